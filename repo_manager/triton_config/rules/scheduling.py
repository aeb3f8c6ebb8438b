"""Rules for the schedulers: the dynamic batcher, its queues and the response cache. The sequence batcher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from repo_manager.triton_config.problems import Severity
from repo_manager.triton_config.rules.rule import Fault, Rule

__all__ = ["BATCHING_RULES", "SEQUENCE_RULES", "preferred_sizes"]


def preferred_sizes(sizes: Any, message: Any, where: str) -> Iterator[Fault]:
    """Check preferred batch sizes, of whichever scheduler.

    Args:
        sizes: as the configuration has them.
        message: the whole `ModelConfig` message, read for its `max_batch_size`.
        where: the scheduler, as it is called in the text.
    """
    for size in sizes:
        if not 1 <= size <= message.max_batch_size:
            text = f"preferred batch size {size} is not between 1 and max_batch_size {message.max_batch_size}"
            yield Fault(f"{where}: {text}")


def _dynamic_sizes(message: Any) -> Iterator[Fault]:
    """Preferred batch sizes are between 1 and `max_batch_size`."""
    if message.HasField("dynamic_batching"):
        yield from preferred_sizes(message.dynamic_batching.preferred_batch_size, message, "dynamic_batching")


def _priorities(message: Any) -> Iterator[Fault]:
    """Priority levels, their default and their queue policies fit together."""
    batching = message.dynamic_batching
    levels = batching.priority_levels
    if not message.HasField("dynamic_batching") or levels == 0:
        return
    if not 1 <= batching.default_priority_level <= levels:
        yield Fault(
            f"default_priority_level is {batching.default_priority_level}; expected 1 to {levels}, the priority_levels"
        )
    for level in sorted(batching.priority_queue_policy):
        if not 1 <= level <= levels:
            yield Fault(f"priority_queue_policy has a level {level}; expected 1 to {levels}, the priority_levels")


def _order(message: Any) -> Iterator[Fault]:
    """`preserve_ordering` needs one priority level and no delayed time-outs."""
    batching = message.dynamic_batching
    if not message.HasField("dynamic_batching") or not batching.preserve_ordering:
        return
    if batching.priority_levels > 1:
        yield Fault(f"preserve_ordering allows one priority level; priority_levels is {batching.priority_levels}")
    policies = [("default_queue_policy", batching.default_queue_policy)]
    policies += [(f"priority_queue_policy {level}", policy) for level, policy in batching.priority_queue_policy.items()]
    for name, policy in policies:
        if policy.default_timeout_microseconds and policy.timeout_action == policy.DELAY:
            yield Fault(f"{name} delays what timed out, which preserve_ordering does not allow")


def _cache(message: Any) -> Iterator[Fault]:
    """The response cache works for neither sequence nor decoupled models."""
    if not message.response_cache.enable:
        return
    if message.HasField("sequence_batching"):
        yield Fault("response_cache is on, and a model with sequence_batching cannot use it")
    if message.model_transaction_policy.decoupled:
        yield Fault("response_cache is on, and a decoupled model cannot use it")


BATCHING_RULES = (
    Rule("preferred-batch-size", "ValidateModelConfig", _dynamic_sizes),
    Rule("priority-levels", "ValidateModelConfig", _priorities),
    Rule("preserve-ordering", "ValidateModelConfig", _order),
    Rule("response-cache", "ValidateModelConfig", _cache),
)


# Rules for the sequence batcher: its controls, its states, its two strategies.

_BOOLEAN = ("CONTROL_SEQUENCE_START", "CONTROL_SEQUENCE_END", "CONTROL_SEQUENCE_READY")
_VALUES = ("int32_false_true", "fp32_false_true", "bool_false_true")
_CORRID_TYPES = ("TYPE_UINT64", "TYPE_INT64", "TYPE_UINT32", "TYPE_INT32", "TYPE_STRING")


def _controls(message: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield tensor, kind and control of every control input."""
    for tensor in message.sequence_batching.control_input:
        for control in tensor.control:
            yield tensor.name, control.Kind.Name(control.kind), control


def _control_tensors(message: Any) -> Iterator[Fault]:
    """Control inputs have names, each once, and each kind at most once."""
    names = [tensor.name for tensor in message.sequence_batching.control_input]
    if "" in names:
        yield Fault("a control_input has no name")
    for name in sorted(set(names) - {""}):
        if names.count(name) > 1:
            yield Fault(f"control_input {name!r} is listed twice")
    kinds = [kind for _, kind, _ in _controls(message)]
    for kind in sorted(set(kinds)):
        if kinds.count(kind) > 1:
            yield Fault(f"{kind} has {kinds.count(kind)} tensors; expected one")


def _control_values(message: Any) -> Iterator[Fault]:
    """A control input states two values of one type, a correlation ID its data type."""
    for name, kind, control in _controls(message):
        given = [field for field in _VALUES if getattr(control, field)]
        if kind in _BOOLEAN:
            if len(given) != 1:
                found = ", ".join(given) or "none"
                yield Fault(f"control_input {name!r}, {kind}: expected one of {', '.join(_VALUES)}; found {found}")
            elif len(getattr(control, given[0])) != 2:
                count = len(getattr(control, given[0]))
                yield Fault(f"control_input {name!r}, {kind}: {given[0]} has {count} values; expected 2")
        elif given:
            yield Fault(f"control_input {name!r}, {kind}: {given[0]} does not belong there; the type is data_type")
        if kind == "CONTROL_SEQUENCE_CORRID":
            types = message.input.add().DESCRIPTOR.fields_by_name["data_type"].enum_type
            data_type = types.values_by_number[control.data_type].name
            if data_type not in _CORRID_TYPES:
                yield Fault(
                    f"control_input {name!r}, {kind}: data_type {data_type}; expected {', '.join(_CORRID_TYPES)}"
                )


def _strategy(message: Any) -> Iterator[Fault]:
    """`minimum_slot_utilization` is between 0 and 1."""
    batching = message.sequence_batching
    if batching.HasField("oldest"):
        yield from preferred_sizes(batching.oldest.preferred_batch_size, message, "sequence_batching.oldest")
    share = batching.direct.minimum_slot_utilization
    if batching.HasField("direct") and (share < 0.0 or share > 1.0):  # NaN passes
        yield Fault(f"minimum_slot_utilization is {share:g}; expected 0 to 1")


def _states(message: Any) -> Iterator[Fault]:
    """States of a sequence have names, each once, and one initial state at most."""
    names = [state.input_name for state in message.sequence_batching.state if state.initial_state]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Fault(f"state {name!r} is listed twice")
    has_start = "CONTROL_SEQUENCE_START" in {kind for _, kind, _ in _controls(message)}
    for state in message.sequence_batching.state:
        label = f"state {state.input_name!r}"
        if not state.initial_state and not has_start:
            text = "has no initial_state, and Triton does not initialise it at the start of a sequence"
            yield Fault(
                f"{label} {text}", Severity.WARNING, "add initial_state { zero_data: true }, or a START control"
            )
        if len(state.initial_state) > 1:
            yield Fault(f"{label} has {len(state.initial_state)} initial states; expected one or none")
        for initial in state.initial_state[:1]:
            yield from _initial_state(label, state, initial)


def _initial_state(label: str, state: Any, initial: Any) -> Iterator[Fault]:
    if not initial.name:
        yield Fault(f"{label}: its initial_state has no name")
    if initial.data_type != state.data_type:
        yield Fault(f"{label}: its initial_state has another data_type than the state")
    if initial.WhichOneof("state_data") is None:
        yield Fault(f"{label}: its initial_state has no data: zero_data or data_file")
    if any(dim == -1 for dim in initial.dims):
        yield Fault(f"{label}: its initial_state has dims {list(initial.dims)}; expected a fixed size")
    elif len(initial.dims) != len(state.dims) or any(
        wanted not in (-1, found) for wanted, found in zip(state.dims, initial.dims, strict=True)
    ):
        yield Fault(f"{label}: its initial_state has dims {list(initial.dims)}, the state {list(state.dims)}")


SEQUENCE_RULES = (
    Rule("sequence-control", "GetBooleanSequenceControlProperties", _control_tensors),
    Rule("sequence-control-value", "GetBooleanSequenceControlProperties", _control_values),
    Rule("sequence-strategy", "ValidateModelConfig", _strategy),
    Rule("sequence-state", "SequenceBatchScheduler::GenerateInitialStateData", _states),
)
