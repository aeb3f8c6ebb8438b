"""The steps of a canary: a share, a while of watching, a judgement, the next share. Back to 0 when one fails.

`Weights` hides who weights the traffic, `Watch` who watches it: the same steps drive clients with weights in a file, a
gateway, or KServe.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from repo_manager.client import VersionWeights, published_name
from repo_manager.errors import GateError, InconclusiveError, InputError, RepoManagerError, UsageError
from repo_manager.files import write_atomic
from repo_manager.gates import GateResult, Outcome
from repo_manager.repository.configuration import change_config
from repo_manager.repository.location import Location
from repo_manager.rollout.options import TrialOptions, Weights
from repo_manager.rollout.trial.gates import worst_outcome
from repo_manager.server.client import TritonClient

__all__ = ["CanaryStep", "FileWeights", "PublishedWeights", "Watch", "check_kind", "gate_error", "run_steps", "untried"]


# Ways to give the new version its share of the traffic: clients, a gateway, KServe.


class PublishedWeights:
    """The weights in the name of the model's first instance group, where `VersionedClient` reads them from the server.

    A change of the name alone reloads nothing (docs/triton-reload.md), so a step costs milliseconds. It is a change of
    config.pbtxt all the same: anyone who drives the roll-out puts the file back, and the weights are gone with it.

    Args:
        repository: the repository the server serves.
        name: name of the model whose config.pbtxt carries the weights.
        versions: the old and the new version.
        client: connected client of the server.
        load: makes the server read the file.
    """

    def __init__(
        self,
        repository: Location,
        name: str,
        versions: tuple[int, int],
        client: TritonClient,
        load: Callable[[], None],
    ) -> None:
        self._repository, self._name, self._client = repository, name, client
        self._old, self._new = versions
        self._load, self._fraction = load, 0.0

    def set_weight(self, fraction: float) -> None:
        """Write the weights and let the server read them."""
        groups = self._client.model_config(self._name).instance_group
        # Triton makes up a missing name (core, model_config_utils.cc). Without a group, our name is the weights alone.
        name = published_name(groups[0].name if groups else "", _weights(self._old, self._new, fraction))
        change_config(self._repository, self._name, {"instance_group.name": f'"{name}"'})
        self._load()
        self._fraction = fraction

    def current(self) -> float:
        """Return the latest published share."""
        return self._fraction


class FileWeights:
    """The weights in a JSON file, for clients of several servers or for other readers.

    Args:
        path: the file. It is replaced as a whole.
        name: name of the model, the only key in the file.
        versions: the old and the new version.
    """

    def __init__(self, path: Path, name: str, versions: tuple[int, int]) -> None:
        self._path, self._name, self._fraction = path, name, 0.0
        self._old, self._new = versions

    def set_weight(self, fraction: float) -> None:
        """Replace the file.

        Raises:
            InputError: it cannot be written.
        """
        shares = _weights(self._old, self._new, fraction).shares
        text = json.dumps({self._name: {str(version): share for version, share in shares.items()}})
        try:
            write_atomic(self._path, text.encode())
        except OSError as exc:
            raise InputError(f"the weights file {self._path} cannot be written: {exc.strerror or exc}") from exc
        self._fraction = fraction

    def current(self) -> float:
        """Return the latest written share."""
        return self._fraction


def _weights(old: int, new: int, fraction: float) -> VersionWeights:
    return VersionWeights.of({old: 1.0 - fraction, new: fraction})


class Watch(Protocol):
    """Anyone who sees how the new version does."""

    def watch(self, seconds: float) -> tuple[GateResult, ...]:
        """Watch for some time, less when a gate fails before. Return the result of every gate over all time so far."""

    def requests(self) -> int:
        """Return how many requests the new version has been seen to get."""


@dataclasses.dataclass(frozen=True)
class CanaryStep:
    """One step taken.

    Attributes:
        fraction: the new version's share of the traffic, 0 to 1.
        seconds: seconds the step was to be watched. A failed gate ends it earlier.
        requests: requests the new version got during the step, if known.
        gates: how every gate stood at its end, over all steps so far.
        outcome: the worst outcome of `gates`. `pass` without any.
    """

    fraction: float
    seconds: float
    requests: int
    gates: tuple[GateResult, ...]
    outcome: Outcome


def run_steps(
    weights: Weights,
    steps: Sequence[float],
    step_s: float,
    watch: Watch,
    report: Callable[[str], None],
    on_step: Callable[[float], None] = lambda _: None,
) -> tuple[CanaryStep, ...]:
    """Take the steps one after the other.

    A failed gate ends it at once. An undecided gate lets the next step follow, except for 100 %: before it every gate
    must have passed. Whatever ends it early, Ctrl-C too, sets the weight back to 0.

    Args:
        weights: gives the new version its share.
        steps: rising shares, the last one 1.
        step_s: seconds each share is watched.
        watch: receives progress, and can stop the build.
        report: called with a line of text for each step.
        on_step: given each share below 1 after it was watched. An exception from it ends the steps.

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
    """Return the error with the gates not passed, and the requests still needed."""
    failed = [result for result in results if result.outcome is Outcome.FAIL]
    if failed:
        return GateError("; ".join(f"the gate {each.gate} failed: {each.reason}" for each in failed))
    open_ = [result for result in results if result.outcome is Outcome.INCONCLUSIVE]
    message = "; ".join(f"the gate {each.gate} is undecided: {each.reason}" for each in open_)
    needed = [result.needed_requests for result in open_ if result.needed_requests is not None]
    hint = (
        f"About {max(needed):,} requests in all would decide: watch for longer, or send more a second."
        if needed and len(needed) == len(open_)
        else None
    )
    return InconclusiveError(message, hint=hint)


def untried(name: str, version: int, where: str) -> InconclusiveError:
    """Return the error of a trial without anything to be judged against.

    Args:
        name: name of the model, for the message.
        version: the version to be tried, for the message.
        where: place of the value, as the error message names it.
    """
    return InconclusiveError(
        f"{name}:{version} is served already on {where}, without an older version beside it, so it cannot be tried. "
        "No gate was judged, and nothing was changed.",
        hint="Without --shadow and --canary, deploy proves it by an inference.",
    )


def check_kind(
    name: str, options: TrialOptions, *, sequence: bool, streams: bool = True, ensemble: bool = False
) -> None:
    """See whether a model of this kind can have the trial.

    Args:
        name: name of the model, for the message and its hint.
        options: steps, duration and gates of the trial.
        sequence: its requests, or those of a part, belong to sequences.
        streams: the connection can carry all the responses it gives. HTTP cannot where there are several.
        ensemble: it is one, so it has no instance group to publish weights in.

    Raises:
        UsageError: it cannot. With the remedy.
    """
    hint = f"Deploy {name} without a trial: every recorded request and response is compared. "
    hint += "For times under load: repo-manager compare."
    if options.shadow is not None and not streams:
        raise UsageError(
            f"--shadow compares every response, and {name} answers with any number of them, which Triton does not send "
            "over HTTP. Nothing was changed.",
            hint="Name the server by grpc://.",
        )
    if options.steps and sequence:
        raise UsageError(
            f"--canary shares out single requests, and those of a sequence of {name} have to reach one version. "
            "Nothing was changed.",
            hint=hint,
        )
    if options.steps and ensemble and options.weights is None and options.weights_file is None:
        raise UsageError(
            f"--canary publishes the shares in the name of an instance group, and {name} is an ensemble, which has "
            "none. Nothing was changed.",
            hint="Write them to a file for clients: --weights-file FILE.json.",
        )
