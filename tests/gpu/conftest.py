"""Tests on an NVIDIA GPU: `pytest tests/gpu`. Without one they are skipped, with the reason.

REPO_MANAGER_REHEARSE=1 runs the parts without need of a device, with TensorRT-RTX's builder. So the tests themselves
are known to work before a GPU is at hand. The other parts stay skipped.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import onnx_models

from repo_manager.engine.gpu import find_gpus
from repo_manager.onnx_model.model import load_model
from repo_manager.optional import is_installed, require
from repo_manager.sparsity import prune

REHEARSE = bool(os.environ.get("REPO_MANAGER_REHEARSE"))


def missing() -> str:
    """Why the tests cannot run here. Empty when they can."""
    if REHEARSE:
        return "" if is_installed("tensorrt_rtx") else "a rehearsal needs tensorrt_rtx"
    if not find_gpus():
        return "no NVIDIA GPU here (nvidia-smi lists none)"
    if not is_installed("tensorrt") and not is_installed("tensorrt_rtx"):
        return "neither tensorrt nor tensorrt_rtx is installed"
    return ""


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def library() -> ModuleType:
    """TensorRT where it is installed, else TensorRT-RTX."""
    return require("tensorrt" if is_installed("tensorrt") and not REHEARSE else "tensorrt_rtx")


@pytest.fixture(scope="session")
def device() -> None:
    """For tests on the GPU itself."""
    if REHEARSE:
        pytest.skip("a rehearsal has no device")


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three 3x3 convolutions of 512 channels, pruned to 2:4: wide enough for a sparse kernel to win."""
    random, nodes, weights, x = np.random.default_rng(0), [], [], "x"
    for index in range(3):
        scale = np.float32((2 / (512 * 9)) ** 0.5)
        values = random.standard_normal((512, 512, 3, 3), np.float32) * scale
        weights.append(numpy_helper.from_array(values, f"w{index}"))
        nodes.append(helper.make_node("Conv", [x, f"w{index}"], [f"c{index}"], name=f"conv{index}", pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"], name=f"relu{index}"))
        x = f"r{index}"
    info = helper.make_tensor_value_info
    shape = ["N", 512, 14, 14]
    graph = helper.make_graph(
        nodes, "wide", [info("x", TensorProto.FLOAT, shape)], [info(x, TensorProto.FLOAT, shape)], weights
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    folder = tmp_path_factory.mktemp("wide")
    onnx.save(proto, folder / "dense.onnx")
    return onnx_models.save(prune(load_model(folder / "dense.onnx"))[0], folder / "wide.onnx")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_models.save(onnx_models.cnn(), tmp_path_factory.mktemp("small") / "cnn.onnx")
