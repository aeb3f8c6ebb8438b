"""The tunable settings of a model's configuration, and the bounds of the search."""

from __future__ import annotations

import itertools

import pytest

from repo_manager.errors import UsageError
from repo_manager.triton_config.config import ModelConfig, parse_config
from repo_manager.triton_config.fields import set_fields
from repo_manager.tuning.space import AXES, BatchTime, Bounds, Setting, Space, left_out, setting_of

TEXT = """name: "m"
backend: "onnxruntime"
max_batch_size: 8
dynamic_batching { preferred_batch_size: [4] }
instance_group { count: 2 }
parameters { key: "intra_op_thread_count" value { string_value: "1" } }
"""
CURVE = [BatchTime(1, 1e6), BatchTime(2, 1.1e6), BatchTime(4, 1.3e6), BatchTime(8, 2.5e6), BatchTime(16, 30e6)]


def config(text: str = TEXT) -> ModelConfig:
    return parse_config(text)


def test_the_setting_of_a_configuration() -> None:
    assert setting_of(config()) == Setting(2, 8, 0, 1)
    assert setting_of(config('name: "m"\nbackend: "onnxruntime"\n')) == Setting(1, 0, None)


@pytest.mark.parametrize(
    "setting", [Setting(1, 8, 0, 1), Setting(4, 16, 500, 2), Setting(2, 8, None, None), Setting(1, 1, None, 1)]
)
def test_changes_make_the_setting_and_keep_the_rest(setting: Setting) -> None:
    changed = config(set_fields(TEXT, setting.changes(setting_of(config())), where="config.pbtxt"))
    assert setting_of(changed) == setting
    kept = [] if setting.queue_delay is None else [4]
    assert list(changed.message().dynamic_batching.preferred_batch_size) == kept


def test_no_change_for_the_same_setting() -> None:
    assert setting_of(config()).changes(setting_of(config())) == {}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("sequence_batching { direct {} }", "a sequence model"),
        ("model_transaction_policy { decoupled: true }", "decoupled"),
        ("ensemble_scheduling { step { model_name: 'x' model_version: -1 } }", "an ensemble"),
        ("instance_group { count: 1 }", "2 instance groups"),
    ],
)
def test_what_cannot_be_tuned_is_named(more: str, says: str) -> None:
    text = TEXT if "instance_group" in more else TEXT.replace("dynamic_batching { preferred_batch_size: [4] }", "")
    with pytest.raises(UsageError, match=says):
        setting_of(config(f"{text}\n{more}\n"))


def test_batches_that_cannot_meet_the_limit_or_gain_nothing_are_not_tried() -> None:
    space = Space.of(config(), Bounds(4, 100, 64), CURVE, latency_ns=20e6)
    assert space.axes["max_batch_size"] == (1, 2, 4, 8)  # 16 takes longer than the limit
    slow = Space.of(config(), Bounds(4, 100, 64), [*CURVE[:3], BatchTime(8, 2.7e6)], latency_ns=None)
    assert slow.axes["max_batch_size"] == (1, 2, 4, 8)  # today's stays, although 4 answers as many
    assert max(delay or 0 for delay in space.axes["queue_delay"]) == 2500
    assert {None, 0} <= set(space.axes["queue_delay"])


def test_instances_stay_within_cores_and_memory() -> None:
    assert Space.of(config(), Bounds(4, 100, 64), CURVE, latency_ns=None).axes["instances"] == (1, 2, 4)
    assert Space.of(config(), Bounds(8, 3, 64), CURVE, latency_ns=None).axes["instances"] == (1, 2, 3)
    only = Space.of(config(), Bounds(8, 8, 64), CURVE, latency_ns=None, search=("instances",))
    assert [axis for axis in AXES if len(only.axes[axis]) > 1] == ["instances"]


def test_threads_and_instances_share_the_cores() -> None:
    space = Space.of(config(), Bounds(4, 100, 64), CURVE, latency_ns=None)
    along = [*itertools.chain(*space.along(Setting(2, 8, 0, 2), "instances"))]
    assert {setting.threads for setting in along} == {1, 2, None} - {None}
    for axis in ("threads", "instances"):
        for setting in itertools.chain(*space.along(Setting(2, 8, 0, 2), axis)):
            assert setting.instances * (setting.threads or 1) <= 4
    assert all(setting.threads is None or setting.instances * setting.threads <= 4 for setting in space.settings())


def test_threads_that_the_backend_takes_by_itself_are_no_setting_of_their_own() -> None:
    text = TEXT.replace('parameters { key: "intra_op_thread_count" value { string_value: "1" } }', "")
    space = Space.of(config(text), Bounds(4, 100, 64), CURVE, latency_ns=None)
    assert space.axes["threads"] == (None, 1, 2, 4)
    assert not space.allows(Setting(2, 8, 0, 2))  # two instances share four cores
    assert space.allows(Setting(2, 8, 0, None))
    assert space.allows(Setting(2, 8, 0, 1))
    up, _ = space.along(Setting(1, 8, 0, 1), "instances")
    assert Setting(4, 8, 0, None) in up


def test_an_engine_prefers_the_batch_that_it_was_built_for() -> None:
    text = TEXT.replace("onnxruntime", "tensorrt")
    space = Space.of(config(text), Bounds(0, 4, 16, profile=8), CURVE, latency_ns=None)
    assert space.axes["preferred"] == (None, (), (8,))
    assert not space.allows(Setting(2, 4, 0, 1, preferred=(8,)))
    assert not space.allows(Setting(2, 8, None, 1, preferred=(8,)))
    changed = config(set_fields(text, Setting(2, 8, 0, 1, preferred=(8,)).changes(setting_of(config())), where="c"))
    assert list(changed.message().dynamic_batching.preferred_batch_size) == [8]
    none = config(set_fields(text, Setting(2, 8, 0, 1, preferred=()).changes(setting_of(config())), where="c"))
    assert list(none.message().dynamic_batching.preferred_batch_size) == []
    assert none.message().HasField("dynamic_batching")
    assert Space.of(config(), Bounds(4, 4, 16), CURVE, latency_ns=None).axes["preferred"] == (None,)


def test_a_part_keeps_the_batch_that_its_ensemble_needs() -> None:
    space = Space.of(config(), Bounds(4, 100, 64, least_batch=4), CURVE, latency_ns=None)
    assert space.axes["max_batch_size"] == (4, 8)


def test_what_was_left_out_is_named_with_its_reason() -> None:
    space = Space.of(config(), Bounds(4, 100, 64), CURVE, latency_ns=20e6, search=("max_batch_size", "instances"))
    said = list(left_out(space, CURVE, {Setting(2, 8, 0, 1)}, ("max_batch_size", "instances"), config()))
    assert "queue_delay, preferred, threads: not among what was to be searched (--search)" in said
    assert "max_batch_size 1, 2, 4: the search did not get there" in said
    assert any(text.startswith("batches of 16: one takes longer than the limit") for text in said)


def test_a_refusal_names_a_model_whose_configuration_has_no_name() -> None:
    nameless = parse_config('backend: "python" model_transaction_policy { decoupled: true }')
    with pytest.raises(UsageError, match="repeat is decoupled"):
        setting_of(nameless, "repeat")
