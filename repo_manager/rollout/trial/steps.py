"""The steps of a canary: a share, a while of watching, a judgement, the next share; back to 0 when one fails.

Whoever weights the traffic is behind `Weights`, whoever watches it behind `Watch`: the same steps drive clients that
read their weights, a gateway, or KServe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from repo_manager.errors import GateError, InconclusiveError, RepoManagerError, UsageError
from repo_manager.gates.verdict import Outcome
from repo_manager.rollout.trial.gates import GateResult, worst_outcome
from repo_manager.rollout.trial.weights import Weights

__all__ = ["CanaryStep", "Watch", "gate_error", "parse_steps", "run_steps"]


class Watch(Protocol):
    """Whoever sees how the new version does."""

    def watch(self, seconds: float) -> tuple[GateResult, ...]:
        """Watch for some time, less when a gate fails before; return how every gate stands over all time so far."""

    def requests(self) -> int:
        """Return how many requests the new version has been seen to get."""


@dataclasses.dataclass(frozen=True)
class CanaryStep:
    """One step that was taken.

    Attributes:
        fraction: the new version's share of the traffic, 0 to 1.
        seconds: how long it was watched.
        requests: requests that the new version got meanwhile, as far as they are seen.
        gates: how every gate stood at its end, over all steps so far.
        outcome: of all of them.
    """

    fraction: float
    seconds: float
    requests: int
    gates: tuple[GateResult, ...]
    outcome: Outcome


def parse_steps(text: str) -> tuple[float, ...]:
    """Parse `5%,25%,100%`.

    Raises:
        UsageError: not percentages that rise to 100.
    """
    hint = "For instance 5%,25%,100%: rising shares of the traffic, the last one 100%."
    try:
        steps = tuple(float(part.strip().removesuffix("%")) / 100.0 for part in text.split(","))
    except ValueError as exc:
        raise UsageError(f"the canary steps {text!r} cannot be read", hint=hint) from exc
    rising = all(low < high for low, high in zip((0.0, *steps), steps, strict=False))
    if not rising or steps[-1] != 1.0 or len(steps) < 2:
        raise UsageError(f"the canary steps {text!r} are not shares that rise to 100 % in two steps or more", hint=hint)
    return steps


def run_steps(
    weights: Weights,
    steps: Sequence[float],
    step_s: float,
    watch: Watch,
    report: Callable[[str], None],
    on_step: Callable[[float], None] = lambda _: None,
) -> tuple[CanaryStep, ...]:
    """Take the steps one after the other.

    A failed gate ends it at once. A gate that is undecided does not stop a step from being followed by the next, except
    for 100 %: before that every gate has to have passed. Whatever ends it early, Ctrl-C too, sets the weight back to 0.

    Args:
        weights: gives the new version its share.
        steps: rising shares, the last one 1.
        step_s: how long each is watched.
        watch: judges.
        report: told what is being done.
        on_step: given each share below 1 after it was watched; what it raises ends the steps.

    Raises:
        GateError: a gate failed.
        InconclusiveError: a gate is undecided before 100 %.
    """
    taken: list[CanaryStep] = []
    try:
        for fraction in steps:
            if fraction >= 1.0 and taken and taken[-1].outcome is not Outcome.PASS:
                raise gate_error(taken[-1].gates)
            report(f"{fraction * 100:g} % of the traffic to the new version, for {step_s:g} s")
            weights.set_weight(fraction)
            before = watch.requests()
            gates = watch.watch(step_s)
            step = CanaryStep(fraction, step_s, watch.requests() - before, gates, worst_outcome(gates))
            taken.append(step)
            report(f"{fraction * 100:g} %: {step.requests} requests, {step.outcome}")
            if step.outcome is Outcome.FAIL:
                raise gate_error(gates)
            if fraction < 1.0:
                on_step(fraction)
    except BaseException:
        _back_to_zero(weights, report)
        raise
    return tuple(taken)


def _back_to_zero(weights: Weights, report: Callable[[str], None]) -> None:
    try:
        weights.set_weight(0.0)
    except (RepoManagerError, OSError) as exc:
        report(f"the weight could not be set back to 0: {exc}")


def gate_error(results: Sequence[GateResult]) -> GateError | InconclusiveError:
    """Return the error that says which gates did not pass, and what more would be needed."""
    failed = [result for result in results if result.outcome is Outcome.FAIL]
    if failed:
        return GateError("; ".join(f"the gate {each.gate} failed: {each.reason}" for each in failed))
    open_ = [result for result in results if result.outcome is Outcome.INCONCLUSIVE]
    message = "; ".join(f"the gate {each.gate} is undecided: {each.reason}" for each in open_)
    needed = [result.needed for result in open_ if result.needed is not None]
    hint = (
        f"About {max(needed):,} requests in all would decide: watch for longer, or send more a second."
        if needed and len(needed) == len(open_)
        else None
    )
    return InconclusiveError(message, hint=hint)
