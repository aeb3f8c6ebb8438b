"""How a roll-out and its trial are asked for. Each default is written here and nowhere else."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from repo_manager.errors import UsageError
from repo_manager.gates import SHARE, TIME, Gate, GateMetric, Grammar
from repo_manager.stats.quantiles import PERCENTILES
from repo_manager.validation import check_fields, check_range

if TYPE_CHECKING:  # it imports these options
    from repo_manager.rollout.trial.shadow import ShadowReport

__all__ = ["Amount", "RolloutOptions", "ShadowOptions", "TrialOptions", "Weights", "parse_gates", "parse_steps"]

_DEFAULT_GATES = "errors<1%"
_LATENCY = GateMetric(TIME, side="<", has_factor=True)
_GRAMMAR = Grammar(
    {
        **dict.fromkeys(("mean", *(percentile.key for percentile in PERCENTILES)), _LATENCY),
        "errors": GateMetric(SHARE, side="<", is_share=True),
        "agreement": GateMetric(SHARE, side=">", is_share=True),
        "drift": GateMetric(SHARE, side="<"),
    },
    examples=("p99<20ms", "p99<1.2x", "errors<0.1%", "agreement>99%", "drift<1e-2"),
)
_FORM = re.compile(r"(?P<value>\d+(?:\.\d+)?)(?P<percent>\s*%)?")


class Weights(Protocol):
    """The new version's share of the traffic."""

    def set_weight(self, fraction: float) -> None:
        """Give the new version this share, 0 to 1. The old one gets the rest.

        Raises:
            RepoManagerError: it cannot be set.
        """

    def current(self) -> float:
        """Return the latest share. 0 before."""


@dataclasses.dataclass(frozen=True)
class Amount:
    """A number of servers as people write it: `3`, or `10%` of them.

    Attributes:
        value: the number, or the per cent.
        percent: whether `value` is a percentage, else a count.
    """

    value: float
    percent: bool = False

    @classmethod
    def parse(cls, text: str | int, option: str) -> Amount:
        """Read `3` or `10%`.

        Raises:
            UsageError: it is neither, a fraction of a server, or more than 100 %. With the option's name.
        """
        match = _FORM.fullmatch(str(text).strip())
        amount = None if match is None else cls(float(match["value"]), match["percent"] is not None)
        if amount is None or (amount.percent and amount.value > 100) or (not amount.percent and amount.value % 1):
            raise UsageError(f"{option} {text}: expected a number of servers or a share, for instance 2 or 10%")
        return amount

    def of(self, total: int) -> int:
        """Return the count for `total` parts. Shares are rounded down, as Kubernetes does for `maxUnavailable`."""
        return int(total * self.value / 100 + 1e-9) if self.percent else int(self.value)

    def __str__(self) -> str:
        return f"{self.value:g}{'%' if self.percent else ''}"


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
    """How to roll out.

    Attributes:
        keep_previous: leave the previous version loaded, and versions pinned by ensembles, so going back is only a
            policy change.
        dry_run: check and plan, and change nothing.
        deadline_s: for everything up to the proof on the last server. The undo has time of its own. A trial adds the
            time it was asked to take.
        load_timeout_s: deadline of one load on a server, and of each step of an InferenceService. A Deployment has it
            for each pod, and `deadline_s` does not end a Deployment with progress.
        settle_timeout_s: how long the server may take until exactly the wanted versions are READY.
        smoke_timeout_s: deadline of the smoke inference, in seconds.
        reconnect_timeout_s: how long the undo waits for a silent server. At most half of a short `deadline_s`.
        lease_timeout_s: how long to wait for another roll-out of the same model.
        retries: how often a call is made again when the server was out of reach, or busy, for a moment.
        signed_by: public keys of which one must vouch for the version. Empty asks for no signature.
        force: go on against a check based on an estimate (memory).
        drop_pinned: take a version out of service although an ensemble pins it: the ensemble is lost.
        batch: how many of several servers at a time. At least one.
        max_unavailable: how many of several servers may not answer without failing the whole.
        context: of the settings the target was taken from, for the history. `None` without one.
        proof: `inference`: a version must answer one. `readiness`: where no sample was recorded and the model refuses
            made-up requests, it is enough that the server says the version is ready.
    """

    keep_previous: bool = False
    dry_run: bool = False
    deadline_s: float = 3600.0
    load_timeout_s: float = 600.0
    settle_timeout_s: float = 60.0
    smoke_timeout_s: float = 60.0
    reconnect_timeout_s: float = 10.0
    lease_timeout_s: float = 0.0
    retries: int = 2
    signed_by: tuple[Path, ...] = ()
    force: bool = False
    drop_pinned: bool = False
    batch: Amount = Amount(1)
    max_unavailable: Amount = Amount(0)
    proof: Literal["inference", "readiness"] = "inference"
    context: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for field in dataclasses.fields(self):
            if field.name.endswith("_s"):
                check_range(field.name, getattr(self, field.name))
        check_range("retries", self.retries)


@dataclasses.dataclass(frozen=True)
class ShadowOptions:
    """How to mirror recorded requests.

    Attributes:
        requests: the file of recorded requests.
        rate_per_s: pairs a second. Each is one request to either version.
        duration_s: for how long at most. It ends before when every gate is decided.
        timeout_s: deadline of one request. A later answer is an error.
        workers: pairs on their way at the same time, at most.
        seed: of the order of the requests and of the versions in each pair.
    """

    requests: Path
    rate_per_s: float = 20.0
    duration_s: float = 60.0
    timeout_s: float = 10.0
    workers: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)


def _ignore(_: object) -> None:
    """Do nothing."""


@dataclasses.dataclass(frozen=True)
class TrialOptions:
    """How a version is tried before it takes over.

    Attributes:
        steps: rising shares of the traffic, the last one 1. Empty for a shadow alone.
        step_s: seconds each share is watched.
        gates: the limits to hold during each step. Empty takes `errors<1%`.
        shadow: mirror recorded requests. `None`: only the server's counters are watched.
        weights_file: write the weights there instead of publishing them on the server.
        weights: gives the new version its share. `None`: published on the server, or in `weights_file`.
        on_shadow: given the shadow's report, regardless of its outcome.
        on_step: given each share below 1 after it was watched. An exception from it undoes the roll-out.
    """

    steps: tuple[float, ...] = ()
    step_s: float = 120.0
    gates: tuple[Gate, ...] = ()
    shadow: ShadowOptions | None = None
    weights_file: Path | None = None
    weights: Weights | None = None
    on_shadow: Callable[[ShadowReport], None] = _ignore
    on_step: Callable[[float], None] = _ignore

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def all_gates(self) -> tuple[Gate, ...]:
        """The gates, or the default ones."""
        return self.gates or parse_gates(_DEFAULT_GATES)

    @property
    def longest_s(self) -> float:
        """How long the trial takes at most."""
        return len(self.steps) * self.step_s + (0.0 if self.shadow is None else self.shadow.duration_s)

    def check(self) -> None:
        """See whether the gates can be judged at all.

        Raises:
            UsageError: one needs mirrored requests, the steps do not rise to 1, or nothing was asked for.
        """
        if self.shadow is None and not self.steps:
            raise UsageError("neither a shadow nor canary steps were asked for")
        rising = all(low < high for low, high in zip((0.0, *self.steps), self.steps, strict=False))
        if self.steps and (not rising or self.steps[-1] != 1.0):
            shares = ", ".join(f"{step * 100:g} %" for step in self.steps)
            raise UsageError(f"the canary steps {shares} do not ascend from above 0 % to 100 %")
        deaf = [gate.text for gate in self.gates if gate.metric not in ("errors", "mean") or gate.relative]
        if self.shadow is None and deaf:
            raise UsageError(
                f"the server's counters cannot tell {', '.join(deaf)}: they provide only error counts and mean times",
                hint="Add --shadow REQUESTS, or use errors<... and mean<... alone.",
            )


def parse_gates(text: str) -> tuple[Gate, ...]:
    """Parse gates separated by commas.

    Raises:
        UsageError: an unknown metric, unit or form.
    """
    return _GRAMMAR.parse_all(text)


def parse_steps(text: str) -> tuple[float, ...]:
    """Parse `5%,25%,100%`.

    Raises:
        UsageError: not percentages rising to 100.
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
