"""Processes add to one model at once while others clean up and verify.

Usage: python -m support.repository_suites.many_writers disk|objects WORK PROCESSES ADDS. Prints the results as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from support.object_stores import tiny_config
from support.repository_suites.places import Place, place_in

from repo_manager.errors import RepositoryError
from repo_manager.repository.publish import publish
from repo_manager.repository.remove import gc
from repo_manager.repository.scan import find_model, scan
from repo_manager.repository.verify import verify


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


def add(place: Place, writer: int, count: int) -> None:
    source = place.work / f"source-{writer}"
    for number in range(count):
        source.write_bytes(f"content {writer} {number} ".encode() * 500)
        published = publish(place.root, "m", {"model.onnx": source}, tiny_config(), {})
        with (place.work / f"log-{writer}").open("a") as file:
            file.write(f"{published.version}\n")


def there(place: Place) -> bool:
    try:
        return bool(scan(place.root, deep=False))
    except RepositoryError:
        return False  # No writer has made it yet.


def clean(place: Place, stop: Path) -> None:
    while not stop.exists():
        if there(place):
            gc(place.root, keep=30)
        time.sleep(0.05)


def look(place: Place, stop: Path) -> None:
    while not stop.exists():
        found = verify(place.root, models=False) if there(place) else ()
        assert not found, found
        time.sleep(0.05)


def result(place: Place) -> dict[str, object]:
    """Return the remains in words."""
    versions = find_model(place.root, "m").versions
    return {
        "left": [entry.version for entry in versions],
        "contents": len({entry.manifest.digest for entry in versions if entry.manifest is not None}),
        "problems": [str(problem) for problem in verify(place.root, models=False)],
        "rest": place.rest(),
    }


def main() -> None:
    store, work, processes, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    stop = work / "stop"
    with place_in(store, work) as place:
        others = [fork(lambda: clean(place, stop)), fork(lambda: look(place, stop))]
        writers = [fork(lambda n=n: add(place, n, count)) for n in range(processes)]  # type: ignore[misc]
        failed = sum(os.waitpid(child, 0)[1] != 0 for child in writers)
        stop.touch()
        failed += sum(os.waitpid(child, 0)[1] != 0 for child in others)
        numbers = sorted(int(line) for log in work.glob("log-*") for line in log.read_text().split())
        right = numbers == list(range(1, processes * count + 1))
        print(json.dumps({"failed": failed, "numbers_right": right, **result(place)}))


if __name__ == "__main__":
    main()
