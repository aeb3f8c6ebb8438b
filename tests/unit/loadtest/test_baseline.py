from __future__ import annotations

import dataclasses
import json

import pytest

from repo_manager.errors import InputError
from repo_manager.gates import Outcome
from repo_manager.loadtest.judge import compare_load_tests, judge_against
from repo_manager.loadtest.merge import read_report
from repo_manager.loadtest.result import ClientUse, Intervals, Latency, LoadPoint, LoadTestReport
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.stats.intervals import Interval
from repo_manager.types import as_json

FACTS = ServedModelFacts(
    "grpc://a:1", "grpc", "triton", "2.51.0", "m", "1", "python", 0, (), (), False, False, False, False
)


def report(factor=1.0, spread=0.01, level=4.0, **changes):
    def around(value):
        return Interval(value * (1 - spread), value * (1 + spread))

    values = {"p50_ns": 1e6 * factor, "p99_ns": 3e6 * factor}
    point = LoadPoint(
        "concurrency", level, "stable", "", 1, ClientUse("native"), duration_s=3.0, requests=1000,
        throughput_per_s=1000 / factor, latency=Latency(**{name: round(value) for name, value in values.items()}),
        intervals=Intervals(
            throughput_per_s=around(1000 / factor), **{name: around(value) for name, value in values.items()}
        ),
    )  # fmt: skip
    return LoadTestReport(FACTS, {}, (dataclasses.replace(point, **changes),), "now", 1.0, {})


def saved(tmp_path, document):
    (tmp_path / "base.json").write_text(json.dumps(as_json(document)))
    return read_report(tmp_path / "base.json")


@pytest.mark.parametrize(
    ("factor", "spread", "outcome"),
    [
        (1.0, 0.01, "pass"),
        (0.5, 0.01, "pass"),
        (1.3, 0.01, "fail"),
        (1.05, 0.01, "inconclusive"),
        (1.0, 0.2, "inconclusive"),
    ],
)
def test_a_regression_is_seen_through_the_noise(tmp_path, factor, spread, outcome):
    verdict = judge_against(report(factor, spread), saved(tmp_path, report(1.0, spread)))
    assert verdict.outcome.value == outcome
    assert len(verdict.results) == 3


def test_a_failed_level_is_a_regression(tmp_path):
    new = report(outcome="failed", reason="gone")
    assert judge_against(new, saved(tmp_path, report())).outcome is Outcome.FAIL


def test_baselines_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="no load level in common"):
        judge_against(report(), saved(tmp_path, report(level=5.0)))
    for text in ("", "[]", '{"points": []}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=r"bad\.json"):
            read_report(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text('{"schema_version": 99, "points": []}')
    with pytest.raises(InputError, match="99"):
        read_report(tmp_path / "bad.json")


@pytest.mark.parametrize(("factor", "word"), [(1.3, "30.0% worse"), (0.5, "50.0% better"), (1.0, "as before")])
def test_a_change_is_named_by_its_direction(tmp_path, factor, word):
    results = judge_against(report(factor), saved(tmp_path, report()), tolerance=0.05).results
    assert any(result.why.startswith(word) for result in results), [result.why for result in results]


def test_a_change_of_throughput_is_the_share_of_the_throughput(tmp_path):
    """Twice as many are 100 % better, half as many 50 % worse; the limit is a share of the earlier number, too."""
    for factor, word in ((0.5, "100.0% better"), (2.0, "50.0% worse")):
        throughput = judge_against(report(factor), saved(tmp_path, report())).results[0]
        assert throughput.why.startswith(word), throughput.why
    fallen = judge_against(report(1 / 0.89, spread=0.0001), saved(tmp_path, report(spread=0.0001)), tolerance=0.1)
    assert fallen.results[0].outcome is Outcome.FAIL
    held = judge_against(report(1 / 0.91, spread=0.0001), saved(tmp_path, report(spread=0.0001)), tolerance=0.1)
    assert held.results[0].outcome is Outcome.PASS


def test_two_load_tests_differ_by_words_of_their_own():
    """Outside the noise it is better or worse, within it no difference; nothing is said of other levels."""

    def outcomes(before, after):
        return {each.outcome for each in compare_load_tests(before, after).differences}

    fast, slow = report(0.5, 0.01), report(1.0, 0.01)
    assert (outcomes(slow, fast), outcomes(fast, slow)) == ({"better"}, {"worse"})
    assert outcomes(report(1.02, 0.1), report(1.0, 0.1)) == {"no difference shown"}
    throughput = compare_load_tests(slow, fast).differences[0]
    assert (throughput.before, throughput.after) == ("1000 /s", "2000 /s")
    unknown = report(1.0, intervals=Intervals())
    assert outcomes(unknown, report(0.5, intervals=Intervals())) == {"no difference shown"}
    assert outcomes(report(level=5.0), slow) == set()
    elsewhere = dataclasses.replace(fast, options={"batch_size": 8}, environment={"machine": "a"})
    assert compare_load_tests(slow, elsewhere).notes == (
        "client machines differ: None and a",
        "option batch_size differ: None and 8",
    )
