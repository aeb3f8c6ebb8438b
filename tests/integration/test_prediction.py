"""`rollout.prediction` held against the real server: random changes, one load after each, every fate compared.

REPO_MANAGER_PREDICTION_LOADS sets how many loads (the default keeps the test under a minute on two cores), and
REPO_MANAGER_PREDICTION_SEED where it begins.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import json_format
from support.random_repository import RandomModel

from repo_manager.errors import ServerRefusedError
from repo_manager.rollout.observe import ServedState, observe
from repo_manager.rollout.prediction.files import Fingerprint, read_fingerprint
from repo_manager.rollout.prediction.rules import Prediction, VersionFate, WantedLoad, predict, read_wanted
from repo_manager.server.client import TritonClient
from repo_manager.triton_config.config import parse_config

pytestmark = [pytest.mark.integration, pytest.mark.slow]
AUTO_COMPLETE = False
LOADS = int(os.environ.get("REPO_MANAGER_PREDICTION_LOADS", "200"))
SEED = int(os.environ.get("REPO_MANAGER_PREDICTION_SEED", "1"))
LOADS_A_MODEL = 50
X = np.ones((1, 1), np.float32)


class Watched:
    """A model on the server: its last loaded state, and which load each version comes from."""

    def __init__(self, model: RandomModel, client: TritonClient) -> None:
        self.model, self.client = model, client
        self.loaded: Fingerprint | None = None
        self.answered: dict[int, int] = {}  # a version's counter restarts when it is loaded
        self.trail: list[str] = []

    def count(self) -> dict[int, int]:
        """Return how many inferences every READY version has answered since it was loaded."""
        ready = observe(self.client, self.model.name).ready
        return {version: self.client.statistics(self.model.name, version)[0].success_count for version in ready}

    def instances(self) -> dict[int, int]:
        """Return how many instances every READY version has."""
        ready = observe(self.client, self.model.name).ready
        groups = {version: self.client.model_config(self.model.name, version).instance_group for version in ready}
        return {version: sum(group.count for group in found) for version, found in groups.items()}

    def ask(self) -> dict[int, int]:
        """Ask every READY version once, so its counter is not 0."""
        before = self.count()
        for version in before:
            self.client.infer(self.model.name, version, {"x": X})
        # Triton counts an inference after it has answered it.
        deadline = time.monotonic() + 10.0
        after = self.count()
        while any(after[version] <= before[version] for version in before):
            assert time.monotonic() < deadline, (before, after)
            after = self.count()
        return after

    def wanted(self, sent: str | None) -> WantedLoad:
        wanted = read_wanted(self.model.folder, unloadable=self.model.unloadable, auto_complete=False)
        if sent is None:
            return wanted
        return dataclasses.replace(wanted, config=parse_config(sent), problem=None, sent=True)

    def load(self, sent: str | None) -> tuple[Prediction, dict[int, VersionFate], bool]:
        """Predict a load, do it, and return the prediction, each version's real fate, and whether it was refused."""
        served = observe(self.client, self.model.name)
        instances = self.instances()
        wanted = self.wanted(sent)
        prediction = predict(served, self.loaded, wanted)
        began_ns, before = time.time_ns(), self.answered
        acted = sent is not None or self.loaded is None or newer(wanted.files, self.loaded)
        refused = False
        try:
            self.client.load(self.model.name, None if sent is None else json_of(sent))
        except ServerRefusedError as exc:
            refused = True
            if self.loaded is None and "failed to poll" not in exc.message:
                self.loaded = Fingerprint({})  # Triton knows the model now, but no time of it
            self.trail.append(f"    refused: {exc.message[:300]}")
        after = self.count()
        now = self.instances()
        updated = {version for version, count in now.items() if instances.get(version, count) != count}
        self.answered = self.ask()
        if not refused and acted and wanted.files is not None:
            self.loaded = wanted.files
            if sent is not None:
                self.loaded = wanted.files.with_config_at(began_ns)
                wait_for_the_clock_of_files(self.model.folder.parent.parent / "tick")
        return prediction, fates(before, after, updated, prediction, served), refused

    def unload(self) -> None:
        self.client.unload(self.model.name)
        self.answered, self.loaded = {}, None


def newer(files: Fingerprint | None, loaded: Fingerprint) -> bool:
    return files is not None and files.newest_ns > loaded.newest_ns


def fates(
    before: dict[int, int], after: dict[int, int], updated: set[int], said: Prediction, served: ServedState
) -> dict[int, VersionFate]:
    """Return the effect on every version. An unchanged one gets the predicted name where it fits."""
    found = {}
    predicted = {each.version: each.action for each in said.versions}
    for version in sorted({*before, *after, *predicted}):
        if version in before and version in after:
            same = before[version] <= after[version]
            staying = predicted.get(version) in (VersionFate.NOTHING, VersionFate.FAIL)
            stayed = VersionFate.UPDATE if version in updated else predicted[version] if staying else VersionFate.KEEP
            found[version] = stayed if same else VersionFate.RELOAD
        elif version in after:
            found[version] = VersionFate.LOAD
        elif version in before:
            found[version] = VersionFate.DROP
        else:
            found[version] = predicted[version] if predicted[version] is VersionFate.NOTHING else VersionFate.FAIL
    assert set(before) == set(served.ready)
    return found


def json_of(text: str) -> str:
    return json.dumps(json_format.MessageToDict(parse_config(text).message(), preserving_proto_field_name=True))


def wait_for_the_clock_of_files(path: Path) -> None:
    """Wait until a file written now is newer than now: the kernel dates files by a coarse clock."""
    now_ns = time.time_ns()
    while True:
        path.write_text("x")
        if path.stat().st_mtime_ns > now_ns:
            return


def test_every_prediction_comes_true(
    repository: Path, client: TritonClient, capsys: pytest.CaptureFixture[str], record_property: object
) -> None:
    counts: collections.Counter[str] = collections.Counter()
    changes: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    for number in range(max(LOADS // LOADS_A_MODEL, 1)):
        rng = random.Random(SEED * 1000 + number)
        watched = Watched(RandomModel(repository, f"random_{number}", rng), client)
        for step in range(LOADS_A_MODEL):
            done = [watched.model.change() for _ in range(rng.choice((1, 1, 2, 3)))] if step else []
            changes.update(done)
            sent = watched.model.config_text() if rng.random() < 0.06 else None
            watched.trail.append(f"{step}: {', '.join(done)}{' + configuration sent' if sent else ''}")
            prediction, seen, refused = watched.load(sent)
            said = {each.version: each.action for each in prediction.versions}
            counts.update(str(action) for action in seen.values())
            if said != seen or (prediction.refusal is not None) != refused:
                wrong.append(describe(watched, prediction, seen, refused))
            if rng.random() < 0.04 or any(files_ahead(watched)):
                watched.unload()
                watched.trail.append("   unload")
        watched.unload()
    total = sum(counts.values())
    report = {
        "loads": LOADS,
        "fates": total,
        "accuracy": 1 - len(wrong) / max(LOADS, 1),
        "seen": dict(counts.most_common()),
        "changes": dict(changes.most_common()),
    }
    with capsys.disabled():
        print(f"\nprediction of loads: {json.dumps(report)}")
    assert callable(record_property)
    record_property("prediction", json.dumps(report))
    assert not wrong, "\n\n".join(wrong[:3])
    assert all(counts[str(action)] for action in VersionFate), counts


def files_ahead(watched: Watched) -> list[bool]:
    """Give an unload some loads after a file was dated ahead: until then nothing else is noticed."""
    ahead = watched.loaded is not None and watched.loaded.newest_ns > time.time_ns() + 10**9
    return [True] if ahead and watched.model.rng.random() < 0.4 else []


def describe(watched: Watched, said: Prediction, seen: dict[int, VersionFate], refused: bool) -> str:
    trail = "\n".join(watched.trail[-8:])
    told = "\n".join(f"    {each.version}: {each.action} ({each.reason})" for each in said.versions)
    files = read_fingerprint(watched.model.folder)
    names = sorted(files.times_ns) if files else None
    return f"{trail}\n  predicted (refused: {said.refusal}):\n{told}\n  seen (refused {refused}): {seen}\n  {names}"
