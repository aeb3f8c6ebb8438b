"""Run the commands of a tutorial and paste their output below them.

    python tools/tutorial.py docs/tutorials/*.md            # runs each, writes the output into the file
    python tools/tutorial.py --check docs/tutorials/*.md    # runs each, fails where a command ends otherwise than shown

A block of the language `console` holds commands, each after `$ `, and their output. All blocks of a file run in one
new folder, one after the other; `repo-manager` is this Python's. A command has to end with 0; one that is meant to fail
says so itself: `$ repo-manager ... || echo "exit code $?"`. The output differs from run to run in numbers and times, so
`--check` compares its words alone.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

COLUMNS = 100
LIMIT_S = 300
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_WORD = re.compile(r"[A-Za-z][A-Za-z-]*[.,:;]?")
# Lines about the moment: how steady a load was, whether a CPU was short, versions still draining, and a slow machine's
# progress.
_MOMENT = re.compile(r"stable|windows|waited for a CPU|CPUs with|Largest load|draining|^\w+: \d+%[,:]")
_UNITS = {"µs", "ms", "s"}


def environment_in(folder: Path) -> dict[str, str]:
    """Return an environment whose settings, caches and running servers are the tutorial's own."""
    (folder / ".run").mkdir(mode=0o700)
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "XDG_CACHE_HOME": str(folder / ".cache"),
        "XDG_CONFIG_HOME": str(folder / ".config"),
        "XDG_RUNTIME_DIR": str(folder / ".run"),
        "COLUMNS": str(COLUMNS),
        "LANG": "C.UTF-8",
    }


def run(command: str, folder: Path, environment: dict[str, str]) -> str:
    """Run a command. Return its output.

    Raises:
        SystemExit: it did not end with 0.
    """
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder / "work",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    if done.returncode != 0:
        raise SystemExit(f"$ {command}\n{done.stdout}\nended with {done.returncode}")
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    return "".join(f"{line}\n" for line in lines if line).replace(str(folder / "work"), ".")


def commands_of(block: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a block, its lines joined, with the output below it."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        while command.endswith("\\"):
            more, _, output = output.partition("\n")
            command += "\n" + more
        yield command, output


def words_of(output: str) -> list[str]:
    """Return the words independent of the machine and the moment."""
    lines = (line for line in output.splitlines() if not _MOMENT.search(line))
    return [word for line in lines for word in line.split() if _WORD.fullmatch(word) and word not in _UNITS]


def run_tutorial(path: Path, *, check: bool) -> list[str]:
    """Run a tutorial. Write its output, or return the differences from it."""
    text, differences = path.read_text(encoding="utf-8"), []
    with tempfile.TemporaryDirectory(prefix="tutorial-") as name:
        folder = Path(name)
        environment = environment_in(folder)
        (folder / "work").mkdir()

        def filled(match: re.Match[str]) -> str:
            parts = []
            for command, before in commands_of(match[1]):
                output = run(command, folder, environment)
                if words_of(output) != words_of(before):
                    differences.append(f"{path}: $ {command}\nthe document:\n{before}\nnow:\n{output}")
                parts.append(f"$ {command}\n{output}")
            return "```console\n" + "".join(parts) + "```"

        try:
            new = _BLOCK.sub(filled, text)
        finally:
            stop = ["repo-manager", "serve", "--stop"]
            subprocess.run(stop, cwd=folder / "work", env=environment, capture_output=True, check=False)
    if not check:
        path.write_text(new, encoding="utf-8")
    return differences if check else []


def main() -> None:
    """Run every tutorial named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("tutorials", nargs="+", type=Path)
    options = parser.parse_args()
    found = [text for path in options.tutorials for text in run_tutorial(path.resolve(), check=options.check)]
    if found:
        raise SystemExit("\n\n".join(found))


if __name__ == "__main__":
    main()
