"""Whether Triton takes two configurations for the same, after it has filled in its defaults.

Source: `ConfigChangeRequiresReload`, `NormalizeModelConfig` and `NormalizeInstanceGroup` of
triton-inference-server/core.
"""

from __future__ import annotations

from typing import Any

from repo_manager.triton_config import ModelConfig

__all__ = ["FREE_FIELDS", "INSTANCES", "changed_config_fields", "instances_differ"]

# The one field that a load changes in place: instances come and go, no version loads again.
INSTANCES = "instance_group"
# A change of these alone reloads nothing.
FREE_FIELDS = ("version_policy", INSTANCES)
# Filled in on the server whatever the file says, so a file that is silent about them has not changed them.
_FILLED_IN = {"platform", "backend", "runtime", "default_model_filename"}
# Filled in from the model where the server completes configurations (its default).
_COMPLETED = {"input", "output", "max_batch_size"}
_SEQUENCE_IDLE_US = 1_000_000
# How many instances a group has that does not say, by kind. Other backends may state a preference of their own.
_ONE_INSTANCE = {"python", "tensorrt", "tensorrt_rtx", "pytorch"}
_TWO_ON_A_CPU = {"onnxruntime", "tensorflow"}


def changed_config_fields(served: ModelConfig, wanted: ModelConfig, *, auto_complete: bool = True) -> tuple[str, ...]:
    """Return the top-level fields for whose sake a load reloads every version.

    Args:
        served: what the server says it runs the model with.
        wanted: what config.pbtxt, or the load's own configuration, says.
        auto_complete: whether the server completes configurations from the model; then what the file leaves out and
            the server may have found by itself is no change.
    """
    theirs, ours = _normalised(served, served), _normalised(wanted, served)
    silent = _FILLED_IN | (_COMPLETED if auto_complete else set())
    changed = []
    for field in theirs.DESCRIPTOR.fields:
        name = field.name
        is_set = _is_set(ours, field)
        if name in (*FREE_FIELDS, "name") or (name in silent and not is_set):
            continue
        one, other = getattr(theirs, name), getattr(ours, name)
        if _is_set(theirs, field) == is_set and one == other:
            continue
        if auto_complete and name in _COMPLETED and _within(other, one):
            continue
        if auto_complete and name == "dynamic_batching" and not is_set and _is_bare_batching(one):
            continue
        changed.append(name)
    return tuple(changed)


def instances_differ(served: ModelConfig, wanted: ModelConfig) -> bool:
    """Say whether a load changes a model's instances in place.

    Triton fills in a group's kind, count and GPUs where config.pbtxt leaves them out; what it filled in is no
    difference. The name of a group is free text.

    Args:
        served: what the server says it runs the model with.
        wanted: what config.pbtxt, or the load's own configuration, says.
    """
    theirs, ours = served.message(), wanted.message()
    if theirs.HasField("ensemble_scheduling") or ours.HasField("ensemble_scheduling"):
        return False
    if not ours.instance_group:
        ours.instance_group.add()
    if len(theirs.instance_group) != len(ours.instance_group):
        return bool(theirs.instance_group)  # a server that tells of no group at all says nothing
    backend = theirs.backend or ours.backend
    groups = zip(theirs.instance_group, ours.instance_group, strict=True)
    return any(_completed(group, like, backend) != _completed(like, like, backend) for like, group in groups)


def _completed(group: Any, like: Any, backend: str) -> Any:
    """Fill in what a group leaves out, as Triton has done in the group that it serves."""
    message = type(group)()
    message.CopyFrom(group)
    message.name = ""
    if message.kind == type(group).KIND_AUTO:
        message.kind = like.kind
    if not message.gpus:
        message.gpus.extend(like.gpus)
    if message.count < 1:
        on_cpu = message.kind == type(group).KIND_CPU
        known = {**dict.fromkeys(_ONE_INSTANCE, 1), **dict.fromkeys(_TWO_ON_A_CPU, 2 if on_cpu else 1)}
        message.count = known.get(backend, like.count)
    return message


def _is_set(message: Any, field: Any) -> bool:
    if field.has_presence:
        return bool(message.HasField(field.name))
    return bool(getattr(message, field.name))


def _normalised(config: ModelConfig, served: ModelConfig) -> Any:
    """Fill in what Triton fills in; its own answer is not changed by it."""
    message = config.message()
    for name in ("input_pinned_memory", "output_pinned_memory"):
        if not message.optimization.HasField(name):
            getattr(message.optimization, name).enable = True
    if message.HasField("dynamic_batching") and not message.dynamic_batching.preferred_batch_size:
        batch = served.max_batch_size or message.max_batch_size  # another maximum is a difference of its own
        message.dynamic_batching.preferred_batch_size.extend([batch] * bool(batch))
    if message.HasField("sequence_batching") and not message.sequence_batching.max_sequence_idle_microseconds:
        message.sequence_batching.max_sequence_idle_microseconds = _SEQUENCE_IDLE_US
    return message


def _is_bare_batching(batching: Any) -> bool:
    """Say whether nothing is set but the default: completion turns it on for a model that has a batch axis."""
    return [field.name for field, _ in batching.ListFields()] in ([], ["preferred_batch_size"])


def _within(ours: Any, theirs: Any) -> bool:
    """Say whether everything that one list of tensors, or number, says is so in the other."""
    if not hasattr(ours, "__len__"):
        return bool(ours == theirs)
    by_name = {tensor.name: tensor for tensor in theirs}
    return all(
        tensor.name in by_name
        and all(value == getattr(by_name[tensor.name], field.name) for field, value in tensor.ListFields())
        for tensor in ours
    )
