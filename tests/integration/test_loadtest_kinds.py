"""Load on sequences, decoupled models and ensembles of a real tritonserver. Each model notes its requests."""

from __future__ import annotations

import collections
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from support.json_documents import check_document
from support.serving import running_server

from repo_manager.errors import ServerError, UsageError
from repo_manager.loadtest.compare import ComparePlan, compare
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.result import LoadTestReport
from repo_manager.loadtest.run import run_load_test
from repo_manager.report.load_html import load_page
from repo_manager.report.load_tables import load_view
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer

pytestmark = [pytest.mark.integration, pytest.mark.slow]

MODEL = """
import json, time
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def initialize(self, args):
        self.log = open(f"{folder}/{{args['model_name']}}.jsonl", "a", buffering=1)

    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb.get_input_tensor_by_name(request, "x").as_numpy()
            {body}
        return answers
"""
GOOD = "answers.append(pb.InferenceResponse([pb.Tensor('y', x)]))"
SEQUENCE = f"""flag = lambda name: pb.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)[0]
            if flag("READY"):
                row = [int(flag("ID")), bool(flag("START")), bool(flag("END")), float(x.reshape(-1)[0])]
                self.log.write(json.dumps(row) + chr(10))
            {GOOD}"""
CHOOSY = f"""if x.reshape(-1)[0] != 3:
                answers.append(pb.InferenceResponse(error=pb.TritonError("out of the vocabulary")))
                continue
            {GOOD}"""
DECOUPLED = """sender, answers = request.get_response_sender(), None
            for number in range(int(x.reshape(-1)[0])):
                time.sleep(0.01)
                sender.send(pb.InferenceResponse([pb.Tensor("y", x)]))
            sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)"""
IO = """
input [{ name: "x" data_type: TYPE_FP32 dims: [1] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [1] }]
"""
CONFIG = 'backend: "python"\nmax_batch_size: 4\ninstance_group [{ kind: KIND_CPU count: 1 }]\n' + IO
BATCHING = """
sequence_batching {
  max_sequence_idle_microseconds: 20000000
  control_input [
    { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] } },
    { name: "END" control { kind: CONTROL_SEQUENCE_END int32_false_true: [0, 1] } },
    { name: "READY" control { kind: CONTROL_SEQUENCE_READY int32_false_true: [0, 1] } },
    { name: "ID" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_INT32 } }
  ]
  oldest { max_candidate_sequences: 4 }
}
"""

ENSEMBLE = """
platform: "ensemble"
max_batch_size: 4
input [{{ name: "x" data_type: TYPE_FP32 dims: [1] }}]
output [{{ name: "y" data_type: TYPE_FP32 dims: [1] }}]
ensemble_scheduling {{ step [
  {{ model_name: "{first}" model_version: -1
     input_map {{ key: "x" value: "x" }} output_map {{ key: "y" value: "m" }} }},
  {{ model_name: "{second}" model_version: -1
     input_map {{ key: "x" value: "m" }} output_map {{ key: "y" value: "y" }} }}
] }}
"""


def write_model(repository: Path, name: str, body: str | None, config: str) -> None:
    (repository / name / "1").mkdir(parents=True)
    if body is not None:
        (repository / name / "1" / "model.py").write_text(MODEL.format(folder=repository.parent, body=body))
    (repository / name / "config.pbtxt").write_text(config)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EmbeddedServer, Path]]:
    folder = tmp_path_factory.mktemp("kinds")
    repository = folder / "repository"
    write_model(repository, "counted", SEQUENCE, CONFIG + BATCHING)
    write_model(repository, "streams", DECOUPLED, CONFIG + "model_transaction_policy { decoupled: true }\n")
    write_model(repository, "slow", f"time.sleep(0.01)\n            {GOOD}", CONFIG)
    write_model(repository, "choosy", CHOOSY, CONFIG)
    write_model(repository, "quick", GOOD, CONFIG)
    write_model(repository, "inner", None, ENSEMBLE.format(first="quick", second="slow"))
    write_model(repository, "outer", None, ENSEMBLE.format(first="inner", second="quick"))
    models = ("counted", "streams", "outer", "choosy")
    with running_server(ServerOptions(repository=str(repository), load=models)) as running:
        yield running, folder


def load(target: tuple[EmbeddedServer, Path], protocol: str, model: str, **changes) -> LoadTestReport:
    server = target[0]
    url = server.grpc_url if protocol == "grpc" else server.http_url
    values = {"warmup_s": 0.2, "window_s": 0.3, "metrics_url": server.metrics_url, "duration_s": 0.9, **changes}
    return run_load_test(LoadTestOptions(url, model, **values))


def seen(folder: Path, model: str, since: int) -> dict[int, list[list[object]]]:
    """Return a model's requests by sequence, from line `since` on."""
    found: dict[int, list[list[object]]] = collections.defaultdict(list)
    for line in (folder / f"{model}.jsonl").read_text().splitlines()[since:]:
        identity, *rest = json.loads(line)
        found[identity].append(rest)
    return found


def lines(folder: Path, model: str) -> int:
    path = folder / f"{model}.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("level", [{"concurrency": (3,)}, {"rate": (60.0,), "sequences": 3}])
def test_every_sequence_reaches_the_model_whole_and_in_order(target, protocol, level, tmp_path):
    folder = target[1]
    data = tmp_path / "steps.json"
    data.write_text(json.dumps({"data": [[{"x": [1]}, {"x": [2]}, {"x": [3]}], [{"x": [7]}]]}))
    since = lines(folder, "counted")
    (point,) = load(target, protocol, "counted", data=data, **level).points
    sequences = list(seen(folder, "counted", since).values())
    assert (point.errors, len(sequences) > 6) == (0, True)
    whole = [[[True, False, 1.0], [False, False, 2.0], [False, True, 3.0]], [[True, True, 7.0]]]
    # The end of the load cut the last sequence of each slot short, and still ended it.
    cut = [rows for rows in sequences if rows not in whole]
    assert len(cut) <= 3
    assert all(rows[0][0] and rows[-1][1] and not any(row[1] for row in rows[:-1]) for rows in sequences)
    detail = point.details["sequence"]
    assert 0 < detail.count < point.requests
    assert detail.latency.max_ns >= point.latency.p50_ns


def test_a_live_sequence_keeps_one_stream_for_all_its_requests(target):
    since = lines(target[1], "counted")
    (point,) = load(target, "grpc", "counted", concurrency=(3,), sequence_length="4", streaming=True).points
    assert (point.errors, point.requests > 10, point.details["sequence"].count > 2) == (0, True, True)
    sequences = list(seen(target[1], "counted", since).values())
    assert sum(len(rows) < 4 for rows in sequences) <= 3
    assert all(rows[0][0] and rows[-1][1] and not any(row[1] for row in rows[:-1]) for rows in sequences)


def test_random_sequences_have_the_lengths_that_were_asked_for(target):
    since = lines(target[1], "counted")
    load(target, "grpc", "counted", concurrency=(2,), sequence_length="3:4")
    sequences = list(seen(target[1], "counted", since).values())
    assert {len(rows) for rows in sequences} - {1, 2} == {3, 4}
    assert sum(len(rows) < 3 for rows in sequences) <= 2


@pytest.mark.parametrize("streaming", [None, False])
def test_each_response_of_a_stream_is_timed(target, tmp_path, streaming):
    path = tmp_path / "d.npz"
    np.savez(path, x=np.array([[3.0], [3.0]], np.float32))
    (point,) = load(target, "grpc", "streams", concurrency=(1,), data=path, streaming=streaming).points
    first, between = point.details["first"], point.details["between"]
    assert abs(between.count - 2 * first.count) <= 3
    assert first.latency.min_ns >= 10e6
    assert between.latency.mean_ns >= 8e6
    assert point.latency.min_ns >= 30e6  # to the last response
    assert point.responses_per_s == pytest.approx(3 * point.throughput_per_s, rel=0.3)
    with pytest.raises(UsageError, match="over gRPC only"):
        load(target, "http", "streams", concurrency=(1,))


def test_an_ensemble_has_a_row_for_every_model(target):
    report = load(target, "http", "outer", concurrency=(2,))
    (point,) = report.points
    assert report.target.parts == ("inner", "quick", "slow")
    parts = point.server.parts
    assert list(parts) == ["inner", "quick", "slow"]
    assert parts["slow"].requests == pytest.approx(point.server.requests, rel=0.3, abs=8)
    assert parts["quick"].requests == pytest.approx(2 * point.server.requests, rel=0.3, abs=16)
    assert parts["slow"].compute_infer_ns >= 10e6
    assert ">slow<" in load_page(report)
    console = Console(file=io.StringIO(), width=140)
    console.print(*load_view(report))
    assert "Models of the ensemble" in console.file.getvalue()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_compressed_requests_are_answered(target, protocol, compression):
    (point,) = load(target, protocol, "quick", concurrency=(2,), duration_s=2.0, compression=compression).points
    assert (point.errors, point.requests > 10) == (0, True)
    with pytest.raises(UsageError, match="cannot be compressed in advance"):
        load(target, protocol, "counted", concurrency=(2,), compression=compression)


def test_a_model_that_refuses_random_inputs_is_sent_its_golden_sample(target):
    golden = ({"x": np.array([[3.0]], np.float32)},)
    report = load(target, "http", "choosy", concurrency=(1,), duration_s=2.0, fallback=golden)
    assert report.points[0].errors == 0
    assert any("out of the vocabulary" in note and "golden sample is sent" in note for note in report.notes)
    refused = load(target, "grpc", "choosy", concurrency=(1,), duration_s=2.0)
    assert refused.points[0].outcome == "failed"
    assert any("The requests were random" in note for note in refused.notes)


def test_sequence_models_are_compared_from_the_shell(target):
    words = ["compare", "counted", "counted", "--url", target[0].grpc_url, "-c", "2", "--pairs", "6", "--block", "0.2"]
    done = subprocess.run(
        [sys.executable, "-m", "repo_manager", *words, "--json", "-q"], capture_output=True, text=True, check=True
    )
    document = json.loads(done.stdout)
    check_document("compare", document)
    (comparison,) = document["comparisons"]
    assert (comparison["level"], comparison["a"]["sequence"]) == ("concurrency 2", True)


def test_a_comparison_of_a_model_that_refuses_random_inputs_says_what_to_send(target):
    options = LoadTestOptions(target[0].grpc_url, "choosy", concurrency=(1,))
    with pytest.raises(ServerError, match="choosy answered no request of a block well") as failed:
        compare(options, options, plan=ComparePlan(pairs=6, block_s=0.1, settle_s=0.0))
    assert "--input-data" in (failed.value.hint or "")
