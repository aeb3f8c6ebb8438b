"""Triton's own rules for a configuration, checked before a server does."""

from __future__ import annotations

from typing import Any

from repo_manager.triton_config.config import ModelConfig
from repo_manager.triton_config.problems import Problem, Severity

__all__ = ["check_rules"]


def check_rules(config: ModelConfig, *, where: str = "config.pbtxt") -> list[Problem]:
    """Check a configuration by itself, without a model.

    The rules are ValidateModelConfig, ValidateModelIOConfig and ValidateInstanceGroup of
    triton-inference-server/core; those of sequences, ensembles and rate limits are left to the server.

    Args:
        config: any configuration.
        where: the subject of the findings.

    Returns:
        What would keep a model of this configuration from loading.
    """
    message = config.message()
    found: list[Problem] = []
    if not config.backend and not message.platform:
        text = "states no backend; Triton guesses it from the files"
        found.append(Problem(where, text, Severity.WARNING, "write the backend down"))
    if message.max_batch_size < 0:
        found.append(Problem(where, f"max_batch_size is {message.max_batch_size}; expected 0 or more"))
    for kind, tensors in (("input", message.input), ("output", message.output)):
        names = [tensor.name for tensor in tensors]
        found += [
            Problem(where, f"{kind} {name!r} is listed twice") for name in sorted(set(names)) if names.count(name) > 1
        ]
        for tensor in tensors:
            found += [Problem(where, f"{kind} {tensor.name!r} {text}") for text in _tensor_faults(tensor, message)]
    if message.HasField("dynamic_batching"):
        for size in message.dynamic_batching.preferred_batch_size:
            if not 1 <= size <= message.max_batch_size:
                text = f"preferred batch size {size} is not between 1 and max_batch_size {message.max_batch_size}"
                found.append(Problem(where, text))
    for group in message.instance_group:
        if group.kind == group.KIND_CPU and group.gpus:
            found.append(Problem(where, f"an instance group of KIND_CPU lists GPUs {list(group.gpus)}"))
        if group.count < 0:
            found.append(Problem(where, f"an instance group has count {group.count}"))
    return found


def _tensor_faults(tensor: Any, message: Any) -> list[str]:
    faults = []
    if not tensor.name:
        faults.append("has no name")
    if tensor.data_type == 0:
        faults.append("has no data_type")
    if not tensor.dims:
        faults.append("has no dims; a scalar is written as dims: [1]")
    if any(dim < 1 and dim != -1 for dim in tensor.dims):
        faults.append(f"has dims {list(tensor.dims)}; each is 1 or more, or -1")
    if not tensor.HasField("reshape"):
        return faults
    shape = list(tensor.reshape.shape)
    if any(dim < 1 and dim != -1 for dim in shape):
        faults.append(f"has reshape {shape}; each is 1 or more, or -1")
    elif not shape and message.max_batch_size == 0:
        faults.append("has an empty reshape, which needs max_batch_size above 0")
    elif _chunks(tensor.dims) != _chunks(shape):
        faults.append(f"has dims {list(tensor.dims)} and reshape {shape} of different size")
    return faults


def _chunks(dims: Any) -> list[int]:
    """Element counts between the variable-size dimensions; equal ones can be reshaped into each other."""
    counts = [1]
    for dim in dims:
        if dim == -1:
            counts.append(1)
        else:
            counts[-1] *= dim
    return counts
