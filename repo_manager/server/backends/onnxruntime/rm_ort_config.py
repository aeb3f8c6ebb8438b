"""What an ONNX file and its Triton configuration say about each other (no repo_manager here: it runs in Triton's stub).

The rules and messages follow Triton's native backend (`onnxruntime_backend`, `src/onnxruntime.cc`:
`AutoCompleteConfig`, `ValidateInputs`, `ValidateOutputs`), so that a repository that loads here loads there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

DYNAMIC = -1
# The native backend's default when a model can be batched and the configuration does not say how far.
DEFAULT_MAX_BATCH_SIZE = 4

TRITON_TYPES = {
    "tensor(bool)": "TYPE_BOOL",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(uint16)": "TYPE_UINT16",
    "tensor(uint32)": "TYPE_UINT32",
    "tensor(uint64)": "TYPE_UINT64",
    "tensor(int8)": "TYPE_INT8",
    "tensor(int16)": "TYPE_INT16",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    "tensor(string)": "TYPE_STRING",
}


class ConfigMismatch(Exception):  # noqa: N818 - it becomes Triton's message, not an error of ours
    """The configuration and the model contradict each other."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A graph's input or output: dims with -1 where they are dynamic."""

    name: str
    data_type: str
    dims: tuple[int, ...]


def tensors_of(infos: Any) -> dict[str, Tensor]:
    """Return ONNX Runtime's NodeArgs by name.

    Raises:
        ConfigMismatch: one is no tensor, or of a type that Triton's Python backend does not carry.
    """
    tensors = {}
    for info in infos:
        if info.type not in TRITON_TYPES:
            raise ConfigMismatch(f"tensor '{info.name}' has type {info.type}, which this backend does not carry")
        dims = tuple(size if isinstance(size, int) and size >= 0 else DYNAMIC for size in info.shape)
        tensors[info.name] = Tensor(info.name, TRITON_TYPES[info.type], dims)
    return tensors


def complete(config: dict[str, Any], inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    """Fill in what a configuration leaves out, as the native backend does; `config` is changed.

    Raises:
        ConfigMismatch: it asks for batches and the model has no batch axis.
    """
    batchable = all(tensor.dims and tensor.dims[0] == DYNAMIC for tensor in (*inputs.values(), *outputs.values()))
    if batchable:
        if not config.get("max_batch_size"):
            config["max_batch_size"] = DEFAULT_MAX_BATCH_SIZE
        if config["max_batch_size"] > 1 and not {"sequence_batching", "dynamic_batching"} & config.keys():
            config["dynamic_batching"] = {}
    elif config.get("max_batch_size"):
        raise ConfigMismatch(
            f"autofill failed for model '{config['name']}': model does not support batching while non-zero "
            "max_batch_size is specified"
        )
    batched = bool(config.get("max_batch_size"))
    for key, tensors in (("input", inputs), ("output", outputs)):
        if not config.get(key):
            config[key] = [_entry(tensor, batched) for tensor in tensors.values()]


def _entry(tensor: Tensor, batched: bool) -> dict[str, Any]:
    dims = list(tensor.dims[1:] if batched else tensor.dims)
    entry: dict[str, Any] = {"name": tensor.name, "data_type": tensor.data_type, "dims": dims or [1]}
    if not dims and batched:
        entry["reshape"] = {"shape": []}
    return entry


def check(
    config: dict[str, Any],
    inputs: dict[str, Tensor],
    optional: dict[str, Tensor],
    outputs: dict[str, Tensor],
) -> None:
    """Check a configuration against the model.

    Args:
        config: the model's configuration.
        inputs: what has to be fed.
        optional: initializers that may be fed.
        outputs: what comes out.

    Raises:
        ConfigMismatch: with the native backend's message.
    """
    name, batched = config["name"], bool(config.get("max_batch_size"))
    required = [entry for entry in config["input"] if not entry.get("optional")]
    if len(required) != len(inputs):
        raise ConfigMismatch(
            f"unable to load model '{name}', configuration expects {len(required)} inputs, "
            f"model provides {len(inputs)} ({', '.join(inputs)})"
        )
    for entry in config["input"]:
        if entry.get("optional") and batched:
            raise ConfigMismatch(
                f"unable to load model '{name}', optional input '{entry['name']}' is not supported for models that "
                "support batching"
            )
        _check_tensor(config, "input", entry, {**inputs, **optional})
    for entry in config["output"]:
        _check_tensor(config, "output", entry, outputs)


def _check_tensor(config: dict[str, Any], kind: str, entry: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    model, name = config["name"], entry["name"]
    tensor = tensors.get(name)
    if tensor is None:
        raise ConfigMismatch(f"unexpected inference {kind} '{name}', allowed {kind}s are: {', '.join(sorted(tensors))}")
    if entry["data_type"] != tensor.data_type:
        raise ConfigMismatch(
            f"unable to load model '{model}', configuration expects datatype {entry['data_type']} for {kind} "
            f"'{name}', model provides {tensor.data_type}"
        )
    reshape = entry.get("reshape")
    dims = [int(size) for size in (entry["dims"] if reshape is None else reshape.get("shape", []))]
    batched = bool(config.get("max_batch_size"))
    if not tensor.dims:
        if any(size != 1 for size in dims):
            raise ConfigMismatch(
                f"unable to load model '{model}', scalar tensor '{name}', should only provide 1 in the model "
                f"configuration when the model doesn't support batching. Model configuration provided: {_text(dims)}."
            )
        return
    if batched and tensor.dims[0] != DYNAMIC:
        raise ConfigMismatch(
            f"model '{model}', tensor '{name}': for the model to support batching the shape should have at least 1 "
            f"dimension and the first dimension must be -1; but shape expected by the model is {_text(tensor.dims)}"
        )
    full = [DYNAMIC, *dims] if batched else dims
    if not _fits(tensor.dims, full, exact=kind == "output"):
        complete_shape = (
            " (an initial batch dimension because max_batch_size > 0 followed by the explicit tensor shape, making "
            f"complete shape {_text(full)})"
            if batched
            else f" (shape {_text(full)})"
        )
        raise ConfigMismatch(
            f"model '{model}', tensor '{name}': the model expects {len(tensor.dims)} dimensions (shape "
            f"{_text(tensor.dims)}) but the model configuration specifies {len(full)} dimensions{complete_shape}"
        )


def _fits(model: tuple[int, ...], config: list[int], *, exact: bool) -> bool:
    if len(model) != len(config):
        return False
    return all(
        mine == theirs or (not exact and DYNAMIC in (mine, theirs)) for mine, theirs in zip(model, config, strict=True)
    )


def _text(dims: tuple[int, ...] | list[int]) -> str:
    return "[" + ",".join(map(str, dims)) + "]"
