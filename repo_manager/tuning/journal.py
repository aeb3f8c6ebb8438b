"""What a tuning has measured, one JSON line each, so that a second run goes on where the first one ended.

It stands apart from the run because what a killed process leaves of a file is its own matter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repo_manager.tuning.search import Trial
from repo_manager.tuning.space import BatchTime, Setting

__all__ = ["Journal"]


class Journal:
    """A file of JSON lines that is only ever added to.

    Args:
        folder: where the file lies.
        facts: all that decides a measurement beside the setting: another model, version, objective or machine has
            another file.
        fresh: forget what was measured before.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], *, fresh: bool = False) -> None:
        key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.path = folder / f"{facts['model']}-{key}.jsonl"
        if fresh:
            self.path.unlink(missing_ok=True)
        self._lines = self._read()
        if not self._lines:
            self._write({"kind": "facts", **facts})

    def _read(self) -> list[dict[str, Any]]:
        """Return the whole lines; the last one may be half-written by a run that was killed."""
        found = []
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    found.append(json.loads(line))
                except ValueError:
                    continue
        return found

    def _write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            if file.tell() and not self.path.read_bytes().endswith(b"\n"):
                file.write("\n")
            file.write(json.dumps(line, default=str) + "\n")
        self._lines.append(dict(line))

    def curve(self) -> tuple[BatchTime, ...]:
        """Return the times of batches that are known."""
        return tuple(BatchTime(line["size"], line["median_ns"]) for line in self._lines if line["kind"] == "batch")

    def add_batch(self, time: BatchTime) -> None:
        """Write the time of a batch."""
        self._write({"kind": "batch", **dataclasses.asdict(time)})

    def trial(self, setting: Setting, against: float | None) -> Trial | None:
        """Return what is known of a setting that was held against the same value; `None` if it was not measured."""
        wanted = dataclasses.asdict(setting)
        for line in reversed(self._lines):
            if line["kind"] == "trial" and line["setting"] == wanted and line["against"] == against:
                fields = {key: value for key, value in line.items() if key not in ("kind", "setting", "levels")}
                return Trial(setting=setting, levels=tuple(line["levels"]), **fields)
        return None

    def add_trial(self, trial: Trial) -> None:
        """Write a measured setting, with all that decided it."""
        self._write({"kind": "trial", **dataclasses.asdict(trial)})
