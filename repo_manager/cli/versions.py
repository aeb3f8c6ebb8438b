"""Commands on the versions of a repository: diff, tag, copy, remove, adopt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repo_manager.cli.connection import ConnectionFlags, client_options
from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import DryRun, Output, RuntimeFlags
from repo_manager.cli.repository_options import (
    AnyModelName,
    NamedVersion,
    RepositoryFlag,
    destination_of,
    model_versions,
)
from repo_manager.cli.signing import signing_key
from repo_manager.errors import UsageError
from repo_manager.optional import deferred
from repo_manager.pipeline.adopting import write_configs
from repo_manager.pipeline.status import refuse_while_ready
from repo_manager.report.progress import transfer_progress
from repo_manager.report.repository_tables import config_change_view, difference_view, removals_view
from repo_manager.report.version_tables import load_differences_view
from repo_manager.repository.adopt import adopt
from repo_manager.repository.difference import VersionDifference, compare_versions
from repo_manager.repository.location import Location
from repo_manager.repository.remove import remove
from repo_manager.repository.scan import find_model
from repo_manager.repository.signing import check_served, sign_version
from repo_manager.repository.tags import model_state, remove_tag, resolve_version, set_tag
from repo_manager.repository.transfer import CopyOptions, Transfer, copy_needed, copy_version
from repo_manager.settings import load_settings
from repo_manager.types import extended

if TYPE_CHECKING:
    from repo_manager.loadtest import judge
    from repo_manager.pipeline import load_records
else:
    judge = deferred("repo_manager.loadtest.judge")
    load_records = deferred("repo_manager.pipeline.load_records")

__all__ = ["app"]

app = typer.Typer()


# The `--json` output of commands with more than one result.


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class MeasuredDifference(VersionDifference):
    """The differences between two versions, their load tests included.

    Attributes:
        load_tests: the latest stored load tests of both, compared; `None` if one version has none.
    """

    load_tests: judge.LoadComparison | None


@dataclasses.dataclass(frozen=True)
class Tagging:
    """A tag given or taken away.

    Attributes:
        name: name of the version's model.
        version: the tagged version. With `--delete`, the version without the tag now.
        tag: the tag given, or with `--delete` the tag taken away.
        before: the tag's version before. `None` if it had none.
        applied: whether the repository's record was changed. `False` with `--dry-run`.
    """

    name: str
    version: int
    tag: str
    before: int | None
    applied: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopiedVersion(Transfer):
    """A copied version, and the models copied for it.

    Attributes:
        needed: the parts of an ensemble and the models the code calls, as far as the destination had none.
    """

    needed: tuple[Transfer, ...]


@app.command("diff")
@grouped
def diff_command(
    a: NamedVersion,
    b: NamedVersion,
    everything: Annotated[
        bool, typer.Option("--all", help="Also show every different field of the manifests.")
    ] = False,
    *,
    place: RepositoryFlag,
    output: Output,
) -> None:
    """Show what differs between two versions: precision, sparsity, drift, I/O, configuration, files, load tests."""
    root = place.root()
    versions = [resolve_version(root, each) for each in (a, b)]
    result = compare_versions(*(find_model(root, name).version(version) for name, version in versions))
    measured = _measured(root, versions)
    document = extended(MeasuredDifference, result, load_tests=measured)
    views = [] if measured is None else load_differences_view(measured)
    output.terminal().result(document, *difference_view(result, everything=everything), *views)


def _measured(root: Location, versions: Sequence[tuple[str, int]]) -> judge.LoadComparison | None:
    """Return how the latest kept load tests of two versions differ, or `None` where one has none."""
    tests = [
        [test for test in model_state(root, name).load_tests if test.version == version] for name, version in versions
    ]
    if not all(tests):
        return None
    latest = [load_records.read_kept(name, kept[-1:]) for (name, _), kept in zip(versions, tests, strict=True)]
    return judge.compare_load_tests(*(report for (report,) in latest)) if all(latest) else None


@app.command("tag")
@grouped
def tag_command(
    named_version: NamedVersion,
    tag: Annotated[str, typer.Argument(metavar="TAG", help="A name for the version, e.g. stable.")],
    delete: Annotated[bool, typer.Option("--delete", help="Remove the tag.")] = False,
    *,
    place: RepositoryFlag,
    dry_run: DryRun = False,
    output: Output,
) -> None:
    """Give a version a name. It protects the version from removal, and works in place of the number."""
    root = place.root()
    if delete:
        name = named_version.partition(":")[0]
        version = remove_tag(root, name, tag, dry_run=dry_run)
        text, before = f"{name}: tag {tag} taken from version {version}", version
    else:
        name, version = resolve_version(root, named_version)
        previous = set_tag(root, name, tag, version, dry_run=dry_run)
        text = f"{name}:{version} is tagged {tag}" + (f" (before: version {previous})" if previous else "")
        before = previous or 0
    result = Tagging(name, version, tag, before or None, applied=not dry_run)
    output.terminal().result(result, text + _dry(dry_run))


@dataclasses.dataclass(frozen=True)
class CopyFlags:
    """Where a copy goes."""

    destination: str = option(
        "--into", default=..., metavar="DIR|URL", help="The repository to copy to; or context:NAME."
    )
    as_name: str | None = option(
        "--as", metavar="NAME", sets=(CopyOptions, "target_name"), help="The model's name there [default: the same]."
    )
    keep_number: bool = option(
        "--keep-number/--new-number",
        sets=(CopyOptions, "keep_number"),
        help="same: keep the version's number, or fail if it is taken. next: use the next free number.",
    )
    with_config: bool = option(
        "--with-config",
        sets=(CopyOptions, "with_config"),
        help="Also copy the configuration (instance counts, delays, labels). The version policy there stays.",
    )
    sign: Path | None = option("--sign", metavar="KEY.pem", help="Sign the copy with this key, as `sign` does.")


@app.command("copy")
@app.command("promote")
@grouped
def copy_command(
    named_version: NamedVersion, *, flags: CopyFlags, place: RepositoryFlag, dry_run: DryRun = False, output: Output
) -> None:
    """Copy a version to another repository (staging to production), every byte checked on the way.

    The members of an ensemble, and models a model's code calls (`add --uses`), are copied first if missing.
    """
    key = signing_key(flags.sign)
    root, into = place.root(), destination_of(flags.destination)
    name, version = resolve_version(root, named_version)
    terminal = output.terminal()
    if key is None and (policy := load_settings().signed_by):
        check_served(root, name, [version], policy)
        for each in copy_needed(root, name, into, dry_run=True):
            part, _, number = each.source.rpartition(":")
            check_served(root, part, [int(number)], policy)
    progress = transfer_progress(terminal.progress, 0)
    options = CopyOptions(**settings_of(CopyOptions, flags))
    needed = copy_needed(root, name, into, keep_number=options.keep_number, dry_run=dry_run, progress=progress)
    result = copy_version(root, name, version, into, options, dry_run=dry_run, progress=progress)
    for each in (*needed, result):
        if key is not None and not dry_run:
            signature = sign_version(into, each.name, each.version, key)
            terminal.note(f"{each.name}:{each.version} is signed: {signature.file}")
    if result.left_behind:
        terminal.note(
            f"{result.name} in {into} keeps its own {', '.join(result.left_behind)}; --with-config copies the "
            "configuration, too"
        )
    document = extended(CopiedVersion, result, needed=tuple(needed))
    changes = [] if result.config is None else config_change_view(result.config, shown=False, repository=str(into))
    terminal.result(document, *(_copied(each, into, dry_run) for each in (*needed, result)), *changes)


def _copied(transfer: Transfer, into: Location, dry_run: bool) -> str:
    done = "is there already as" if transfer.identical else "would become" if dry_run else "copied to"
    return f"{transfer.source} {done} {transfer.name}:{transfer.version} in {into}"


@app.command("remove")
@grouped
def remove_command(
    named_version: Annotated[
        str,
        typer.Argument(
            metavar="NAME[:VERSION]",
            help="The version to remove \\[default: the whole model].",
            autocompletion=model_versions,
        ),
    ],
    force: Annotated[
        bool,
        typer.Option("--force", help="Also remove versions now deployed, selected, tagged or a roll-back version."),
    ] = False,
    *,
    place: RepositoryFlag,
    dry_run: DryRun = False,
    output: Output,
) -> None:
    """Remove a version or a model. One in use needs --force. Its number is never used again.

    A version in use is ready on the running `serve`, deployed, selected by the version policy, tagged, the target of a
    roll-back, or needed by an ensemble. A model only added, or undeployed again, can be removed as a whole.
    """
    root = place.root()
    name, separator, _ = named_version.partition(":")
    version = resolve_version(root, named_version)[1] if separator else None
    result = remove(root, name, version, force=force, dry_run=True)
    if not force:
        refuse_while_ready(root, name, version)
    if not dry_run:
        result = remove(root, name, version, force=force)
    output.terminal().result(result, *removals_view([result], dry_run=dry_run))


@dataclasses.dataclass(frozen=True)
class AdoptFlags:
    """Files to write besides manifests."""

    write_config: bool = option(
        "--write-config",
        default=False,
        help="Write the config.pbtxt derived by Triton, if a model has none: computed for ONNX, else fetched from "
        "--to.",
    )
    to: str | None = option(
        "--to", metavar="URL", help="With --write-config: a server with the models loaded, grpc:// or http://."
    )


@app.command("adopt")
@grouped
def adopt_command(
    name: AnyModelName = None,
    *,
    place: RepositoryFlag,
    flags: AdoptFlags,
    _runtime: RuntimeFlags,
    dry_run: DryRun = False,
    output: Output,
    connection: ConnectionFlags,
) -> None:
    """Write manifests for versions without one, so `verify` can check them from now on."""
    if flags.to is not None and not flags.write_config:
        raise UsageError("--to requires --write-config: it names the server to ask")
    lines = []
    if flags.write_config:
        options = client_options(connection, [flags.to] if flags.to else [])
        written = write_configs(place.root(), name, flags.to, options, dry_run=dry_run)
        lines += [f"{change.name}: config.pbtxt written{_dry(dry_run)}\n{change.after}" for change in written]
    result = adopt(place.root(), name, dry_run=dry_run)
    lines += [f"{one.name}:{one.version} adopted ({len(one.manifest.files)} files){_dry(dry_run)}" for one in result]
    document = {"repository": str(place.root()), "adopted": result}
    output.terminal().result(document, *(lines or ["Every version has a manifest."]))


def _dry(dry_run: bool) -> str:
    return " (dry run: nothing was changed)" if dry_run else ""
