"""`deploy`'s options of a trial: recorded requests in the shadow, a growing share of the traffic, gates."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repo_manager.cli.options import writing
from repo_manager.errors import UsageError

if TYPE_CHECKING:
    from repo_manager.report.terminal import Terminal
    from repo_manager.repository.location import Location
    from repo_manager.rollout import RolloutOptions
    from repo_manager.rollout.trial.canary import CanaryOptions, CanaryRollout
    from repo_manager.rollout.trial.shadow import ShadowReport
    from repo_manager.server import ClientOptions

__all__ = ["Trial", "parse_duration", "run_trial"]

_SECONDS_OF = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]*\.?[0-9]+)\s*(ms|s|m|h|)")


@dataclasses.dataclass(frozen=True)
class Trial:
    """How the new version has to prove itself before it takes over; without --shadow and --canary it has not to."""

    shadow: Annotated[
        Path | None,
        typer.Option(
            "--shadow",
            metavar="REQUESTS",
            help="Send recorded requests (.jsonl, .npz, or perf_analyzer's .json) to the old and the new version "
            "first, and compare answers and latencies.",
            show_default=False,
        ),
    ] = None
    shadow_rate: Annotated[
        float, typer.Option("--shadow-rate", metavar="R", help="Pairs of requests a second.", min=0.001)
    ] = 20.0
    shadow_duration: Annotated[
        str, typer.Option("--shadow-duration", metavar="T", help="For how long at most: 30s, 5m, 1h.")
    ] = "60s"
    shadow_report: Annotated[
        Path | None,
        typer.Option(
            "--shadow-report",
            metavar="FILE.json",
            help="Write what the shadow showed, whatever it was.",
            show_default=False,
        ),
    ] = None
    canary: Annotated[
        str | None,
        typer.Option(
            "--canary",
            metavar="5%,25%,100%",
            help="Then give the new version these shares of the traffic, one after the other; clients follow with "
            "VersionedClient (docs/canary.md).",
            show_default=False,
        ),
    ] = None
    step: Annotated[str, typer.Option("--step", metavar="T", help="How long each share is watched.")] = "2m"
    weights_file: Annotated[
        Path | None,
        typer.Option(
            "--weights-file",
            metavar="FILE.json",
            help="Write the shares there, for clients that read it [default: they are published on the server].",
            show_default=False,
        ),
    ] = None
    gate: Annotated[
        list[str] | None,
        typer.Option(
            "--gate",
            metavar="GATES",
            help='What has to hold: "p99<20ms, p99<1.2x, errors<0.1%, agreement>99%, drift<1e-2" [default: errors<1%].',
            show_default=False,
        ),
    ] = None

    @property
    def is_wanted(self) -> bool:
        """Whether there is to be a trial."""
        return self.shadow is not None or self.canary is not None

    def options(self) -> CanaryOptions | None:
        """Return them as the library takes them; `None` without a trial.

        Raises:
            UsageError: one cannot be read, or is of no use without another.
        """
        needs = {
            "--gate": (self.gate, self.is_wanted, "--shadow or --canary"),
            "--weights-file": (self.weights_file, self.canary is not None, "--canary"),
            "--shadow-report": (self.shadow_report, self.shadow is not None, "--shadow"),
        }
        for option, (given, satisfied, needed) in needs.items():
            if given and not satisfied:
                raise UsageError(f"{option} is of no use without {needed}")
        if not self.is_wanted:
            return None
        from repo_manager.rollout.trial.canary import CanaryOptions
        from repo_manager.rollout.trial.gates import parse_gates
        from repo_manager.rollout.trial.shadow import ShadowOptions
        from repo_manager.rollout.trial.steps import parse_steps

        shadow = None
        if self.shadow is not None:
            duration_s = parse_duration(self.shadow_duration, "--shadow-duration")
            shadow = ShadowOptions(self.shadow, rate_per_s=self.shadow_rate, duration_s=duration_s)
        options = CanaryOptions(
            steps=() if self.canary is None else parse_steps(self.canary),
            step_s=parse_duration(self.step, "--step"),
            gates=parse_gates(",".join(self.gate or [])),
            shadow=shadow,
            weights_file=self.weights_file,
        )
        options.check()
        return options


def parse_duration(text: str, option: str) -> float:
    """Read `90`, `90s`, `1.5m`, `2h` or `500ms`; return seconds.

    Raises:
        UsageError: it is none of these, or 0.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    seconds = 0.0 if match is None else float(match.group(1)) * _SECONDS_OF[match.group(2)]
    if seconds <= 0:
        raise UsageError(f"{option} {text}: expected a time such as 30s, 5m or 1h")
    return seconds


def run_trial(
    terminal: Terminal,
    root: Location,
    what: tuple[str, int],
    server: tuple[str, ClientOptions],
    options: RolloutOptions,
    trial: Trial,
) -> CanaryRollout:
    """Deploy with a trial; what the shadow showed is shown at once, because a failed gate ends the command.

    Raises:
        RepoManagerError: as `run_canary`.
    """
    import json

    from repo_manager.report.shadow_tables import shadow_view
    from repo_manager.rollout.trial.canary import run_canary
    from repo_manager.server import TritonClient
    from repo_manager.types import as_json

    canary = trial.options()
    assert canary is not None

    def show(report: ShadowReport) -> None:
        terminal.show(*shadow_view(report))
        if trial.shadow_report is not None:
            with writing(trial.shadow_report):
                trial.shadow_report.write_text(json.dumps(as_json(report), indent=2) + "\n", encoding="utf-8")

    with TritonClient.connect(*server) as client:
        return run_canary(
            root,
            *what,
            client,
            canary,
            options=options,
            report=terminal.reporter(),
            connect=lambda: TritonClient.connect(*server),
            on_shadow=show,
        )
