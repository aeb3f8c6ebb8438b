"""The command for the shares of a gateway's traffic: traffic."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from repo_manager.cli.durations import seconds_option
from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import DryRun, Output
from repo_manager.report.rollout_tables import traffic_view
from repo_manager.rollout.traffic import parse_shares, shift_traffic

__all__ = ["app"]

app = typer.Typer()


@dataclasses.dataclass(frozen=True)
class TrafficFlags:
    """The new version's share of the traffic, and its pace."""

    share: str | None = option(
        "--share",
        metavar="10%,50%,100%",
        sets=(shift_traffic, "steps"),
        read=lambda text: parse_shares(text),
        help="The new version's shares, one after the other. 0% takes all traffic from it [default: show the shares].",
    )
    step: float = seconds_option(
        "--step",
        sets=(shift_traffic, "step_s"),
        least=0.001,
        help="Duration of each share but the last.",
    )
    stable: str | None = option(
        "--stable", metavar="SERVICE", help="The Service of the old version [default: the first of the route's two]."
    )
    canary: str | None = option(
        "--canary", metavar="SERVICE", help="The Service of the new version [default: the second of the route's two]."
    )


@app.command("traffic")
@grouped
def traffic_command(
    route: Annotated[
        str,
        typer.Argument(
            metavar="ROUTE", help="gateway://NAMESPACE/HTTPROUTE, or with ?context=NAME.", show_default=False
        ),
    ],
    *,
    flags: TrafficFlags,
    dry_run: DryRun = False,
    output: Output,
) -> None:
    """Show or set how an HTTPRoute of the Gateway API shares traffic between two releases.

    Each share is accepted by every gateway before the next one begins. On any failure, and on Ctrl-C, the previous
    weights are restored.
    """
    terminal = output.terminal()
    settings = settings_of(shift_traffic, flags)
    made = shift_traffic(
        route,
        settings.pop("steps") or (),
        services=(flags.stable, flags.canary),
        **settings,
        dry_run=dry_run,
        report=terminal.reporter(),
    )
    terminal.result(made, *traffic_view(made))
