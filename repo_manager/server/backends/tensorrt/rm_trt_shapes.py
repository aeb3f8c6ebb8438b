"""Shapes of an engine and of a configuration: pure, so it is tested without a GPU (no repo_manager here)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

Shape = tuple[int, ...]

TRITON_TYPES = {
    "FLOAT": ("TYPE_FP32", "float32"),
    "HALF": ("TYPE_FP16", "float16"),
    "INT8": ("TYPE_INT8", "int8"),
    "UINT8": ("TYPE_UINT8", "uint8"),
    "INT32": ("TYPE_INT32", "int32"),
    "INT64": ("TYPE_INT64", "int64"),
    "BOOL": ("TYPE_BOOL", "bool"),
}


class Mismatch(Exception):  # noqa: N818 - it becomes Triton's message, not an error of ours
    """Engine, configuration and request contradict each other."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An engine's input or output. -1 is dynamic."""

    name: str
    is_input: bool
    data_type: str
    numpy_type: str
    shape: Shape


@dataclasses.dataclass(frozen=True)
class Profile:
    """One optimization profile: input -> (min, opt, max)."""

    index: int
    ranges: Mapping[str, tuple[Shape, Shape, Shape]]

    def holds(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether every input's shape is within its range."""
        return all(_within(shapes[name], low, high) for name, (low, _, high) in self.ranges.items() if name in shapes)

    def distance(self, shapes: Mapping[str, Shape]) -> int:
        """How far shapes are from the ones the profile is tuned for."""
        return sum(
            abs(size - tuned)
            for name, (_, opt, _) in self.ranges.items()
            if name in shapes
            for size, tuned in zip(shapes[name], opt, strict=True)
        )


def _within(shape: Shape, low: Shape, high: Shape) -> bool:
    return len(shape) == len(low) and all(a <= size <= b for size, a, b in zip(shape, low, high, strict=True))


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> Profile:
    """Return the profile tuned closest to the shapes among those with room for them.

    Raises:
        Mismatch: none holds them. The message has the shapes and the ranges.
    """
    fitting = [profile for profile in profiles if profile.holds(shapes)]
    if fitting:
        return min(fitting, key=lambda profile: profile.distance(shapes))
    asked = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    ranges = "; ".join(
        ", ".join(f"{name} {list(low)} to {list(high)}" for name, (low, _, high) in profile.ranges.items())
        for profile in profiles
    )
    raise Mismatch(f"INVALID_ARGUMENT: the engine is not built for the shapes {asked}; it takes {ranges}")


def check(config: Mapping[str, Any], tensors: Sequence[Tensor], profiles: Sequence[Profile]) -> None:
    """Check a configuration against the engine, as Triton's tensorrt backend does when it loads a plan.

    Args:
        config: configuration of the model, as parsed JSON.
        tensors: inputs and outputs of the engine.
        profiles: optimisation profiles of the engine.

    Raises:
        Mismatch: with the shapes found and expected.
    """
    name, limit = config["name"], int(config.get("max_batch_size", 0))
    for key, is_input in (("input", True), ("output", False)):
        entries = {entry["name"]: entry for entry in config.get(key, [])}
        found = {tensor.name: tensor for tensor in tensors if tensor.is_input is is_input}
        wrong = set(entries) != set(found) if is_input else not set(entries) <= set(found)
        if wrong:
            raise Mismatch(
                f"model '{name}': the configuration's {key}s are {sorted(entries)}, the engine's {sorted(found)}"
            )
        for entry in entries.values():
            _check_entry(name, key, entry, found[entry["name"]], batched=limit > 0)
    if limit > 0:
        largest = max((_largest_batch(profile) for profile in profiles), default=1)
        if limit > largest:
            raise Mismatch(
                f"model '{name}': max_batch_size is {limit}, and the engine takes batches up to {largest}: lower it, "
                "or build the engine for more"
            )


def _check_entry(model: str, key: str, entry: Mapping[str, Any], tensor: Tensor, *, batched: bool) -> None:
    if entry["data_type"] != tensor.data_type:
        raise Mismatch(
            f"model '{model}': {key} '{tensor.name}' is {entry['data_type']}, the engine's {tensor.data_type}"
        )
    reshaped = entry.get("reshape", {}).get("shape")
    dims = [int(size) for size in (entry["dims"] if reshaped is None else reshaped)]
    full = [-1, *dims] if batched else dims
    if len(full) != len(tensor.shape) or any(
        -1 not in pair and pair[0] != pair[1] for pair in zip(full, tensor.shape, strict=True)
    ):
        raise Mismatch(
            f"model '{model}': {key} '{tensor.name}' has dims {full}, the engine's shape is {list(tensor.shape)}"
        )


def _largest_batch(profile: Profile) -> int:
    return min((high[0] for _, _, high in profile.ranges.values() if high), default=1)


def plan_filename(config: Mapping[str, Any], capability: str, default: str) -> str:
    """Return the file for a GPU: `cc_model_filenames`, then `default_model_filename`, then the default.

    Args:
        config: configuration of the model, as parsed JSON.
        capability: compute capability of the GPU, such as `8.9`.
        default: file name without one in the configuration.
    """
    by_capability = config.get("cc_model_filenames") or {}
    return str(by_capability.get(capability) or config.get("default_model_filename") or default)


def complete(config: dict[str, Any], tensors: Sequence[Tensor], profiles: Sequence[Profile]) -> None:
    """Fill in inputs, outputs and batching where a configuration leaves them out. `config` is changed.

    Args:
        config: configuration of the model, as parsed JSON.
        tensors: inputs and outputs of the engine.
        profiles: optimisation profiles of the engine.
    """
    batchable = all(tensor.shape and tensor.shape[0] == -1 for tensor in tensors)
    if batchable and not config.get("max_batch_size"):
        config["max_batch_size"] = min((_largest_batch(profile) for profile in profiles), default=1)
    batched = bool(config.get("max_batch_size"))
    for key, is_input in (("input", True), ("output", False)):
        if not config.get(key):
            config[key] = [
                {"name": t.name, "data_type": t.data_type, "dims": list(t.shape[1:] if batched else t.shape) or [1]}
                for t in tensors
                if t.is_input is is_input
            ]
