"""The configuration of a version from `add`: derived from the model, with the entries of the engine options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from repo_manager.engine.options import EngineOptions
from repo_manager.engine.plan_set import plan_name
from repo_manager.engine.profiles import derive_profile, find_dim_ranges
from repo_manager.engine.triton_options import (
    AcceleratorOptions,
    config_variant,
    with_accelerator,
    with_plans_by_capability,
)
from repo_manager.errors import UsageError
from repo_manager.onnx_model.batch_axis import BatchAxis
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.signature import Signature, signature_of
from repo_manager.optional import require
from repo_manager.pipeline.add_types import AddOptions, AddTask
from repo_manager.repository.configuration import read_config_bytes
from repo_manager.triton_config.compare import changed_fields
from repo_manager.triton_config.config import ModelConfig, format_config, parse_config
from repo_manager.triton_config.derive import derive_config
from repo_manager.triton_config.options import ConfigOptions
from repo_manager.triton_config.served_signature import ServedSignature
from repo_manager.types import Backend

__all__ = ["check_backend_options", "config_options", "existing_config", "fields_kept", "serving_config"]

_ACCELERATED = ("sparse", "workspace_bytes", "shapes")
"""Engine options known to TensorRT inside ONNX Runtime, too."""


def check_backend_options(options: AddOptions, backend: Backend) -> None:
    """Refuse options the backend would ignore.

    Raises:
        UsageError: naming them.
        MissingDependencyError: the backend's builder is not installed.
    """
    if options.accelerator is not None and backend is not Backend.ONNXRUNTIME:
        raise UsageError(f"--accelerator tensorrt goes with --backend onnxruntime, and the backend is {backend}")
    if options.control and any(options.engine.plans.values()):
        raise UsageError(
            "--control builds the twins of what is built here, and --for names plans that were built elsewhere",
            hint="Leave out --control, or the files of --for.",
        )
    if backend is not Backend.ONNXRUNTIME:
        if not options.engine.plans or not all(options.engine.plans.values()):
            require(str(backend))  # check for the builder before the conversion
        return
    if options.precision.facts.low == "bfloat16":
        raise UsageError(
            "--precision bf16 with the onnxruntime backend: ONNX Runtime on the CPU has no BF16 operators, so no "
            "server could load the version",
            hint="Use --precision fp16, or --backend tensorrt or tensorrt_rtx. `convert` writes the file alone.",
        )
    default = EngineOptions()
    known = _ACCELERATED if options.accelerator is not None else ()
    asked = [
        field.name
        for field in dataclasses.fields(EngineOptions)
        if field.name not in known and getattr(options.engine, field.name) != getattr(default, field.name)
    ]
    if asked:
        names = ", ".join(_OPTION_OF.get(name, name) for name in asked)
        raise UsageError(
            f"{names}: for engines, and the onnxruntime backend serves the ONNX file as it is",
            hint="Use --backend tensorrt or tensorrt_rtx, or leave the option out. With --accelerator tensorrt, "
            "--no-sparse, --workspace and --shape-range hold for the engine that the server builds.",
        )


_OPTION_OF = {
    "sparse": "--no-sparse",
    "shapes": "--shape-range",
    "workspace_bytes": "--workspace",
    "optimization_level": "--optimization-level",
    "timing_cache": "--timing-cache",
    "deterministic": "--deterministic",
    "version_compatible": "--version-compatible",
    "hardware_compatibility": "--hardware-compatibility",
    "compute_capabilities": "--compute-capability",
    "strip": "--strip",
    "refit": "--refit",
    "plan_detail": "--plan-detail",
    "without_tactics": "--without-tactics",
    "plans": "--for",
}


def config_options(
    options: ConfigOptions, task: AddTask, sample: Mapping[str, NDArray[Any]], *, batched: bool
) -> ConfigOptions:
    """Fill in options left out: the existing model's largest batch and file, the sample's sizes for warm-up.

    Args:
        options: fields of config.pbtxt the caller chose.
        task: name, repository and backend of the version.
        sample: input name -> array of the golden sample.
        batched: whether the arrays have a batch axis.
    """
    size = options.max_batch_size
    existing = existing_config(task)
    if size is None and batched and existing is not None:
        size = existing.max_batch_size
    filename = options.model_filename
    if filename is None and existing is not None and not existing.message().cc_model_filenames:
        filename = existing.message().default_model_filename or None
    skip = 1 if batched and size != 0 else 0
    shapes = {name: tuple(array.shape[skip:]) for name, array in sample.items()}
    shapes.update(options.warmup_shapes)
    return dataclasses.replace(options, max_batch_size=size, model_filename=filename, warmup_shapes=shapes)


def serving_config(
    task: AddTask,
    signature: Signature | ServedSignature,
    axis: BatchAxis,
    options: AddOptions,
    *,
    model: Model,
    sample: Mapping[str, NDArray[Any]],
) -> ModelConfig:
    """Derive the configuration, plans per GPU kind, accelerator and named variants included.

    Args:
        task: name, repository and backend of the version.
        signature: the model's inputs and outputs, shapes with the batch axis.
        axis: whether the first axis is a batch axis.
        options: `options.config` is complete, see `config_options`.
        model: to try sizes on, when the accelerator needs a range for a dynamic axis.
        sample: shapes the model runs with.

    Raises:
        ConfigError: the model cannot be served so.
        UsageError: the options contradict each other, or the existing model.
    """
    backend = task.choice.backend
    derived = derive_config(task.name, signature, axis, backend, options.config)
    message = derived.message()
    by_capability = {capability: plan_name(backend, capability) for capability in options.engine.plans}
    if by_capability:
        message = with_plans_by_capability(message, by_capability)
    if options.accelerator is not None:
        accelerator = _with_profile(options.accelerator, options, model, axis, derived.max_batch_size, sample)
        message = with_accelerator(message, accelerator)
    variants = {
        name: format_config(ModelConfig.from_message(config_variant(message, name, value, by_capability)))
        for name, value in options.model_configs.items()
    }
    return ModelConfig.from_message(message, labels=derived.labels, variants=variants)


def _with_profile(
    accelerator: AcceleratorOptions,
    options: AddOptions,
    model: Model,
    axis: BatchAxis,
    max_batch_size: int,
    sample: Mapping[str, NDArray[Any]],
) -> AcceleratorOptions:
    """Tell TensorRT the shapes in advance, else each new shape among the requests would build an engine again."""
    signature = signature_of(model)
    if all(isinstance(dim, int) for spec in signature.inputs for dim in spec.shape or (None,)):
        return accelerator
    shapes = {name: array.shape for name, array in sample.items()}
    profile = derive_profile(
        signature,
        batched=axis.batched,
        max_batch_size=max_batch_size,
        free=find_dim_ranges(model, signature, batched=axis.batched, sample=shapes),
        overrides=options.engine.shapes,
    )
    ranges = {name: (given.min, given.opt, given.max) for name, given in profile.items()}
    return dataclasses.replace(accelerator, profile=ranges)


def fields_kept(task: AddTask, config: ModelConfig, options: AddOptions) -> tuple[str, ...]:
    """Compare with the existing config.pbtxt: all versions share it, and publishing leaves it as it is.

    Args:
        task: name, repository and backend of the version.
        config: configuration of the model (config.pbtxt).
        options: settings of the conversion and of the version.

    Returns:
        The fields where it differs, for a note. Empty for a new model.

    Raises:
        UsageError: the options would not take effect: it loads other files, or has no such accelerator.
    """
    existing = existing_config(task)
    if existing is None:
        return ()
    # `deploy` owns the version policy. Warm-up and other fields may have been edited by hand.
    differing = [field for field in changed_fields(existing, config) if field not in ("version_policy", "name")]
    binding = {"cc_model_filenames": True, "optimization": options.accelerator is not None}
    refused = [field for field in differing if binding.get(field, False)]
    if refused:
        raise UsageError(
            f"model '{task.name}': the config.pbtxt that all its versions share has another {', '.join(refused)}, "
            "and add does not change it: it would reload every version",
            hint="Give the new kind of version another --name.",
        )
    return tuple(differing)


def existing_config(task: AddTask) -> ModelConfig | None:
    """Return the config.pbtxt the model has already. `None` for a new model."""
    content = read_config_bytes(task.repository, task.name)
    where = f"{task.repository / task.name}/config.pbtxt"
    return None if content is None else parse_config(content.decode(errors="replace"), where=where)
