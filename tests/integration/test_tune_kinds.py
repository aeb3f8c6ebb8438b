"""`tune` of ensembles, of several models together, for energy; changing answers; instances in place."""

from __future__ import annotations

import contextlib
import http.server
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from support.serving import SCALING_CONFIG, onnx_model, running_server, scaling_model, write_model

from repo_manager.accuracy.evaluate import AccuracyOptions
from repo_manager.errors import GateError, UsageError
from repo_manager.loadtest.compare import ComparePlan, compare_together
from repo_manager.loadtest.judge import parse_slo
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.tuning.result import TuneOptions
from repo_manager.tuning.run import tune, tuning_run
from repo_manager.tuning.scratch import CANDIDATE, TODAY, copies_of
from repo_manager.tuning.space import Setting
from repo_manager.tuning.subjects import read_subjects

pytestmark = [pytest.mark.integration, pytest.mark.slow]
GATES = (parse_slo("p50<2s"),)
ENSEMBLE = """
platform: "ensemble"
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: 4 }
output { name: "y" data_type: TYPE_FP32 dims: 4 }
ensemble_scheduling {
  step {
    model_name: "first" model_version: -1
    input_map { key: "x" value: "x" } output_map { key: "y" value: "between" }
  }
  step {
    model_name: "second" model_version: -1
    input_map { key: "x" value: "between" } output_map { key: "y" value: "y" }
  }
}
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "models"
    write_model(root, "first", SCALING_CONFIG, {1: scaling_model(2.0), 2: scaling_model(5.0)})
    write_model(root, "second", SCALING_CONFIG, {1: scaling_model(3.0)})
    (write_model(root, "whole", ENSEMBLE, {}) / "1").mkdir()
    return root


def options(**more: object) -> TuneOptions:
    return TuneOptions(**{"gates": GATES, "budget_s": 8.0, "search": ("instances",), **more})  # type: ignore[arg-type]


def test_an_ensemble_is_tuned_by_its_parts_under_its_own_load(models: Path) -> None:
    with tuning_run(models, {"whole": 1}, options(rate=40.0, budget_s=100.0)) as run:
        today = run.evaluate(run.subjects.today(), None, 0.0)
        more = run.evaluate({**today.state, "second": Setting(2, 8, 0)}, today, 0.04, "second")
        served = {name: run.copies.named(CANDIDATE, name) for name in run.subjects.models}
        counts = {
            name: run.copies.client.model_config(served[name]).instance_group[0].count for name in ("first", "second")
        }
    assert {name: subject.version for name, subject in run.subjects.models.items()} == {
        "first": 2,
        "second": 1,
        "whole": 1,
    }
    assert today.value is not None
    assert set(today.busy) == {"first", "second"}
    assert min(today.busy.values()) > 0
    assert more.label == "first: 1 instance, batch 8, delay 0 µs; second: 2 instances, batch 8, delay 0 µs"
    assert counts == {"first": 1, "second": 2}


def test_an_ensemble_is_copied_to_a_server_elsewhere(models: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with (
        running_server(ServerOptions(str(tmp_path / "other"), auto_complete=False)) as server,
        contextlib.ExitStack() as stack,
    ):
        subjects = read_subjects(models, {"whole": 1}, {}, stack)
        access = server.client_options
        copies = stack.enter_context(copies_of(subjects, url=server.grpc_url, access=access))
        copies.load(CANDIDATE, {"second": {"instance_group.count": "2"}})
        names = [copies.named(CANDIDATE, name) for name in ("first", "second", "whole")]
        with TritonClient.connect(server.grpc_url, access) as client:
            answer = client.infer(names[2], None, {"x": np.ones((1, 4), np.float32)})
            assert answer["y"][0, 0] == 15.0
            assert client.model_config(names[1]).instance_group[0].count == 2
            stack.close()
            assert not any(client.model_ready(name) for name in names)


def test_models_together_are_under_load_at_once_and_compared_at_once(models: Path) -> None:
    sought = options(gates=(parse_slo("p50<20s"),), mix={"first": 1.0, "second": 3.0}, budget_s=100.0)
    with tuning_run(models, {"first": 1, "second": 1}, sought) as run:
        run.copies.load(CANDIDATE, {})
        held = run.loads.rates_together(CANDIDATE, (40.0, 40.0))
        assert held.value == 40.0, held.reason
        assert {level["model"]: level["level"] for level in held.levels} == {"first": 10.0, "second": 30.0}
        assert set(held.busy) == {"first", "second"}
        run.copies.load(TODAY, {})
        couples = [
            tuple(run.loads.options_of(copy, name, concurrency=(2,)) for copy in (TODAY, CANDIDATE))
            for name in ("first", "second")
        ]
        compared = compare_together(couples, plan=ComparePlan(pairs=6, block_s=0.5, settle_s=0.1))
    assert [each.b.model for each in compared] == [run.copies.named(CANDIDATE, name) for name in ("first", "second")]
    assert all(len(each.ratios["throughput"]) == 6 for each in compared)


class _Metrics(http.server.BaseHTTPRequestHandler):
    """A server's metrics with a joule per execution of a model, so fewer and larger batches save energy."""

    source = ""

    def do_GET(self) -> None:
        with urllib.request.urlopen(self.source, timeout=10) as answer:
            text = answer.read().decode()
        lines = [line for line in text.splitlines() if line.startswith("nv_inference_exec_count{")]
        joules = sum(float(line.rpartition(" ")[2]) for line in lines)
        body = f'{text}\nnv_energy_consumption{{gpu_uuid="G"}} {joules}\n'.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def metrics_of(url: str) -> Iterator[str]:
    handler = type("Handler", (_Metrics,), {"source": url})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/metrics"
        finally:
            server.shutdown()
            thread.join()


def test_for_energy_larger_batches_win_where_executions_cost(models: Path, tmp_path: Path) -> None:
    """Requests that wait for others share an execution and its joule."""
    (tmp_path / "other").mkdir()
    with (
        running_server(ServerOptions(str(tmp_path / "other"), auto_complete=False)) as server,
        metrics_of(server.metrics_url) as metrics_url,
    ):
        sought = options(
            objective="energy",
            rate=50.0,
            budget_s=60.0,
            url=server.grpc_url,
            access=server.client_options,
            load={"metrics_url": metrics_url},
        )
        with tuning_run(models, {"first": 1}, sought) as run:
            today = run.evaluate({"first": Setting(1, 8, 0)}, None, 0.0)
            waiting = run.evaluate({"first": Setting(1, 8, 100_000)}, today, 0.04)
            assert waiting.is_better
            assert today.value is not None
            assert waiting.value is not None
            assert waiting.value < today.value / 1.5


def test_where_nothing_reports_energy_that_is_said(models: Path) -> None:
    with pytest.raises(UsageError, match="neither the server's metrics nor NVML"):
        tune(models, {"first": 1}, options(objective="energy", rate=100.0, budget_s=100.0))


def test_a_setting_that_changes_the_answers_is_out_and_instances_change_in_place(models: Path) -> None:
    """The model subtracts the mean of its batch, so a request that comes alone gets zeros."""
    mixing = onnx_model(
        [
            helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["x", "m"], ["y"]),
        ],
        {"x": (TensorProto.FLOAT, ["N", 4])},
        {"y": (TensorProto.FLOAT, ["N", 4])},
    )
    config = SCALING_CONFIG.replace("max_batch_size: 8", "max_batch_size: 1") + (
        'parameters { key: "intra_op_thread_count" value { string_value: "1" } }\n'
    )
    write_model(models, "mixing", config, {1: mixing})
    with tuning_run(models, {"mixing": 1}, options(rate=40.0, budget_s=100.0)) as run:
        today = run.evaluate({"mixing": Setting(1, 1, 0, 1)}, None, 0.0)
        assert today.value is not None
        out = run.evaluate({"mixing": Setting(1, 8, 0, 1)}, today, 0.04)
        assert not out.is_better
        assert "its answers differ from today's" in out.reason
        assert "y is off by" in out.reason
        served = run.copies.named(CANDIDATE, "mixing")
        run.copies.load(CANDIDATE, {})
        run.copies.client.infer(served, None, {"x": np.ones((1, 4), np.float32)})
        run.copies.load(CANDIDATE, {"mixing": {"instance_group.count": "2"}})
        assert run.copies.client.model_config(served).instance_group[0].count == 2
        assert sum(each.success_count for each in run.copies.client.statistics(served)) == 1  # a load resets it


def test_settings_are_scored_as_served_and_one_below_the_limit_is_out(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's function says 1.0 of today's setting, and less of the one after it."""
    lines = (
        "import numpy as np",
        "scores = [1.0, 0.5]",
        "def score(run):",
        "    assert run({'x': np.ones((1, 4), np.float32)})['y'].tolist() == [[2.0] * 4]",
        "    return scores.pop(0)",
    )
    (tmp_path / "scored_as_served.py").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    limits = AccuracyOptions("scored_as_served:score", max_drop=0.1)
    with tuning_run(models, {"first": 1}, options(rate=40.0, budget_s=100.0, accuracy=limits)) as run:
        today = run.evaluate({"first": Setting(1, 8, 0)}, None, 0.0)
        out = run.evaluate({"first": Setting(2, 8, 0)}, today, 0.04)
    assert today.value is not None
    assert not out.is_better
    assert out.reason.startswith("its accuracy is below the limit:")
    assert "0.5, today's 1; a drop of 0.5 > 0.1" in out.reason


@pytest.mark.parametrize(("labels", "accuracy"), [(0, 1.0), (1, None)])
def test_todays_setting_is_held_against_the_limit_first(
    labels: int, accuracy: float | None, models: Path, tmp_path: Path
) -> None:
    """The largest of four inputs is the first one, so it is the class."""
    images = np.tile(np.array([4, 1, 2, 3], np.float32), (4, 1))
    np.savez(tmp_path / "held.npz", x=images, labels=np.full(4, labels))
    sought = options(
        rate=20.0,
        search=("queue_delay",),
        budget_s=1.0,
        accuracy=AccuracyOptions(f"{tmp_path / 'held.npz'}:labels", min_accuracy=0.9),
    )
    if accuracy is None:
        with pytest.raises(GateError, match=r"first:1: today's configuration is below the limit: .* 0 < 0.9"):
            tune(models, {"first": 1}, sought)
    else:
        found = tune(models, {"first": 1}, sought).accuracy
        assert found is not None
        assert (found.value, found.samples, found.passed) == (accuracy, 4, True)
