"""A tuning's measurements, one JSON line each, so a second run goes on where the first one ended.

It is separate from the run because the remains of a file after a killed process are a matter of their own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repo_manager.tuning.race import RaceBlock
from repo_manager.tuning.search import MeasuredSetting
from repo_manager.tuning.space import BatchTime, Setting

__all__ = ["Journal"]

_NOT_PLAIN = ("kind", "setting", "levels", "state")


class Journal:
    """A file of JSON lines, only ever extended.

    Args:
        folder: existing folder of the file. `facts` give the file's name.
        facts: the facts behind a measurement beside the setting: another model, version, objective or machine has
            another file.
        fresh: delete the file of an earlier run first, instead of going on with it.
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
        """Return the whole lines. The last one may be half-written by a run killed."""
        found = []
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    found.append(json.loads(line))
                except ValueError:
                    continue
        return found

    def _write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("ab+") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(line, default=str).encode() + b"\n")
        self._lines.append(_as_read(line))

    def curve(self, model: str) -> tuple[BatchTime, ...]:
        """Return the times of a model's batches known."""
        lines = [line for line in self._lines if line["kind"] == "batch" and line["model"] == model]
        return tuple(BatchTime(line["size"], line["median_ns"]) for line in lines)

    def add_batch(self, model: str, time: BatchTime) -> None:
        """Write the time of a batch."""
        self._write({"kind": "batch", "model": model, **dataclasses.asdict(time)})

    def end_curve(self, model: str) -> None:
        """Write that a larger batch of a model needs no measurement."""
        self._write({"kind": "curve end", "model": model})

    def has_whole_curve(self, model: str) -> bool:
        """Return whether a larger batch of a model needs no measurement."""
        return any(line["kind"] == "curve end" and line["model"] == model for line in self._lines)

    def measured(self, state: Mapping[str, Setting], against: float | None) -> MeasuredSetting | None:
        """Return the record of settings compared with the same value, or `None` if they were not measured."""
        wanted = _as_read({name: dataclasses.asdict(setting) for name, setting in state.items()})
        for line in reversed(self._lines):
            if line["kind"] == "trial" and line["state"] == wanted and line["against"] == against:
                plain = {key: value for key, value in line.items() if key not in _NOT_PLAIN}
                setting = _setting(line["setting"])
                return MeasuredSetting(setting=setting, levels=tuple(line["levels"]), state=dict(state), **plain)
        return None

    def add_measured(self, measured: MeasuredSetting) -> None:
        """Write a measured setting, with the facts behind it."""
        self._write({"kind": "trial", **dataclasses.asdict(measured)})

    def race(self, states: Sequence[Mapping[str, Setting]]) -> list[dict[str, Any]]:
        """Return the blocks of a race known, in order of time: `side`, `rate`, and the fields of `RaceBlock`.

        Args:
            states: the settings of the best one before the race, and those of its rival.
        """
        wanted = _as_read(_plain(states))
        return [line for line in self._lines if line["kind"] == "race" and line["states"] == wanted and "shift" in line]

    def add_block(self, states: Sequence[Mapping[str, Setting]], side: int, rate: float, block: RaceBlock) -> None:
        """Write a block of a race.

        Args:
            states: as in `race`.
            side: 0 for the best one, 1 for its rival.
            rate: requests a second.
            block: what it showed.
        """
        self._write({"kind": "race", "states": _plain(states), "side": side, "rate": rate, **dataclasses.asdict(block)})


def _plain(states: Sequence[Mapping[str, Setting]]) -> list[dict[str, Any]]:
    return [{name: dataclasses.asdict(setting) for name, setting in state.items()} for state in states]


def _as_read(value: Any) -> Any:
    """Return a value as it comes back from the file."""
    return json.loads(json.dumps(value, default=str))


def _setting(fields: Mapping[str, Any]) -> Setting:
    preferred = fields["preferred"]
    return Setting(**{**fields, "preferred": None if preferred is None else tuple(preferred)})
