"""Commands for a look at a repository: list, show, history."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from repo_manager.cli.option_groups import grouped
from repo_manager.cli.options import Output
from repo_manager.cli.repository_options import ModelName, RepositoryFlag, model_versions
from repo_manager.errors import RepositoryError, StoreUnreachableError, UsageError
from repo_manager.report.repository_tables import model_view, models_view
from repo_manager.report.version_tables import history_view, kept_tests_view, version_view
from repo_manager.repository.scan import ModelEntry, VersionEntry, find_model, scan
from repo_manager.repository.state import ModelState, RolloutRecord, current_version, history_of
from repo_manager.repository.tags import model_state, model_states, resolve_version
from repo_manager.types import extended

__all__ = ["app"]

app = typer.Typer()


# The `--json` output of commands with more than one result.


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class ListedModel(ModelEntry):
    """A model of a repository, with its record.

    Attributes:
        tags: tag -> version. Empty, too, if the repository's record is damaged.
        deployed: the version of the last successful roll-out; `None` if there was none.
    """

    tags: Mapping[str, int]
    deployed: int | None


@dataclasses.dataclass(frozen=True)
class ModelListing:
    """The models of a repository.

    Attributes:
        repository: its folder as the option or the settings name it, or its URL.
        models: all models by name, those with problems as well.
    """

    repository: str
    models: tuple[ListedModel, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownVersion(VersionEntry):
    """One version of a model, with its record.

    Attributes:
        name: name of its model, without the version.
        tags: the tags of this version, by name.
        selected: whether the version policy selects it.
        deployed: whether the last successful roll-out was of this version.
        load_tests: its reports stored by `loadtest --keep`, the latest last.
    """

    name: str
    tags: tuple[str, ...]
    selected: bool
    deployed: bool
    load_tests: tuple[Mapping[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class History:
    """The roll-outs and load tests of a model.

    Attributes:
        repository: its folder as the option or the settings name it, or its URL.
        model: name of the model. Its versions are in the records.
        rollouts: the latest last, at most 100.
        load_tests: the reports stored by `loadtest --keep`, the latest last.
    """

    repository: str
    model: str
    rollouts: tuple[RolloutRecord, ...]
    load_tests: tuple[Mapping[str, Any], ...]


@app.command("list")
@grouped
def list_command(place: RepositoryFlag, output: Output) -> None:
    """List the models of a repository: published versions, those the version policy selects, tags, backend.

    `status` shows the ready versions of a server.
    """
    root, terminal = place.root(), output.terminal()
    models = scan(root, deep=False)
    try:
        states = model_states(root)
    except StoreUnreachableError:
        raise
    except RepositoryError as exc:
        terminal.warn(exc.message)
        states = {}
    known = {model.name: states.get(model.name, ModelState()) for model in models}
    listed = (
        extended(ListedModel, each, tags=known[each.name].tags, deployed=current_version(known[each.name]))
        for each in (models if output.json else ())
    )
    views = [] if output.json else models_view(root, models, states)
    terminal.result(ModelListing(str(root), tuple(listed)), *views)


@app.command("show")
@grouped
def show_command(
    named_version: Annotated[
        str,
        typer.Argument(
            metavar="NAME[:VERSION]",
            help="A model; or one version of it, by number or tag.",
            show_default=False,
            autocompletion=model_versions,
        ),
    ],
    place: RepositoryFlag,
    output: Output,
) -> None:
    """Show one model: its versions, the source of each, and the version policy's selection.

    NAME:VERSION shows one version: state, source, checks, files.
    """
    root, terminal = place.root(), output.terminal()
    name, separator, _ = named_version.partition(":")
    model, state = find_model(root, name), model_state(root, name)
    if not separator:
        terminal.result({"model": model, "state": state}, *model_view(model, state))
        return
    version = model.version(resolve_version(root, named_version)[1])
    document = extended(
        ShownVersion,
        version,
        name=name,
        tags=tuple(sorted(tag for tag, number in state.tags.items() if number == version.version)),
        selected=version.version in model.selected,
        deployed=current_version(state) == version.version,
        load_tests=tuple(test.report for test in state.load_tests if test.version == version.version),
    )
    terminal.result(document, *([] if output.json else version_view(model, version, state)))


@app.command("history")
@grouped
def history_command(name: ModelName, place: RepositoryFlag, output: Output) -> None:
    """Show a model's roll-outs: when, what, by whom, where to, and how each ended. The last 100 are kept.

    Load tests of `loadtest --keep` follow: of each version the latest five.
    """
    root = place.root()
    model, _, version = name.partition(":")
    if version:
        hint = f"It shows every version: repo-manager history {model}"
        raise UsageError(f"{name}: expected a model's name", hint=hint)
    find_model(root, name)
    state = model_state(root, name)
    records = history_of(state)
    document = History(str(root), name, records, tuple(test.report for test in state.load_tests))
    output.terminal().result(document, *history_view(name, records), *kept_tests_view(state.load_tests))
