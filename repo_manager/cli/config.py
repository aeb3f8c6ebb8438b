"""Commands on a model's configuration: config, labels."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import typer

from repo_manager.cli.option_groups import grouped, option
from repo_manager.cli.options import DryRun, Output, parse_changes, read_labels_file
from repo_manager.cli.repository_options import ModelName, RepositoryFlag
from repo_manager.errors import InputError, UsageError
from repo_manager.files import reason_of
from repo_manager.report.repository_tables import config_change_view, label_change_view, labels_view
from repo_manager.repository.configuration import change_config, edit_config
from repo_manager.repository.location import Location
from repo_manager.repository.plan.configuration import ConfigChange
from repo_manager.repository.relabel import read_labels, set_labels

__all__ = ["app", "edited"]


# The user's editor, for `config --edit`.


@contextlib.contextmanager
def edited(text: str, *, name: str) -> Iterator[str]:
    """Let a person edit a text in `$VISUAL`, `$EDITOR` or vi.

    If the block refuses the text, it is kept, and the error says where.

    Args:
        text: the text at the start, written to a temporary file as UTF-8.
        name: the file's name in the editor. Its ending tells the editor the language.

    Raises:
        UsageError: the editor cannot be started, or it ended with an error. Nothing of the text is used then.
    """
    folder = Path(tempfile.mkdtemp(prefix="repo-manager-edit-"))
    file = folder / name
    file.write_text(text, encoding="utf-8")
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        status = subprocess.run([*shlex.split(command), str(file)], check=False).returncode
    except (OSError, ValueError) as exc:
        _discard(file)
        raise UsageError(
            f"The editor {command!r} cannot be started: {reason_of(exc)}", hint="Set $EDITOR, or use --file."
        ) from exc
    if status != 0:
        _discard(file)
        raise UsageError(f"The editor {command!r} ended with status {status}; nothing was changed")
    try:
        yield file.read_text(encoding="utf-8")
    except (InputError, UnicodeDecodeError) as exc:
        message = exc.message if isinstance(exc, InputError) else f"{name} is not UTF-8 text: {exc}"
        raise (type(exc) if isinstance(exc, InputError) else InputError)(
            f"{message}\nYour text is kept in {file}",
            hint=f"Correct it there, then run: repo-manager config NAME --file {file}",
        ) from exc
    _discard(file)


def _discard(file: Path) -> None:
    file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the editor may have left another file in the folder
        file.parent.rmdir()


app = typer.Typer()


@dataclasses.dataclass(frozen=True)
class ConfigFlags:
    """The change. Without any option the file is shown."""

    set_: list[str] | None = option(
        "--set",
        metavar="FIELD=VALUE",
        help="Set a field, such as instance_group.count=2 or dynamic_batching={} (may be given often).",
    )
    clear: list[str] | None = option("--clear", metavar="FIELD", help="Remove a field (may be given often).")
    file: Path | None = option("--file", metavar="config.pbtxt", help="Replace the whole file with this one.")
    edit: bool = option("--edit", default=False, help="Change the file in $VISUAL or $EDITOR.")

    def changes(self) -> dict[str, str | None]:
        """Return field -> value, `None` for one to remove.

        Raises:
            UsageError: a text has another form, or the whole file is replaced, too.
        """
        changes: dict[str, str | None] = dict.fromkeys(self.clear or [])
        changes |= parse_changes(self.set_ or [])
        if sum((self.file is not None, bool(changes), self.edit)) > 1:
            raise UsageError(
                "--file and --edit replace the whole configuration; use only one of them, without --set and --clear"
            )
        return changes


@app.command("config")
@grouped
def config_command(
    name: ModelName, *, flags: ConfigFlags, place: RepositoryFlag, dry_run: DryRun = False, output: Output
) -> None:
    """Show a model's config.pbtxt, or change it: checked first, and with the reload it causes."""
    root, changes = place.root(), flags.changes()
    if flags.edit:
        result = _edit(root, name, dry_run=dry_run)
    elif flags.file is not None:
        try:
            text = flags.file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise UsageError(f"--file {flags.file}: it cannot be read: {reason_of(exc)}") from exc
        result = edit_config(root, name, text, dry_run=dry_run)
    else:
        result = change_config(root, name, changes, dry_run=dry_run or not changes)
    is_shown = not (changes or flags.file or flags.edit)
    output.terminal().result(result, *config_change_view(result, shown=is_shown, repository=place.repository))


def _edit(root: Location, name: str, *, dry_run: bool) -> ConfigChange:
    before = change_config(root, name, {}, dry_run=True).before
    with edited(before, name="config.pbtxt") as text:
        return edit_config(root, name, text, based_on=before, dry_run=dry_run)


@dataclasses.dataclass(frozen=True)
class LabelFlags:
    """The labels to set. Without any option the labels are shown."""

    target: str | None = option("--output", metavar="OUTPUT", help="The output to label.")
    file: Path | None = option("--file", metavar="FILE", help="A file with one label per line.")


@app.command("labels")
@grouped
def labels_command(
    name: ModelName, *, flags: LabelFlags, place: RepositoryFlag, dry_run: DryRun = False, output: Output
) -> None:
    """Show a model's class labels, or set those of one output for all its versions."""
    root = place.root()
    if flags.target is None and flags.file is None:
        labels = read_labels(root, name)
        output.terminal().result(labels, *labels_view(labels))
        return
    if flags.target is None or flags.file is None:
        raise UsageError("labels: --output and --file belong together")
    result = set_labels(root, name, flags.target, read_labels_file(flags.file), dry_run=dry_run)
    output.terminal().result(result, *label_change_view(result))
