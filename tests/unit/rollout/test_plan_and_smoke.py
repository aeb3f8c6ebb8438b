from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from repo_manager.repository.scan import ModelEntry, VersionEntry
from repo_manager.rollout.comparison import _compare
from repo_manager.rollout.observe import ServedState
from repo_manager.rollout.plan import Obstacle, VersionFate, plan_from
from repo_manager.triton_config.config import ModelConfig, parse_config

LOADED = 'name: "m" backend: "onnxruntime" max_batch_size: 8'


def served(*ready: int, config: str = LOADED, reasons: dict[int, str] | None = None) -> ServedState:
    parsed: ModelConfig | None = parse_config(config, where="test") if ready else None
    return ServedState("grpc://h:1", ready, (), reasons or {}, parsed)


def model(
    tmp_path: Path, *versions: int, policy: tuple[int, ...] | str = "latest:1", config: str = LOADED
) -> ModelEntry:
    entries = tuple(VersionEntry(each, tmp_path / str(each), size_bytes=10 * each) for each in versions)
    return ModelEntry("m", tmp_path, "onnxruntime", 8, policy, (), entries, config_text=config)


def actions(plan_of: object) -> dict[int, VersionFate]:
    return {step.version: step.action for step in plan_of.steps}  # type: ignore[attr-defined]


def test_a_new_version_is_loaded_beside_the_old_one_which_is_dropped(tmp_path: Path) -> None:
    plan = plan_from(model(tmp_path, 1, 2), 2, served(1), keep_previous=False)
    assert actions(plan) == {1: VersionFate.DROP, 2: VersionFate.LOAD}
    assert (plan.ready_after, plan.peak_bytes, plan.changes) == ((2,), 30, True)


def test_the_previous_version_is_kept_when_asked(tmp_path: Path) -> None:
    plan = plan_from(model(tmp_path, 1, 2, 3), 3, served(1, 2), keep_previous=True)
    assert actions(plan) == {1: VersionFate.DROP, 2: VersionFate.KEEP, 3: VersionFate.LOAD}


def test_the_end_of_live_sequences_is_foreseen(tmp_path: Path) -> None:
    config = LOADED + " sequence_batching { }"

    def notes(before: tuple[int, ...], version: int, *, keeps: bool = False, now: str = config) -> str:
        entry = model(tmp_path, 1, 2, config=config)
        return " ".join(plan_from(entry, version, served(*before, config=now), keep_previous=keeps).notes)

    assert "next request goes to version 2" in notes((1,), 2)
    assert "Those that name it" not in notes((1,), 2)
    assert "Those that name it go on." in notes((1,), 2, keeps=True)
    assert "version 2 is loaded again, without their state" in notes((2,), 2, now=config.replace(": 8", ": 4"))
    assert notes((), 2) == ""
    assert notes((2,), 2) == ""
    iterative = LOADED + " sequence_batching { iterative_sequence: true }"  # Triton makes them, of single requests
    entry = model(tmp_path, 1, 2, config=iterative)
    assert plan_from(entry, 2, served(1, config=iterative), keep_previous=False).notes == ()
    assert plan_from(model(tmp_path, 1, 2), 2, served(1), keep_previous=False).notes == ()


def test_what_is_deployed_needs_no_change(tmp_path: Path) -> None:
    plan = plan_from(model(tmp_path, 1, 2, policy=(2,)), 2, served(2), keep_previous=False)
    assert (actions(plan), plan.changes) == ({2: VersionFate.KEEP}, False)


def test_a_policy_that_would_serve_another_version_after_a_restart_is_a_change(tmp_path: Path) -> None:
    assert plan_from(model(tmp_path, 1, 2, policy="latest:1"), 2, served(2), keep_previous=False).changes


@pytest.mark.parametrize(
    ("change", "action"),
    [
        ("", VersionFate.KEEP),
        ("instance_group { count: 3 }", VersionFate.KEEP),
        ("version_policy { all {} }", VersionFate.KEEP),
        ("dynamic_batching {}", VersionFate.RELOAD),
        ('parameters { key: "a" value { string_value: "b" } }', VersionFate.RELOAD),
    ],
)
def test_only_policy_and_instances_change_without_a_reload(tmp_path: Path, change: str, action: VersionFate) -> None:
    entry = model(tmp_path, 1, policy=(1,), config=f"{LOADED} {change}")
    filled_in = "optimization { input_pinned_memory { enable: true } output_pinned_memory { enable: true } }"
    config = f"{LOADED} {filled_in}"
    assert actions(plan_from(entry, 1, served(1, config=config), keep_previous=False)) == {1: action}


def test_fields_that_a_server_may_refuse_are_named_even_where_nothing_is_to_do(tmp_path: Path) -> None:
    entry = model(tmp_path, 1, policy=(1,), config=f"{LOADED} future_field: 1")
    plan = plan_from(entry, 1, served(1, config=LOADED), keep_previous=False)
    assert actions(plan) == {1: VersionFate.KEEP}
    assert plan.notes[-1].endswith("refuses at the next load: future_field")


def test_a_served_version_without_a_folder_is_pointed_out(tmp_path: Path) -> None:
    plan = plan_from(model(tmp_path, 2), 2, served(1), keep_previous=False)
    assert "its folder is gone" in plan.notes[0]


def test_a_failed_load_before_gives_its_reason(tmp_path: Path) -> None:
    plan = plan_from(model(tmp_path, 1, 2), 2, served(1, reasons={2: "bad"}), keep_previous=False)
    assert next(step for step in plan.steps if step.version == 2).reason == "bad"


NEVER_SEEN = Obstacle("Azure", always=True, way_out="unloading")
SENT = Obstacle("an override", always=False, way_out="touching")


def test_nothing_happens_where_a_change_is_never_seen(tmp_path: Path) -> None:
    plan = plan_from(model(tmp_path, 1, 2), 2, served(1), keep_previous=False, obstacle=NEVER_SEEN)
    assert actions(plan) == {1: VersionFate.DROP, 2: VersionFate.NOTHING}
    assert "a load would do nothing: Azure. So unloading" in plan.steps[1].reason
    assert (plan.is_hindered, plan.new_bytes, plan.peak_bytes) == (True, 20, 30)
    first = plan_from(model(tmp_path, 1), 1, served(), keep_previous=False, obstacle=NEVER_SEEN)
    assert actions(first) == {1: VersionFate.NOTHING}


def test_nothing_happens_while_a_config_sent_with_a_load_is_in_the_way(tmp_path: Path) -> None:
    changed = 'name: "m" backend: "onnxruntime" max_batch_size: 4'
    entry = model(tmp_path, 1, policy=(1,))
    plan = plan_from(entry, 1, served(1, config=changed), keep_previous=False, obstacle=SENT)
    assert actions(plan) == {1: VersionFate.NOTHING}
    assert plan.changes
    # A changed policy makes config.pbtxt newer, so Triton drops the override.
    entry = model(tmp_path, 1, 2, policy=(1,))
    plan = plan_from(entry, 2, served(1, config=changed), keep_previous=False, obstacle=SENT)
    assert (actions(plan), plan.is_hindered) == ({1: VersionFate.DROP, 2: VersionFate.LOAD}, False)
    # If server and file agree, nothing is in the way.
    plan = plan_from(model(tmp_path, 1, policy=(1,)), 1, served(1), keep_previous=False, obstacle=SENT)
    assert (actions(plan), plan.changes) == ({1: VersionFate.KEEP}, False)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("one", "other", "passed"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.0], [1.0, 2.01], True),
        ([1.0, 2.0], [1.0, 2.1], False),
        ([NAN, 1.0], [NAN, 1.0], True),
        ([NAN, 1.0], [1.0, 1.0], False),
        ([INF, 1.0], [INF, 1.0], True),
        ([INF, 1.0], [1.0, 1.0], False),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([], [], True),
        ([1.0], [1.0, 1.0], False),
    ],
)
def test_floats_are_compared_within_the_tolerance(one: list[float], other: list[float], passed: bool) -> None:
    result = _compare("y", np.array(one, np.float32), np.array(other, np.float32), 1e-2)
    assert result.passed is passed


def test_other_types_are_compared_exactly() -> None:
    ints = np.array([1, 2])
    assert _compare("y", ints, ints, 0.5).passed
    assert not _compare("y", ints, ints + 1, 0.5).passed
    texts = np.array(["a", "b"], np.object_)
    assert _compare("y", np.array([b"a", b"b"], np.object_), texts, 0.5).passed
    assert not _compare("y", np.array([b"a", b"c"], np.object_), texts, 0.5).passed
