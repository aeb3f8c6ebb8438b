"""The best configuration of models: tune."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from repo_manager.cli.connection import ConnectionFlags, client_options
from repo_manager.cli.conversion import AccuracyFlags
from repo_manager.cli.durations import seconds_option
from repo_manager.cli.load_options import DataFlags
from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import Output, check_input, check_outputs, parse_changes, parse_shapes, writing
from repo_manager.cli.repository_options import RepositoryFlag, model_versions
from repo_manager.errors import GateError, InconclusiveError, UsageError
from repo_manager.files import write_atomic
from repo_manager.gates import Gate
from repo_manager.loadtest.judge import parse_slo
from repo_manager.loadtest.options import Arrival, LoadTestOptions
from repo_manager.pipeline.load_inputs import known_inputs
from repo_manager.report.progress import tune_progress
from repo_manager.report.repository_tables import config_change_view
from repo_manager.report.tune_view import tune_page, tune_view
from repo_manager.repository.configuration import change_config
from repo_manager.repository.location import Location
from repo_manager.repository.plan.configuration import ConfigChange
from repo_manager.repository.tags import resolve_version
from repo_manager.settings import load_settings
from repo_manager.tuning.result import BETTER, KEPT, NONE_HOLDS, Objective, TuneOptions, Tuning
from repo_manager.tuning.run import tune

__all__ = ["app"]

app = typer.Typer()
NamedVersions = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME[:VERSION]...",
        help="VERSION is a number or a tag \\[default: the newest]. Several models: with --together.",
        show_default=False,
        autocompletion=model_versions,
    ),
]


@dataclasses.dataclass(frozen=True)
class GoalFlags:
    """The goal of the search, and its budget."""

    PANEL: ClassVar[str] = "Objective"
    slo: list[str] | None = option(
        "--slo",
        metavar="GATE",
        help='Limits to hold: "p99<20ms", "errors<0.1%". For one model: "NAME:p99<20ms" (may be given often).',
    )
    objective: Objective | None = option(
        "--objective",
        sets=(TuneOptions, "objective"),
        help="The largest rate, the lowest p99 at --rate, or the most inferences per joule [default: the largest rate; "
        "with --rate the lowest p99].",
    )
    rate: float | None = option(
        "--rate",
        sets=(TuneOptions, "rate"),
        help="Requests a second to hold [default: find the largest rate that holds --slo].",
    )
    arrival: Arrival = option("--arrival", sets=(TuneOptions, "arrival"), help="Arrival process of the requests.")
    together: bool = option(
        "--together", default=False, help="Tune several models on the same machine, under load at once."
    )
    mix: str | None = option(
        "--mix",
        metavar="NAME=N,...",
        help="Shares of the models' requests [default: the rate of each model alone, one request at a time].",
    )
    budget: float = seconds_option(
        "--budget",
        sets=(TuneOptions, "budget_s"),
        help="Longest duration.",
    )
    search: str = option(
        "--search",
        metavar="AXES",
        sets=(TuneOptions, "search"),
        read=lambda text: tuple(part.strip() for part in text.split(",") if part.strip()),
        show=",".join,
        help="Settings that may change, separated by commas.",
    )
    fix: list[str] | None = option(
        "--set",
        metavar="FIELD=VALUE",
        help="Fix a field of config.pbtxt before the search. For one of several models: NAME:FIELD=VALUE (may be "
        "given often).",
    )
    to: str | None = option(
        "--to",
        metavar="URL",
        sets=(TuneOptions, "url"),
        help="A server to load copies of the model on, by its load API [default: start one here].",
    )
    metrics: str | None = option(
        "--metrics-url", metavar="URL", help="The server's metrics, for energy and memory [default: port 8002]."
    )
    fresh: bool = option("--fresh", sets=(TuneOptions, "fresh"), help="Ignore the measurements of earlier runs.")
    write: bool = option(
        "--write", default=False, help="Change the model's config.pbtxt if a better setting is proven."
    )
    report: Path | None = option(
        "--report", "--html", metavar="FILE.html", help="Also write a one-file HTML page.", rich_help_panel="Output"
    )


@app.command("tune")
@grouped
def tune_command(
    named_versions: NamedVersions,
    *,
    place: RepositoryFlag,
    goal: GoalFlags,
    accuracy: AccuracyFlags,
    data: DataFlags,
    output: Output,
    connection: ConnectionFlags,
) -> None:
    """Find the configuration that serves best, on a copy of the model, and prove it against today's.

    Exit codes: 0 a better one is proven, or today's is kept; 4 no configuration holds the limits; 6 the budget ended
    undecided.
    """
    terminal = output.terminal()
    check_outputs(goal.report)
    check_input(data.data)
    if len(named_versions) > 1 and not goal.together:
        raise UsageError("several models are given", hint="Do they share the machine? Tune them --together.")
    wanted = accuracy.accuracy_options()
    root = place.root()
    options = _options(goal, data, [each.partition(":")[0] for each in named_versions])
    versions = dict(resolve_version(root, each) for each in named_versions)
    if len(versions) < len(named_versions):
        raise UsageError("a model is named twice, but all its versions share one configuration")
    access = None if options.url is None else client_options(connection, [options.url])
    options = dataclasses.replace(options, access=access, accuracy=wanted, signed_by=load_settings().signed_by)
    with tune_progress(terminal.console, options.budget_s, quiet=terminal.quiet) as told:
        result = tune(
            root, versions, options, inputs=lambda name, version: _inputs(root, name, version, data), progress=told
        )
    result = dataclasses.replace(result, command=shlex.join(["repo-manager", *sys.argv[1:]]))
    if goal.report is not None:
        with writing(goal.report):
            write_atomic(goal.report, tune_page(result).encode())
        terminal.note(f"Page: {goal.report}")
    written = _write(root, result) if goal.write else []
    views = [view for each in written for view in config_change_view(each, shown=False, repository=place.repository)]
    terminal.result(result, *tune_view(result, written=bool(written), repository=place.repository), *views)
    _raise_for(result)


def _options(goal: GoalFlags, data: DataFlags, names: Sequence[str]) -> TuneOptions:
    """Return the goal of the search.

    Raises:
        UsageError: a text cannot be read.
    """
    gates: list[Gate] = []
    own: dict[str, tuple[Gate, ...]] = {}
    for part in (part.strip() for text in goal.slo or [] for part in text.split(",")):
        name, mark, rest = part.partition(":")
        if mark and name in names:
            own[name] = (*own.get(name, ()), parse_slo(rest.strip()))
        elif part:
            gates.append(parse_slo(part))
    load = {**settings_of(LoadTestOptions, data), "shapes": parse_shapes(data.shape)}
    if goal.metrics is not None:
        load["metrics_url"] = goal.metrics
    return TuneOptions(
        gates=tuple(gates),
        own_gates=own,
        mix=_mix(goal.mix),
        fixed=parse_changes(goal.fix or []),
        load=load,
        **settings_of(TuneOptions, goal),
    )


def _mix(text: str | None) -> dict[str, float]:
    """Read NAME=N,NAME=N.

    Raises:
        UsageError: it has another form.
    """
    found: dict[str, float] = {}
    for part in (text or "").split(",") if text else ():
        name, mark, number = part.strip().partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            mark = ""
        if not mark or not name:
            raise UsageError(f"--mix {text}: expected NAME=N,..., for instance detector=1,classifier=3")
    return found


def _inputs(root: Location, name: str, version: int, data: DataFlags) -> Mapping[str, Any]:
    """Return the requests the repository holds for a model.

    Raises:
        UsageError: the golden sample is requested but missing, or other data is given, too.
    """
    known = known_inputs(root, name, version)
    if data.golden and data.data is not None:
        raise UsageError("both --golden and --input-data are given", hint="Give one of them.")
    if data.golden and not known.golden:
        raise UsageError(f"--golden: {name}:{version} has no golden sample", hint="Give --input-data.")
    is_recorded = data.golden or (known.why_golden and data.data is None and not data.shape)
    return {
        "int_ranges": known.ranges,
        "shapes": known.shapes,
        "recorded": known.golden if is_recorded else (),
        "fallback": known.golden,
    }


def _write(root: Location, result: Tuning) -> list[ConfigChange]:
    """Change each model's config.pbtxt as `config --set` does. Return the changes."""
    if result.outcome != BETTER:
        return []
    return [change_config(root, name, changes) for name, changes in result.changes.items()]


def _raise_for(result: Tuning) -> None:
    """Turn the shown result into an exit code.

    Raises:
        GateError: no setting holds the limits.
        InconclusiveError: the budget ended first, or the intervals are too wide.
    """
    if result.outcome == NONE_HOLDS:
        raise GateError("No configuration holds the limits", hint=result.reason, is_shown=True)
    if result.outcome not in (BETTER, KEPT) and result.is_complete:
        raise InconclusiveError(
            "No configuration is shown to hold the limits, or to fail them",
            hint="Measure longer (--budget), or on a machine without other work.",
            is_shown=True,
        )
    if result.outcome not in (BETTER, KEPT):
        raise InconclusiveError("The budget ended before a decision", hint="Give more (--budget).", is_shown=True)
