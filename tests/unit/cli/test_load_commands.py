"""loadtest, loadtest merge and compare as they are written on the command line; servers are in tests/integration."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from repo_manager.cli.compare import _couples
from repo_manager.cli.level_options import _moment
from repo_manager.cli.loadtest import _image_options
from repo_manager.cli.main import app
from repo_manager.errors import InputError, UsageError
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.result import ClientUse, Latency, LoadPoint, LoadTestReport
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.request_data.tensors import InputFacts
from repo_manager.stats.histogram import Histogram
from repo_manager.types import as_json

FACTS = ServedModelFacts(
    "grpc://a:1", "grpc", "triton", "2.51.0", "m", "1", "b", 8, (InputFacts("x", "FP32", (4,)),), ("y",),
    False, True, False, False,
)  # fmt: skip


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path):
    histogram = Histogram.of([1_000_000] * 900 + [5_000_000] * 100)
    point = LoadPoint(
        "concurrency", 4, "stable", "why", 1, ClientUse("native"), duration_s=10.0, requests=1000,
        throughput_per_s=100.0, latency=Latency.of(histogram), histogram=histogram.to_json(), measured_from=1000.0,
    )  # fmt: skip
    paths = []
    for number in range(2):
        shifted = dataclasses.replace(point, measured_from=1000.0 + number / 10)
        report = LoadTestReport(FACTS, {"seed": number}, (shifted,), "now", 12.0, {"cpu": "c"})
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(as_json(report)))
    return paths


@pytest.mark.parametrize("command", [("loadtest", "m"), ("compare", "m:1", "m:2"), ("tune", "m", "--slo", "p99<1s")])
def test_a_second_file_of_requests_is_not_dropped_in_silence(command):
    ended = run(*command, "--input-data", "a.json", "--input-data", "b.json")
    assert isinstance(ended.exception, UsageError) or ended.exit_code == 2
    assert "given 2 times: a.json, b.json" in str(ended.exception) + ended.output


def test_merge_writes_the_whole_and_judges_it(files, tmp_path):
    merged, page = tmp_path / "merged.json", tmp_path / "merged.html"
    ended = run("loadtest", "merge", *files, "-o", merged, "--report", page, "--slo", "throughput>150", "--json", "-q")
    assert ended.exit_code == 0, ended.output
    document = json.loads(merged.read_text())
    assert document["points"][0]["throughput_per_s"] == 200
    assert document["points"][0]["level"] == 8
    assert json.loads(ended.stdout)["verdict"]["outcome"] == "pass"
    assert "Merged from 2" in page.read_text()


def test_merge_says_what_is_wrong(files, tmp_path):
    for arguments, error in (
        ((files[0], files[0]), InputError),
        ((files[0], tmp_path / "none.json"), InputError),
        ((*files, "-o", tmp_path / "merged.html"), UsageError),
        ((*files, "--slo", "p99"), UsageError),
    ):
        assert isinstance(run("loadtest", "merge", *arguments).exception, error)


def test_merge_is_a_word_of_its_own_and_a_model_is_not():
    assert "NAME[:VERSION]" in run("loadtest", "--help").output
    assert "loadtest run" not in run("loadtest", "--help").output
    assert "FILES..." in run("loadtest", "merge", "--help").output
    ended = run("loadtest", "digits", "--slo", "p99")
    assert isinstance(ended.exception, UsageError)
    assert run("loadtest").exit_code == 2


def test_moments():
    assert _moment(None) is None
    assert _moment("1000.5") == 1000.5
    assert _moment("1970-01-01T00:00:10Z") == 10.0
    assert _moment("1970-01-01T02:00:10+02:00") == 10.0
    for text in ("soon", "1970-01-01T00:00:10"):
        with pytest.raises(UsageError, match="zone"):
            _moment(text)


def test_image_options():
    assert _image_options(["mean=0.5,0.5,0.5", "color = bgr"]) == {"mean": "0.5,0.5,0.5", "color": "bgr"}
    assert _image_options(None) == {}
    with pytest.raises(UsageError, match="KEY=VALUE"):
        _image_options(["bgr"])


def test_controls_are_the_reference_of_the_model_that_they_belong_to():
    assert _couples("a", "b:2", []) == [("a", "b:2")]
    assert _couples("a:3", None, ["dense", "noflag"]) == [("a__dense", "a:3"), ("a__noflag", "a:3")]
    assert _couples("a", "b", ["dense", "other"]) == [("a", "b"), ("b__dense", "b"), ("other", "b")]
    with pytest.raises(UsageError, match="needs a second model"):
        _couples("a", None, [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("loadtest", "m", "--url", "grpc://127.0.0.1:9", "--tls-ca", "x.pem"), "TLS"),
        (("loadtest", "m", "--url", "grpc://127.0.0.1:9", "--image", "x"), "KEY=VALUE"),
        (("loadtest", "m", "--url", "grpc://127.0.0.1:9", "--start-at", "x"), "start-at"),
        (("loadtest", "m", "--url", "grpc://127.0.0.1:9", "--parameter", "sequence_id=3"), "expected KEY=VALUE"),
        (("loadtest", "m", "--url", "grpc://127.0.0.1:9", "--golden"), "no golden sample"),
        (("loadtest", "m", "--url", "grpc://127.0.0.1:9", "--sequence-length", "9:3"), "sequence length"),
        (
            ("loadtest", "m", "--url", "grpc://127.0.0.1:9", "--until", "noon"),
            "'noon' cannot be read; expected gates, or 's",
        ),
        (("loadtest", "m", "--url", "grpc://127.0.0.1:9", "--until", "throughput>5"), "no load can be searched"),
        (("loadtest", "m", "--url", "http://127.0.0.1:9", "--streaming"), "part of gRPC"),
        (("compare", "m", "--url", "grpc://127.0.0.1:9"), "needs a second model"),
        (("compare", "m", "n", "--url", "grpc://127.0.0.1:9", "--tls-ca", "x.pem"), "TLS"),
    ],
)
def test_each_option_is_read(arguments, words):
    ended = run(*arguments)
    assert isinstance(ended.exception, UsageError)
    assert words in str(ended.exception)


@pytest.mark.parametrize(
    ("command", "option", "text", "choices"),
    [
        ("loadtest", "--shared-memory", "gpu", "'none', 'system', 'cuda'"),
        ("compare", "--shared-memory", "gpu", "'none', 'system', 'cuda'"),
        ("loadtest", "--arrival", "replay", "'constant', 'poisson', 'burst', 'ramp'"),
        ("loadtest", "--client", "ab", "'auto', 'native', 'perf_analyzer'"),
        ("loadtest", "--protocol", "ftp", "'grpc', 'http'"),
        ("loadtest", "--slo-over", "most", "'every', 'some'"),
    ],
)
def test_a_closed_choice_names_its_values(command, option, text, choices):
    ended = run(command, "m", "--url", "grpc://127.0.0.1:9", option, text)
    assert ended.exit_code == 2
    assert f"{text!r} is not one of {choices}" in re.sub(r"[\s│]+", " ", ended.output)


LOAD_OPTIONS = {
    "--concurrency": ("2,3", "concurrency", (2, 3)),
    "--rate": ("7", "rate", (7.0,)),
    "--arrival": ("poisson", "arrival", "poisson"),
    "--burst-size": ("3", "burst_size", 3),
    "--ramp-from": ("5", "ramp_from_per_s", 5.0),
    "--replay": ("moments.json", "replay", Path("moments.json")),
    "--until": ("saturation", "until_saturation", True),
    "--resolution": ("10", "resolution", 0.1),
    "--protocol": ("grpc", "protocol", "grpc"),
    "--timeout": ("3", "timeout_s", 3.0),
    "--client": ("perf_analyzer", "client", "perf_analyzer"),
    "--batch-size": ("4", "batch_size", 4),
    "--shape": ("x:3,4", "shapes", {"x": (3, 4)}),
    "--input-data": ("d.npz", "data", Path("d.npz")),
    "--image": ("mean=0.5", "image", {"mean": "0.5"}),
    "--compression": ("gzip", "compression", "gzip"),
    "--parameter": ("priority=1", "parameters", {"priority": 1}),
    "--sequences": ("9", "sequences", 9),
    "--sequence-length": ("5:7", "sequence_length", "5:7"),
    "--streaming": (None, "streaming", True),
    "--no-streaming": (None, "streaming", False),
    "--distinct": ("9", "distinct", 9),
    "--shared-memory": ("system", "shared_memory", "system"),
    "--warmup": ("0.5", "warmup_s", 0.5),
    "--window": ("2", "window_s", 2.0),
    "--stability": ("20", "stability", 0.2),
    "--duration": ("4", "duration_s", 4.0),
    "--request-count": ("11", "request_count", 11),
    "--seed": ("6", "seed", 6),
    "--workers": ("2", "workers", 2),
    "--metrics-url": ("http://b:1/metrics", "metrics_url", "http://b:1/metrics"),
    "--start-at": ("99", "start_at", 99.0),
    "--allow-zeros": (None, "allow_zeros", True),
}
# Options beside the measurement itself; each has a test of its own.
ELSEWHERE = {"--wide", "--context",
    "--tls-ca", "--tls-cert", "--tls-key", "--tls-server-name", "--header-file", "--token-file", "--url", "--to",
    "--golden", "--keep",
    "--repository", "--slo", "--slo-over", "--baseline", "--tolerance", "--report", "--json", "--quiet", "--help",
}  # fmt: skip


def test_every_option_of_a_load_test_has_a_case():
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", run("loadtest", "--help").output))
    assert named - ELSEWHERE == set(LOAD_OPTIONS)


@pytest.mark.parametrize("option", LOAD_OPTIONS)
def test_each_option_of_a_load_test_reaches_it(option, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("moments.json", "d.npz"):
        Path(name).touch()
    text, attribute, expected = LOAD_OPTIONS[option]
    taken = []

    def take(options, progress):
        taken.append(options)
        raise UsageError("far enough")

    monkeypatch.setattr("repo_manager.cli.loadtest.run_load_test", take)
    values = [] if text is None else [text]
    ended = run("loadtest", "m", "--url", "grpc://127.0.0.1:9", option, *values)
    assert "far enough" in str(ended.exception), ended.output
    assert getattr(taken[0], attribute) == expected
    assert expected != getattr(LoadTestOptions("grpc://127.0.0.1:9", "m", concurrency=(1,)), attribute)
