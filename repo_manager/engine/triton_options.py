"""What Triton's own engine options look like in a config: one plan per GPU kind, and TensorRT inside ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from tritonclient.grpc import model_config_pb2

from repo_manager.engine.plan_header import read_plan_header
from repo_manager.errors import EngineError, UsageError
from repo_manager.types import Backend, Precision

__all__ = ["AcceleratorOptions", "PlanSet", "parse_for", "plan_set", "with_accelerator", "with_plans_by_capability"]

_MODES = {
    Precision.FP32: "FP32",
    Precision.FP16: "FP16",
    Precision.BF16: "FP32",
    Precision.INT8: "INT8",
    Precision.INT8_FP16: "INT8",
}


@dataclasses.dataclass(frozen=True)
class PlanSet:
    """Plans of one model for several GPU kinds.

    Attributes:
        files: name in the version's folder -> the plan.
        by_capability: `8.0` -> name in the version's folder.
    """

    files: Mapping[str, Path]
    by_capability: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class AcceleratorOptions:
    """TensorRT as the accelerator of Triton's onnxruntime backend, for build machines without a GPU.

    Keys: README of triton-inference-server/onnxruntime_backend, "Parameter mapping".

    Attributes:
        precision: FP16 and INT8 allow TensorRT those types; INT8 is for graphs with Quantize/DequantizeLinear.
        workspace_bytes: `None` is the backend's default, 1 GiB.
        sparse: let TensorRT choose sparse kernels.
        engine_cache: a folder on the server that keeps built engines over restarts; `None` builds at every load.
        profile: input -> (min, opt, max) shapes; `None` lets the first requests decide, which rebuilds.
    """

    precision: Precision = Precision.FP32
    workspace_bytes: int | None = None
    sparse: bool = True
    engine_cache: str | None = None
    profile: Mapping[str, Sequence[Sequence[int]]] | None = None


def parse_for(texts: Sequence[str]) -> dict[str, Path]:
    """Read `--for 8.0=a.plan` options.

    Raises:
        UsageError: another form, or a GPU kind given twice.
    """
    plans: dict[str, Path] = {}
    for text in texts:
        capability, separator, path = text.partition("=")
        major, dot, minor = capability.partition(".")
        if not (separator and path and dot and major.isdecimal() and minor.isdecimal()):
            raise UsageError(f"--for {text}: expected CAPABILITY=FILE, for instance 8.0=a100.plan")
        if capability in plans:
            raise UsageError(f"--for {text}: compute capability {capability} is given twice")
        plans[capability] = Path(path)
    return plans


def plan_set(plans: Mapping[str, Path]) -> PlanSet:
    """Check plans and name them for one version's folder.

    Raises:
        UsageError: there is none.
        EngineError: one is not a TensorRT plan, or they come from different TensorRT versions, which no one
            server loads.
    """
    if not plans:
        raise UsageError("--for: give at least one plan, for instance --for 8.0=a100.plan")
    headers = {capability: read_plan_header(path) for capability, path in plans.items()}
    for capability, header in headers.items():
        if header.backend is not Backend.TENSORRT:
            raise EngineError(
                f"{plans[capability]}: a TensorRT-RTX engine, which Triton's tensorrt backend does not load",
                hint="Publish it with --backend tensorrt_rtx; it holds several GPU kinds itself.",
            )
    versions = {capability: header.version for capability, header in headers.items()}
    if len(set(versions.values())) > 1:
        found = ", ".join(f"{capability}: {version}" for capability, version in versions.items())
        raise EngineError(
            f"the plans were built with different TensorRT versions ({found}); a server has one",
            hint="Build all of them in the container release that will serve them.",
        )
    names = {capability: f"model_sm{capability.replace('.', '')}.plan" for capability in plans}
    return PlanSet({names[capability]: path for capability, path in plans.items()}, names)


def with_plans_by_capability(
    config: model_config_pb2.ModelConfig, by_capability: Mapping[str, str]
) -> model_config_pb2.ModelConfig:
    """Return a copy of a config whose `cc_model_filenames` sends each GPU kind to its plan.

    The default file name is the first plan's, so that Triton finds a file on every GPU; one that it is not for refuses
    to load there.
    """
    changed = model_config_pb2.ModelConfig()
    changed.CopyFrom(config)
    changed.cc_model_filenames.clear()
    for capability, name in by_capability.items():
        changed.cc_model_filenames[capability] = name
    changed.default_model_filename = next(iter(by_capability.values()))
    return changed


def with_accelerator(config: model_config_pb2.ModelConfig, options: AcceleratorOptions) -> model_config_pb2.ModelConfig:
    """Return a copy of an onnxruntime config that runs through TensorRT on the server's GPU.

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
    parameters = {"precision_mode": _MODES[options.precision]}
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
