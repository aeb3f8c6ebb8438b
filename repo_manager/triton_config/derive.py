"""From a model's signature to the configuration Triton serves it with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repo_manager.errors import ConfigError
from repo_manager.triton_config.config import DEFAULT_FILENAMES, ModelConfig
from repo_manager.triton_config.fields import set_field
from repo_manager.triton_config.labels import check_labels, label_filename
from repo_manager.triton_config.options import DEFAULT_MAX_BATCH_SIZE, ConfigOptions
from repo_manager.triton_config.served_signature import check_dtypes, config_dtype
from repo_manager.triton_messages import model_config_pb2
from repo_manager.types import Backend, TensorSpec

if TYPE_CHECKING:
    from repo_manager.onnx_model.batch_axis import BatchAxis
    from repo_manager.onnx_model.signature import Signature
    from repo_manager.triton_config.served_signature import ServedSignature

__all__ = ["add_warmup", "derive_config"]


# Warm-up samples: Triton runs them before a model is READY (`ModelWarmup`, model_config.proto).

_FLOATS = ("TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_BF16")


def add_warmup(message: Any, options: ConfigOptions) -> None:
    """Add one sample of batch 1, and one of the largest batch.

    Floating-point inputs get random values (each byte random, as Triton makes them). All others are zeros, valid as
    indices, flags and empty strings: a sample the model refuses fails the whole load.

    Args:
        message: a `ModelConfig` message whose inputs are complete. The samples are added to it.
        options: `warmup_shapes` gives the sizes of dynamic dims.

    Raises:
        ConfigError: an input's dims are dynamic and no shape is given for it, or the given one does not fit.
    """
    batched = message.max_batch_size > 0
    for batch_size in sorted({1, message.max_batch_size}) if batched else [1]:  # Triton skips batch size 0 (core)
        sample = message.model_warmup.add(name=f"batch_{batch_size}" if batched else "single")
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


_KINDS = {"cpu": model_config_pb2.ModelInstanceGroup.KIND_CPU, "gpu": model_config_pb2.ModelInstanceGroup.KIND_GPU}


def derive_config(
    name: str,
    signature: Signature | ServedSignature,
    batch_axis: BatchAxis,
    backend: Backend,
    options: ConfigOptions = ConfigOptions(),  # noqa: B008 - frozen
) -> ModelConfig:
    """Derive a configuration the backend's own checks accept, the native C++ ones included.

    The rules are those of ValidateModelConfig in triton-inference-server/core and of ValidateInputs and
    ValidateOutputs in triton-inference-server/onnxruntime_backend: every input is listed, and dims leave out the first
    axis when max_batch_size > 0. An output's dims are exactly the model's. A tensor whose dims would be empty is
    written as `dims: [1]`. With a batch axis it gets an empty reshape. Without one it gets none: core refuses an empty
    reshape there, and the backend takes `[1]` for a scalar.

    Args:
        name: name of the model, written into the configuration.
        signature: inputs and outputs, shapes with the batch axis, as `served_signature` returns it: the native
            onnxruntime backend compares output dims with the shapes inferred by ONNX Runtime, not with the file's.
        batch_axis: whether the first axis is a batch axis, and why (not).
        backend: the Triton backend to serve the model.
        options: choices the model does not decide.

    Raises:
        ConfigError: Triton or the backend cannot carry a tensor, or an option contradicts the model.
    """
    backend = Backend(backend)
    check_dtypes(signature.inputs + signature.outputs, backend)
    message = model_config_pb2.ModelConfig(name=name, backend=str(backend))
    message.max_batch_size = _max_batch_size(batch_axis, options)
    batched = message.max_batch_size > 0
    for spec in signature.inputs:
        if spec.shape is None:
            raise ConfigError(
                f"input {spec.name!r} has no rank in the model, and Triton checks each request's rank",
                hint="State the input's shape in the model; its dimensions may be dynamic.",
            )
        _add_tensor(message.input.add(), spec, batched)
    for spec in signature.outputs:
        _add_tensor(message.output.add(), spec, batched)
    labels = _add_labels(message, options, signature.outputs, batched)
    _add_serving(message, backend, options)
    _add_model_file(message, backend, options)
    batches = message.HasField("dynamic_batching")
    for path, value in options.written().items():
        if batches or path in options.fields or not path.startswith("dynamic_batching."):
            set_field(message, path, value)  # a model without batching gets no queue settings
    if options.warmup:
        add_warmup(message, options)
    return ModelConfig.from_message(message, labels=labels)


def _max_batch_size(batch_axis: BatchAxis, options: ConfigOptions) -> int:
    batched = batch_axis.kind == "batched"
    if options.max_batch_size is None:
        return DEFAULT_MAX_BATCH_SIZE if batched else 0
    if options.max_batch_size > 0 and not batched:
        raise ConfigError(
            f"max_batch_size is {options.max_batch_size}, but the model cannot be batched: {batch_axis.reason}",
            hint="Use max_batch_size 0, or export the model with a dynamic first dimension on every input and output.",
        )
    return options.max_batch_size


def _add_tensor(tensor: Any, spec: TensorSpec, batched: bool) -> None:
    """Fill a ModelInput or ModelOutput."""
    if not spec.name:
        raise ConfigError("a tensor of the model has no name", hint="Name every input and output of the model.")
    tensor.name = spec.name
    tensor.data_type = model_config_pb2.DataType.Value(config_dtype(spec.dtype))
    # The onnxruntime backend takes an output of unknown rank for a scalar. It then requires [1] and returns any shape.
    shape = spec.shape or ()
    if batched and not shape:
        raise ConfigError(f"tensor {spec.name!r} has no batch axis, but max_batch_size is above 0")
    if batched and isinstance(shape[0], int) and shape[0] >= 0:
        raise ConfigError(
            f"tensor {spec.name!r} has no batch axis: its first dimension is {shape[0]} once the model is loaded",
            hint="Publish it with --max-batch-size 0, or export it with a dynamic first dimension.",
        )
    dims = [-1 if not isinstance(dim, int) or dim < 0 else dim for dim in (shape[1:] if batched else shape)]
    if 0 in dims:
        raise ConfigError(
            f"tensor {spec} has a dimension of 0, and Triton's dims are 1 or more, or -1",
            hint="Remove the tensor from the model, or make the dimension dynamic.",
        )
    tensor.dims.extend(dims or [1])
    if batched and not dims:
        tensor.reshape.SetInParent()


def _add_serving(message: Any, backend: Backend, options: ConfigOptions) -> None:
    """Instances, batching and the backend's parameters."""
    group = message.instance_group.add()
    group.count = 1 if options.instance_count is None else options.instance_count
    if options.instance_kind == "cpu" and backend != Backend.ONNXRUNTIME:
        raise ConfigError(f"instance_kind is cpu, but the {backend} backend runs on GPUs only")
    if options.instance_kind in _KINDS:
        group.kind = _KINDS[options.instance_kind]
    if message.max_batch_size > 0 and options.dynamic_batching:
        message.dynamic_batching.SetInParent()
        for size in options.preferred_batch_sizes:
            if not 1 <= size <= message.max_batch_size:
                raise ConfigError(f"preferred batch size {size} is not between 1 and {message.max_batch_size}")
        message.dynamic_batching.preferred_batch_size.extend(sorted(set(options.preferred_batch_sizes)))
    for key, value in options.parameters.items():
        message.parameters[key].string_value = value
    if options.threads is not None:
        if backend != Backend.ONNXRUNTIME:
            raise ConfigError(f"threads is a setting of the onnxruntime backend, and the backend is {backend}")
        message.parameters["intra_op_thread_count"].string_value = str(options.threads)


def _add_model_file(message: Any, backend: Backend, options: ConfigOptions) -> None:
    filename = options.model_filename
    if filename is None or filename == "":
        filename = DEFAULT_FILENAMES[str(backend)]
    if "/" in filename or filename in (".", "..") or not filename.isprintable():
        raise ConfigError(f"model_filename is {filename!r}; expected a plain file name")
    if filename != DEFAULT_FILENAMES[str(backend)] or backend == Backend.TENSORRT_RTX:
        message.default_model_filename = filename


def _add_labels(
    message: Any, options: ConfigOptions, outputs: tuple[TensorSpec, ...], batched: bool
) -> dict[str, tuple[str, ...]]:
    """Name a label file on each output with labels. Return file name -> labels."""
    check_labels(options.labels, outputs, batched=batched)
    files: dict[str, tuple[str, ...]] = {}
    for position, output in enumerate(message.output):
        if output.name in options.labels:
            output.label_filename = label_filename(output.name, position)
            files[output.label_filename] = tuple(options.labels[output.name])
    return files
