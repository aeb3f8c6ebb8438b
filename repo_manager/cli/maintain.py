"""Commands that change a repository: remove, gc, diff, config, tag, labels, copy, adopt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repo_manager.cli.options import DryRun, JsonOutput, ModelName, Quiet, Repository, resolve_repository
from repo_manager.errors import RepositoryError, UsageError

if TYPE_CHECKING:
    from repo_manager.report.terminal import Terminal

__all__ = ["register"]

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
Target = Annotated[str, typer.Argument(metavar="NAME[:VERSION]", help="A number or a tag; without one the newest.")]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    for name, command in (
        ("diff", diff),
        ("config", config_command),
        ("labels", labels_command),
        ("tag", tag_command),
        ("copy", copy_command),
        ("promote", copy_command),
        ("remove", remove_command),
        ("gc", gc_command),
        ("adopt", adopt_command),
    ):
        app.command(name)(command)


def diff(a: Target, b: Target, repository: Repository = None, json: JsonOutput = False, quiet: Quiet = False) -> None:
    """Show what differs between two versions: precision, sparsity, drift, I/O, configuration, files."""
    from repo_manager.report.repository_tables import difference_view
    from repo_manager.repository import compare_versions, find_model, resolve_version

    root = resolve_repository(repository)
    entries = [find_model(root, name).version(version) for name, version in (resolve_version(root, t) for t in (a, b))]
    result = compare_versions(*entries)
    _terminal(json, quiet).result(result, *difference_view(result))


def config_command(
    name: ModelName,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="E.g. instance_group.count=2, dynamic_batching={}"),
    ] = None,
    clear: Annotated[list[str] | None, typer.Option("--clear", metavar="FIELD", help="Remove a field.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="config.pbtxt", help="Replace the whole file by this one.")
    ] = None,
    edit: Annotated[bool, typer.Option("--edit", help="Change the file in $VISUAL or $EDITOR.")] = False,
    repository: Repository = None,
    dry_run: DryRun = False,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Show a model's config.pbtxt, or change it: checked first, with the reload that it would cause."""
    from repo_manager.cli.editor import edited
    from repo_manager.report.repository_tables import config_change_view
    from repo_manager.repository import change_config, edit_config

    root = resolve_repository(repository)
    changes: dict[str, str | None] = dict.fromkeys(clear or [])
    for text in set_ or []:
        field, separator, value = text.partition("=")
        if not separator or not field:
            raise UsageError(f"--set {text}: expected FIELD=VALUE, for instance max_batch_size=16")
        changes[field] = value
    if sum((file is not None, bool(changes), edit)) > 1:
        raise UsageError("--file and --edit replace the whole configuration; they go alone, without --set and --clear")
    if edit:
        before = change_config(root, name, {}, dry_run=True).before
        with edited(before, name="config.pbtxt") as text:
            if change_config(root, name, {}, dry_run=True).before != before:
                raise RepositoryError(f"config.pbtxt of {name} was changed by somebody else meanwhile")
            result = edit_config(root, name, text, dry_run=dry_run)
    elif file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise UsageError(f"--file {file}: it cannot be read: {exc}") from exc
        result = edit_config(root, name, text, dry_run=dry_run)
    else:
        result = change_config(root, name, changes, dry_run=dry_run or not changes)
    _terminal(json, quiet).result(result, *config_change_view(result, shown=not (changes or file or edit)))


def labels_command(
    name: ModelName,
    output: Annotated[str | None, typer.Option("--output", metavar="OUTPUT", help="The output to label.")] = None,
    file: Annotated[Path | None, typer.Option("--file", metavar="FILE", help="One label a line.")] = None,
    repository: Repository = None,
    dry_run: DryRun = False,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Show a model's class labels, or set those of one output for all its versions."""
    from repo_manager.cli.model import read_labels_file
    from repo_manager.report.repository_tables import label_change_view, labels_view
    from repo_manager.repository import read_labels, set_labels

    root = resolve_repository(repository)
    if output is None and file is None:
        labels = read_labels(root, name)
        _terminal(json, quiet).result(labels, *labels_view(labels))
        return
    if output is None or file is None:
        raise UsageError("labels: --output and --file belong together")
    result = set_labels(root, name, output, read_labels_file(file), dry_run=dry_run)
    _terminal(json, quiet).result(result, *label_change_view(result))


def tag_command(
    target: Target,
    tag: Annotated[str, typer.Argument(metavar="TAG", help="A name for the version, e.g. stable.")],
    delete: Annotated[bool, typer.Option("--delete", help="Take the tag away.")] = False,
    repository: Repository = None,
    dry_run: DryRun = False,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Give a version a name that protects it from clean-up and can stand for its number."""
    from repo_manager.repository import remove_tag, resolve_version, set_tag

    root = resolve_repository(repository)
    if delete:
        name = target.partition(":")[0]
        version = remove_tag(root, name, tag, dry_run=dry_run)
        text, before = f"{name}: tag {tag} taken from version {version}", version
    else:
        name, version = resolve_version(root, target)
        previous = set_tag(root, name, tag, version, dry_run=dry_run)
        text = f"{name}:{version} is tagged {tag}" + (f" (before: version {previous})" if previous else "")
        before = previous or 0
    result = {"name": name, "version": version, "tag": tag, "before": before or None, "applied": not dry_run}
    _terminal(json, quiet).result(result, text + _dry(dry_run))


def copy_command(
    target: Target,
    destination: Annotated[str, typer.Option("--into", metavar="DIR|URL", help="The repository to copy to.")],
    as_name: Annotated[str | None, typer.Option("--as", metavar="NAME", help="Another name there.")] = None,
    sign: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY.pem", help="Sign the copy with this key, as `sign` does.")
    ] = None,
    repository: Repository = None,
    dry_run: DryRun = False,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Copy a version to another repository (staging to production), every byte checked on the way."""
    from repo_manager.cli.sign import signing_key
    from repo_manager.report.transfer_progress import transfer_progress
    from repo_manager.repository import copy_version, parse_location, resolve_version, sign_version

    key = signing_key(sign)
    root, into = resolve_repository(repository), parse_location(destination)
    name, version = resolve_version(root, target)
    terminal = _terminal(json, quiet)
    progress = transfer_progress(terminal.progress, 0)
    result = copy_version(root, name, version, into, target_name=as_name, dry_run=dry_run, progress=progress)
    if key is not None and not dry_run:
        signature = sign_version(into, result.name, result.version, key)
        terminal.note(f"{result.name}:{result.version} is signed: {signature.file}")
    done = "is there already as" if result.identical else "would become" if dry_run else "copied to"
    terminal.result(result, f"{result.source} {done} {result.name}:{result.version} in {into}")


def remove_command(
    target: Annotated[str, typer.Argument(metavar="NAME[:VERSION]", help="Without a version: the whole model.")],
    force: Annotated[bool, typer.Option("--force", help="Also what is served, tagged or a roll-back target.")] = False,
    repository: Repository = None,
    dry_run: DryRun = False,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Remove a version or a model; never one that is in use unless told. Its number is not given out again."""
    from repo_manager.report.repository_tables import removals_view
    from repo_manager.repository import remove, resolve_version

    root = resolve_repository(repository)
    name, separator, _ = target.partition(":")
    version = resolve_version(root, target)[1] if separator else None
    result = remove(root, name, version, force=force, dry_run=dry_run)
    _terminal(json, quiet).result(result, *removals_view([result], dry_run=dry_run))


def gc_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One model [default: all].")] = None,
    keep: Annotated[int, typer.Option("--keep", min=1, help="How many of the newest versions stay.")] = 3,
    older_than: Annotated[str | None, typer.Option("--older-than", metavar="AGE", help="E.g. 30d, 12h.")] = None,
    repository: Repository = None,
    dry_run: DryRun = False,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Remove old versions. What is served, tagged, or a roll-back target stays."""
    from repo_manager.report.repository_tables import removals_view
    from repo_manager.repository import gc

    root = resolve_repository(repository)
    age_s = None if older_than is None else parse_age(older_than)
    result = gc(root, name, keep=keep, older_than_s=age_s, dry_run=dry_run)
    terminal = _terminal(json, quiet)
    for failure in result.failed:
        terminal.warn(f"{failure} (nothing of this model was removed)")
    terminal.result(result, *removals_view(result.removals, dry_run=dry_run))
    if result.failed:
        raise typer.Exit(RepositoryError.exit_code)


def adopt_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One model [default: all].")] = None,
    repository: Repository = None,
    dry_run: DryRun = False,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Write manifests for versions that came without one, so that `verify` can check them from now on."""
    from repo_manager.repository import adopt

    result = adopt(resolve_repository(repository), name, dry_run=dry_run)
    lines = [f"{one.name}:{one.version} adopted ({len(one.manifest.files)} files){_dry(dry_run)}" for one in result]
    _terminal(json, quiet).result(result, *(lines or ["Every version has a manifest."]))


def parse_age(text: str) -> float:
    """Return an age in seconds.

    Raises:
        UsageError: it is no number with one of the units s, m, h, d, w.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if match is None:
        raise UsageError(f"--older-than {text}: expected a number and a unit, for instance 30d or 12h")
    return float(match[1]) * _SECONDS[match[2]]


def _dry(dry_run: bool) -> str:
    return " (dry run: nothing was changed)" if dry_run else ""


def _terminal(json: bool, quiet: bool) -> Terminal:
    from repo_manager.report.terminal import Terminal

    return Terminal(as_json=json, quiet=quiet)
