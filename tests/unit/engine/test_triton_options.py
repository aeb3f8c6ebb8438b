from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format  # type: ignore[import-untyped]  # its stubs are a package of their own
from tritonclient.grpc.model_config_pb2 import ModelConfig

from repo_manager.engine.triton_options import (
    AcceleratorOptions,
    config_variant,
    parse_config_names,
    with_accelerator,
    with_plans_by_capability,
)
from repo_manager.errors import UsageError
from repo_manager.types import Precision


def config(**fields: object) -> ModelConfig:
    return ModelConfig(name="m", backend="onnxruntime", **fields)


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


BY_CAPABILITY = {"8.0": "model_sm80.plan", "9.0": "model_sm90.plan"}


def test_plans_by_gpu_kind_reach_the_config() -> None:
    original = ModelConfig(name="m", backend="tensorrt")
    changed = with_plans_by_capability(original, BY_CAPABILITY)
    assert dict(changed.cc_model_filenames) == BY_CAPABILITY
    assert changed.default_model_filename == "model_sm80.plan"
    assert not original.cc_model_filenames


def test_config_names_are_read() -> None:
    assert parse_config_names(["h100=9.0", "t4-small=a=b.pbtxt"]) == {"h100": "9.0", "t4-small": "a=b.pbtxt"}


@pytest.mark.parametrize("texts", [["h100"], ["=9.0"], ["h100="], ["a/b=9.0"], ["..=9.0"], ["a=1", "a=2"]])
def test_other_forms_of_config_names_are_usage_errors(texts: list[str]) -> None:
    with pytest.raises(UsageError, match="--model-config"):
        parse_config_names(texts)


def test_a_variant_takes_the_plan_of_its_gpu() -> None:
    model = with_plans_by_capability(ModelConfig(name="m", backend="tensorrt"), BY_CAPABILITY)
    changed = config_variant(model, "h100", "9.0", BY_CAPABILITY)
    assert changed.default_model_filename == "model_sm90.plan"
    assert dict(changed.cc_model_filenames) == BY_CAPABILITY
    with pytest.raises(UsageError, match=r"no plan for 8\.9; --for gives 8\.0, 9\.0"):
        config_variant(model, "l4", "8.9", BY_CAPABILITY)


def test_a_variants_fields_take_the_place_of_the_models(tmp_path: Path) -> None:
    model = ModelConfig(name="m", backend="onnxruntime", max_batch_size=8, instance_group=[{"count": 1}])
    path = tmp_path / "big.pbtxt"
    path.write_text("max_batch_size: 64\ninstance_group { count: 4 }\n")
    changed = config_variant(model, "big", str(path), {})
    assert (changed.max_batch_size, [group.count for group in changed.instance_group]) == (64, [4])
    assert changed.backend == "onnxruntime"
    assert model.max_batch_size == 8


@pytest.mark.parametrize("text", ["max_batch_sise: 3", 'name: "other"', None])
def test_a_variant_that_is_no_configuration_of_the_model_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "v.pbtxt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match="--model-config v="):
        config_variant(ModelConfig(name="m"), "v", str(path), {})
