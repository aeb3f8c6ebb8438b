"""A model's record: readable for older and newer releases."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from repo_manager.repository.state import KeptLoadTest, ModelState, current_version, previous_version, record_of
from repo_manager.repository.state_file import format_entry, parse_entry

STATE = (
    ModelState()
    .deployed(1)
    .deployed(2)
    .recorded(record_of("deploy", 2, [1], "grpc://a:1"))
    .deployed(None)
    .recorded(record_of("undeploy", None, [2], "grpc://a:1", outcome="undone", reason="it was busy"))
)


def test_a_model_out_of_service_has_no_current_version_and_goes_back_to_the_last_one() -> None:
    assert (current_version(STATE), STATE.is_deployed, previous_version(STATE, (1, 2))) == (None, False, 2)
    assert STATE.deployed(None) == STATE, "a repetition changes nothing"
    assert ModelState().deployed(None) == ModelState(), "what was never deployed is not undeployed"
    assert current_version(STATE.deployed(1)) == 1


def test_older_releases_read_numbers_and_lose_nothing() -> None:
    entry = format_entry(STATE)
    assert [int(each["version"]) for each in entry["deployments"]] == [1, 2, 0]
    assert parse_entry(entry) == STATE
    older = {key: value for key, value in entry.items() if key != "history"}
    assert parse_entry(older).deployments == STATE.deployments
    assert "history" not in format_entry(parse_entry(older))


def test_fields_of_a_newer_release_stay() -> None:
    entry = format_entry(STATE)
    newer: dict[str, Any] = {**entry, "history": [{**entry["history"][0], "ticket": "X-1"}]}
    assert format_entry(parse_entry(newer))["history"][0]["ticket"] == "X-1"


@pytest.mark.parametrize("damage", [{"version": "two"}, {"before": 3}, {"before": ["x"]}])
def test_a_damaged_record_is_an_error(damage: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        parse_entry({"history": [{"at": "t", **damage}]})


def test_the_history_is_bounded() -> None:
    state = ModelState()
    for number in range(150):
        state = state.recorded(dataclasses.replace(STATE.history[0], version=number))
    assert (len(state.history), state.history[-1].version) == (100, 149)


def test_load_tests_are_kept_by_version_and_bounded() -> None:
    state = ModelState()
    for number in range(60):
        state = state.measured(KeptLoadTest(number // 6 + 1, {"started": str(number)}))
    assert parse_entry(format_entry(state)) == state
    of_first = [test.report["started"] for test in state.load_tests if test.version == 10]
    assert (len(state.load_tests), of_first) == (40, ["55", "56", "57", "58", "59"])
    assert "load_tests" not in format_entry(ModelState())
    with pytest.raises((TypeError, ValueError, KeyError)):
        parse_entry({"load_tests": [{"version": 1}]})
