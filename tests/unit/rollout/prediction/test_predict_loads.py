"""The effect of a load, from names, times and configurations alone. The real server is in test_prediction.py."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest

from repo_manager.repository.scan import find_model
from repo_manager.repository.tags import record_deployment
from repo_manager.rollout.observe import ServedState
from repo_manager.rollout.plan import plan_from
from repo_manager.rollout.prediction.files import Fingerprint, read_fingerprint
from repo_manager.rollout.prediction.rules import (
    Prediction,
    VersionFate,
    changed_config_fields,
    instances_differ,
    predict,
    read_wanted,
)
from repo_manager.triton_config.config import parse_config

CONFIG = """
backend: "python"
max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: 1 }
output { name: "y" data_type: TYPE_FP32 dims: 1 }
version_policy { specific { versions: [1, 2] } }
"""
AHEAD_S = 4_000_000_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "m"
    for version in (1, 2, 3):
        (folder / str(version)).mkdir(parents=True)
        (folder / str(version) / "model.py").write_text("x")
    (folder / "config.pbtxt").write_text(CONFIG)
    return folder


def served(*ready: int, config: str = CONFIG) -> ServedState:
    return ServedState("grpc://h:1", ready, (), {}, parse_config(config, where="test") if ready else None)


def loaded(folder: Path) -> Fingerprint:
    """Take the fingerprint, and wait until the next change has another time."""
    found = read_fingerprint(folder)
    assert found is not None
    probe = folder.parent / "probe"
    while True:
        probe.write_text("x")
        if probe.stat().st_mtime_ns > found.newest_ns:
            return found


def actions(prediction: Prediction) -> dict[int, str]:
    return {each.version: str(each.action) for each in prediction.versions}


def after(folder: Path, before: Fingerprint | None, *ready: int, config: str = CONFIG) -> dict[int, str]:
    return actions(predict(served(*ready, config=config), before, read_wanted(folder, auto_complete=False)))


def test_nothing_changed(folder: Path) -> None:
    assert after(folder, loaded(folder), 1, 2) == {1: "keep", 2: "keep"}


def test_never_loaded_or_unloaded(folder: Path) -> None:
    assert after(folder, None) == {1: "load", 2: "load"}


@pytest.mark.parametrize("deep", [False, True])
def test_a_changed_version_reloads_alone(folder: Path, deep: bool) -> None:
    before = loaded(folder)
    (folder / "1" / "sub").mkdir()
    (folder / "1" / ("sub/file" if deep else "file")).write_text("x")
    assert after(folder, before, 1, 2) == {1: "reload", 2: "keep"}


@pytest.mark.parametrize(
    ("name", "expected"), [("README.md", "reload"), ("x1", "reload"), ("7", "keep"), ("007", "keep")]
)
def test_what_lies_beside_the_versions(folder: Path, name: str, expected: str) -> None:
    """A file whose name is all digits is taken for a version's, and is none: nothing happens."""
    before = loaded(folder)
    (folder / name).write_text("x")
    assert after(folder, before, 1, 2) == {1: expected, 2: expected}


def test_a_policy_change_loads_and_drops(folder: Path) -> None:
    before = loaded(folder)
    (folder / "config.pbtxt").write_text(CONFIG.replace("[1, 2]", "[2, 3]"))
    assert after(folder, before, 1, 2) == {1: "drop", 2: "keep", 3: "load"}


def test_a_served_version_whose_folder_is_gone_is_dropped_by_the_next_load(folder: Path) -> None:
    before = loaded(folder)
    (folder / "2" / "model.py").unlink()
    (folder / "2").rmdir()
    prediction = predict(served(1, 2), before, read_wanted(folder))
    assert actions(prediction) == {1: "keep", 2: "drop"}
    assert prediction.versions[1].reason == "its folder is gone"


def test_no_version_left_refuses_the_load(folder: Path) -> None:
    before = loaded(folder)
    (folder / "config.pbtxt").write_text(CONFIG.replace("[1, 2]", "[8, 9]"))
    prediction = predict(served(1, 2), before, read_wanted(folder))
    assert actions(prediction) == {1: "keep", 2: "keep"}
    assert prediction.refusal == "no version that the policy asks for has a folder"
    assert prediction.ready_after == (1, 2)


def test_one_bad_version_refuses_all(folder: Path) -> None:
    before = loaded(folder)
    (folder / "config.pbtxt").write_text(CONFIG.replace("[1, 2]", "[2, 3]"))
    wanted = read_wanted(folder, unloadable={3: "it is broken"})
    assert actions(predict(served(1, 2), before, wanted)) == {1: "keep", 2: "keep", 3: "fail"}
    # A version that stays loaded is not checked for loading again.
    wanted = read_wanted(folder, unloadable={2: "it is broken"})
    assert actions(predict(served(1, 2), before, wanted)) == {1: "drop", 2: "keep", 3: "load"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("max_batch_size: many", "not a Triton model"),
        ('name: "other"', "the folder is 'm'"),
        ("nix: 1", "the field nix"),
    ],
)
def test_a_configuration_that_cannot_be_used_refuses_the_load(folder: Path, text: str, reason: str) -> None:
    before = loaded(folder)
    (folder / "config.pbtxt").write_text(text)
    prediction = predict(served(1, 2), before, read_wanted(folder))
    assert reason in str(prediction.refusal)
    assert actions(prediction) == {1: "keep", 2: "keep"}


def test_a_missing_folder_and_a_dangling_link_refuse_the_load(folder: Path) -> None:
    before = loaded(folder)
    (folder / "link").symlink_to("nowhere")
    (folder / "config.pbtxt").touch()
    assert predict(served(1, 2), before, read_wanted(folder)).refusal == "link is a link to nothing"
    assert predict(served(1), before, read_wanted(folder.parent / "none")).refusal == "the model's folder is gone"


def test_a_lookalike_of_the_configuration_blinds_triton(folder: Path) -> None:
    before = loaded(folder)
    (folder / "config").write_text("x")
    (folder / "config.pbtxt").write_text(CONFIG.replace("[1, 2]", "[1, 3]"))
    prediction = predict(served(1, 2), before, read_wanted(folder))
    assert actions(prediction) == {1: "keep", 2: "nothing", 3: "nothing"}
    assert "config is taken for a second config.pbtxt" in prediction.versions[2].reason


def test_a_file_dated_ahead_hides_what_comes_after(folder: Path) -> None:
    os.utime(folder / "1" / "model.py", (AHEAD_S, AHEAD_S))
    before = loaded(folder) if time.time() > AHEAD_S else read_fingerprint(folder)
    (folder / "2" / "model.py").write_text("y")
    (folder / "config.pbtxt").write_text(CONFIG.replace("max_batch_size: 4", "max_batch_size: 8"))
    assert after(folder, before, 1, 2) == {1: "nothing", 2: "nothing"}


def test_a_folder_name_that_begins_with_a_number_is_a_version(folder: Path) -> None:
    before = loaded(folder)
    (folder / "5.tmp").mkdir()
    (folder / "05").mkdir()
    (folder / "config.pbtxt").write_text(CONFIG.replace("specific { versions: [1, 2] }", "all {}"))
    prediction = predict(served(1, 2), before, read_wanted(folder))
    assert "5.tmp counts as version 5" in str(prediction.refusal)
    assert actions(prediction) == {1: "keep", 2: "keep", 3: "fail", 5: "fail"}


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        ("", 'name: "m" backend: "b"', ()),
        ("dynamic_batching { preferred_batch_size: [4] }", "dynamic_batching {}", ()),
        ("dynamic_batching { max_queue_delay_microseconds: 5 }", "", ("dynamic_batching",)),
        ("", "dynamic_batching {}", ("dynamic_batching",)),
        ("optimization { input_pinned_memory { enable: true } }", "", ()),
        ("optimization { priority: PRIORITY_MAX }", "", ("optimization",)),
        ('parameters { key: "a" value { string_value: "1" } }', "", ("parameters",)),
        ("sequence_batching { max_sequence_idle_microseconds: 1000000 }", "sequence_batching {}", ()),
        (
            "sequence_batching { max_sequence_idle_microseconds: 9 oldest { preferred_batch_size: 4 } }",
            "sequence_batching { max_sequence_idle_microseconds: 9 oldest {} }",
            (),
        ),
        (
            "sequence_batching { max_sequence_idle_microseconds: 9 oldest { preferred_batch_size: 4 } }",
            "sequence_batching { max_sequence_idle_microseconds: 9 oldest { preferred_batch_size: 2 } }",
            ("sequence_batching",),
        ),
        ("instance_group { count: 2 }", "version_policy { all {} }", ()),
    ],
)
def test_which_changes_of_the_configuration_count(before: str, now: str, changed: tuple[str, ...]) -> None:
    fixed = 'backend: "b" max_batch_size: 4 '
    ours = fixed + now.replace('backend: "b"', "")
    assert changed_config_fields(parse_config(fixed + before), parse_config(ours)) == changed


def test_what_the_server_completes_by_itself_is_no_change() -> None:
    completed = parse_config('backend: "b" max_batch_size: 4 dynamic_batching {} input { name: "x" dims: 1 }')
    silent = parse_config('backend: "b"')
    assert changed_config_fields(completed, silent) == ()
    found = changed_config_fields(completed, silent, auto_complete=False)
    assert found == ("max_batch_size", "input", "dynamic_batching")
    other = parse_config('backend: "b" input { name: "x" dims: 2 }')
    assert changed_config_fields(completed, other) == ("input",)


@pytest.mark.parametrize(
    ("backend", "served", "wanted", "differ"),
    [
        ("onnxruntime", "{ count: 1 kind: KIND_CPU }", "{ count: 3 kind: KIND_CPU }", True),
        ("onnxruntime", "{ name: 'm_0' count: 3 kind: KIND_CPU }", "{ count: 3 }", False),
        ("onnxruntime", "{ name: 'm_0' count: 2 kind: KIND_CPU }", "", False),
        ("onnxruntime", "{ name: 'm_0' count: 3 kind: KIND_CPU }", "", True),
        ("onnxruntime", "{ name: 'm_0' count: 1 kind: KIND_GPU gpus: [0, 1] }", "{ kind: KIND_GPU }", False),
        ("onnxruntime", "{ name: 'm_0' count: 1 kind: KIND_GPU gpus: [0, 1] }", "{ gpus: [1] }", True),
        ("python", "{ name: 'm_0' count: 2 kind: KIND_CPU }", "{ kind: KIND_CPU }", True),
        ("other", "{ name: 'm_0' count: 4 kind: KIND_CPU }", "{ kind: KIND_CPU }", False),
        ("python", "{ count: 1 kind: KIND_CPU }", "{ count: 1 kind: KIND_CPU profile: 'a' }", True),
        ("python", "{ count: 1 kind: KIND_CPU }", "[{ count: 1 kind: KIND_CPU }, { count: 1 kind: KIND_CPU }]", True),
    ],
)
def test_which_instances_differ(backend: str, served: str, wanted: str, differ: bool) -> None:
    fixed = f'backend: "{backend}" '
    ours = parse_config(fixed + (f"instance_group {wanted}" if wanted else ""))
    assert instances_differ(parse_config(f"{fixed}instance_group {served}"), ours) is differ


def test_a_refused_load_has_changed_the_instances_of_what_stays(folder: Path) -> None:
    before = parse_config("instance_group { count: 1 kind: KIND_CPU }")
    now = parse_config("instance_group { count: 2 kind: KIND_CPU } version_policy { all {} }")
    wanted = dataclasses.replace(read_wanted(folder), config=now, problem=None, unloadable={3: "broken"}, sent=True)
    found = predict(dataclasses.replace(served(1, 2), config=before), loaded(folder), wanted)
    assert actions(found) == {1: "update", 2: "update", 3: "fail"}
    assert found.refusal is not None


def test_a_plan_knows_of_files_that_changed_since_the_last_deployment(folder: Path) -> None:
    root = folder.parent
    record_deployment(root, "m", 2)
    loaded(folder)
    deployed_ns = time.time_ns()
    while (folder / "labels.txt").write_text("a") and (folder / "labels.txt").stat().st_mtime_ns <= deployed_ns:
        pass  # the kernel dates files by a coarse clock
    steps = plan_from(find_model(root, "m"), 3, served(1, 2), keep_previous=True).steps
    assert [(step.version, step.action) for step in steps] == [
        (1, VersionFate.DROP),
        (2, VersionFate.RELOAD),
        (3, VersionFate.LOAD),
    ]
    assert "labels.txt, beside the versions, has changed" in steps[1].reason


def test_a_plan_says_what_blinds_triton(folder: Path) -> None:
    root = folder.parent
    record_deployment(root, "m", 2)
    (folder / "conf").write_text("x")
    (note,) = plan_from(find_model(root, "m"), 3, served(1, 2), keep_previous=False).notes
    assert "conf in the model's folder is taken for a second config.pbtxt" in note
    (folder / "conf").unlink()
    os.utime(folder / "1" / "model.py", (AHEAD_S, AHEAD_S))
    (note,) = plan_from(find_model(root, "m"), 3, served(1, 2), keep_previous=False).notes
    assert note.startswith("1 is dated ahead")
