"""Load tests kept with versions, in show, history, diff, the card and --baseline."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from support.onnx_models import mlp
from typer.testing import CliRunner, Result

from repo_manager.cli.main import app
from repo_manager.errors import RepositoryError
from repo_manager.loadtest.result import ClientUse, Intervals, Latency, LoadPoint, LoadTestReport
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.pipeline.adding import AddOptions, add
from repo_manager.pipeline.load_records import keep_load_test, kept_load_tests
from repo_manager.precision import ConvertOptions
from repo_manager.repository.configuration import set_served_versions
from repo_manager.repository.remove import remove
from repo_manager.repository.tags import model_state
from repo_manager.stats.histogram import Histogram
from repo_manager.stats.intervals import Interval
from repo_manager.types import Precision

Measured = Callable[..., LoadTestReport]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    onnx.save(mlp(), tmp_path / "m.onnx")
    for precision in (Precision.FP32, Precision.FP16):
        options = AddOptions(precision=precision, convert=ConvertOptions())
        add(tmp_path / "m.onnx", "m", tmp_path / "models", options)
    return tmp_path / "models"


def measured(version: int, milliseconds: float = 2.0, *, outcome: str = "stable") -> LoadTestReport:
    histogram = Histogram.of([round(milliseconds * 1e6)] * 1000)
    per_s = 4000 / milliseconds
    numbers = {"p50_ns": milliseconds * 1e6, "p99_ns": milliseconds * 1e6, "throughput_per_s": per_s}
    point = LoadPoint(
        "concurrency", 4, outcome, "why", 1, ClientUse("native"), duration_s=3.0, requests=1000,
        throughput_per_s=per_s, latency=Latency.of(histogram), histogram=histogram.to_json(),
        intervals=Intervals(**{name: Interval(value * 0.99, value * 1.01) for name, value in numbers.items()}),
    )  # fmt: skip
    facts = ServedModelFacts("grpc://a:1", "grpc", "triton", "2.51.0", "m", str(version), "b", 8, (), (), *(False,) * 4)
    return LoadTestReport(facts, {"seed": 0}, (point,), f"2026-01-0{version}T00:00:00+00:00", 12.0, {"machine": "here"})


def test_two_versions_are_compared_without_files(repository: Path) -> None:
    assert json.loads(run("diff", "m:1", "m:2", "-r", repository, "--json").stdout)["load_tests"] is None
    assert keep_load_test(repository, measured(1, 2.0)) == 1
    keep_load_test(str(repository), measured(2, 1.0))
    document = json.loads(run("diff", "m:1", "m:2", "-r", repository, "--json").stdout)["load_tests"]
    assert {each["outcome"] for each in document["differences"]} == {"better"}
    text = run("diff", "m:1", "m:2", "-r", repository).output
    assert "2000 /s" in text
    assert "100.0% better" in text
    assert "one after the other" in text


def test_what_is_kept_is_shown_and_goes_with_its_version(repository: Path) -> None:
    for milliseconds in (2.0, 3.0):
        keep_load_test(repository, measured(1, milliseconds))
    kept = kept_load_tests(repository, "m", 1)
    assert [report.points[0].latency.p99_ns for report in kept] == [
        measured(1, each).points[0].latency.p99_ns for each in (2.0, 3.0)
    ]
    assert kept[0].points[0].histogram is None, "charts are not kept"
    assert kept_load_tests(repository, "m", 2) == ()
    for command in (("history", "m"), ("show", "m:1"), ("report", "m:1")):
        assert "concurrency 4" in run(*command, "-r", repository).output, command
    assert "concurrency 4" not in run("show", "m:2", "-r", repository).output
    document = json.loads(run("history", "m", "-r", repository, "--json").stdout)
    assert [test["target"]["version"] for test in document["load_tests"]] == ["1", "1"]
    set_served_versions(repository, "m", (2,))
    remove(repository, "m", 1, force=True)
    assert model_state(repository, "m").load_tests == ()


def test_what_cannot_be_kept_is_refused(repository: Path) -> None:
    with pytest.raises(RepositoryError, match="no version 7"):
        keep_load_test(repository, measured(7))
    with pytest.raises(RepositoryError, match="nothing of m:1 was measured"):
        keep_load_test(repository, measured(1, outcome="failed"))
    unnamed = dataclasses.replace(measured(1), target=dataclasses.replace(measured(1).target, version=""))
    with pytest.raises(RepositoryError, match="which version"):
        keep_load_test(repository, unnamed)
    assert model_state(repository, "m").load_tests == ()


def test_keep_and_baseline_are_looked_at_before_the_load(repository: Path) -> None:
    where = ("--url", "grpc://127.0.0.1:9", "-r", repository)
    missing = run("loadtest", "m:1", *where, "--baseline", "m:2").exception
    assert "no load test of m:2 is kept" in str(missing)
    unknown = run("loadtest", "other", *where, "--keep").exception
    assert isinstance(unknown, RepositoryError)


def test_a_result_is_shown_although_it_cannot_be_kept(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repo_manager.cli.loadtest.run_load_test", lambda *_, **__: measured(7))
    where = ("--url", "grpc://127.0.0.1:9", "-r", repository)
    ended = run("loadtest", "m", *where, "--keep")
    assert "concurrency 4" in ended.output
    assert "was not kept" in str(ended.exception)
    monkeypatch.setattr("repo_manager.cli.loadtest.run_load_test", lambda *_, **__: measured(1, 4.0))
    assert run("loadtest", "m:1", *where, "--keep").exit_code == 0
    monkeypatch.setattr("repo_manager.cli.loadtest.run_load_test", lambda *_, **__: measured(1, 8.0))
    judged = json.loads(run("loadtest", "m:1", *where, "--baseline", "m:1", "--json").stdout)
    assert judged["verdict"]["outcome"] == "fail"
