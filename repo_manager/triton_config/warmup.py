"""Warm-up samples: what Triton runs through a model before it is READY."""

from __future__ import annotations

from typing import Any

from repo_manager.errors import ConfigError
from repo_manager.triton_config.options import ConfigOptions
from repo_manager.triton_messages import model_config_pb2

__all__ = ["add_warmup"]

_FLOATS = ("TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_BF16")


def add_warmup(message: Any, options: ConfigOptions) -> None:
    """Add one sample of batch 1, and one of the largest batch.

    Floating-point inputs get random values (each byte random, as Triton makes them); all others zeros, which are valid
    indices, flags and empty strings: a sample that the model refuses fails the whole load.

    Args:
        message: a `ModelConfig` message whose inputs are complete; the samples are added to it.
        options: `warmup_shapes` gives the sizes of dynamic dims.

    Raises:
        ConfigError: an input's dims are dynamic and no shape is given for it, or the given one does not fit.
    """
    sizes = sorted({1, message.max_batch_size}) if message.max_batch_size > 0 else [0]
    for batch_size in sizes:
        sample = message.model_warmup.add(name=f"batch_{batch_size}" if batch_size else "single")
        sample.batch_size = batch_size
        for tensor in message.input:
            entry = sample.inputs[tensor.name]
            entry.data_type = tensor.data_type
            entry.dims.extend(_dims(tensor, options))
            if model_config_pb2.DataType.Name(tensor.data_type) in _FLOATS:
                entry.random_data = True
            else:
                entry.zero_data = True


def _dims(tensor: Any, options: ConfigOptions) -> tuple[int, ...]:
    dims = tuple(tensor.dims)
    given = options.warmup_shapes.get(tensor.name)
    if given is None or (dims == (1,) and given == ()):
        if -1 in dims:
            raise ConfigError(
                f"input {tensor.name!r} has dims {list(dims)}: a warm-up sample needs a size for each -1",
                hint="Give the shape to warm up with.",
            )
        return dims
    if len(given) != len(dims) or any(d not in (-1, g) or g < 1 for d, g in zip(dims, given, strict=True)):
        raise ConfigError(f"input {tensor.name!r} has dims {list(dims)}: the warm-up shape {list(given)} does not fit")
    return tuple(given)
