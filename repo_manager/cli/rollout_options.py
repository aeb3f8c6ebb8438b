"""Options of a roll-out, for every deploying command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from repo_manager.cli.durations import seconds_option
from repo_manager.cli.option_groups import option, settings_of
from repo_manager.cli.options import check_outputs, writing
from repo_manager.errors import UsageError
from repo_manager.report.rollout_tables import shadow_view
from repo_manager.report.terminal import Terminal
from repo_manager.rollout.options import RolloutOptions, ShadowOptions, TrialOptions, parse_gates, parse_steps
from repo_manager.types import as_json

if TYPE_CHECKING:
    from repo_manager.rollout.trial.shadow import ShadowReport

__all__ = ["RolloutFlags", "Trial"]


@dataclasses.dataclass(frozen=True)
class RolloutFlags:
    """How long a roll-out may take, and the versions it leaves."""

    PANEL: ClassVar[str] = "Roll-out"
    keep_previous: bool = option(
        "--keep-previous",
        sets=(RolloutOptions, "keep_previous"),
        help="Keep the previous version and the versions pinned by ensembles loaded, so a roll-back is instant.",
    )
    timeout: float | None = seconds_option(
        "--timeout",
        help="Deadline of a model's roll-out, and of each load in it "
        f"[default: {RolloutOptions.deadline_s:g}s, a load {RolloutOptions.load_timeout_s:g}s].",
    )

    @property
    def load_timeout_s(self) -> float:
        """The deadline of one load: the option's, else the library's."""
        return RolloutOptions.load_timeout_s if self.timeout is None else self.timeout

    def settings(self) -> dict[str, Any]:
        """Return the settings of `RolloutOptions` the options hold."""
        settings = settings_of(RolloutOptions, self)
        if self.timeout is not None:
            settings |= {"deadline_s": self.timeout, "load_timeout_s": self.timeout}
        return settings


# Trial options of `deploy`: recorded shadow requests, a growing share of the traffic, gates.


@dataclasses.dataclass(frozen=True)
class Trial:
    """The trial of a new version before it takes over. Without --shadow and --canary there is none."""

    PANEL: ClassVar[str] = "Trial"
    shadow: Path | None = option(
        "--shadow",
        metavar="REQUESTS",
        help="Send recorded requests (.jsonl, .npz, or perf_analyzer's .json) to the old and the new version "
        "first, and compare answers and latencies.",
    )
    shadow_rate: float = option(
        "--shadow-rate", metavar="R", sets=(ShadowOptions, "rate_per_s"), min=0.001, help="Pairs of requests a second."
    )
    shadow_duration: float = seconds_option(
        "--shadow-duration",
        sets=(ShadowOptions, "duration_s"),
        least=0.001,
        help="Longest duration.",
    )
    shadow_report: Path | None = option(
        "--shadow-report", metavar="FILE.json", help="File for the shadow's report. It is written in any case."
    )
    canary: str | None = option(
        "--canary",
        metavar="5%,25%,100%",
        sets=(TrialOptions, "steps"),
        read=lambda text: parse_steps(text),
        help="Then give the new version these shares of the traffic, one after the other. Clients follow with "
        "VersionedClient (document canary.md).",
    )
    step: float = seconds_option(
        "--step",
        sets=(TrialOptions, "step_s"),
        least=0.001,
        help="How long each share is watched.",
    )
    weights_file: Path | None = option(
        "--weights-file",
        metavar="FILE.json",
        sets=(TrialOptions, "weights_file"),
        help="Write the shares to this file, for clients to read [default: publish them on the server].",
    )
    gate: list[str] | None = option(
        "--gate",
        metavar="GATES",
        sets=(TrialOptions, "gates"),
        read=lambda texts: parse_gates(",".join(texts)),
        help='Limits of the trial: "p99<20ms, p99<1.2x, errors<0.1%, agreement>99%, drift<1e-2" [default: errors<1%].',
    )

    @property
    def is_wanted(self) -> bool:
        """Whether there will be a trial."""
        return self.shadow is not None or self.canary is not None

    def options(self, terminal: Terminal) -> TrialOptions | None:
        """Return them as the library takes them, or `None` without a trial.

        Args:
            terminal: shows the shadow's result at once, because a failed gate ends the command.

        Raises:
            UsageError: one cannot be read, or requires another.
        """
        needs = {
            "--gate": (self.gate, self.is_wanted, "--shadow or --canary"),
            "--weights-file": (self.weights_file, self.canary is not None, "--canary"),
            "--shadow-report": (self.shadow_report, self.shadow is not None, "--shadow"),
        }
        for name, (given, satisfied, needed) in needs.items():
            if given and not satisfied:
                raise UsageError(f"{name} requires {needed}")
        if not self.is_wanted:
            return None

        check_outputs(self.shadow_report, self.weights_file)
        shadow = None if self.shadow is None else ShadowOptions(self.shadow, **settings_of(ShadowOptions, self))
        settings = settings_of(TrialOptions, self)
        options = TrialOptions(shadow=shadow, on_shadow=lambda report: self._show(terminal, report), **settings)
        options.check()
        return options

    def _show(self, terminal: Terminal, report: ShadowReport) -> None:
        terminal.show(*shadow_view(report))
        if self.shadow_report is not None:
            with writing(self.shadow_report):
                self.shadow_report.write_text(json.dumps(as_json(report), indent=2) + "\n", encoding="utf-8")
