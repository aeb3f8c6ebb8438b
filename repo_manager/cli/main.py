"""The entry point: runs the command table, and turns our errors into documented exit codes."""

from __future__ import annotations

import dataclasses
import errno
import io
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any

import typer

from repo_manager import __version__
from repo_manager.cli.commands import CommandTable
from repo_manager.errors import InputError, RepoManagerError
from repo_manager.report.terminal import Terminal, error_document

__all__ = ["RENAMED", "Renamed", "app", "current_words", "main"]

_HELP = """
From a sparse (2:4) ONNX model to a proven, load-tested, reversible Triton deployment.

Start with `repo-manager quickstart`: it runs every step with a sample model on this machine.
"""
_EXIT_CODES = """
Exit codes: 0 done. 1 unexpected. 2 usage. 3 bad input. 4 a gate failed. 5 server or store unreachable or
busy, refused, or a roll-out undone. 6 inconclusive. 7 a roll-back failed, act by hand.
8 --check found changes to make. 130 interrupted.
"""

app = typer.Typer(
    cls=CommandTable,
    name="repo-manager",
    help=_HELP,
    epilog=_EXIT_CODES.strip().replace("\n", " "),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"repo-manager {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Hold the options before a command."""


_signals: list[int] = []


def _interrupt(number: int, _frame: FrameType | None) -> None:
    """Treat SIGTERM as Ctrl-C: roll-outs are undone, servers stopped, temporary files removed."""
    _signals.append(number)
    raise KeyboardInterrupt


# Click's base error class. It comes from `click` or from Typer's own copy, depending on Typer's version.
_CLICK_ERROR: Any = typer.BadParameter.__mro__[2]


# Errors of the machine, possible in every command. They are not bugs, so no traceback is shown.
_SURROUNDINGS = {
    errno.ENOSPC: "Make room on the disk, or set TMPDIR or XDG_CACHE_HOME to a folder on another one.",
    errno.EDQUOT: "Make room, or set TMPDIR to a folder on another disk.",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f).",
    errno.EROFS: "The file system is read-only: set TMPDIR and XDG_CACHE_HOME to writable folders.",
    errno.EACCES: "Run it as the owner, or ask the owner for the permission.",
    errno.EPERM: "Run it as the owner, or ask the owner for the permission.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n).",
    errno.ENFILE: "This machine has too many open files.",
    errno.EIO: "The disk or the server of the file system fails. Read the system's log.",
    errno.ESTALE: "The server of the file system has lost it: mount it again.",
    errno.ELOOP: "Its symbolic links lead in a circle.",
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.ENOTDIR: "A file is in the place of a folder.",
    errno.EISDIR: "A folder is in the place of a file.",
}


@dataclasses.dataclass(frozen=True)
class Renamed:
    """A renamed option, working under its old name for a while (docs/deprecation.md).

    Attributes:
        command: the command with the option.
        old: the old name, of an option without a value.
        new: the words that replace it.
        since: the release that renamed it.
        removed_in: the first release without the old name, two minor releases later at the earliest.
    """

    command: str
    old: str
    new: tuple[str, ...]
    since: str
    removed_in: str


RENAMED = (Renamed("loadtest", "--until-saturation", ("--until", "saturation"), since="0.1.0", removed_in="0.3.0"),)


def current_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with the present names of its options; an old name causes a warning."""
    end = words.index("--") if "--" in words else len(words)
    found: list[str] = []
    for index, word in enumerate(words):
        renamed = [each for each in RENAMED if index < end and words[0] == each.command and word == each.old]
        for each in renamed:
            text = f"{each.old} is deprecated since {each.since}, and {each.removed_in} removes it."
            Terminal().warn(f"{text} Use {' '.join(each.new)}.")
        found += renamed[0].new if renamed else [word]
    return found


# Pydantic's wording, shown by some versions of Typer.
_PLAIN_WORDS = (
    (r"Value error, ", ""),
    (r"Input should be greater than or equal to (\S+)", r"expected \1 or more"),
    (r"Input should be less than or equal to (\S+)", r"expected \1 or less"),
    (r"Input should be a valid integer.*", "expected a whole number"),
    (r"Input should be a valid number.*", "expected a number"),
)


def _in_plain_words(message: str) -> str:
    for pattern, plain in _PLAIN_WORDS:
        message = re.sub(pattern, plain, message)
    return message


_PLACES = {"-r": "-r", "--repository": "-r", "--context": "--context"}


def _with_place(hint: str, words: Sequence[str]) -> str:
    """Return a hint whose commands name the repository or the context that the user's command names."""
    place = ""
    for number, word in enumerate(words):
        option, mark, value = word.partition("=")
        if option in _PLACES and (mark or number + 1 < len(words)):
            place = f" {_PLACES[option]} {shlex.quote(value if mark else words[number + 1])}"
            break
    if not place or any(re.search(rf"(^| ){option}[ =]", hint) for option in _PLACES):
        return hint
    table: Any = typer.main.get_command(app)

    def completed(found: re.Match[str]) -> str:
        command = table.get_command(None, found[1])
        options = () if command is None else [option for each in command.params for option in each.opts]
        return found[0] + (place if place.split()[0] in options else "")

    return re.sub(r"\brepo-manager ([a-z]+)\b", completed, hint)


def main() -> None:
    """Run the command line. Only this function turns an error into an exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may have characters outside the user's encoding
    try:
        code = app(current_words(sys.argv[1:]), prog_name="repo-manager", standalone_mode=False)
    except _CLICK_ERROR as error:
        error.message = _in_plain_words(error.message)
        error.show()
        if "--json" in sys.argv:
            sys.stdout.write(error_document("UsageError", error.format_message(), None, error.exit_code))
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.stderr.write("Aborted.\n")
        sys.exit(1)
    except RepoManagerError as error:
        if error.hint is not None:
            error.hint = _with_place(error.hint, sys.argv[1:])
        Terminal(as_json="--json" in sys.argv).error(error)
        sys.exit(error.exit_code)
    except ImportError:
        # A C extension replaces a KeyboardInterrupt raised during its import by an ImportError.
        if not _signals:
            raise
        sys.exit(130)
    except BrokenPipeError:
        # The reader closed our output (`| head`). This is not an error.
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if error.errno not in _SURROUNDINGS:
            raise
        place = error.filename2 or error.filename
        where = f"{place}: " if place else ""
        told = InputError(f"{where}{error.strerror}", hint=_SURROUNDINGS[error.errno])
        Terminal(as_json="--json" in sys.argv).error(told)
        sys.exit(told.exit_code)
    sys.exit(code if isinstance(code, int) else 0)
