from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from repo_manager.engine.triton_options import (
    AcceleratorOptions,
    parse_for,
    plan_set,
    with_accelerator,
    with_plans_by_capability,
)
from repo_manager.errors import EngineError, UsageError
from repo_manager.types import Precision


def plan(path: Path, tag: bytes = b"ftrt", version: tuple[int, ...] = (11, 1, 0, 5)) -> Path:
    path.write_bytes(tag + bytes(20) + bytes(version) + bytes(100))
    return path


def config(**fields: object) -> ModelConfig:
    return ModelConfig(name="m", backend="onnxruntime", **fields)


def test_for_options_are_read() -> None:
    assert parse_for(["8.0=a.plan", "12.0=x=y.plan"]) == {"8.0": Path("a.plan"), "12.0": Path("x=y.plan")}


@pytest.mark.parametrize("text", ["a.plan", "8=a.plan", "8.0=", "=a", "8.x=a", "sm80=a"])
def test_other_forms_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError, match="expected CAPABILITY=FILE"):
        parse_for([text])


def test_a_gpu_kind_given_twice_is_an_error() -> None:
    with pytest.raises(UsageError, match="twice"):
        parse_for(["8.0=a", "8.0=b"])


def test_plans_are_named_by_gpu_kind_and_reach_the_config(tmp_path: Path) -> None:
    found = plan_set({"8.0": plan(tmp_path / "a"), "9.0": plan(tmp_path / "b")})
    assert found.files == {"model_sm80.plan": tmp_path / "a", "model_sm90.plan": tmp_path / "b"}
    original = ModelConfig(name="m", backend="tensorrt")
    changed = with_plans_by_capability(original, found.by_capability)
    assert dict(changed.cc_model_filenames) == {"8.0": "model_sm80.plan", "9.0": "model_sm90.plan"}
    assert changed.default_model_filename == "model_sm80.plan"
    assert not original.cc_model_filenames


def test_plans_of_different_versions_fit_no_one_server(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"8\.0: 11\.1\.0\.5, 9\.0: 10\.5\.0\.1"):
        plan_set({"8.0": plan(tmp_path / "a"), "9.0": plan(tmp_path / "b", version=(10, 5, 0, 1))})


def test_an_rtx_engine_is_not_for_the_tensorrt_backend(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="TensorRT-RTX engine"):
        plan_set({"8.9": plan(tmp_path / "a", tag=b"vtrt")})
    with pytest.raises(UsageError, match="at least one"):
        plan_set({})


def test_the_accelerator_is_written_as_the_backend_reads_it() -> None:
    options = AcceleratorOptions(
        precision=Precision.FP16,
        workspace_bytes=1 << 30,
        engine_cache="/cache",
        profile={"x": ((1, 3), (4, 3), (8, 3)), "y": ((1,), (4,), (8,))},
    )
    changed = with_accelerator(config(), options)
    (accelerator,) = changed.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert dict(accelerator.parameters) == {
        "precision_mode": "FP16",
        "max_workspace_size_bytes": "1073741824",
        "trt_sparsity_enable": "1",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": "/cache",
        "trt_profile_min_shapes": "x:1x3,y:1",
        "trt_profile_opt_shapes": "x:4x3,y:4",
        "trt_profile_max_shapes": "x:8x3,y:8",
    }
    assert text_format.Parse(text_format.MessageToString(changed), ModelConfig()) == changed


def test_what_is_not_asked_for_is_not_written() -> None:
    changed = with_accelerator(config(), AcceleratorOptions(sparse=False, precision=Precision.INT8))
    (accelerator,) = changed.optimization.execution_accelerators.gpu_execution_accelerator
    assert dict(accelerator.parameters) == {"precision_mode": "INT8"}
    again = with_accelerator(changed, AcceleratorOptions())
    assert len(again.optimization.execution_accelerators.gpu_execution_accelerator) == 1


def test_it_needs_the_onnxruntime_backend_on_a_gpu() -> None:
    with pytest.raises(UsageError, match="goes with --backend onnxruntime"):
        with_accelerator(ModelConfig(backend="tensorrt"), AcceleratorOptions())
    with pytest.raises(UsageError, match="instances on the GPU"):
        with_accelerator(config(instance_group=[{"kind": "KIND_CPU"}]), AcceleratorOptions())
