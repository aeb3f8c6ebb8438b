"""Rules for the dynamic batcher, its queues, and the response cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from repo_manager.triton_config.rules.rule import Fault, Rule

__all__ = ["BATCHING_RULES", "preferred_sizes"]


def preferred_sizes(sizes: Any, message: Any, where: str) -> Iterator[Fault]:
    """Check preferred batch sizes, of whichever scheduler.

    Args:
        sizes: as the configuration has them.
        message: the configuration.
        where: the scheduler, as it is called in the text.
    """
    for size in sizes:
        if not 1 <= size <= message.max_batch_size:
            text = f"preferred batch size {size} is not between 1 and max_batch_size {message.max_batch_size}"
            yield Fault(f"{where}: {text}")


def _dynamic_sizes(message: Any) -> Iterator[Fault]:
    if message.HasField("dynamic_batching"):
        yield from preferred_sizes(message.dynamic_batching.preferred_batch_size, message, "dynamic_batching")


def _priorities(message: Any) -> Iterator[Fault]:
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
