"""The table of commands: where each one is, and its line in `--help`.

A command's module is imported when the command runs, so `--help` and the shell's completion of command names import
none. This table is the only place with a module's name as a string. In the modules, imports are at the top.
"""

from __future__ import annotations

import functools
import gc
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["COMMANDS", "CommandEntry", "CommandTable"]


class CommandEntry(NamedTuple):
    """Place of a command: a module of this package, whose `app` has a command of the name, and its one-line help."""

    module: str
    help: str


COMMANDS: dict[str, dict[str, CommandEntry]] = {
    "Start": {
        "quickstart": CommandEntry("start", "Run every step with the sample model on this machine."),
        "doctor": CommandEntry("start", "Show this machine's equipment, and the engines it will load."),
    },
    "Model": {
        "inspect": CommandEntry("inspection", "Show a model's inputs, outputs and 2:4 sparsity."),
        "prune": CommandEntry("conversion", "Prune weights to 2:4, without retraining."),
        "calibrate": CommandEntry("calibrate", "Make calibration data from images or requests."),
        "convert": CommandEntry("conversion", "Convert a model to another precision, checked."),
    },
    "Repository": {
        "add": CommandEntry("add", "Convert, check and publish a model as a new version."),
        "ensemble": CommandEntry("add", "Join published models into an ensemble, checked and recorded."),
        "list": CommandEntry("repository", "List the models of a repository."),
        "show": CommandEntry("repository", "Show one model, or one version of it."),
        "history": CommandEntry("repository", "Show a model's roll-outs, and how each ended."),
        "report": CommandEntry("report", "Write a version's card, as HTML or Markdown."),
        "verify": CommandEntry("verify", "Check a repository: files, configurations, signatures."),
        "diff": CommandEntry("versions", "Show the differences between two versions."),
        "config": CommandEntry("config", "Show or change a model's config.pbtxt."),
        "labels": CommandEntry("config", "Show or set a model's class labels."),
        "tag": CommandEntry("versions", "Give a version a name, and so protect it."),
        "copy": CommandEntry("versions", "Copy a version to another repository."),
        "promote": CommandEntry("versions", "Alias of copy."),
        "remove": CommandEntry("versions", "Remove a version or a model."),
        "gc": CommandEntry("snapshot", "Remove old versions, or snapshots, not in use."),
        "adopt": CommandEntry("versions", "Write manifests for versions without one."),
        "sign": CommandEntry("signing", "Sign a version in the OpenSSF model-signing format."),
        "apply": CommandEntry("apply", "Bring a repository and servers to a declared state."),
        "export": CommandEntry("apply", "Write a repository as the YAML file for apply."),
        "snapshot": CommandEntry("snapshot", "Freeze the versions for pods; pin them for Argo CD or Flux."),
        "fetch": CommandEntry("snapshot", "Copy a snapshot to this machine and check it (for pods)."),
    },
    "Serve": {
        "serve": CommandEntry("serve", "Run the embedded Triton on a repository."),
        "deploy": CommandEntry("rollout", "Serve a version, proven by an inference, or undo."),
        "rollback": CommandEntry("rollout", "Go back to the version deployed before."),
        "undeploy": CommandEntry("rollout", "Take a model or a version out of service."),
        "traffic": CommandEntry("traffic", "Share a gateway's traffic between two releases."),
        "status": CommandEntry("status", "Show the served versions, and differences from the repository."),
        "infer": CommandEntry("infer", "Send requests to a served model and show its answers."),
        "logs": CommandEntry("serve", "Show the log of the embedded server."),
    },
    "Measure": {
        "loadtest": CommandEntry("loadtest", "Measure a served model. Gates decide the exit code."),
        "compare": CommandEntry("compare", "Compare two served models by paired blocks."),
        "tune": CommandEntry("tune", "Find a better configuration, and prove it."),
    },
}
"""Group of the help -> name of a command -> where it is, in the order of the help."""


def take_plain_values(command: Any, parameters: list[Any]) -> list[Any]:
    """Skip the conversion of parameters without a need: absent ones, texts and paths.

    Some versions of Typer convert every value by pydantic, even an absent one. Its import would take a fifth of the
    time of a short command.
    """
    hints = inspect.signature(command.callback).parameters if command.callback is not None else {}
    for parameter in parameters:
        if not isinstance(parameter.process_value, functools.partial):
            hint = hints[parameter.name].annotation if parameter.name in hints else None
            parameter.process_value = functools.partial(_process, parameter, parameter.process_value, hint)
    return parameters


def _process(parameter: Any, convert: Callable[[Any, Any], Any], hint: Any, ctx: Any, value: Any) -> Any:
    """Return a parameter's value, converted by Typer only where needed."""
    if value is None and not parameter.required:
        taken: object = None
    elif isinstance(value, int | float) and not isinstance(value, bool) and value is parameter.default:
        taken = value
    elif (kind := _plain_kind(hint, value)) is None:
        return convert(ctx, value)
    elif isinstance(value, str):
        taken = kind(value)
    else:
        taken = [kind(each) for each in value]
    return taken if parameter.callback is None else parameter.callback(ctx, parameter, taken)


def _plain_kind(hint: Any, value: Any) -> type[str] | type[Path] | None:
    """Return the value of a text, or of each of several, or `None` if Typer must convert or refuse it."""
    base = get_args(hint)[0] if get_origin(hint) is Annotated else None
    kinds = {*get_args(base)} - {NoneType} if get_origin(base) in (Union, UnionType) else {base}
    kind, is_several = kinds.pop(), isinstance(value, list | tuple)
    if is_several and get_origin(kind) is list:
        (kind,) = get_args(kind)
    elif is_several:
        return None
    texts = value if is_several else (value,)
    if kinds or not texts or not all(text and isinstance(text, str) for text in texts):
        return None
    if get_origin(kind) is Literal:
        return str if all(text in get_args(kind) for text in texts) else None
    return kind if kind in (str, Path) else None


class CommandTable(TyperGroup):
    """The root command: lists the table, and imports the one command to run."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self._is_listing = False
        self._rows: dict[str, CommandEntry] = {}
        for group, entries in COMMANDS.items():
            self._rows.update(entries)
            for name, entry in entries.items():
                line = TyperCommand(name, help=entry.help, short_help=entry.help, rich_help_panel=group)
                self.commands.setdefault(name, line)
        self._lines = dict(self.commands)

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the table's order."""
        return list(self._rows)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, imported. While commands are listed, its line of the table."""
        entry = self._rows.get(cmd_name)
        if entry is None:
            return None
        if self._is_listing:
            return self._lines[cmd_name]
        if self.commands[cmd_name] is self._lines[cmd_name]:
            module = importlib.import_module(f"repo_manager.cli.{entry.module}")
            command: Any = typer.main.get_group(module.app).commands[cmd_name]
            parameters_of = command.get_params
            command.get_params = lambda context: take_plain_values(command, parameters_of(context))
            self.commands[cmd_name] = command
            gc.freeze()  # exempts the imported objects from garbage collection
            gc.enable()
        return self.commands[cmd_name]

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options before the command's name."""
        return take_plain_values(self, super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help. No command is imported for it."""
        with self._listing():
            super().format_help(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Complete a command's name. No command is imported for it."""
        with self._listing():
            return super().shell_complete(ctx, incomplete)

    @contextmanager
    def _listing(self) -> Iterator[None]:
        self._is_listing = True
        try:
            yield
        finally:
            self._is_listing = False
