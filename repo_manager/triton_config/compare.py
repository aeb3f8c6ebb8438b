"""Two configurations, or a configuration and a model, side by side."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

from repo_manager.errors import ConfigError
from repo_manager.triton_config.config import ModelConfig
from repo_manager.triton_config.problems import Problem, Severity
from repo_manager.triton_config.served_signature import config_dtype
from repo_manager.triton_messages import model_config_pb2
from repo_manager.types import Dim, TensorSpec

if TYPE_CHECKING:  # Annotations only: reading a repository does not have to import onnx.
    from repo_manager.onnx_model.signature import Signature
    from repo_manager.triton_config.served_signature import ServedSignature

__all__ = ["ReloadEffect", "changed_fields", "check_config", "reload_effect", "same_signature"]

# ModelLifeCycle::AsyncLoad of core compares two configurations without these two fields.
_KEEPS_VERSIONS = {"instance_group", "version_policy"}


class ReloadEffect(str, enum.Enum):
    """What a changed config.pbtxt makes a running Triton do with the versions that it already serves."""

    NOTHING = "nothing"
    """The text may differ, the configuration does not."""
    KEEP = "keep"
    """Versions stay loaded; only instances or the set of served versions change."""
    RELOAD = "reload"
    """Every served version is loaded anew beside the old one, which serves until then."""

    def __str__(self) -> str:
        return self.value


def same_signature(existing: ModelConfig, new: ModelConfig) -> tuple[str, ...]:
    """Say what keeps two configurations from serving the same clients with one config.pbtxt.

    Compared are backend, model file, max_batch_size, and name, type, dims and reshape of each tensor. What `existing`
    leaves to Triton's auto-completion (no tensor listed at all) is not compared.

    Returns:
        One sentence a difference; empty when a version of `new` can be served under `existing`.
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
            found.extend(_tensor_differences(kind, old_tensors, new_tensors))
    return tuple(found)


def changed_fields(before: ModelConfig, after: ModelConfig) -> tuple[str, ...]:
    """Return the names of the top-level fields that differ, in the schema's order."""
    a, b = before.message(), after.message()
    return tuple(
        field.name
        for field in model_config_pb2.ModelConfig.DESCRIPTOR.fields
        if _field_bytes(a, field) != _field_bytes(b, field)
    )


def reload_effect(before: ModelConfig, after: ModelConfig) -> ReloadEffect:
    """Predict what the next load does to versions that are served and whose folders did not change."""
    changed = set(changed_fields(before, after)) | (set(before.unknown_fields) ^ set(after.unknown_fields))
    if not changed:
        return ReloadEffect.NOTHING
    return ReloadEffect.KEEP if changed <= _KEEPS_VERSIONS else ReloadEffect.RELOAD


def check_config(
    config: ModelConfig, signature: Signature | ServedSignature, *, where: str = "config.pbtxt"
) -> list[Problem]:
    """Check a configuration against the model that it describes.

    Args:
        config: any configuration, also one written by hand.
        signature: the model's inputs and outputs, shapes with the batch axis.
        where: the subject of the findings.

    Returns:
        What the onnxruntime backend would refuse at load; empty when nothing.
    """
    message = config.message()
    batched = config.max_batch_size > 0
    problems: list[Problem] = []
    for kind, tensors, specs in (
        ("input", message.input, signature.inputs),
        ("output", message.output, signature.outputs),
    ):
        by_name = {spec.name: spec for spec in specs}
        if not tensors:
            continue  # Triton completes it from the model.
        listed = {tensor.name for tensor in tensors}
        problems += [
            Problem(where, f"{kind} {tensor.name!r} is not in the model; it has {', '.join(map(repr, by_name))}")
            for tensor in tensors
            if tensor.name not in by_name
        ]
        missing = [name for name in by_name if name not in listed]
        if missing and kind == "input":
            problems.append(Problem(where, f"the model's inputs {', '.join(map(repr, missing))} are not listed"))
        elif missing:
            text = f"the model's outputs {', '.join(map(repr, missing))} are not listed and cannot be requested"
            problems.append(Problem(where, text, Severity.WARNING))
        for tensor in tensors:
            if tensor.name in by_name:
                problems += _against_model(kind, tensor, by_name[tensor.name], batched, where)
    return problems


def _against_model(kind: str, tensor: Any, spec: TensorSpec, batched: bool, where: str) -> list[Problem]:
    problems = []
    found_type = model_config_pb2.DataType.Name(tensor.data_type)
    try:
        if found_type != config_dtype(spec.dtype):
            problems.append(
                Problem(where, f"{kind} {spec.name!r} is {found_type}; the model has {config_dtype(spec.dtype)}")
            )
    except ConfigError as exc:
        problems.append(Problem(where, f"{kind} {spec.name!r}: {exc.message}"))
    shape = tuple(tensor.reshape.shape) if tensor.HasField("reshape") else tuple(tensor.dims)
    if not _shapes_fit(shape, spec.shape, batched=batched, exact=kind == "output"):
        full = "max_batch_size > 0 adds a first dimension to " if batched else ""
        text = f"{kind} {spec.name!r}: {full}dims {list(shape)}, which do not fit the model's {spec}"
        problems.append(Problem(where, text))
    return problems


def _shapes_fit(shape: tuple[int, ...], model: tuple[Dim, ...] | None, *, batched: bool, exact: bool) -> bool:
    """CompareDimsSupported of onnxruntime_utils.cc, and its rule for scalars: nothing but ones."""
    if not model:
        return all(dim == 1 for dim in shape)
    if batched:
        if isinstance(model[0], int) and model[0] >= 0:
            return False
        model = model[1:]
    if len(model) != len(shape):
        return False
    for dim, wanted in zip(shape, model, strict=True):
        size = wanted if isinstance(wanted, int) and wanted >= 0 else -1
        if dim != size and (exact or size != -1):
            return False
    return True


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
    text = f"{model_config_pb2.DataType.Name(tensor.data_type)} {list(tensor.dims)}"
    return f"{text} reshaped to {list(tensor.reshape.shape)}" if tensor.HasField("reshape") else text


def _field_bytes(message: Any, field: Any) -> bytes:
    alone = model_config_pb2.ModelConfig()
    alone.CopyFrom(message)
    for other, _ in message.ListFields():
        if other.name != field.name:
            alone.ClearField(other.name)
    data: bytes = alone.SerializeToString(deterministic=True)
    return data
