"""Tiny models and hand-written repositories, served in tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer


@contextlib.contextmanager
def running_server(options: ServerOptions) -> Iterator[EmbeddedServer]:
    """Run a tritonserver, and kill it at the end: an orderly end takes up to five seconds, and has its own tests."""
    with EmbeddedServer(options) as server:
        try:
            yield server
        finally:
            server.stop(deadline_s=0.0)


def onnx_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, Sequence[int | str | None]]],
    outputs: Mapping[str, tuple[int, Sequence[int | str | None]]],
    weights: Mapping[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """Build a checked model; inputs and outputs are name -> (TensorProto type, shape)."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def scaling_model(factor: float = 2.0, width: int = 4) -> onnx.ModelProto:
    """Build `y = factor * x` on `[N, width]`."""
    return onnx_model(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        {"x": (TensorProto.FLOAT, ["N", width])},
        {"y": (TensorProto.FLOAT, ["N", width])},
        {"factor": np.array(factor, np.float32)},
    )


SCALING_CONFIG = """
backend: "onnxruntime"
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: 4 }
output { name: "y" data_type: TYPE_FP32 dims: 4 }
dynamic_batching {}
instance_group { count: 1 kind: KIND_CPU }
"""


def write_model(
    repository: Path, name: str, config: str | None, versions: Mapping[int, onnx.ModelProto | bytes]
) -> Path:
    """Write a model's folder; a version's content may be plain bytes, to be broken on purpose."""
    folder = repository / name
    folder.mkdir(parents=True, exist_ok=True)
    for version, model in versions.items():
        (folder / str(version)).mkdir(exist_ok=True)
        data = model if isinstance(model, bytes) else model.SerializeToString()
        (folder / str(version) / "model.onnx").write_bytes(data)
    if config is not None:
        (folder / "config.pbtxt").write_text(f'name: "{name}"\n{config}', encoding="utf-8")
    return folder
