"""Kill a command at its n-th call, for every n, and check the remains.

Most calls only read, so many deaths of an operation leave equal remains. Equal remains are checked once.

Usage: python -m support.repository_suites.crash_points disk|objects WORK STRIDE [COLLECTION]
Prints how often each operation was killed.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

from support.repository_suites.operations import OPERATIONS, Operation, build, check
from support.repository_suites.places import Place, place_in

from repo_manager.errors import RepoManagerError

MAX_POINTS = 20_000
OWN_TO_A_RUN = re.compile(rb"[0-9a-f]{8,}|\d{4}-\d\d-\d\dT[\d:.+Z]+|\d+\.\d+")
"""Random names, digests, times: the differences between two equal runs."""


def left_by(place: Place) -> frozenset[tuple[bytes, bytes]]:
    """Every path with its content, without a run's own parts. A truncated file differs from the whole one."""
    return frozenset((_plain(path.encode()), _plain(data)) for path, data in place.contents())


def _plain(text: bytes) -> bytes:
    return OWN_TO_A_RUN.sub(b"*", text)


def collect(place: Place, collection: Path, prefix: str) -> None:
    """Keep each model as the crash left it, once for each content, for a server to load."""
    with tempfile.TemporaryDirectory(dir=place.work) as folder:
        place.download(Path(folder))
        for model in sorted(Path(folder).glob("*/*/")):
            if model.name.startswith("."):
                continue
            files = sorted(path for path in model.rglob("*") if path.is_file() and path.name != "manifest.json")
            content = "".join(f"{path.relative_to(model)} {hash(path.read_bytes())}\n" for path in files)
            target = collection / f"{prefix}_{model.name}_{hash(content) & 0xFFFFFFFFFFFFFFFF:x}"
            if not target.exists():
                shutil.copytree(model, target)


def run(place: Place, name: str, operation: Operation, stride: int, first: int, collection: Path | None) -> int:
    """Crash one operation at every stride-th call. Return the number of crashes."""
    checked = set()
    for points, number in enumerate(range(first, MAX_POINTS, stride)):
        place.restore("prepared")
        if not place.dies(lambda: operation.act(place), number):
            return points
        left = left_by(place)
        if left in checked:
            continue
        checked.add(left)
        if collection is not None:
            collect(place, collection, type(place).__name__.lower())
        try:
            place.isolated(lambda: check(place, operation))
        except (AssertionError, RepoManagerError, OSError) as exc:
            raise AssertionError(f"{name}, killed at call {number}: {exc!r}") from exc
    raise AssertionError(f"{name} makes more than {MAX_POINTS} calls")


def main() -> None:
    store, work, stride = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    collection = Path(sys.argv[4]) if len(sys.argv) > 4 else None
    points = {}
    with place_in(store, work) as place:
        place.isolated(lambda: build(place))
        place.keep("built")
        for position, (name, operation) in enumerate(OPERATIONS.items()):
            place.restore("built")
            prepare = operation.prepare
            if prepare is not None:
                place.isolated(lambda prepare=prepare: prepare(place))  # type: ignore[misc]
            place.keep("prepared")
            points[name] = run(place, name, operation, stride, 1 + position % stride, collection)
    print(json.dumps(points))


if __name__ == "__main__":
    main()
