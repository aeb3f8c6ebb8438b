"""Processes that add to one model at once while others clean up and verify. Run by test_crash.py.

Usage: many_writers.py WORK PROCESSES ADDS. Prints what happened as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests_conftest import make_config  # type: ignore[import-not-found]  # conftest.py under a name of its own

from repo_manager.repository import find_model, gc, publish, verify


def fork(act: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException:  # noqa: BLE001 - the parent sees the exit status
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def add(root: Path, source: Path, log: Path, count: int) -> None:
    for _ in range(count):
        published = publish(root, "m", {"model.onnx": source}, make_config(), {})
        with log.open("a") as file:
            file.write(f"{published.version}\n")


def clean(root: Path, stop: Path) -> None:
    while not stop.exists():
        if (root / "m").is_dir():
            gc(root, keep=30)
        time.sleep(0.05)


def look(root: Path, stop: Path) -> None:
    while not stop.exists():
        found = verify(root, models=False) if root.is_dir() else ()
        assert not found, found
        time.sleep(0.05)


def main() -> None:
    work, processes, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    root, source, stop = work / "models", work / "source", work / "stop"
    source.write_bytes(b"content " * 5000)
    start = time.monotonic()
    others = [fork(lambda: clean(root, stop)), fork(lambda: look(root, stop))]
    writers = [fork(lambda n=n: add(root, source, work / f"log-{n}", count)) for n in range(processes)]  # type: ignore[misc]
    failed = sum(os.waitpid(child, 0)[1] != 0 for child in writers)
    seconds = time.monotonic() - start
    stop.touch()
    failed += sum(os.waitpid(child, 0)[1] != 0 for child in others)
    numbers = sorted(int(line) for log in work.glob("log-*") for line in log.read_text().split())
    print(
        json.dumps(
            {
                "failed": failed,
                "numbers_right": numbers == list(range(1, processes * count + 1)),
                "left": [entry.version for entry in find_model(root, "m").versions],
                "problems": [str(problem) for problem in verify(root, models=False)],
                "rest": [p.name for p in (*work.iterdir(), *root.iterdir()) if "staging" in p.name],
                "seconds": round(seconds, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
