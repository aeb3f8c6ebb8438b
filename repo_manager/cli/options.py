"""Options shared by several commands, for models, repositories and servers alike."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from repo_manager.cli.contexts import chosen_context, context_taken
from repo_manager.cli.durations import seconds_option
from repo_manager.cli.option_groups import option, settings_of
from repo_manager.errors import InputError, UsageError
from repo_manager.files import reason_of
from repo_manager.onnx_model.runtime import RuntimeLimits, runtime_limits
from repo_manager.report.terminal import Terminal

__all__ = [
    "DryRun",
    "ModelFile",
    "Output",
    "RuntimeFlags",
    "check_input",
    "check_keys",
    "check_outputs",
    "parse_changes",
    "parse_named_version",
    "parse_pairs",
    "parse_shapes",
    "read_labels_file",
    "writing",
]


DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the planned changes without making them.")]
ModelFile = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="An ONNX file.", show_default=False)]


@dataclasses.dataclass(frozen=True)
class Output:
    """Form and place of a command's output."""

    PANEL: ClassVar[str] = "Output"
    json: bool = option("--json", default=False, help="Print the result as JSON on stdout.")
    quiet: bool = option("--quiet", "-q", default=False, help="No progress and no notes.")
    wide: bool = option("--wide", default=False, help="Show tables with every column and full times, at any width.")
    context: str | None = option(
        "--context",
        metavar="NAME",
        callback=chosen_context,
        help="Context of the settings: its repository and servers. none: use no context.",
    )

    def terminal(self) -> Terminal:
        """Return the terminal for the output."""
        taken = context_taken()
        label = None if taken is None else f"{taken.name} (protected)" if taken.protected else taken.name
        return Terminal(as_json=self.json, quiet=self.quiet, wide=self.wide, context=label)


@dataclasses.dataclass(frozen=True)
class RuntimeFlags:
    """Limits of a model while ONNX Runtime loads or runs it here."""

    PANEL: ClassVar[str] = "Running the model here"
    timeout: float = seconds_option(
        "--timeout",
        sets=(RuntimeLimits, "timeout_s"),
        help="How long ONNX Runtime may take for one load or one run of the model.",
    )
    memory: float | None = option(
        "--memory",
        metavar="GIB",
        sets=(RuntimeLimits, "memory_bytes"),
        read=lambda gib: int(gib * 2**30),
        min=0.01,
        help="How much memory ONNX Runtime may take [default: three quarters of the free memory].",
    )

    def during(self) -> contextlib.AbstractContextManager[None]:
        """Let the limits hold while the command runs."""
        return runtime_limits(RuntimeLimits(**settings_of(RuntimeLimits, self)))

    def given(self) -> tuple[str, ...]:
        """Return the options with another value than their default."""
        usual = RuntimeFlags()
        return tuple(
            f"--{field.name}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(usual, field.name)
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the disk's refusal to write `path` into an error with its name.

    Raises:
        InputError: the folder is missing or not writable, the disk is full, ...
    """
    try:
        yield
    except OSError as exc:
        raise InputError(
            f"{path}: cannot be written: {exc.strerror or exc}",
            hint="Check the folder, its permissions and free space.",
        ) from exc


def check_outputs(*paths: Path | None) -> None:
    """Check whether files can be written, before work whose result would be lost.

    Args:
        paths: files to be written at the end. `None` is left out.

    Raises:
        InputError: a path is a folder, or its own folder is missing or cannot be written.
    """
    for path in paths:
        if path is None or (path.exists() and not path.is_file() and not path.is_dir()):
            continue  # a pipe or a device cannot be created
        folder = path.absolute().parent
        if path.is_dir():
            reason, hint = "it is a folder", f"Name a file: {path / 'FILE'}"
        elif not folder.is_dir():
            reason, hint = f"the folder {folder} does not exist", f"Create it: mkdir -p {shlex.quote(str(folder))}"
        elif not os.access(folder, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
            reason, hint = "permission denied", "Check who owns the file and its folder."
        else:
            continue
        raise InputError(f"{path} cannot be written: {reason}. Nothing was done.", hint=hint)


def check_input(path: Path | None) -> None:
    """Check whether a file exists, before a server is contacted.

    Args:
        path: a file or folder. It must exist, and is not opened. `None`: nothing to check.

    Raises:
        InputError: it is not.
    """
    if path is not None and not path.exists():
        raise InputError(f"{path} does not exist")


def check_keys(paths: Sequence[Path] | None) -> None:
    """Check whether the key files exist, before any work with them.

    Args:
        paths: public keys and certificates. `None`: nothing to check.

    Raises:
        UsageError: one is not.
    """
    for path in paths or ():
        if not path.is_file():
            raise UsageError(f"{path} is not a key file", hint="The path does not exist, or is not a file.")


def parse_pairs(texts: list[str], name: str) -> dict[str, str]:
    """Read KEY=VALUE options.

    Raises:
        UsageError: one has another form.
    """
    pairs = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise UsageError(f"{name} {text}: expected KEY=VALUE")
        pairs[key] = value
    return pairs


def parse_shapes(texts: list[str] | None) -> dict[str, tuple[int, ...]]:
    """Read `--shape NAME:2,3,224,224` options.

    Args:
        texts: values of the option. `None`: no shape was given.

    Raises:
        UsageError: a text has another form, or a size below 0.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts or []:
        name, separator, sizes = text.rpartition(":")
        try:
            shape = tuple(int(size) for size in sizes.replace("x", ",").split(",") if size)
        except ValueError:
            shape = (-1,)
        if not separator or not name or any(size < 0 for size in shape):
            raise UsageError(f"--shape {text}: expected NAME:SIZE,SIZE,... for instance image:1,3,224,224")
        shapes[name] = shape
    return shapes


def parse_changes(texts: list[str]) -> dict[str, str]:
    """Read `--set FIELD=VALUE` options. Return field of config.pbtxt -> value.

    Raises:
        UsageError: a text has another form.
    """
    changes: dict[str, str] = {}
    for text in texts:
        field, separator, value = text.partition("=")
        if not separator or not field:
            raise UsageError(f"--set {text}: expected FIELD=VALUE, for instance max_batch_size=16")
        changes[field] = value
    return changes


def parse_named_version(text: str) -> tuple[str, int | None]:
    """Read `NAME` or `NAME:VERSION`.

    Raises:
        UsageError: the version is not a positive number.
    """
    name, separator, version = text.partition(":")
    if not separator:
        return name, None
    if not version.isdecimal() or int(version) < 1:
        raise UsageError(f"{text}: expected NAME or NAME:VERSION with a version of 1 or more, found {version!r}")
    return name, int(version)


# Files with one class label a line, for `add --labels` and `labels --file`.


def read_labels_file(path: Path) -> tuple[str, ...]:
    """Read class labels, one per line. Empty lines do not count.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path}: the labels cannot be read: {reason_of(exc)}") from exc
    return tuple(line.strip() for line in lines if line.strip())
