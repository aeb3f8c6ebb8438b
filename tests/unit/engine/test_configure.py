"""What TensorRT-only options set. Its builder needs a GPU, so a recorder stands in for the library; TensorRT-RTX's real
builder is asked in tests/integration/test_engine_rtx.py."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from support import onnx_models

from repo_manager.engine.capabilities import Capabilities, StrongTyping, capabilities_of
from repo_manager.engine.network import create_config, hold_wide_layers, quantised_in_the_graph, wide_nodes
from repo_manager.engine.options import EngineOptions, check_options
from repo_manager.errors import EngineError, UsageError
from repo_manager.onnx_model.inputs import natural_inputs
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import signature_of
from repo_manager.precision import ConvertOptions, convert, load_calibration
from repo_manager.types import Backend, Precision

FLAGS_8 = "FP16 INT8 TF32 SPARSE_WEIGHTS OBEY_PRECISION_CONSTRAINTS REFIT VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME"
FLAGS_11 = "TF32 SPARSE_WEIGHTS REFIT REFIT_IDENTICAL STRIP_PLAN VERSION_COMPATIBLE ERROR_ON_TIMING_CACHE_MISS"


class Config:
    def __init__(self) -> None:
        self.flags: set[str] = set()
        self.sources = 0b111
        self.pools: list[tuple[Any, int]] = []

    def set_flag(self, flag: enum.Enum) -> None:
        self.flags.add(flag.name)

    def get_tactic_sources(self) -> int:
        return self.sources

    def set_tactic_sources(self, sources: int) -> None:
        self.sources = sources

    def set_memory_pool_limit(self, pool: enum.Enum, size_bytes: int) -> None:
        self.pools.append((pool.name, size_bytes))


class Builder:
    def create_builder_config(self) -> Config:
        return Config()


def library(flags: str, version: str, network_flags: str = "EXPLICIT_BATCH") -> ModuleType:
    module = ModuleType("tensorrt")
    module.__dict__.update(
        __version__=version,
        BuilderFlag=enum.Enum("BuilderFlag", flags),
        NetworkDefinitionCreationFlag=enum.Enum("NetworkDefinitionCreationFlag", network_flags),
        HardwareCompatibilityLevel=enum.Enum("HardwareCompatibilityLevel", "NONE AMPERE_PLUS"),
        ProfilingVerbosity=enum.Enum("ProfilingVerbosity", "LAYER_NAMES_ONLY DETAILED NONE"),
        MemoryPoolType=enum.Enum("MemoryPoolType", "WORKSPACE"),
        TacticSource=enum.IntEnum("TacticSource", "CUBLAS CUBLAS_LT CUDNN", start=0),
        LayerType=enum.Enum("LayerType", "CONVOLUTION SHAPE QUANTIZE DEQUANTIZE"),
        ParserError=object,
        float32="float32",
    )
    return module


V8 = library(FLAGS_8, "8.6.0")
V10 = library(FLAGS_8 + " BF16", "10.5.0", "EXPLICIT_BATCH STRONGLY_TYPED")
V11 = library(FLAGS_11, "11.1.0", "STRONGLY_TYPED")


def configured(module: ModuleType, precision: Precision = Precision.FP32, **options: Any) -> Any:
    return create_config(module, Builder(), EngineOptions(**options), capabilities_of(module), precision)


@pytest.mark.parametrize(
    ("precision", "flags"),
    [
        (Precision.FP32, set()),
        (Precision.FP16, {"FP16"}),
        (Precision.INT8, {"INT8"}),
        (Precision.INT8_FP16, {"INT8", "FP16"}),
    ],
)
def test_only_tensorrt_8_is_told_the_precision(precision: Precision, flags: set[str]) -> None:
    assert configured(V8, precision).flags - {"SPARSE_WEIGHTS"} == flags
    assert configured(V10, precision).flags == {"SPARSE_WEIGHTS"}
    assert configured(V11, precision).flags == {"SPARSE_WEIGHTS"}


def test_a_precision_that_tensorrt_8_lacks_is_an_error() -> None:
    with pytest.raises(EngineError, match=r"tensorrt 8\.6\.0 has no BF16"):
        configured(V8, Precision.BF16)


def test_deterministic_fails_on_a_time_that_is_not_known() -> None:
    assert "ERROR_ON_TIMING_CACHE_MISS" in configured(V11, deterministic=True).flags
    assert "ERROR_ON_TIMING_CACHE_MISS" not in configured(V11).flags
    with pytest.raises(EngineError, match="ERROR_ON_TIMING_CACHE_MISS"):
        configured(V8, deterministic=True)


def test_a_version_compatible_plan_of_tensorrt_keeps_its_lean_runtime() -> None:
    flags = configured(V11, version_compatible=True).flags
    assert "VERSION_COMPATIBLE" in flags
    assert "EXCLUDE_LEAN_RUNTIME" not in flags


def test_hardware_compatibility_is_set_by_name() -> None:
    assert configured(V11, hardware_compatibility="ampere_plus").hardware_compatibility_level.name == "AMPERE_PLUS"
    assert not hasattr(configured(V11), "hardware_compatibility_level")


def test_numbers_are_passed_on_and_defaults_are_the_builders() -> None:
    config = configured(V11, workspace_bytes=1 << 20, optimization_level=0)
    assert config.pools == [("WORKSPACE", 1 << 20)]
    assert config.builder_optimization_level == 0
    bare = configured(V11)
    assert bare.pools == []
    assert not hasattr(bare, "builder_optimization_level")


@pytest.mark.parametrize(
    ("module", "typing", "batch"),
    [(V8, StrongTyping.ABSENT, True), (V10, StrongTyping.ASK, True), (V11, StrongTyping.ALWAYS, False)],
)
def test_the_names_of_a_version_are_its_capabilities(module: ModuleType, typing: StrongTyping, batch: bool) -> None:
    able: Capabilities = capabilities_of(module)
    assert (able.backend, able.strong_typing, able.explicit_batch) == (Backend.TENSORRT, typing, batch)
    assert able.needs_gpu
    assert able.hardware_levels == ("AMPERE_PLUS",)
    assert able.strip_flag == ("STRIP_PLAN" if module is V11 else None)


@dataclasses.dataclass
class Output:
    dtype: str


class Layer:
    def __init__(self, kind: str, dtype: str | None, name: str = "conv") -> None:
        self.name = name
        self.type = getattr(V8.LayerType, kind)
        self.outputs = [] if dtype is None else [Output(dtype)]
        self.num_outputs = len(self.outputs)
        self.precision = "free"

    def get_output(self, index: int) -> Output:
        return self.outputs[index]


class Network:
    def __init__(self, *layers: Layer) -> None:
        self.layers = layers
        self.num_layers = len(layers)

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]


def test_layers_that_the_graph_keeps_in_float32_are_held_there() -> None:
    kept, more, half = (
        Layer("CONVOLUTION", "float32"),
        Layer("CONVOLUTION", "float32", "conv_7"),
        Layer("CONVOLUTION", "float16"),
    )
    free = Layer("CONVOLUTION", "float32", "low")  # TensorRT 8 calls the output of half weights float32, too
    network, config = Network(kept, more, half, free, Layer("DEQUANTIZE", "float32"), Layer("SHAPE", None)), Config()
    assert hold_wide_layers(V8, network, config, {"conv": True, "low": False}) == 2
    assert [layer.precision for layer in (kept, more, half, free)] == ["float32", "float32", "free", "free"]
    assert config.flags == {"OBEY_PRECISION_CONSTRAINTS"}


def test_a_model_without_them_is_left_free() -> None:
    config = Config()
    assert hold_wide_layers(V8, Network(Layer("CONVOLUTION", "float32")), config, {"conv": False}) == 0
    assert config.flags == set()


def test_what_the_graph_computes_in_float32_is_read_from_its_types(tmp_path: Path) -> None:
    source = load_model(onnx_models.save(onnx_models.cnn(), tmp_path / "cnn.onnx"))
    low = tmp_path / "low.onnx"
    options = ConvertOptions(max_drift=10.0, min_top1=0.0, keep_fp32=("conv2",))
    convert(source, Precision.FP16, low, options=options)
    wide = wide_nodes(load_model(low).graph_only)
    assert {name for name, is_wide in wide.items() if is_wide} == {"conv2"}
    assert wide["conv1"] is False


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT8_FP16])
def test_int8_weights_become_floats_behind_a_quantisation_and_nothing_else_changes(
    precision: Precision, tmp_path: Path
) -> None:
    source = load_model(onnx_models.save(onnx_models.cnn(), tmp_path / "cnn.onnx"))
    inputs = natural_inputs(signature_of(source), batch=4)
    low = tmp_path / "low.onnx"
    np.savez(tmp_path / "samples.npz", **inputs)
    samples = load_calibration(tmp_path / "samples.npz", signature_of(source))
    convert(source, precision, low, calibration=samples, options=ConvertOptions(max_drift=10.0, min_top1=0.0))
    model = load_model(low)
    proto = quantised_in_the_graph(model, None)
    assert proto is not None
    onnx.checker.check_model(proto)
    stored = {tensor.name for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    scales = {name for node in proto.graph.node for name in node.input[1:]}
    assert stored <= scales, "zero points alone"
    onnx.save(proto, tmp_path / "changed.onnx")
    wanted, found = (Session(load_model(path)).run(inputs) for path in (low, tmp_path / "changed.onnx"))
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_graph_without_int8_weights_is_parsed_as_it_is(tmp_path: Path) -> None:
    assert quantised_in_the_graph(load_model(onnx_models.save(onnx_models.cnn(), tmp_path / "cnn.onnx")), None) is None


def test_kernels_of_a_library_are_left_out() -> None:
    assert configured(V8).sources == 0b111, "untouched"
    assert configured(V8, without_tactics=("cudnn", "cublas")).sources == 0b010
    with pytest.raises(UsageError, match="its sources are: cublas, cublas_lt, cudnn"):
        check_options(EngineOptions(without_tactics=("mkl",)), capabilities_of(V8))
