"""The embedded server's engine backends on a GPU, and the headline benchmark's smallest run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from repo_manager.engine.options import EngineOptions
from repo_manager.errors import ServerRefusedError
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.run import run_load_test
from repo_manager.pipeline.adding import Added, AddOptions, add
from repo_manager.repository.golden import read_golden
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.types import Precision

pytestmark = pytest.mark.gpu

WITHOUT = tuple(os.environ.get("REPO_MANAGER_WITHOUT_TACTICS", "").split())
HEADLINE = Path(__file__).parents[2] / "benchmarks" / "gpu" / "headline.py"


@pytest.fixture(scope="module")
def added(small: Path, library: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Added:
    root = tmp_path_factory.mktemp("models")
    engine = EngineOptions(without_tactics=WITHOUT)
    return add(small, "cnn", root, AddOptions(precision=Precision.FP16, backend=library.__name__, engine=engine))


@pytest.mark.usefixtures("device")
def test_an_engine_is_served_as_onnx_runtime_answers(added: Added) -> None:
    golden = read_golden(Path(str(added.path)) / "golden.npz")
    with EmbeddedServer(ServerOptions(repository=str(added.path.parent.parent))) as server:
        server.wait_ready(60)
        client = TritonClient.connect(server.grpc_url)
        client.load("cnn")
        for batch in (1, 3, 8):
            inputs = {name: np.concatenate([array] * batch) for name, array in golden.inputs.items()}
            outputs = client.infer("cnn", None, inputs)
            for name, wanted in golden.outputs.items():
                error = np.abs(outputs[name] - wanted).max() / np.abs(wanted).max()
                assert error <= added.golden.tolerance, (batch, name, error)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_inputs_come_from_memory_of_the_gpu(added: Added, protocol: str) -> None:
    root = added.path.parent.parent
    with EmbeddedServer(ServerOptions(repository=str(root))) as server:
        server.wait_ready(60)
        client = TritonClient.connect(server.grpc_url)
        client.load("cnn")
        url = server.grpc_url if protocol == "grpc" else server.http_url
        options = LoadTestOptions(url, "cnn", concurrency=(2,), request_count=50, shared_memory="cuda")
        report = run_load_test(options)
        assert [point.errors for point in report.points] == [0]
        assert client.registered_memory("cuda") == ()


@pytest.mark.usefixtures("device")
def test_requests_of_many_clients_do_not_mix(added: Added) -> None:
    golden = read_golden(Path(str(added.path)) / "golden.npz")
    ((name, array),) = golden.inputs.items()
    with EmbeddedServer(ServerOptions(repository=str(added.path.parent.parent))) as server:
        server.wait_ready(60)
        TritonClient.connect(server.grpc_url).load("cnn")
        scales = [1.0, 0.5, -1.0, 2.0]
        alone = [
            TritonClient.connect(server.grpc_url).infer("cnn", None, {name: array * np.float32(s)}) for s in scales
        ]
        wrong: list[str] = []

        def ask(scale: float, wanted: dict[str, np.ndarray]) -> None:
            client = TritonClient.connect(server.grpc_url)
            for _ in range(50):
                found = client.infer("cnn", None, {name: array * np.float32(scale)})
                for key, value in wanted.items():
                    if not np.allclose(found[key], value, atol=2e-2 * np.abs(value).max()):
                        wrong.append(f"{scale}: {key}")

        threads = [threading.Thread(target=ask, args=pair) for pair in zip(scales, alone, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


@pytest.mark.usefixtures("device")
def test_a_plan_of_another_version_is_refused_in_words(added: Added, tmp_path: Path, library: ModuleType) -> None:
    engine = next(name for name in added.files if name.endswith((".plan", ".engine")))
    root = tmp_path / "models"
    version = root / "cnn" / "1"
    version.mkdir(parents=True)
    (root / "cnn" / "config.pbtxt").write_text(added.config)
    data = bytearray((Path(str(added.path)) / engine).read_bytes())
    data[24] = 99  # the library's major version
    (version / engine).write_bytes(data)
    with EmbeddedServer(ServerOptions(repository=str(root))) as server:
        server.wait_ready(60)
        with pytest.raises(ServerRefusedError, match="was built with"):
            TritonClient.connect(server.grpc_url).load("cnn")


def test_the_headline_benchmark_runs_and_is_resumed(tmp_path: Path, library: ModuleType, small: Path) -> None:
    from repo_manager.engine.gpu import find_gpus

    output = tmp_path / "out.json"
    real = bool(find_gpus())
    command = [sys.executable, str(HEADLINE), "--models", "tiny", "--precisions", "fp16", "--batches", "1"]
    command += ["--rounds", "2", "--round-s", "0.2", "--no-triton", "--output", str(output)]
    command += ["--library", library.__name__] if real else ["--rehearse"]
    command += ["--without-tactics", *WITHOUT] if WITHOUT else []
    for _ in range(2):
        ended = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "", "nothing was left to do the second time"
    (cell,) = json.loads(output.read_text())["cells"].values()
    assert cell["rehearsal"] is not real
    assert set(cell["variants"]) == {"dense", "sparse", "noflag"}
    assert cell["layers"]
    assert output.with_suffix(".svg").read_text().startswith("<svg")
    if real:
        assert all(variant["watts"] > 0 for variant in cell["variants"].values())
        assert all(variant["inferences_per_joule"] > 0 for variant in cell["variants"].values())
