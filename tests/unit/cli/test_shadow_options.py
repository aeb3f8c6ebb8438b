"""deploy's options of a trial: each is read, and refused where it is of no use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repo_manager.cli.durations import parse_duration
from repo_manager.cli.rollout_options import Trial
from repo_manager.errors import UsageError
from repo_manager.report.terminal import Terminal

Run = Callable[..., Any]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("30s", 30), ("1.5m", 90), ("2 h", 7200), ("500ms", 0.5), (" 1M ", 60), ("1d", 86400), (3.5, 3.5)],
)
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_duration(text, "--step") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "-1s", "1y", "s", "1m30s", "nan", "inf"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=f"--step {text}: expected a time"):
        parse_duration(text, "--step")


def test_a_duration_has_a_least_value() -> None:
    with pytest.raises(UsageError, match=r"--step 0s: expected 0\.1s or longer"):
        parse_duration("0s", "--step")
    assert parse_duration("0s", "--warmup", least=0.0) == 0.0


def test_an_age_needs_its_unit() -> None:
    with pytest.raises(UsageError, match="--older-than 30: expected a number and a unit such as 12h or 30d"):
        parse_duration("30", "--older-than", needs_unit=True)


def test_without_a_trial_nothing_is_asked_for() -> None:
    assert Trial().options(Terminal()) is None
    assert not Trial().is_wanted


def test_every_option_arrives() -> None:
    options = Trial(
        shadow=Path("r.jsonl"),
        shadow_rate=5.0,
        shadow_duration=120.0,
        canary="10%,100%",
        step=30.0,
        weights_file=Path("w.json"),
        gate=["p99<20ms", "errors<1%, drift<0.1"],
    ).options(Terminal())
    assert options is not None
    assert options.shadow is not None
    assert (options.shadow.requests, options.shadow.rate_per_s, options.shadow.duration_s) == (
        Path("r.jsonl"),
        5.0,
        120,
    )
    assert (options.steps, options.step_s, options.weights_file) == ((0.1, 1.0), 30.0, Path("w.json"))
    assert [gate.text for gate in options.all_gates] == ["p99<20ms", "errors<1%", "drift<0.1"]
    assert options.longest_s == 180.0


def test_without_a_gate_errors_are_judged() -> None:
    options = Trial(canary="10%,100%").options(Terminal())
    assert options is not None
    assert [gate.text for gate in options.all_gates] == ["errors<1%"]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--gate", "p99<1ms"], "--gate requires"),
        (["--weights-file", "w", "--shadow", "r.jsonl"], "--weights-file requires --canary"),
        (["--shadow-report", "s", "--canary", "5%,100%"], "--shadow-report requires --shadow"),
        (["--canary", "5%"], "are not shares that rise"),
        (["--canary", "5%,100%", "--step", "x"], "--step x"),
        (["--shadow", "r.jsonl", "--shadow-duration", "x"], "--shadow-duration x"),
        (["--shadow", "r.jsonl", "--gate", "speed>3"], "names 'speed'"),
        (["--canary", "5%,100%", "--gate", "p99<1ms"], "cannot tell p99<1ms"),
    ],
)
def test_what_is_of_no_use_is_refused_before_anything_is_done(run: Run, arguments: list[str], found: str) -> None:
    ended = run("deploy", "m:2", "-r", "nowhere", *arguments)
    assert ended.code == 2
    assert found in ended.err


def test_a_trial_is_for_one_server(run: Run, tmp_path: Path) -> None:
    (tmp_path / "models" / "m" / "1").mkdir(parents=True)
    (tmp_path / "models" / "m" / "config.pbtxt").write_text('name: "m" backend: "onnxruntime"\n')
    to = ["--to", "grpc://127.0.0.1:1", "--to", "grpc://127.0.0.1:2"]
    ended = run("deploy", "m:1", "-r", "models", "--canary", "5%,100%", *to)
    assert ended.code == 2
    assert "try a version on one server" in ended.err
