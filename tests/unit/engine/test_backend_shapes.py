"""The parts of the tensorrt backends without need of a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import repo_manager

FOLDER = Path(repo_manager.__file__).parent / "server" / "backends" / "tensorrt"


def backend_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


shapes = backend_module("rm_trt_shapes")
cuda = backend_module("rm_trt_cuda")
engine = backend_module("rm_trt_engine")

SMALL = shapes.Profile(0, {"x": ((1, 3), (1, 3), (4, 3))})
LARGE = shapes.Profile(1, {"x": ((1, 3), (32, 3), (32, 3))})
TENSORS = (
    shapes.Tensor("x", True, "TYPE_FP32", "float32", (-1, 3)),
    shapes.Tensor("y", False, "TYPE_FP16", "float16", (-1, 10)),
    shapes.Tensor("z", False, "TYPE_FP16", "float16", (-1, 10)),
)


def config(**changes: Any) -> dict[str, Any]:
    return {
        "name": "m",
        "max_batch_size": 32,
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": ["3"]}],
        "output": [{"name": "y", "data_type": "TYPE_FP16", "dims": ["10"]}],
        **changes,
    }


@pytest.mark.parametrize(("batch", "index"), [(1, 0), (4, 0), (5, 1), (32, 1), (20, 1)])
def test_the_profile_tuned_closest_is_chosen(batch: int, index: int) -> None:
    assert shapes.choose_profile([SMALL, LARGE], {"x": (batch, 3)}).index == index


@pytest.mark.parametrize("shape", [(33, 3), (0, 3), (1, 4), (1, 3, 1)])
def test_a_shape_that_no_profile_holds_is_the_requests_fault(shape: tuple[int, ...]) -> None:
    with pytest.raises(shapes.Mismatch, match=r"INVALID_ARGUMENT.*\[1, 3\] to \[32, 3\]"):
        shapes.choose_profile([SMALL, LARGE], {"x": shape})


def test_a_configuration_may_leave_outputs_out() -> None:
    shapes.check(config(), TENSORS, [SMALL, LARGE])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"max_batch_size": 33}, "max_batch_size is 33, and the engine takes batches up to 32"),
        ({"max_batch_size": 0}, r"dims \[3\], the engine's shape is \[-1, 3\]"),
        ({"input": []}, r"inputs are \[\], the engine's \['x'\]"),
        ({"output": [{"name": "q", "data_type": "TYPE_FP16", "dims": [10]}]}, "outputs are"),
        ({"output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [10]}]}, "TYPE_FP32, the engine's TYPE_FP16"),
        ({"output": [{"name": "y", "data_type": "TYPE_FP16", "dims": [11]}]}, r"dims \[-1, 11\]"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(shapes.Mismatch, match=match):
        shapes.check(config(**changes), TENSORS, [SMALL, LARGE])


def test_a_reshape_is_what_the_engine_sees() -> None:
    output = {"name": "y", "data_type": "TYPE_FP16", "dims": [2, 5], "reshape": {"shape": ["10"]}}
    shapes.check(config(output=[output]), TENSORS, [LARGE])


def test_a_configuration_is_completed_from_the_engine() -> None:
    written: dict[str, Any] = {"name": "m"}
    shapes.complete(written, TENSORS, [LARGE])
    assert written["max_batch_size"] == 32
    assert written["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [3]}]
    shapes.check(written, TENSORS, [LARGE])


def test_each_gpu_kind_loads_its_own_file() -> None:
    by_gpu = {"cc_model_filenames": {"8.0": "a.plan"}, "default_model_filename": "d.plan"}
    assert shapes.plan_filename(by_gpu, "8.0", "model.plan") == "a.plan"
    assert shapes.plan_filename(by_gpu, "9.0", "model.plan") == "d.plan"
    assert shapes.plan_filename({}, "9.0", "model.plan") == "model.plan"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "cannot be read"),
        (b"onnx" + bytes(60), "no plan of tensorrt"),
        (b"vtrt" + bytes(60), "no plan of tensorrt"),
        (b"ftrt" + bytes(20) + bytes((10, 5, 0, 1)) + bytes(60), "built with tensorrt 10.5.0.1; the server has 11.1.0"),
    ],
)
def test_a_plan_is_judged_before_the_library_sees_it(content: bytes | None, match: str, tmp_path: Path) -> None:
    path = tmp_path / "model.plan"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(engine.Mismatch, match=match):
        engine.check_plan("tensorrt", "11.1.0", path)


def test_a_plan_of_this_version_passes(tmp_path: Path) -> None:
    path = tmp_path / "model.plan"
    path.write_bytes(b"ftrt" + bytes(20) + bytes((11, 1, 0, 5)) + bytes(60))
    engine.check_plan("tensorrt", "11.1.0.5", path)


def test_a_library_that_is_not_there_is_named() -> None:
    with pytest.raises(engine.Mismatch, match=r"no_such_trt cannot be imported.*pip install no-such-trt"):
        engine.import_library("no_such_trt")
