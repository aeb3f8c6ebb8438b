"""The tensors Triton feeds a model and takes from it, by its configuration, and the model's own word on them.

This is the one description of it: the check of a configuration against its model, the editor, the preflight of a
roll-out and the embedded onnxruntime backend all read it. It knows the standard library only and imports nothing of
repo_manager, because it also runs in Triton's stub process, beside the backend.

The rules and messages follow Triton's native backend (`onnxruntime_backend`, `src/onnxruntime.cc`:
`AutoCompleteConfig`, `ValidateInputs`, `ValidateOutputs`, `ValidateBooleanSequenceControl`), so a repository loads
here exactly when it loads there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = [
    "DEFAULT_MAX_BATCH_SIZE",
    "ConfigMismatch",
    "Fed",
    "Mismatch",
    "Tensor",
    "check",
    "complete",
    "fed_tensors",
    "mismatches",
    "needs_completion",
    "taken_tensors",
    "tensors_of",
]

DYNAMIC = -1
# The native backend's default for a model that supports batching, without a value in the configuration.
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
_CONTROL_VALUES = {"int32_false_true": "TYPE_INT32", "fp32_false_true": "TYPE_FP32", "bool_false_true": "TYPE_BOOL"}


class ConfigMismatch(Exception):  # noqa: N818 - it becomes Triton's message, not an error of ours
    """The configuration and the model contradict each other."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A graph's input or output.

    Attributes:
        name: name of the input or output in the graph.
        data_type: element type as in config.pbtxt, such as `TYPE_FP32`.
        dims: with -1 where they are dynamic. Empty for a scalar, and for an unknown rank.
        shown: how a message shows it. Empty shows type and dims.
    """

    name: str
    data_type: str
    dims: tuple[int, ...]
    shown: str = ""

    def __str__(self) -> str:
        return self.shown or f"{self.name} {self.data_type} {_text(self.dims)}"


@dataclasses.dataclass(frozen=True)
class Fed:
    """A tensor on its way between Triton and the model.

    Attributes:
        name: of the graph's input or output.
        role: `input` or `output` (a request has it), `optional`, `ragged` (requests are joined flat), `control` (of a
            sequence), `state` (kept by the server between the requests of a sequence), `batch_input`, `batch_output`.
        data_type: element type as in config.pbtxt, such as `TYPE_FP32`. Empty where the configuration has none.
        dims: as the model sees them, without the batch axis.
    """

    name: str
    role: str
    data_type: str
    dims: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """One contradiction between a configuration and its model.

    Attributes:
        text: for a person. Empty where another mismatch says it better.
        native: the native backend's message. Empty where it says nothing.
        fatal: whether the model does not load, or cannot be asked.
    """

    text: str
    native: str = ""
    fatal: bool = True


def tensors_of(infos: Any) -> dict[str, Tensor]:
    """Return ONNX Runtime's NodeArgs by name.

    Raises:
        ConfigMismatch: one is no tensor, or of a type Triton's Python backend does not carry.
    """
    tensors = {}
    for info in infos:
        if info.type not in TRITON_TYPES:
            raise ConfigMismatch(f"tensor '{info.name}' has type {info.type}, which this backend does not carry")
        dims = tuple(size if isinstance(size, int) and size >= 0 else DYNAMIC for size in info.shape)
        tensors[info.name] = Tensor(info.name, TRITON_TYPES[info.type], dims)
    return tensors


def fed_tensors(config: Mapping[str, Any]) -> tuple[Fed, ...]:
    """Return everything Triton feeds the model.

    Args:
        config: a model configuration as Triton's JSON has it.
    """
    fed = []
    for entry in config.get("input") or ():
        role = "optional" if entry.get("optional") else "ragged" if entry.get("allow_ragged_batch") else "input"
        fed.append(Fed(entry["name"], role, entry.get("data_type", ""), _dims(entry)))
    batching = config.get("sequence_batching") or {}
    for entry in batching.get("control_input") or ():
        for control in entry.get("control") or ():
            fed.append(Fed(entry["name"], "control", _control_type(control), (1,)))
    for state in batching.get("state") or ():
        fed.append(Fed(state.get("input_name", ""), "state", state.get("data_type", ""), _dims(state)))
    for entry in config.get("batch_input") or ():
        for name in entry.get("target_name") or ():
            fed.append(Fed(name, "batch_input", entry.get("data_type", ""), ()))
    return tuple(fed)


def taken_tensors(config: Mapping[str, Any]) -> tuple[Fed, ...]:
    """Return everything Triton takes from the model. See `fed_tensors`."""
    scattered = {name for entry in config.get("batch_output") or () for name in entry.get("target_name") or ()}
    taken = [
        Fed(
            entry["name"],
            "batch_output" if entry["name"] in scattered else "output",
            entry.get("data_type", ""),
            _dims(entry),
        )
        for entry in config.get("output") or ()
    ]
    for state in (config.get("sequence_batching") or {}).get("state") or ():
        taken.append(Fed(state.get("output_name", ""), "state", state.get("data_type", ""), _dims(state)))
    return tuple(taken)


def _control_type(control: Mapping[str, Any]) -> str:
    for field, data_type in _CONTROL_VALUES.items():
        if control.get(field):
            return data_type
    return str(control.get("data_type", ""))


def _dims(entry: Mapping[str, Any]) -> tuple[int, ...]:
    """Return an entry's dims as the model sees them: a reshape goes before."""
    reshape = entry.get("reshape")
    dims = entry.get("dims") if reshape is None else reshape.get("shape")
    return tuple(int(size) for size in dims or ())


def needs_completion(config: Mapping[str, Any]) -> bool:
    """Return whether the backend fills in inputs, outputs and batching: not where both are listed already."""
    return not ((config.get("input") or config.get("batch_input")) and config.get("output"))


def complete(config: dict[str, Any], inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    """Fill in missing fields of a configuration, as the native backend does. `config` is changed.

    Args:
        config: configuration of the model, as parsed JSON.
        inputs: name -> input of the model.
        outputs: name -> output of the model.

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
    if not config.get("input") and not config.get("batch_input"):
        config["input"] = [_entry(tensor, batched) for tensor in inputs.values()]
    if not config.get("output"):
        config["output"] = [_entry(tensor, batched) for tensor in outputs.values()]


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
        config: configuration of the model, as parsed JSON.
        inputs: name -> input without a default in the model. The configuration must list each.
        optional: name -> input with a default in the model. Listed with `optional: true` or not at all.
        outputs: name -> output of the model.

    Raises:
        ConfigMismatch: with the native backend's message, else with ours.
    """
    for mismatch in mismatches(config, inputs, optional, outputs, completed=True):
        if mismatch.fatal:
            raise ConfigMismatch(mismatch.native or f"unable to load model '{config['name']}', {mismatch.text}")


def mismatches(
    config: Mapping[str, Any],
    inputs: Mapping[str, Tensor],
    optional: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    *,
    completed: bool = False,
) -> Iterator[Mismatch]:
    """Compare a configuration with its model. See `check`.

    Args:
        config: configuration of the model, as parsed JSON.
        inputs: name -> input without a default in the model. One not listed is a mismatch.
        optional: name -> input with a default in the model. One not listed is no mismatch.
        outputs: name -> output of the model.
        completed: the backend has filled in missing fields, else inputs or outputs not listed at all are not compared.
    """
    fed, taken = fed_tensors(config), taken_tensors(config)
    if completed or config.get("input") or config.get("batch_input"):
        yield from _names_of_inputs(config, fed, inputs, optional)
        for each in fed:
            tensor = inputs.get(each.name) or optional.get(each.name)
            if tensor is not None:
                yield from _against_model(config, "input", each, tensor)
    if completed or config.get("output"):
        yield from _names_of_outputs(taken, outputs)
        for each in taken:
            if each.name in outputs:
                yield from _against_model(config, "output", each, outputs[each.name])


def _names_of_inputs(
    config: Mapping[str, Any], fed: tuple[Fed, ...], inputs: Mapping[str, Tensor], optional: Mapping[str, Tensor]
) -> Iterator[Mismatch]:
    model = config.get("name", "")
    required = [each for each in fed if each.role != "optional"]
    known = {**inputs, **optional}
    if len(required) != len(inputs):
        native = f"unable to load model '{model}', configuration expects {len(required)} inputs, "
        yield Mismatch("", native + f"model provides {len(inputs)} ({', '.join(inputs)})")
    if config.get("max_batch_size"):
        for each in fed:
            if each.role == "optional":
                text = "is optional, which the onnxruntime backend does not allow with max_batch_size above 0"
                native = f"optional input '{each.name}' is not supported for models that support batching"
                yield Mismatch(f"input {each.name!r} {text}", f"unable to load model '{model}', {native}")
    for each in fed:
        if each.name not in known:
            allowed = f"unexpected inference input '{each.name}', allowed inputs are: {', '.join(sorted(known))}"
            yield Mismatch(f"{_label(each)} is not in the model; it has {_listed(known)}", allowed)
        elif each.role == "optional" and each.name in inputs:
            yield Mismatch(f"input {each.name!r} is optional, and the model has no default for it")
        elif each.role != "optional" and each.name in optional:
            text = "has a default in the model: the onnxruntime backend takes it with optional: true only"
            yield Mismatch(f"{_label(each)} {text}")
    fed_names = [each.name for each in fed]
    missing = [name for name in inputs if name not in fed_names]
    if missing:
        yield Mismatch(f"the model's inputs {', '.join(map(repr, missing))} are not listed")
    for name in sorted({name for name in fed_names if fed_names.count(name) > 1}):
        yield Mismatch(f"the model's input {name!r} is fed twice: {' and '.join(_roles(fed, name))}")


def _names_of_outputs(taken: tuple[Fed, ...], outputs: Mapping[str, Tensor]) -> Iterator[Mismatch]:
    for each in taken:
        if each.name not in outputs:
            allowed = f"unexpected inference output '{each.name}', allowed outputs are: {', '.join(sorted(outputs))}"
            yield Mismatch(f"{_label(each, 'output')} is not in the model; it has {_listed(outputs)}", allowed)
    missing = [name for name in outputs if name not in {each.name for each in taken}]
    if missing:
        text = f"the model's outputs {', '.join(map(repr, missing))} are not listed and cannot be requested"
        yield Mismatch(text, fatal=False)


def _roles(fed: tuple[Fed, ...], name: str) -> list[str]:
    return [f"as {each.role}" for each in fed if each.name == name]


def _label(each: Fed, kind: str = "input") -> str:
    """Name a tensor by its place in the configuration."""
    named = {"control": "control_input", "state": f"state's {kind}", "batch_input": "batch_input"}
    return f"{named.get(each.role, kind)} {each.name!r}"


def _listed(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(map(repr, tensors)) or "none"


def _against_model(config: Mapping[str, Any], kind: str, each: Fed, tensor: Tensor) -> Iterator[Mismatch]:
    """Compare type and shape of one tensor."""
    model, name, batched = config.get("name", ""), each.name, bool(config.get("max_batch_size"))
    if each.data_type != tensor.data_type:
        yield Mismatch(
            f"{_label(each, kind)} is {each.data_type or 'of no type'}; the model has {tensor.data_type}",
            f"unable to load model '{model}', configuration expects datatype {each.data_type} for {kind} "
            f"'{name}', model provides {tensor.data_type}",
        )
    if each.role in ("batch_output", "batch_input"):
        return  # their shape follows the requests and may differ from the model's
    if each.role == "ragged":
        if tensor.dims != (DYNAMIC,):
            native = f"configuration expects model provides input with shape [-1]  for ragged input '{name}'"
            text = f"input {name!r} has allow_ragged_batch, so requests are joined flat; the model needs shape [-1]"
            yield Mismatch(
                f"{text} there, and has {tensor}",
                f"unable to load model '{model}', {native}, model provides {_text(tensor.dims)}",
            )
        return
    if each.role == "control":
        if tensor.dims[batched:] != (1,):
            yield Mismatch(
                f"{_label(each)} needs shape {_text(((DYNAMIC,) if batched else ()) + (1,))} in the model: {tensor}",
                f"unable to load model '{model}', sequence control '{name}' in model has dims "
                f"{_text(tensor.dims[batched:])} but dims [1] is expected",
            )
        return
    yield from _shape(model, kind, each, tensor, batched)


def _shape(model: str, kind: str, each: Fed, tensor: Tensor, batched: bool) -> Iterator[Mismatch]:
    """CompareDimsSupported of onnxruntime_utils.cc, and its rule for scalars: nothing but ones."""
    dims = list(each.dims)
    full_text = "max_batch_size > 0 adds a first dimension to " if batched else ""
    text = f"{_label(each, kind)}: {full_text}dims {dims}, which do not fit the model's {tensor}"
    if not tensor.dims:
        if any(size != 1 for size in dims):
            native = (
                f"unable to load model '{model}', scalar tensor '{each.name}', should only provide 1 in the model "
                f"configuration when the model doesn't support batching. Model configuration provided: {_text(dims)}."
            )
            yield Mismatch(text, native)
        return
    if each.role == "state":  # the native backend checks a state only when it feeds it
        if not _fits(tensor.dims, [DYNAMIC, *dims] if batched else dims, exact=False):
            yield Mismatch(text)
        return
    if batched and tensor.dims[0] != DYNAMIC:
        yield Mismatch(
            text,
            f"model '{model}', tensor '{each.name}': for the model to support batching the shape should have at least "
            f"1 dimension and the first dimension must be -1; but shape expected by the model is {_text(tensor.dims)}",
        )
        return
    full = [DYNAMIC, *dims] if batched else dims
    if not _fits(tensor.dims, full, exact=kind == "output"):
        complete_shape = (
            " (an initial batch dimension because max_batch_size > 0 followed by the explicit tensor shape, making "
            f"complete shape {_text(full)})"
            if batched
            else f" (shape {_text(full)})"
        )
        yield Mismatch(
            text,
            f"model '{model}', tensor '{each.name}': the model expects {len(tensor.dims)} dimensions (shape "
            f"{_text(tensor.dims)}) but the model configuration specifies {len(full)} dimensions{complete_shape}",
        )


def _fits(model: tuple[int, ...], config: list[int], *, exact: bool) -> bool:
    if len(model) != len(config):
        return False
    return all(mine == theirs or (not exact and mine == DYNAMIC) for mine, theirs in zip(model, config, strict=True))


def _text(dims: tuple[int, ...] | list[int]) -> str:
    return "[" + ",".join(map(str, dims)) + "]"
