"""Two configurations, or a configuration and a model, side by side."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

from repo_manager.errors import ConfigError
from repo_manager.optional import deferred
from repo_manager.triton_config.backend_io import Tensor, fed_tensors, mismatches, taken_tensors
from repo_manager.triton_config.config import ModelConfig
from repo_manager.triton_config.problems import Problem, Severity
from repo_manager.triton_config.served_signature import config_dtype
from repo_manager.triton_messages import model_config_pb2
from repo_manager.types import TensorSpec

if TYPE_CHECKING:  # annotations only: reading a repository does not import onnx
    from repo_manager.onnx_model.signature import Signature
    from repo_manager.triton_config.served_signature import ServedSignature

json_format = deferred("google.protobuf.json_format")

__all__ = ["ReloadEffect", "changed_fields", "check_config", "misfits", "reload_effect", "same_signature"]

# ModelLifeCycle::AsyncLoad of core ignores these two fields when it compares configurations.
_KEEPS_VERSIONS = {"instance_group", "version_policy"}


class ReloadEffect(str, enum.Enum):
    """The effect of a changed config.pbtxt on the versions a running Triton serves."""

    NOTHING = "nothing"
    """The text may differ, the configuration does not."""
    KEEP = "keep"
    """Versions stay loaded. Only instances or the set of served versions change."""
    RELOAD = "reload"
    """Every served version is reloaded beside the old one, served until then."""

    def __str__(self) -> str:
        return self.value


def same_signature(existing: ModelConfig, new: ModelConfig) -> tuple[str, ...]:
    """List the differences that keep two configurations from serving the same clients with one config.pbtxt.

    Compared are backend, model file, max_batch_size, and name, type, dims and reshape of each tensor. Tensors
    `existing` leaves to Triton's auto-completion (none is listed) are not compared. Neither are tensors no request
    carries: controls and states of sequences, batch inputs, the model's own defaults.

    Returns:
        One sentence a difference. Empty when a version of `new` can be served under `existing`.
    """
    found: list[str] = []
    for label, old, now in (
        ("backend", existing.backend, new.backend),
        ("model file", existing.model_filename, new.model_filename),
        ("max_batch_size", existing.max_batch_size, new.max_batch_size),
    ):
        if old != now and old != "":
            found.append(f"{label} is {old!r} in the repository and {now!r} in the new version")
    old_message, new_message = existing.message(), new.message()
    for kind, old_tensors, new_tensors in (
        ("input", old_message.input, new_message.input),
        ("output", old_message.output, new_message.output),
    ):
        if old_tensors:
            aside = {name for config in (existing, new) for name in _beside_requests(config, kind)}
            found.extend(
                _tensor_differences(
                    kind,
                    [tensor for tensor in old_tensors if tensor.name not in aside],
                    [tensor for tensor in new_tensors if tensor.name not in aside],
                )
            )
    return tuple(found)


def misfits(config: ModelConfig, published: ModelConfig) -> tuple[str, ...]:
    """List the parts of a version's published configuration at odds with the present config.pbtxt.

    Compared are the tensors as the backend sees them: after a reshape, and with the batch axis, so `max_batch_size`
    can change together with the dims. An input's dims may be narrower than the model's.

    Args:
        config: the configuration a server would load.
        published: the configuration derived from the version's model.

    Returns:
        One sentence a difference; empty when the version can be served under `config`.
    """
    now, then = config.message(), published.message()
    found = []
    if "" not in (config.backend, published.backend) and config.backend != published.backend:
        found.append(f"backend is {config.backend!r}, and {published.backend!r} was published")
    for kind, tensors, models in (("input", now.input, then.input), ("output", now.output, then.output)):
        if not tensors or not models:
            continue  # Triton completes them
        aside = {name for each in (config, published) for name in _beside_requests(each, kind)}
        given = {tensor.name: _seen(tensor, now) for tensor in tensors if tensor.name not in aside}
        wanted = {tensor.name: _seen(tensor, then) for tensor in models if tensor.name not in aside}
        found += [f"{kind} {name!r} is not among those of the version" for name in given if name not in wanted]
        if kind == "input":
            found += [f"{kind} {name!r} of the version is missing" for name in wanted if name not in given]
        for name in given.keys() & wanted.keys():
            if not _fits(given[name], wanted[name], narrower=kind == "input"):
                is_now, was = (_text_of(*each) for each in (given[name], wanted[name]))
                found.append(f"{kind} {name!r} is {is_now}, and {was} in the version, batch axis included")
    return tuple(sorted(found))


def _seen(tensor: Any, message: Any) -> tuple[int, tuple[int, ...]]:
    """Return data type and dims of a tensor as the backend sees it."""
    dims = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
    return tensor.data_type, (*((-1,) if message.max_batch_size > 0 else ()), *dims)


def _text_of(data_type: int, dims: tuple[int, ...]) -> str:
    return f"{model_config_pb2.DataType.Name(data_type)} {list(dims)}"


def _fits(given: tuple[int, tuple[int, ...]], wanted: tuple[int, tuple[int, ...]], *, narrower: bool) -> bool:
    if given[0] != wanted[0] or len(given[1]) != len(wanted[1]):
        return False
    return all(a == b or (narrower and b == -1) for a, b in zip(given[1], wanted[1], strict=True))


def changed_fields(before: ModelConfig, after: ModelConfig) -> tuple[str, ...]:
    """Return the names of the differing top-level fields, in the schema's order."""
    a, b = before.message(), after.message()
    return tuple(
        field.name
        for field in model_config_pb2.ModelConfig.DESCRIPTOR.fields
        if _field_bytes(a, field) != _field_bytes(b, field)
    )


def reload_effect(before: ModelConfig, after: ModelConfig) -> ReloadEffect:
    """Predict the effect of the next load on served versions with unchanged folders."""
    changed = set(changed_fields(before, after)) | (set(before.unknown_fields) ^ set(after.unknown_fields))
    if not changed:
        return ReloadEffect.NOTHING
    return ReloadEffect.KEEP if changed <= _KEEPS_VERSIONS else ReloadEffect.RELOAD


def check_config(
    config: ModelConfig, signature: Signature | ServedSignature, *, where: str = "config.pbtxt"
) -> list[Problem]:
    """Check a configuration against the model it describes.

    Args:
        config: any configuration, also one written by hand.
        signature: the model's inputs and outputs, shapes with the batch axis.
        where: the subject of the findings.

    Returns:
        The faults for which the onnxruntime backend would refuse the load. Empty when nothing.
    """
    unsuitable: list[Problem] = []

    def tensors_of(kind: str, specs: tuple[TensorSpec, ...]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for spec in specs:
            try:
                found |= tensors_by_name(kind, (spec,))
            except ConfigError as exc:
                unsuitable.append(Problem(where, exc.message, rule="tensor-type"))
                found[spec.name] = Tensor(spec.name, "", _dims(spec), str(spec))
        return found

    inputs, outputs = tensors_of("input", signature.inputs), tensors_of("output", signature.outputs)
    initializers = tensors_of("input", getattr(signature, "initializers", ()))
    hint = "requests are joined flat: an output needs a batch axis in the model, or a batch_output"
    return unsuitable + [
        Problem(
            where,
            mismatch.text,
            Severity.ERROR if mismatch.fatal else Severity.WARNING,
            hint if config.is_ragged and mismatch.fatal and mismatch.text.startswith("output ") else "",
            rule="tensors-of-the-model",
        )
        for mismatch in mismatches(as_document(config), inputs, initializers, outputs)
        if mismatch.text
    ]


def tensors_by_name(kind: str, specs: tuple[TensorSpec, ...]) -> dict[str, Tensor]:
    """Return a model's inputs or outputs in the form Triton feeds them.

    Args:
        kind: their name in an error.
        specs: shapes with the batch axis.

    Raises:
        ConfigError: one has a type Triton lacks.
    """
    found = {}
    for spec in specs:
        try:
            found[spec.name] = Tensor(spec.name, config_dtype(spec.dtype), _dims(spec), str(spec))
        except ConfigError as exc:
            raise ConfigError(f"{kind} {spec.name!r}: {exc.message}", hint=exc.hint) from None
    return found


def _dims(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in spec.shape or ())


def as_document(config: ModelConfig) -> dict[str, Any]:
    """Return a configuration as Triton's JSON has it: names as in config.pbtxt, enums by name."""
    document: dict[str, Any] = json_format.MessageToDict(config.message(), preserving_proto_field_name=True)
    return document


def _beside_requests(config: ModelConfig, kind: str) -> set[str]:
    """Return the tensors of the model no request has, or need not have."""
    passed = fed_tensors(as_document(config)) if kind == "input" else taken_tensors(as_document(config))
    return {each.name for each in passed if each.role in ("control", "state", "batch_input", "optional")}


def _tensor_differences(kind: str, old_tensors: Any, new_tensors: Any) -> list[str]:
    old = {tensor.name: tensor for tensor in old_tensors}
    new = {tensor.name: tensor for tensor in new_tensors}
    found = [f"{kind} {name!r} is only in the repository's config.pbtxt" for name in old if name not in new]
    found += [f"{kind} {name!r} is only in the new version" for name in new if name not in old]
    for name in old:
        if name in new and _tensor_text(old[name]) != _tensor_text(new[name]):
            found.append(
                f"{kind} {name!r} is {_tensor_text(old[name])} in the repository "
                f"and {_tensor_text(new[name])} in the new version"
            )
    return found


def _tensor_text(tensor: Any) -> str:
    text = _text_of(tensor.data_type, tuple(tensor.dims))
    return f"{text} reshaped to {list(tensor.reshape.shape)}" if tensor.HasField("reshape") else text


def _field_bytes(message: Any, field: Any) -> bytes:
    alone = model_config_pb2.ModelConfig()
    alone.CopyFrom(message)
    for other, _ in message.ListFields():
        if other.name != field.name:
            alone.ClearField(other.name)
    data: bytes = alone.SerializeToString(deterministic=True)
    return data
