"""Feed broken files of every kind but ONNX (fuzz_onnx.py) to their readers.

    python tests/fuzz/fuzz_files.py --cases 2400 [--first SEED]

Each case mutates one file: bytes flipped, cut, repeated, or pieces put in the place of others. Anything but success or
an error of ours is a finding. Exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from repo_manager.declared.read import read_declaration
from repo_manager.errors import RepoManagerError
from repo_manager.loadtest.merge import read_report
from repo_manager.loadtest.worker.schedule import load_replay
from repo_manager.repository.golden import read_golden
from repo_manager.repository.manifest import read_manifest
from repo_manager.repository.scan import scan
from repo_manager.request_data.read import read_rows
from repo_manager.request_data.tensors import InputFacts
from repo_manager.settings import load_settings

SAMPLE = Path(__file__).parents[2] / "model_repository"
INPUTS = [InputFacts("x", "FP32", (3,), False), InputFacts("t", "BYTES", (1,), True)]
PIECES = [b"null", b"-1", b"1e999", b"[", b"{", b"\xff", b'"', b"9" * 400, b"\0", b"&a *a", b"<<:", b"NaN", b"\n", b":"]
DECLARED = b"models:\n  a: &a\n    source: m.onnx\n    serve: newest\n  b: {<<: *a, tags: {x: 1}}\n"


def _rows(path: Path) -> None:
    read_rows(path, INPUTS, ignore_others=True)


def _scan(path: Path) -> None:
    for entry in scan(path.parents[1]):
        entry.config()


def kinds(scratch: Path) -> list[tuple[str, bytes, Callable[[Path], object]]]:
    """Return name below the scratch folder, content, and reader of each kind of file."""
    np.savez_compressed(scratch / "seed.npz", x=np.ones((2, 3), np.float32))
    archive = (scratch / "seed.npz").read_bytes()
    rows = json.dumps({"data": [{"x": {"content": [1, 2, 3], "shape": [3]}, "t": {"b64": "AAAA"}}]}).encode()
    text = (SAMPLE / "digits/config.pbtxt").read_bytes()
    return [
        ("rows.json", rows, _rows),
        ("rows.jsonl", b'{"x": [1, 2, 3]}\n{"inputs": [{"name": "x", "shape": [3], "data": [1, 2, 3]}]}\n', _rows),
        ("rows.npz", archive, _rows),
        ("golden.npz", (SAMPLE / "digits/1/golden.npz").read_bytes(), read_golden),
        ("manifest.json", (SAMPLE / "digits/1/manifest.json").read_bytes(), lambda path: read_manifest(path.parent)),
        ("moments.csv", b"timestamp_s,x\n0.1,a\n0.2,b\n", load_replay),
        ("moments.json", b'{"timestamps_ns": [1, 2, 3]}', load_replay),
        ("report.json", b'{"schema_version": 1, "points": [{"mode": "rate"}], "target": {}}', read_report),
        ("repository.yaml", DECLARED, read_declaration),
        ("settings.yaml", b"server: grpc://h:1\nsigned_by: [a, b]\n", _settings),
        ("models/m/config.pbtxt", text, _scan),
    ]


def _settings(path: Path) -> None:
    load_settings({"REPO_MANAGER_SETTINGS": str(path)})


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return a file that differs in one to four places."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(content) + 1)
        size = rng.choice((0, 1, 2, 8, 40))
        how = rng.randrange(4)
        if how == 0:
            content[place : place + size] = rng.randbytes(size)
        elif how == 1:
            content[place : place + size] = rng.choice(PIECES)
        elif how == 2:
            del content[place : place + size * 3]
        else:
            content[place:place] = content[place : place + size * 3] * rng.choice((1, 2, 300))
    return bytes(content)


def findings(cases: int, first: int = 0) -> tuple[list[str], collections.Counter[str]]:
    """Run cases; return what was neither read nor refused, and how often each happened."""
    found: list[str] = []
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "models/m/1").mkdir(parents=True)
        readers = kinds(scratch)
        for seed in range(first, first + cases):
            name, data, read = readers[seed % len(readers)]
            path = scratch / name
            path.write_bytes(mutate(data, random.Random(seed)))
            try:
                read(path)
                outcomes["read"] += 1
            except RepoManagerError:
                outcomes["refused"] += 1
            except Exception as exc:  # noqa: BLE001 - finding them all is this script's purpose
                frame = traceback.extract_tb(exc.__traceback__)[-1]
                found.append(f"case {seed}, {name}: {exc!r:.200} in {frame.filename}:{frame.lineno}")
    return found, outcomes


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2400)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    found, outcomes = findings(options.cases, options.first)
    print("\n".join(found))
    print(dict(outcomes), len(found), "findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
