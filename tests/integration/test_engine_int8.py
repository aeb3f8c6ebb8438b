"""INT8 engines: operators the builder computes in floating point are not quantised, and are listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from support import onnx_models

from repo_manager.engine.artifact import EngineSource, build_artifact
from repo_manager.engine.capabilities import FLOAT_OPERATORS
from repo_manager.engine.options import EngineOptions
from repo_manager.errors import WiderPrecisionError
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.signature import signature_of
from repo_manager.optional import is_installed
from repo_manager.pipeline.adding import Added, AddOptions, add
from repo_manager.precision import ConvertOptions, convert
from repo_manager.precision.calibration.data import data_of_samples
from repo_manager.types import Backend, Precision

pytestmark = pytest.mark.integration

if not is_installed("tensorrt_rtx"):
    pytest.skip("tensorrt_rtx is not installed: pip install 'triton-repo-manager[rtx]'", allow_module_level=True)

RTX = Backend.TENSORRT_RTX
INT8 = [Precision.INT8, Precision.INT8_FP16]
REASON = "the target's builder computes it in floating point, quantised or not"
ONE_TARGET = EngineOptions(compute_capabilities=("8.9",))


def node(op_type: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs, [output], name=output, **attributes)


def weight(*shape: int, sparse: bool = False) -> np.ndarray:
    return onnx_models.weight(shape, sparse=sparse, seed=sum(shape)) * np.float32(0.2)


def decoder(dims: int, group: int = 1) -> onnx.ModelProto:
    """Conv - Relu - ConvTranspose - Relu - Conv, as segmentation and text detection nets end."""
    size, ones = [8] * dims, [1] * dims
    nodes = [
        node("Conv", ["x", "w"], "conv", pads=[*ones, *ones]),
        node("Relu", ["conv"], "relu"),
        node("ConvTranspose", ["relu", "t"], "up", strides=[2] * dims, group=group),
        node("Relu", ["up"], "up_relu"),
        node("Conv", ["up_relu", "v"], "head"),
    ]
    weights = {
        "w": weight(16, 16, *[3] * dims, sparse=True),
        "t": weight(16, 16 // group, *[2] * dims),
        "v": weight(8, 16, *ones, sparse=True),
    }
    value = onnx_models.value
    return onnx_models.model(
        nodes, [value("x", ["N", 16, *size])], [value("head", ["N", 8, *[2 * n for n in size]])], weights
    )


def published(proto: onnx.ModelProto, folder: Path, precision: Precision, **options: Any) -> Added:
    path = onnx_models.save(proto, folder / "m.onnx")
    shape = [dim if isinstance(dim, int) else 6 for dim in signature_of(load_model(path)).inputs[0].shape or ()]
    np.savez(folder / "data.npz", x=np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    return add(
        path,
        "m",
        folder / "models",
        AddOptions(
            precision=precision,
            backend="tensorrt_rtx",
            calibration=str(folder / "data.npz"),
            engine=ONE_TARGET,
            convert=ConvertOptions(max_drift=0.5),
            **options,
        ),
    )


def runs_in(folder: Path, name: str = "m") -> dict[str, str]:
    manifest = json.loads((folder / "models" / name / "1" / "manifest.json").read_text())
    return {row["node"]: row["found"] for row in manifest["engine"]["build"]["precision"]}


@pytest.mark.parametrize("precision", INT8)
@pytest.mark.parametrize(("dims", "group"), [(1, 1), (2, 1), (2, 4), (3, 1)])
def test_a_transposed_convolution_is_left_out_and_listed(
    tmp_path: Path, precision: Precision, dims: int, group: int
) -> None:
    added = published(decoder(dims, group), tmp_path, precision)
    assert [(kept.node, kept.op_type, kept.reason) for kept in added.conversion.kept] == [
        ("up", "ConvTranspose", REASON)
    ]
    wide = "float16" if precision is Precision.INT8_FP16 else "float32"
    assert runs_in(tmp_path) == {"conv": "int8", "up": wide, "head": "int8"}


def test_the_controls_leave_out_the_same_layers(tmp_path: Path) -> None:
    published(decoder(2), tmp_path, Precision.INT8_FP16, control=True)
    assert runs_in(tmp_path, "m__dense") == runs_in(tmp_path) == {"conv": "int8", "up": "float16", "head": "int8"}


@pytest.mark.parametrize("precision", INT8)
def test_a_layer_that_the_builder_turns_out_to_widen_is_left_out_of_a_second_build(
    tmp_path: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with an operator not recorded for a builder."""
    monkeypatch.delitem(FLOAT_OPERATORS, RTX)  # type: ignore[arg-type]
    added = published(decoder(2), tmp_path, precision, control=True)
    assert [(kept.node, kept.reason) for kept in added.conversion.kept] == [("up", REASON)]
    assert runs_in(tmp_path)["conv"] == "int8"
    assert runs_in(tmp_path, "m__dense") == runs_in(tmp_path)


CASES: dict[str, tuple[str, tuple[int, ...], list[int], dict[str, Any]]] = {
    "Conv": ("Conv", (16, 16, 3, 3), [16, 8, 8], {}),
    "Conv of one channel": ("Conv", (8, 1, 3, 3), [1, 8, 8], {}),
    "depthwise Conv": ("Conv", (16, 1, 3, 3), [16, 8, 8], {"group": 16}),
    "grouped Conv": ("Conv", (24, 3, 3, 3), [24, 8, 8], {"group": 8}),
    "1-D Conv": ("Conv", (16, 16, 3), [16, 8], {}),
    "3-D Conv": ("Conv", (16, 16, 3, 3, 3), [16, 6, 6, 6], {}),
    "ConvTranspose": ("ConvTranspose", (16, 16, 2, 2), [16, 8, 8], {"strides": [2, 2]}),
    "1-D ConvTranspose": ("ConvTranspose", (16, 16, 2), [16, 8], {"strides": [2]}),
    "Gemm": ("Gemm", (32, 16), [32], {}),
    "Gemm of odd sizes": ("Gemm", (5, 7), [7], {"transB": 1}),
    "MatMul": ("MatMul", (32, 16), [32], {}),
    "batched MatMul": ("MatMul", (32, 16), [9, 32], {}),
    "stacked MatMul": ("MatMul", (3, 32, 16), [3, 9, 32], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_operators_on_record_are_those_that_the_builder_widens(tmp_path: Path, name: str) -> None:
    op_type, shape, data, attributes = CASES[name]
    value = onnx_models.value
    proto = onnx_models.model(
        [
            node("Relu", ["x"], "relu"),
            node(op_type, ["relu", "w"], "product", **attributes),
            node("Relu", ["product"], "y"),
        ],
        [value("x", ["N", *data])],
        [value("y", None)],
        {"w": weight(*shape)},
    )
    model = load_model(onnx_models.save(onnx.shape_inference.infer_shapes(proto), tmp_path / "m.onnx"))
    samples = [{"x": np.random.default_rng(0).standard_normal((1, *data)).astype(np.float32)}]
    calibration = data_of_samples(samples, signature_of(model), "test")
    converted = convert(model, Precision.INT8, tmp_path / "m8.onnx", calibration=calibration)
    assert converted.kept == ()
    source = EngineSource(Precision.INT8, max_batch_size=2)
    if op_type not in FLOAT_OPERATORS[RTX]:
        facts = build_artifact(converted.files, RTX, source=source, options=ONE_TARGET).facts
        assert [row.found for row in facts["build"].precision] == ["int8"]
        return
    with pytest.raises(WiderPrecisionError, match="asked for int8, runs in float32") as caught:
        build_artifact(converted.files, RTX, source=source, options=ONE_TARGET)
    assert caught.value.not_in_int8 == ("product",)


def test_a_layer_that_is_kept_may_read_what_another_one_reads_quantised(tmp_path: Path) -> None:
    """Its data comes out of DequantizeLinear through a Transpose; its weight was left as it is."""
    value = onnx_models.value
    proto = onnx_models.model(
        [
            node("Relu", ["x"], "relu"),
            node("Conv", ["relu", "w"], "conv"),
            node("Transpose", ["relu"], "turned", perm=[0, 1, 3, 2]),
            node("Conv", ["turned", "v"], "product"),
        ],
        [value("x", ["N", 16, 4, 4])],
        [value("conv", ["N", 8, 2, 2]), value("product", ["N", 8, 2, 2])],
        {"w": weight(8, 16, 3, 3), "v": weight(8, 16, 3, 3) * 2},
    )
    path = onnx_models.save(proto, tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((6, 16, 4, 4)).astype(np.float32))
    options = AddOptions(
        precision=Precision.INT8,
        backend="tensorrt_rtx",
        calibration=str(tmp_path / "data.npz"),
        engine=ONE_TARGET,
        convert=ConvertOptions(keep_fp32=("product",)),
    )
    add(path, "m", tmp_path / "models", options)
    assert runs_in(tmp_path)["conv"] == "int8"
    assert runs_in(tmp_path)["product"] == "float32"
