from __future__ import annotations

import pytest

from repo_manager.errors import ConfigError
from repo_manager.triton_config.config import parse_config
from repo_manager.triton_config.fields import set_fields

ENSEMBLE = 'platform: "ensemble" ensemble_scheduling { step { model_name: "part" } }\n'
SEQUENCE = 'backend: "x" sequence_batching { direct { } }\n'
POLICY = 'backend: "x" version_policy { all { } }\n'


@pytest.mark.parametrize(
    ("text", "field", "value", "lost"),
    [
        (ENSEMBLE, "dynamic_batching.max_queue_delay_microseconds", "100", "ensemble_scheduling"),
        (ENSEMBLE, "dynamic_batching", "{}", "ensemble_scheduling"),
        (SEQUENCE, "dynamic_batching", "{}", "sequence_batching"),
        (SEQUENCE, "sequence_batching.oldest.max_candidate_sequences", "4", "sequence_batching.direct"),
    ],
)
def test_a_change_removes_nothing_that_it_does_not_name(text: str, field: str, value: str, lost: str) -> None:
    with pytest.raises(ConfigError, match=f"would remove {lost}: ") as caught:
        set_fields(text, {field: value}, where="f")
    assert f"--clear {lost}" in (caught.value.hint or "")
    changed = parse_config(set_fields(text, {field: value, lost: None}, where="f")).message()
    assert changed != parse_config(text).message()


def test_a_change_within_the_chosen_field_is_free() -> None:
    text = set_fields(SEQUENCE, {"sequence_batching.direct.minimum_slot_utilization": "0.5"}, where="f")
    assert parse_config(text).message().sequence_batching.direct.minimum_slot_utilization == 0.5
    assert set_fields(ENSEMBLE, {"dynamic_batching": None}, where="f") == ENSEMBLE
    policy = set_fields(POLICY, {"version_policy.latest.num_versions": "2"}, where="f")
    assert parse_config(policy).message().version_policy.latest.num_versions == 2
