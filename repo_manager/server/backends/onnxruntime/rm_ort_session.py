"""An ONNX Runtime session from a Triton configuration (no repo_manager here: it runs in Triton's stub)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnxruntime as ort

# `optimization { graph { level } }`, with the native backend's meaning.
_GRAPH_LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}


# On x86 CPUs without VNNI, ONNX Runtime's fused INT8 kernels saturate 16-bit sums (onnxruntime#6004, #14642). This
# entry selects exact kernels. Other CPUs ignore it.
_EXACT_INT8 = "session.x64quantprecision"


class BadParameterError(ValueError):
    """A parameter in the configuration has a value it cannot have."""


def parameters_of(config: dict[str, Any]) -> dict[str, str]:
    """Return the configuration's parameters, name -> text."""
    return {key: str(value.get("string_value", "")) for key, value in (config.get("parameters") or {}).items()}


def model_file(folder: Path, config: dict[str, Any]) -> Path:
    """Return the model's file in a version's folder.

    Raises:
        BadParameterError: there is none.
    """
    name = config.get("default_model_filename") or "model.onnx"
    path = folder / name
    if path.is_dir():  # a folder: the file and its external data
        path = path / "model.onnx"
    if not path.is_file():
        raise BadParameterError(f"unable to find '{path}' for model '{config['name']}'")
    return path


def _integer(parameters: dict[str, str], key: str, allowed: range) -> int | None:
    text = parameters.get(key)
    if text is None:
        return None
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or value not in allowed:
        raise BadParameterError(
            f"parameter {key} is '{text}', expected a whole number from {allowed[0]} to {allowed[-1]}"
        )
    return value


def _flag(parameters: dict[str, str], key: str) -> bool | None:
    text = parameters.get(key)
    if text is None:
        return None
    if text.lower() not in {"0", "1", "true", "false", "on", "off"}:
        raise BadParameterError(f"parameter {key} is '{text}', expected 0, 1, true or false")
    return text.lower() in {"1", "true", "on"}


def session_options(config: dict[str, Any]) -> ort.SessionOptions:
    """Return the options a configuration asks for.

    Raises:
        BadParameterError: a value is not one the parameter can have.
    """
    parameters = parameters_of(config)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    level = int(((config.get("optimization") or {}).get("graph") or {}).get("level") or 0)
    options.graph_optimization_level = _GRAPH_LEVELS.get(level, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    threads = _integer(parameters, "intra_op_thread_count", range(1025))
    options.intra_op_num_threads = threads or default_threads(config)
    inter = _integer(parameters, "inter_op_thread_count", range(1025))
    if inter:
        options.inter_op_num_threads = inter
    if _integer(parameters, "execution_mode", range(2)):
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    arena, pattern = _flag(parameters, "enable_mem_arena"), _flag(parameters, "enable_mem_pattern")
    if arena is not None:
        options.enable_cpu_mem_arena = arena
    if pattern is not None:
        options.enable_mem_pattern = pattern
    for key, value in parameters.items():
        if key.startswith(("session.", "optimization.", "ep.")):
            options.add_session_config_entry(key, value)
    if "session.intra_op.allow_spinning" not in parameters:
        # Idle workers would spin on cores needed by the server's own threads.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for library in (config.get("model_operations") or {}).get("op_library_filename", ()):
        options.register_custom_ops_library(library)
    return options


def new_run_options() -> ort.RunOptions:
    """Return options of a run with no effect."""
    return ort.RunOptions()


def default_threads(config: dict[str, Any]) -> int:
    """Return the threads of one instance: the cores are shared out among the CPU instances."""
    instances = sum(int(group.get("count") or 1) for group in config.get("instance_group") or ()) or 1
    return max(1, len(os.sched_getaffinity(0)) // instances)


def providers(config: dict[str, Any], kind: str, device: int) -> list[Any]:
    """Return the execution providers for an instance, the best first.

    Args:
        config: configuration of the model, as parsed JSON.
        kind: kind of the instance: `CPU` or `GPU`.
        device: number of the GPU, from 0, for CUDA and TensorRT. Without effect for kind `CPU`.

    Raises:
        BadParameterError: the configuration asks for an accelerator the native backend refuses, too.
    """
    asked = (config.get("optimization") or {}).get("execution_accelerators") or {}
    known = {"cpu": ("openvino",), "gpu": ("tensorrt", "cuda")}
    for device_kind in ("cpu", "gpu") if kind == "GPU" else ("cpu",):
        for accelerator in asked.get(f"{device_kind}_execution_accelerator", ()):
            if accelerator.get("name") not in known[device_kind]:
                raise BadParameterError(f"unknown Execution Accelerator '{accelerator.get('name')}' is requested")
    if kind != "GPU":
        return ["CPUExecutionProvider"]
    available = set(ort.get_available_providers())
    chosen: list[Any] = []
    for accelerator in asked.get("gpu_execution_accelerator", ()):
        if accelerator.get("name") == "tensorrt" and "TensorrtExecutionProvider" in available:
            chosen.append(("TensorrtExecutionProvider", {"device_id": device, **_tensorrt(accelerator)}))
    if "CUDAExecutionProvider" in available:
        chosen.append(("CUDAExecutionProvider", {"device_id": device}))
    return [*chosen, "CPUExecutionProvider"]


def _tensorrt(accelerator: dict[str, Any]) -> dict[str, str]:
    """Translate the native backend's parameters into the provider's options."""
    options = {}
    for key, value in (accelerator.get("parameters") or {}).items():
        if key == "precision_mode":
            options["trt_fp16_enable" if value == "FP16" else "trt_int8_enable"] = str(value in {"FP16", "INT8"})
        elif key == "max_workspace_size_bytes":
            options["trt_max_workspace_size"] = str(value)
        elif key.startswith("trt_"):
            options[key] = str(value)
    return options


def open_session(folder: Path, config: dict[str, Any], kind: str, device: int) -> ort.InferenceSession:
    """Open the model in a version's folder as the configuration says.

    Args:
        folder: the version's folder, with `default_model_filename` or else model.onnx in it.
        config: configuration of the model, as parsed JSON.
        kind: kind of the instance: `CPU` or `GPU`.
        device: number of the GPU, from 0. Without effect for kind `CPU`.

    Raises:
        BadParameterError: there is no model file, or a parameter's value cannot be used.
        Exception: ONNX Runtime's own, for a broken model.
    """
    options = session_options(config)
    path, chosen = str(model_file(folder, config)), providers(config, kind, device)
    if _EXACT_INT8 not in parameters_of(config):
        options.add_session_config_entry(_EXACT_INT8, "1")
        try:
            return ort.InferenceSession(path, options, providers=chosen)
        except Exception:  # noqa: BLE001 - a few models load only without it; the second try gives the reason
            options.add_session_config_entry(_EXACT_INT8, "0")
    return ort.InferenceSession(path, options, providers=chosen)
