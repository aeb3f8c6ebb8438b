"""Deploy models of every kind, and the models inside an ensemble, while clients ask all of them.

    python benchmarks/deploys.py [--deploys 30] [--pause 0.3] [--json FILE]

One embedded server has `scale`, `opt`, an ensemble of both (`ens`), a BLS model that asks `scale` (`bls`), a sequence
model (`acc`) and a decoupled one (`repeat`), each in three versions. A client for each asks without a pause; the one of
`acc` sends whole sequences of four requests. Meanwhile `--deploys` deploys follow each other, drawn evenly over the
models and versions. Bar: no request fails and none is answered wrongly, unless the plan of that deploy predicted it: a
sequence model's live sequences end with the version that holds them, and are counted apart where the plan names them.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from repo_manager.errors import ServerError
from repo_manager.rollout.deploy import deploy
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.server.exchange import ModelKind, ask

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support.python_models import write_python_model

VERSIONS = (1, 2, 3)
FIRST = "version_policy { specific { versions: [1] } }\n"
SEQUENCE, STREAM = ModelKind(sequence=True), ModelKind(decoupled=True)
ONES = np.ones((1, 2), np.float32)


def _single(name: str, input_name: str, output: str, expected: tuple[float, ...]) -> Callable[[TritonClient], bool]:
    """Return a function: it sends one request and says whether one of the versions gave the answer."""

    def once(client: TritonClient) -> bool:
        return float(client.infer(name, None, {input_name: ONES})[output][0, 0]) in expected

    return once


def _sequence(client: TritonClient) -> bool:
    requests = [{"X": np.array([[1]], np.int32)}] * 4
    sums = [int(each.outputs["SUM"][0, 0]) for each in ask(client, "acc", None, requests, SEQUENCE)]
    return any(sums == [version * step for step in (1, 2, 3, 4)] for version in VERSIONS)


def _stream(client: TritonClient) -> bool:
    request = {"IN": np.array([1, 2, 3], np.int32)}
    values = [int(each.outputs["OUT"][0]) for each in ask(client, "repeat", None, [request], STREAM)]
    return any(values == [version * step for step in (1, 2, 3)] for version in VERSIONS)


# Any answer of `ens` is a version of `scale` times two, whichever version of `ens` and `opt` gave it.
CLIENTS: dict[str, Callable[[TritonClient], bool]] = {
    "scale": _single("scale", "X", "Y", (1.0, 2.0, 3.0)),
    "ens": _single("ens", "IN", "OUT", (2.0, 4.0, 6.0)),
    "bls": _single("bls", "X", "Y", (1.5, 2.5, 3.5)),
    "acc": _sequence,
    "repeat": _stream,
}
MODELS = ("scale", "opt", "ens", "bls", "acc", "repeat")


class Load:
    """Clients that ask until told to end, and their findings."""

    def __init__(self, client: TritonClient) -> None:
        self._client, self._ended = client, threading.Event()
        self.asked: collections.Counter[str] = collections.Counter()
        self.failed: list[tuple[str, str, float]] = []
        self._threads = [threading.Thread(target=self._run, args=each) for each in CLIENTS.items()]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _run(self, name: str, once: Callable[[TritonClient], bool]) -> None:
        with self._client.another() as own:
            while not self._ended.is_set():
                self.asked[name] += 1
                try:
                    if not once(own):
                        self.failed.append((name, "wrong answer", time.monotonic()))
                except ServerError as exc:
                    self.failed.append((name, exc.message, time.monotonic()))


def run(deploys: int, pause_s: float, seed: int) -> dict[str, Any]:
    """Deploy under load. Return the requests, the failures, and whether the plan predicted them."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="repo-manager-deploys-") as folder:
        root = Path(folder)
        for name in MODELS:
            write_python_model(root, name, versions=VERSIONS, extra=FIRST)
        with (
            EmbeddedServer(ServerOptions(repository=str(root), auto_complete=False)) as server,
            TritonClient.connect(server.grpc_url) as client,
        ):
            served = dict.fromkeys(MODELS, 1)
            for name in MODELS:
                deploy(root, name, 1, client)
            spans: list[tuple[str, int, float, float, tuple[str, ...]]] = []
            with Load(client) as load:
                for number in range(deploys):
                    name = MODELS[number % len(MODELS)]
                    version = draw.choice([each for each in VERSIONS if each != served[name]])
                    began = time.monotonic()
                    done = deploy(root, name, version, client)
                    plan = done.servers[0].plan
                    spans.append((name, version, began, time.monotonic(), () if plan is None else tuple(plan.notes)))
                    served[name] = version
                    time.sleep(pause_s)
    return {"asked": dict(load.asked), "failed": load.failed, "spans": spans}


def main() -> None:
    """Run it and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deploys", type=int, default=30)
    parser.add_argument("--pause", type=float, default=0.3, help="seconds between two deploys")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = run(options.deploys, options.pause, options.seed)
    unforeseen = 0
    for name, message, at in found["failed"]:
        model, version, _, _, notes = next((each for each in found["spans"] if each[2] <= at <= each[3]), ("",) * 5)
        foreseen = any(f"sequences of {name} that are live end" in note for note in notes)
        unforeseen += not foreseen
        when = f"during the deploy of {model}:{version}" if model else "between two deploys"
        print(f"{'foreseen' if foreseen else 'NOT FORESEEN'}: {name}, {when}: {message[:160]}")
    asked = ", ".join(f"{name} {count}" for name, count in sorted(found["asked"].items()))
    print(f"{options.deploys} deploys; requests and sequences: {asked}")
    print(f"failed: {len(found['failed'])}, of these not foreseen by a plan: {unforeseen}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    raise SystemExit(1 if unforeseen else 0)


if __name__ == "__main__":
    main()
