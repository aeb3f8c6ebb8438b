"""Triton's own engine options in a config: one plan per GPU kind, and TensorRT inside ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from google.protobuf import text_format  # type: ignore[import-untyped]  # its stubs are a separate package

from repo_manager.errors import UsageError
from repo_manager.files import reason_of
from repo_manager.triton_messages import model_config_pb2
from repo_manager.types import Backend, Precision

__all__ = ["AcceleratorOptions", "config_variant", "parse_config_names", "with_accelerator", "with_plans_by_capability"]


@dataclasses.dataclass(frozen=True)
class AcceleratorOptions:
    """TensorRT as the accelerator of Triton's onnxruntime backend, for build machines without a GPU.

    Keys: README of triton-inference-server/onnxruntime_backend, "Parameter mapping".

    Attributes:
        precision: FP16 and INT8 allow TensorRT those types. INT8 is for graphs with Quantize/DequantizeLinear.
        workspace_bytes: `None` is the backend's default, 1 GiB.
        sparse: let TensorRT choose sparse kernels.
        engine_cache: a folder on the server to keep built engines over restarts. `None` builds at every load.
        profile: input -> (min, opt, max) shapes. `None` lets the first requests decide, with rebuilds.
    """

    precision: Precision = Precision.FP32
    workspace_bytes: int | None = None
    sparse: bool = True
    engine_cache: str | None = None
    profile: Mapping[str, Sequence[Sequence[int]]] | None = None


def with_plans_by_capability(
    config: model_config_pb2.ModelConfig, by_capability: Mapping[str, str]
) -> model_config_pb2.ModelConfig:
    """Return a copy of a config whose `cc_model_filenames` sends each GPU kind to its plan.

    The default file name is the first plan's, so Triton finds a file on every GPU. On a GPU it is not for, it refuses
    to load.
    """
    changed = model_config_pb2.ModelConfig()
    changed.CopyFrom(config)
    changed.cc_model_filenames.clear()
    for capability, name in by_capability.items():
        changed.cc_model_filenames[capability] = name
    changed.default_model_filename = next(iter(by_capability.values()))
    return changed


def with_accelerator(config: model_config_pb2.ModelConfig, options: AcceleratorOptions) -> model_config_pb2.ModelConfig:
    """Return a copy of an onnxruntime config to run through TensorRT on the server's GPU.

    Raises:
        UsageError: the config is not for the onnxruntime backend, or places its instances on the CPU.
    """
    if config.backend and config.backend != str(Backend.ONNXRUNTIME):
        raise UsageError(f"--accelerator tensorrt goes with --backend onnxruntime, found {config.backend}")
    if any(group.kind == model_config_pb2.ModelInstanceGroup.KIND_CPU for group in config.instance_group):
        raise UsageError("--accelerator tensorrt needs instances on the GPU: use --instance-kind gpu or auto")
    changed = model_config_pb2.ModelConfig()
    changed.CopyFrom(config)
    accelerators = changed.optimization.execution_accelerators
    del accelerators.gpu_execution_accelerator[:]
    accelerator = accelerators.gpu_execution_accelerator.add(name="tensorrt")
    for key, value in _parameters(options).items():
        accelerator.parameters[key] = value
    return changed


def _parameters(options: AcceleratorOptions) -> dict[str, str]:
    facts = options.precision.facts
    parameters = {"precision_mode": "INT8" if facts.quantizes else "FP16" if facts.low == "float16" else "FP32"}
    if options.workspace_bytes is not None:
        parameters["max_workspace_size_bytes"] = str(options.workspace_bytes)
    if options.sparse:
        parameters["trt_sparsity_enable"] = "1"
    if options.engine_cache is not None:
        parameters["trt_engine_cache_enable"] = "1"
        parameters["trt_engine_cache_path"] = options.engine_cache
    if options.profile:
        for index, which in enumerate(("min", "opt", "max")):
            shapes = (f"{name}:{'x'.join(map(str, shape[index]))}" for name, shape in options.profile.items())
            parameters[f"trt_profile_{which}_shapes"] = ",".join(shapes)
    return parameters


def parse_config_names(texts: Sequence[str]) -> dict[str, str]:
    """Read `--model-config h100=9.0` and `--model-config small=overrides.pbtxt` options.

    Returns:
        Name for `--model-config-name` -> compute capability or file.

    Raises:
        UsageError: another form, a name unfit for a file, or one given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not value or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise UsageError(f"--model-config {text}: expected NAME=CAPABILITY or NAME=FILE, for instance h100=9.0")
        if name.startswith(".") or name in found:
            raise UsageError(f"--model-config {text}: the name is given twice, or starts with a dot")
        found[name] = value
    return found


def config_variant(
    config: model_config_pb2.ModelConfig, name: str, value: str, by_capability: Mapping[str, str]
) -> model_config_pb2.ModelConfig:
    """Return the configuration a server started with `--model-config-name=NAME` reads in place of config.pbtxt.

    Args:
        config: configuration of the model (config.pbtxt).
        name: of the variant, for an error.
        value: a compute capability, whose plan becomes the default, or a file in protobuf's text form, whose fields
            take the place of the model's (a repeated field as a whole).
        by_capability: compute capability -> file of the version.

    Raises:
        UsageError: there is no plan for the capability, or the file is no configuration or names another model.
    """
    changed = model_config_pb2.ModelConfig()
    changed.CopyFrom(config)
    if value in by_capability:
        changed.default_model_filename = by_capability[value]
        return changed
    if value.replace(".", "", 1).isdecimal():
        known = ", ".join(by_capability) or "none"
        raise UsageError(f"--model-config {name}={value}: there is no plan for {value}; --for gives {known}")
    overrides = _read_overrides(name, Path(value))
    if overrides.name not in ("", config.name):
        raise UsageError(f"--model-config {name}={value}: it names the model {overrides.name!r}, not {config.name!r}")
    for field, _ in overrides.ListFields():
        changed.ClearField(field.name)
    changed.MergeFrom(overrides)
    return changed


def _read_overrides(name: str, path: Path) -> model_config_pb2.ModelConfig:
    overrides = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(path.read_text(encoding="utf-8"), overrides)
    except (OSError, UnicodeDecodeError, text_format.ParseError) as exc:
        raise UsageError(
            f"--model-config {name}={path}: not a readable Triton configuration: {reason_of(exc)}"
        ) from exc
    return overrides
