"""The record of a tuning: a second run goes on, whatever the first one's end."""

from __future__ import annotations

import json
from pathlib import Path

from repo_manager.tuning.journal import Journal
from repo_manager.tuning.search import MeasuredSetting
from repo_manager.tuning.space import BatchTime, Setting

FACTS = {"model": "m", "version": 1}
STATE = {"m": Setting(2, 8, 0, 1, preferred=(8,))}
MEASURED = MeasuredSetting(
    STATE["m"], True, 120.5, "it holds", 3.0, 100.0, ({"label": "rate 100/s", "p99_ns": 5},), "m", STATE, {"m": 0.5}
)


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, FACTS)
    journal.add_measured(MEASURED)
    journal.add_batch("m", BatchTime(4, 1e6))
    again = Journal(tmp_path, FACTS)
    assert again.measured(STATE, 100.0) == MEASURED
    kinds = [json.loads(line)["kind"] for line in journal.path.read_text().splitlines()]
    assert kinds == ["facts", "trial", "batch"], "a run of an earlier release goes on from these lines"
    assert again.measured(STATE, 110.0) is None
    assert again.measured({"m": STATE["m"], "other": STATE["m"]}, 100.0) is None
    assert again.curve("m") == (BatchTime(4, 1e6),)
    assert again.curve("other") == ()


def test_a_half_written_line_is_left_out_and_the_next_one_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path, FACTS)
    journal.add_measured(MEASURED)
    journal.path.write_bytes(journal.path.read_bytes() + b'{"kind": "tri')
    cut = Journal(tmp_path, FACTS)
    assert cut.measured(STATE, 100.0) == MEASURED
    cut.add_batch("m", BatchTime(2, 1e6))
    assert Journal(tmp_path, FACTS).curve("m") == (BatchTime(2, 1e6),)


def test_another_model_version_objective_or_machine_has_another_record(tmp_path: Path) -> None:
    Journal(tmp_path, FACTS).add_measured(MEASURED)
    assert Journal(tmp_path, {**FACTS, "version": 2}).measured(STATE, 100.0) is None
    assert Journal(tmp_path, FACTS, fresh=True).measured(STATE, 100.0) is None
