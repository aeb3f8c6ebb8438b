"""Rules for warm-up samples: a sample that fails keeps the model from loading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from repo_manager.triton_config.rules.rule import Fault, Rule

__all__ = ["WARMUP_RULES"]


def _samples(message: Any) -> Iterator[tuple[str, Any]]:
    if message.HasField("ensemble_scheduling"):
        return  # a rule of ensembles refuses them
    for index, sample in enumerate(message.model_warmup):
        yield f"warm-up sample {sample.name or index!r}", sample


def _data(message: Any) -> Iterator[Fault]:
    for label, sample in _samples(message):
        for name, tensor in sorted(sample.inputs.items()):
            if any(dim == -1 for dim in tensor.dims):
                yield Fault(f"{label}: input {name!r} has dims {list(tensor.dims)}; expected a fixed size")
            if tensor.WhichOneof("input_data_type") is None:
                yield Fault(f"{label}: input {name!r} has no data: zero_data, random_data or input_data_file")


def _inputs(message: Any) -> Iterator[Fault]:
    expected = {tensor.name: tensor for tensor in message.input}
    given_by_triton = {tensor.name for tensor in message.sequence_batching.control_input}
    for label, sample in _samples(message):
        if not expected:
            continue  # filled in by the backend
        for name in sorted(set(sample.inputs) - set(expected) - given_by_triton):
            yield Fault(f"{label}: there is no input {name!r}; the inputs are: {', '.join(sorted(expected))}")
        for name, tensor in sorted(expected.items()):
            if name not in sample.inputs:
                if not tensor.optional:
                    yield Fault(f"{label}: input {name!r} is missing")
                continue
            found = sample.inputs[name]
            if found.data_type != tensor.data_type:
                yield Fault(f"{label}: input {name!r} has another data_type than the model's input")
            dims = list(tensor.dims)
            if len(found.dims) != len(dims) or any(
                wanted not in (-1, got) for wanted, got in zip(dims, found.dims, strict=True)
            ):
                yield Fault(f"{label}: input {name!r} has dims {list(found.dims)}, the model's input {dims}")


def _batch(message: Any) -> Iterator[Fault]:
    """Triton 2.51 refuses such a sample, and sometimes crashes while it does."""
    for label, sample in _samples(message):
        if sample.batch_size > max(1, message.max_batch_size):
            yield Fault(f"{label} has batch_size {sample.batch_size}; max_batch_size is {message.max_batch_size}")


WARMUP_RULES = (
    Rule("warmup-data", "TritonModelInstance::GenerateWarmupData", _data),
    Rule("warmup-inputs", "InferenceRequest::Normalize", _inputs),
    Rule("warmup-batch-size", "InferenceRequest::Normalize", _batch),
)
