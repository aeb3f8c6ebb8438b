"""The tensorrt backends on the real server without a GPU: the load fails, and the message names the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.serving import running_server
from tritonclient.grpc import model_config_pb2

from repo_manager.engine.gpu import find_gpus
from repo_manager.errors import ServerRefusedError
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for backend, file, tag in (("tensorrt", "model.plan", b"ftrt"), ("tensorrt_rtx", "model.engine", b"vtrt")):
        folder = root / f"m_{backend}" / "1"
        folder.mkdir(parents=True)
        (folder / file).write_bytes(tag + bytes(100))
        message = model_config_pb2.ModelConfig(name=f"m_{backend}", backend=backend, max_batch_size=4)
        message.input.add(name="x", data_type=model_config_pb2.TYPE_FP32, dims=[3])
        message.output.add(name="y", data_type=model_config_pb2.TYPE_FP32, dims=[3])
        (folder.parent / "config.pbtxt").write_text(str(message))
    return root


@pytest.mark.skipif(bool(find_gpus()), reason="this machine has a GPU; the message is for those without")
def test_without_a_gpu_the_load_fails_with_the_next_step(repository: Path) -> None:
    with running_server(ServerOptions(repository=str(repository))) as server:
        server.wait_ready(60)
        client = TritonClient.connect(server.grpc_url)
        for backend in ("tensorrt", "tensorrt_rtx"):
            with pytest.raises(ServerRefusedError) as caught:
                client.load(f"m_{backend}")
            assert f"the {backend} backend needs an NVIDIA GPU" in str(caught.value)
            assert "--backend onnxruntime" in str(caught.value)
        assert client.metadata(), "the server itself goes on"
