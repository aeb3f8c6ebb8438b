"""The rules of the native onnxruntime backend, without a server."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import repo_manager.server
from repo_manager.triton_config import backend_io as rules

BACKEND = Path(repo_manager.server.__file__).parent / "backends" / "onnxruntime"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BACKEND / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


options = load("rm_ort_session")


def tensor(name: str, *dims: int, kind: str = "TYPE_FP32") -> Any:
    return rules.Tensor(name, kind, dims)


def config(inputs: list[dict[str, Any]], outputs: list[dict[str, Any]], batch: int = 8) -> dict[str, Any]:
    return {"name": "m", "max_batch_size": batch, "input": inputs, "output": outputs}


def entry(name: str, *dims: int, kind: str = "TYPE_FP32", **more: Any) -> dict[str, Any]:
    return {"name": name, "data_type": kind, "dims": list(dims), **more}


def check(settings: dict[str, Any], inputs: list[Any], outputs: list[Any], optional: list[Any] | None = None) -> None:
    by_name = [{each.name: each for each in group} for group in (inputs, optional or [], outputs)]
    rules.check(settings, *by_name)


def test_an_empty_config_is_filled_in() -> None:
    empty = config([], [], batch=0)
    rules.complete(empty, {"x": tensor("x", -1, 3)}, {"y": tensor("y", -1)})
    assert empty["max_batch_size"] == rules.DEFAULT_MAX_BATCH_SIZE
    assert empty["dynamic_batching"] == {}
    assert empty["input"] == [entry("x", 3)]
    assert empty["output"] == [entry("y", 1, reshape={"shape": []})]


def test_a_model_without_batch_axis_is_filled_in_whole() -> None:
    empty = config([], [], batch=0)
    rules.complete(empty, {"x": tensor("x", 1, 3)}, {"y": tensor("y")})
    assert (empty["max_batch_size"], "dynamic_batching" in empty) == (0, False)
    assert empty["input"] == [entry("x", 1, 3)]
    assert empty["output"] == [entry("y", 1)]


def test_batches_of_a_model_without_batch_axis_are_refused() -> None:
    with pytest.raises(rules.ConfigMismatch, match="does not support batching"):
        rules.complete(config([], [], batch=4), {"x": tensor("x", 1, 3)}, {"y": tensor("y", -1)})


@pytest.mark.parametrize(
    ("inputs", "outputs", "batch"),
    [
        ([entry("x", 3)], [entry("y", 2)], 8),
        ([entry("x", 3, reshape={"shape": [3]})], [entry("y", 2)], 8),
        ([entry("x", -1, 3)], [entry("y", -1, 2)], 0),
    ],
)
def test_what_fits_is_accepted(inputs: list[Any], outputs: list[Any], batch: int) -> None:
    check(config(inputs, outputs, batch), [tensor("x", -1, 3)], [tensor("y", -1, 2)])


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        ([entry("x", 4)], [entry("y", 2)], r"tensor 'x'.*\[-1,3\].*\[-1,4\]"),
        ([entry("x", -1)], [entry("y", 2)], r"tensor 'x'.*\[-1,3\].*\[-1,-1\]"),  # fixed dimensions stay fixed
        ([entry("x", 3, 1)], [entry("y", 2)], "expects 2 dimensions.*specifies 3"),
        ([entry("x", 3)], [entry("y", -1)], r"tensor 'y'.*\[-1,2\].*\[-1,-1\]"),  # an output may not
        ([entry("z", 3)], [entry("y", 2)], "input 'z', allowed inputs are: x"),
        ([entry("x", 3)], [entry("z", 2)], "output 'z', allowed outputs are: y"),
        ([], [entry("y", 2)], "expects 0 inputs, model provides 1"),
        ([entry("x", 3, kind="TYPE_INT8")], [entry("y", 2)], "datatype TYPE_INT8 .* provides TYPE_FP32"),
        ([entry("x", 3), entry("w", 1, optional=True)], [entry("y", 2)], "optional input 'w' is not supported"),
    ],
)
def test_what_does_not_fit_is_refused_in_the_native_words(inputs: list[Any], outputs: list[Any], reason: str) -> None:
    with pytest.raises(rules.ConfigMismatch, match=reason):
        check(config(inputs, outputs), [tensor("x", -1, 3)], [tensor("y", -1, 2)])


def test_a_scalar_is_one_element_wide() -> None:
    check(config([entry("x", 1)], [entry("y", 1)], 0), [tensor("x")], [tensor("y")])
    with pytest.raises(rules.ConfigMismatch, match="scalar tensor 'x'"):
        check(config([entry("x", 2)], [entry("y", 1)], 0), [tensor("x")], [tensor("y")])


def parameters(**values: object) -> dict[str, Any]:
    return {"name": "m", "parameters": {key: {"string_value": str(value)} for key, value in values.items()}}


def test_parameters_become_session_options() -> None:
    made = options.session_options(
        {**parameters(intra_op_thread_count=3, inter_op_thread_count=2, execution_mode=1, enable_mem_pattern="false")}
    )
    assert (made.intra_op_num_threads, made.inter_op_num_threads) == (3, 2)
    assert made.execution_mode == options.ort.ExecutionMode.ORT_PARALLEL
    assert made.enable_mem_pattern is False


def test_cores_are_shared_out_among_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options.os, "sched_getaffinity", lambda _: set(range(8)))
    assert options.default_threads({"instance_group": [{"count": 2}, {"count": 2}]}) == 2
    assert options.default_threads({"instance_group": [{"count": 20}]}) == 1
    assert options.default_threads({}) == 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("intra_op_thread_count", "-1"),
        ("inter_op_thread_count", "x"),
        ("execution_mode", 2),
        ("enable_mem_arena", "maybe"),
    ],
)
def test_a_parameter_that_cannot_be_is_named(key: str, value: object) -> None:
    with pytest.raises(options.BadParameterError, match=f"{key} is '{value}'"):
        options.session_options(parameters(**{key: value}))


def test_the_model_file_is_found_by_name_or_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(options.BadParameterError, match=r"unable to find .*model\.onnx"):
        options.model_file(tmp_path, {"name": "m"})
    (tmp_path / "net.onnx").mkdir()
    (tmp_path / "net.onnx" / "model.onnx").touch()
    found = options.model_file(tmp_path, {"name": "m", "default_model_filename": "net.onnx"})
    assert found == tmp_path / "net.onnx" / "model.onnx"


def test_providers_follow_the_instance_and_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerators = {
        "gpu_execution_accelerator": [
            {"name": "tensorrt", "parameters": {"precision_mode": "FP16", "max_workspace_size_bytes": "9"}}
        ]
    }
    settings = {"optimization": {"execution_accelerators": accelerators}}
    available = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(options.ort, "get_available_providers", lambda: available)
    assert options.providers(settings, "CPU", 0) == ["CPUExecutionProvider"]
    tensorrt, cuda, cpu = options.providers(settings, "GPU", 3)
    assert tensorrt[1] == {"device_id": 3, "trt_fp16_enable": "True", "trt_max_workspace_size": "9"}
    assert (cuda, cpu) == (("CUDAExecutionProvider", {"device_id": 3}), "CPUExecutionProvider")
    available[:] = ["CPUExecutionProvider"]
    assert options.providers(settings, "GPU", 3) == ["CPUExecutionProvider"]


@pytest.mark.parametrize("fails", ["never", "with exact kernels", "always"])
def test_int8_runs_by_exact_kernels_where_the_model_loads_with_them(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.onnx").touch()
    asked: list[str] = []

    def open_session(path: str, made: Any, providers: list[Any]) -> str:
        asked.append(made.get_session_config_entry("session.x64quantprecision"))
        if fails == "always" or (fails == "with exact kernels" and asked[-1] == "1"):
            raise RuntimeError("it does not load")
        return path

    monkeypatch.setattr(options.ort, "InferenceSession", open_session)
    if fails == "always":
        with pytest.raises(RuntimeError, match="it does not load"):
            options.open_session(tmp_path, {"name": "m"}, "CPU", 0)
    else:
        options.open_session(tmp_path, {"name": "m"}, "CPU", 0)
    assert asked == (["1"] if fails == "never" else ["1", "0"])


def test_a_given_int8_setting_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").touch()
    given = {"name": "m", "parameters": {"session.x64quantprecision": {"string_value": "0"}}}
    asked: list[str] = []
    monkeypatch.setattr(
        options.ort,
        "InferenceSession",
        lambda _, made, providers: asked.append(made.get_session_config_entry("session.x64quantprecision")),
    )
    options.open_session(tmp_path, given, "CPU", 0)
    assert asked == ["0"]
