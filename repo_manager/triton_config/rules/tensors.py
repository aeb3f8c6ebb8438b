"""Rules for inputs, outputs and the tensors added by batching."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from repo_manager.triton_config.problems import Severity
from repo_manager.triton_config.rules.rule import Fault, Rule, is_tensorrt

__all__ = ["TENSOR_RULES", "WARMUP_RULES"]


def _tensors(message: Any) -> Iterator[tuple[str, Any]]:
    for kind, tensors in (("input", message.input), ("output", message.output)):
        for tensor in tensors:
            yield f"{kind} {tensor.name!r}", tensor


def _names(message: Any) -> Iterator[Fault]:
    """Inputs and outputs have names, each once."""
    for kind, tensors in (("input", message.input), ("output", message.output)):
        names = [tensor.name for tensor in tensors]
        if "" in names:
            yield Fault(f"an {kind} has no name")
        for name in sorted(set(names) - {""}):
            if names.count(name) > 1:
                yield Fault(
                    f"{kind} {name!r} is listed twice", Severity.WARNING, "Triton takes it, and uses one of them"
                )


def _data_types(message: Any) -> Iterator[Fault]:
    """Every tensor has a data type."""
    for label, tensor in _tensors(message):
        if tensor.data_type == 0:
            yield Fault(f"{label} has no data_type", curable=True)


def _dims(message: Any) -> Iterator[Fault]:
    """Every tensor has dims of 1 or more, or -1."""
    for label, tensor in _tensors(message):
        if not tensor.dims:
            yield Fault(f"{label} has no dims; a scalar is written as dims: [1]", curable=True)
        if any(dim < 1 and dim != -1 for dim in tensor.dims):
            yield Fault(f"{label} has dims {list(tensor.dims)}; each is 1 or more, or -1")


def _reshapes(message: Any) -> Iterator[Fault]:
    """A reshape keeps the number of elements."""
    for label, tensor in _tensors(message):
        if not tensor.HasField("reshape"):
            continue
        shape = list(tensor.reshape.shape)
        if any(dim < 1 and dim != -1 for dim in shape):
            yield Fault(f"{label} has reshape {shape}; each is 1 or more, or -1")
        elif not shape and message.max_batch_size == 0:
            yield Fault(f"{label} has an empty reshape, which needs max_batch_size above 0")
        elif _chunks(tensor.dims) != _chunks(shape):
            yield Fault(f"{label} has dims {list(tensor.dims)} and reshape {shape} of different size")


def _chunks(dims: Iterable[int]) -> list[int]:
    """Return the element counts between variable-size dimensions. Equal ones can be reshaped into each other."""
    counts = [1]
    for dim in dims:
        if dim == -1:
            counts.append(1)
        else:
            counts[-1] *= dim
    return counts


def _formats(message: Any) -> Iterator[Fault]:
    """An image format needs three dims."""
    for tensor in message.input:
        if tensor.format in (tensor.FORMAT_NHWC, tensor.FORMAT_NCHW) and len(tensor.dims) != 3:
            name = tensor.Format.Name(tensor.format)
            yield Fault(f"input {tensor.name!r} has {name}, which needs 3 dims; it has {len(tensor.dims)}")


def _tensorrt_only(message: Any) -> Iterator[Fault]:
    """Shape tensors and non-linear formats belong to TensorRT models."""
    for label, tensor in _tensors(message):
        if tensor.is_shape_tensor and not is_tensorrt(message):
            yield Fault(f"{label} is a shape tensor, which only TensorRT models have")
        if getattr(tensor, "is_non_linear_format_io", False):
            if not is_tensorrt(message):
                yield Fault(f"{label} has a non-linear format, which only TensorRT models have")
            elif len(tensor.dims) != 3:
                yield Fault(f"{label} has a non-linear format, which needs 3 dims; it has {len(tensor.dims)}")


def _batch_inputs(message: Any) -> Iterator[Fault]:
    """A batch input has the source inputs its kind needs, all of them inputs of the model."""
    inputs = {tensor.name for tensor in message.input}
    for batch_input in message.batch_input:
        label = f"batch_input {', '.join(batch_input.target_name)!r}"
        kind = batch_input.Kind.Name(batch_input.kind)
        if len(batch_input.source_input) != 1:
            yield Fault(f"{label} of {kind} has {len(batch_input.source_input)} source inputs; expected 1")
        if batch_input.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[
            batch_input.data_type
        ].name not in ("TYPE_INT32", "TYPE_FP32"):
            yield Fault(f"{label} has another data_type than TYPE_INT32 and TYPE_FP32")
        for name in sorted(set(batch_input.source_input) - inputs):
            yield Fault(f"{label} names the source input {name!r}; the inputs are: {_listed(inputs)}")


def _batch_outputs(message: Any) -> Iterator[Fault]:
    """A batch output names one source input and outputs of the model, each once."""
    inputs, outputs = ({tensor.name for tensor in tensors} for tensors in (message.input, message.output))
    for batch_output in message.batch_output:
        targets = list(batch_output.target_name)
        label = f"batch_output {', '.join(targets)!r}"
        if not targets:
            yield Fault("a batch_output has no target_name; Triton 2.51 crashes over it")
        if len(batch_output.source_input) != 1:
            yield Fault(f"{label} has {len(batch_output.source_input)} source inputs; expected 1")
        for name in sorted(set(batch_output.source_input) - inputs):
            yield Fault(f"{label} names the source input {name!r}; the inputs are: {_listed(inputs)}")
        for name in sorted(set(targets) - outputs):
            yield Fault(f"{label} names the output {name!r}; the outputs are: {_listed(outputs)}")
        for name in sorted({name for name in targets if targets.count(name) > 1}):
            yield Fault(f"{label} names the output {name!r} more than once")


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


TENSOR_RULES = (
    Rule("tensor-names", "ValidateIOShape", _names),
    Rule("tensor-data-type", "ValidateIOShape", _data_types),
    Rule("tensor-dims", "ValidateIOShape", _dims),
    Rule("tensor-reshape", "ValidateIOShape", _reshapes),
    Rule("input-format", "ValidateModelInput", _formats),
    Rule("tensorrt-tensors", "ValidateModelInput, ValidateNonLinearFormatIO", _tensorrt_only),
    Rule("batch-input", "ValidateBatchIO", _batch_inputs),
    Rule("batch-output", "ValidateBatchIO", _batch_outputs),
)


# Rules for warm-up samples: a failing sample prevents the load.


def _samples(message: Any) -> Iterator[tuple[str, Any]]:
    if message.HasField("ensemble_scheduling"):
        return  # an ensemble rule rejects warm-up
    for index, sample in enumerate(message.model_warmup):
        if sample.batch_size:  # Triton skips samples with batch size 0 (core, backend_model_instance.cc)
            yield f"warm-up sample {sample.name or index!r}", sample


def _data(message: Any) -> Iterator[Fault]:
    """A warm-up input has a fixed size and data."""
    for label, sample in _samples(message):
        for name, tensor in sorted(sample.inputs.items()):
            if any(dim == -1 for dim in tensor.dims):
                yield Fault(f"{label}: input {name!r} has dims {list(tensor.dims)}; expected a fixed size")
            if tensor.WhichOneof("input_data_type") is None:
                yield Fault(f"{label}: input {name!r} has no data: zero_data, random_data or input_data_file")


def _inputs(message: Any) -> Iterator[Fault]:
    """A warm-up sample gives every input of the model, in its type and dims."""
    expected = {tensor.name: tensor for tensor in message.input}
    given_by_triton = {tensor.name for tensor in message.sequence_batching.control_input}
    for label, sample in _samples(message):
        if not expected:
            continue  # the backend completes the inputs
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
    """A warm-up sample holds 1 to `max_batch_size`. Triton 2.51 sometimes crashes over a larger one."""
    for sample in message.model_warmup:
        if sample.batch_size == 0 and not message.HasField("ensemble_scheduling"):
            text = f"warm-up sample {sample.name!r} has batch_size 0, and Triton skips it"
            yield Fault(text, Severity.WARNING, "write batch_size: 1, also where max_batch_size is 0")
    for label, sample in _samples(message):
        if sample.batch_size > max(1, message.max_batch_size):
            yield Fault(f"{label} has batch_size {sample.batch_size}; max_batch_size is {message.max_batch_size}")


WARMUP_RULES = (
    Rule("warmup-data", "TritonModelInstance::GenerateWarmupData", _data),
    Rule("warmup-inputs", "InferenceRequest::Normalize", _inputs),
    Rule("warmup-batch-size", "InferenceRequest::Normalize", _batch),
)
