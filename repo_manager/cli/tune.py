"""The configuration of a model that serves best: tune."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import ClassVar

import typer

from repo_manager.cli.connection import Connection, client_options
from repo_manager.cli.load_options import DataFlags
from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import Output, check_input, check_outputs, parse_changes, parse_shapes, writing
from repo_manager.cli.repository_options import RepositoryFlag, Target
from repo_manager.cli.rollout_options import parse_duration
from repo_manager.errors import GateError, InconclusiveError
from repo_manager.files import write_atomic
from repo_manager.loadtest.judge import parse_slo
from repo_manager.loadtest.options import Arrival, LoadTestOptions
from repo_manager.pipeline.load_inputs import known_inputs
from repo_manager.report.terminal import Terminal
from repo_manager.report.tune_view import tune_page, tune_view
from repo_manager.repository.configuration import change_config
from repo_manager.repository.tags import resolve_version
from repo_manager.tuning.result import BETTER, KEPT, NONE_HOLDS, TuneOptions, TuneProgress, Tuning
from repo_manager.tuning.run import tune

__all__ = ["app"]

app = typer.Typer()


@dataclasses.dataclass(frozen=True)
class GoalFlags:
    """What is sought, and for how long."""

    PANEL: ClassVar[str] = "Objective"
    slo: list[str] | None = option(
        "--slo", metavar="GATE", help='Limits to hold: "p99<20ms", "errors<0.1%" (may be given often).'
    )
    rate: float | None = option(
        "--rate",
        sets=(TuneOptions, "rate"),
        help="Seek the lowest p99 at this many requests a second [default: the largest rate that holds --slo].",
    )
    arrival: Arrival = option("--arrival", sets=(TuneOptions, "arrival"), help="When the requests come.")
    budget: str = option(
        "--budget",
        metavar="TIME",
        sets=(TuneOptions, "budget_s"),
        read=lambda text: parse_duration(text, "--budget"),
        show=lambda seconds: f"{seconds / 60:g}m",
        help="The longest that it may take: 90s, 15m.",
    )
    search: str = option(
        "--search",
        metavar="AXES",
        sets=(TuneOptions, "search"),
        read=lambda text: tuple(part.strip() for part in text.split(",") if part.strip()),
        show=",".join,
        help="What may change, separated by commas.",
    )
    fix: list[str] | None = option(
        "--set", metavar="FIELD=VALUE", help="Fix a field of config.pbtxt beforehand (may be given often)."
    )
    to: str | None = option(
        "--to",
        metavar="URL",
        sets=(TuneOptions, "url"),
        help="A server that takes copies of the model by its load API [default: one is started here].",
    )
    fresh: bool = option("--fresh", sets=(TuneOptions, "fresh"), help="Forget what an earlier run measured.")
    write: bool = option(
        "--write", default=False, help="Change the model's config.pbtxt to what is shown to be better."
    )
    report: Path | None = option(
        "--report", metavar="FILE.html", help="Also write a one-file HTML page.", rich_help_panel="Output"
    )


@app.command("tune")
@grouped
def tune_command(
    target: Target,
    *,
    place: RepositoryFlag,
    goal: GoalFlags,
    data: DataFlags,
    output: Output,
    connection: Connection,
) -> None:
    """Find the configuration that serves best, on a copy of the model, and prove it against today's.

    Exit codes: 0 a better one is shown, or today's is kept; 4 no configuration holds the limits; 6 the budget ended
    undecided.
    """
    terminal = output.terminal()
    check_outputs(goal.report)
    check_input(data.data)
    options = _options(goal, data)
    root = place.root()
    name, version = resolve_version(root, target)
    known = known_inputs(root, name, version)
    load = {**options.load, "int_ranges": known.ranges, "shapes": {**known.shapes, **options.load["shapes"]}}
    access = None if options.url is None else client_options(connection, [options.url])
    options = dataclasses.replace(options, load=load, access=access)
    result = tune(root, name, version, options, progress=lambda told: _tell(terminal, told))
    result = dataclasses.replace(result, command=shlex.join(["repo-manager", *sys.argv[1:]]))
    if goal.report is not None:
        with writing(goal.report):
            write_atomic(goal.report, tune_page(result).encode())
        terminal.note(f"Page: {goal.report}")
    written = goal.write and result.outcome == BETTER
    if written:
        change_config(root, name, result.changes)
    terminal.result(result, *tune_view(result, written=written))
    _raise_for(result)


def _options(goal: GoalFlags, data: DataFlags) -> TuneOptions:
    """Return what is sought.

    Raises:
        UsageError: a text cannot be read.
    """
    parts = (part.strip() for text in goal.slo or [] for part in text.split(","))
    load = {**settings_of(LoadTestOptions, data), "shapes": parse_shapes(data.shape)}
    return TuneOptions(
        gates=tuple(parse_slo(part) for part in parts if part),
        fixed=parse_changes(goal.fix or []),
        load=load,
        **settings_of(TuneOptions, goal),
    )


def _tell(terminal: Terminal, told: TuneProgress) -> None:
    terminal.progress(f"{told.text} ({told.remaining_s:.0f} s of the budget left)")


def _raise_for(result: Tuning) -> None:
    """Turn what came out, and was shown, into an exit code.

    Raises:
        GateError: no setting holds the limits.
        InconclusiveError: the budget ended first.
    """
    if result.outcome == NONE_HOLDS:
        raise GateError("No configuration holds the limits", hint=result.reason, is_shown=True)
    if result.outcome not in (BETTER, KEPT):
        raise InconclusiveError("The budget ended undecided", hint="Give more (--budget).", is_shown=True)
