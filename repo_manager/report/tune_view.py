"""A tuning as tables on a terminal, and as one HTML file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.layout import key_values, make_table
from repo_manager.report.load_tables import comparison_view
from repo_manager.report.page import Figure, render_page
from repo_manager.report.svg import Chart, ChartAxis
from repo_manager.report.terminal import next_command
from repo_manager.tuning.result import Tuning, value_text
from repo_manager.tuning.search import MeasuredSetting
from repo_manager.tuning.space import AXES

__all__ = ["tune_page", "tune_view"]

_HEADLINES = {
    "better": "Better",
    "kept": "Kept: today's configuration stays",
    "none holds": "No configuration holds",
    "undecided": "Undecided",
}


def tune_view(result: Tuning, *, written: bool, repository: str | None = None) -> list[RenderableType]:
    """Return a terminal's view of a tuning.

    Args:
        result: result of the search. Its best settings are compared with today's.
        written: the models' config.pbtxt have been changed to it.
        repository: value of `--repository`, for the next command. `None`: the option was not given.
    """
    pairs: list[tuple[str, object]] = [
        ("model", result.model),
        ("sought", result.objective),
        ("today", f"{result.today.label}: {_value(result, result.today)}"),
        ("best", f"{result.best.label}: {_value(result, result.best)}"),
        *([] if result.accuracy is None else [("accuracy", f"{result.accuracy.detail} ({result.accuracy.data})")]),
        ("measured", f"{len(result.trials)} of {result.settings} settings in {result.seconds:.0f} s"),
        ("record", result.journal),
    ]
    views: list[RenderableType] = [Text(_HEADLINES[result.outcome], style="bold"), Text(result.reason)]
    views.append(key_values(pairs))
    rows = [[each.label, _value(result, each), _better(result, each), each.reason] for each in _settings(result)]
    if rows:
        views.append(make_table("Settings", ["setting", "holds", "better", "why"], rows, right="holds", drop="why"))
    if result.finalists:
        _, *numbers = columns = ("setting", "of the winner", "95 % interval", "blocks")
        views.append(make_table("In turn under load", columns, _race(result), right=",".join(numbers)))
    if result.left_out:
        views.append(Text("\nNot tried:\n" + "\n".join(f"  {text}" for text in result.left_out)))
    if result.comparisons:
        views += comparison_view(result.comparisons)
    if not written:
        for name, changes in result.changes.items():
            sets = [
                word for field, value in changes.items() if value is not None for word in ("--set", f"{field}={value}")
            ]
            clears = [word for field, value in changes.items() if value is None for word in ("--clear", field)]
            views.append(Text(f"\nTake it: {next_command('config', name, *sets, *clears, repository=repository)}"))
    return views


def tune_page(result: Tuning) -> str:
    """Return the page of a tuning: a complete HTML document without references to the outside."""
    return render_page(
        "tune.html.j2",
        result=result,
        headline=_HEADLINES[result.outcome],
        steps=_steps(result),
        rows=[
            {
                "label": measured.label,
                "value": _value(result, measured),
                "better": _better(result, measured),
                "is_best": measured.state == result.best.state,
                "is_today": measured.state == result.today.state,
                "reason": measured.reason,
                "seconds": f"{measured.seconds:.1f}",
            }
            for measured in _settings(result)
        ],
        figures=[*_front(result), *_curves(result)],
        effects=_effects(result),
        race=_race(result),
    )


def _steps(result: Tuning) -> list[str]:
    """Return why the best one won, from today's setting over each better one to the proof."""
    steps = [f"Today's setting, {result.today.label}: {_value(result, result.today)} ({result.today.reason})."]
    for measured in result.trials[1:]:
        if measured.is_better and measured.value is not None:
            asked = (
                "" if measured.against is None else f", where {value_text(result.seeks, measured.against)} was asked"
            )
            steps.append(f"{measured.label}: {_value(result, measured)}{asked} ({measured.reason}).")
    if result.accuracy is not None:
        steps.append(f"The best setting on {result.accuracy.data}: {result.accuracy.detail}.")
    beaten = sum(not each.is_better for each in result.trials)
    if beaten:
        steps.append(f"{beaten} other settings did not beat the best one before them; the table says why.")
    if result.finalists:
        steps.append(
            f"{result.finalists[0].label} won the race of {len(result.finalists)} settings in turn under load."
        )
    for each in result.comparisons:
        steps.append(f"The proof, both served and measured in {each.plan.pairs} pairs at {each.level}: {each.verdict}.")
    return steps


def _race(result: Tuning) -> list[tuple[str, str, str, int]]:
    """Return a row of each setting in the race: its share of the winner's value with its interval, and its blocks."""
    return [
        (each.label, f"{each.ratio:.1%}", f"{each.low:.1%} to {each.high:.1%}" if number else "-", each.rounds)
        for number, each in enumerate(result.finalists)
    ]


def _settings(result: Tuning) -> list[MeasuredSetting]:
    """Return every setting measured, in order. The best one as the race left it."""
    return [result.best if each.state == result.best.state else each for each in result.trials]


def _better(result: Tuning, measured: MeasuredSetting) -> str:
    """Say whether a setting was better; today's is the measure for the others."""
    if measured.state == result.today.state:
        return "-"
    return "yes" if measured.is_better else "no"


def _value(result: Tuning, measured: MeasuredSetting) -> str:
    """Return a setting's value, in the objective's unit."""
    if measured.value is not None:
        return value_text(result.seeks, measured.value)
    if measured.against is None or not measured.levels:
        return "-"
    return f"{'less than' if result.seeks == 'throughput' else 'not'} {value_text(result.seeks, measured.against)}"


def _front(result: Tuning) -> list[Figure]:
    """Return the chart of throughput against p99."""
    points = [
        (measured, level["throughput_per_s"], level["p99_ns"] / 1e6)
        for measured in result.trials
        for level in measured.levels
        if level["p99_ns"] and level["throughput_per_s"]
    ]
    if not points:
        return []
    x = ChartAxis.around("inferences/s", [point[1] for point in points])
    y = ChartAxis.around("p99, ms", [point[2] for point in points], is_log=True)
    chart = Chart("Throughput against p99", "Each measured load level of each setting.", x, y)
    today, best = result.today.state, result.best.state
    for series, name, chosen in (
        (3, "others", [point for point in points if point[0].state not in (today, best)]),
        (1, "today", [point for point in points if point[0].state == today]),
        (0, "best", [point for point in points if point[0].state == best != today]),
    ):
        if chosen:
            marks = [(rate, p99, f"{measured.label}: {rate:.4g}/s, p99 {p99:.3g} ms") for measured, rate, p99 in chosen]
            chart.marks(marks, series)
            chart.line(name, sorted((rate, p99) for _, rate, p99 in chosen) if name != "others" else [], series)
    caption = "Each point is a measured load level; further right and lower is better."
    return [Figure("Throughput against p99", Markup(chart.render()), caption)]  # the chart escapes its texts


def _curves(result: Tuning) -> list[Figure]:
    """Return the chart of batch times of each model."""
    figures = []
    for name, curve in result.curves.items():
        if len(curve) < 2:
            continue
        x = ChartAxis.around("samples in a batch", [each.size for each in curve], is_log=True)
        y = ChartAxis.around("ms a batch", [each.median_ns / 1e6 for each in curve])
        title = f"Time of one batch of {name}" if len(result.curves) > 1 else "Time of one batch"
        chart = Chart(title, "The median time of a batch by its size.", x, y)
        line = [(float(each.size), each.median_ns / 1e6) for each in curve]
        chart.line("", line, 0)
        chart.marks([(size, ms, f"{size:g} samples: {ms:.3g} ms, {size / ms * 1e3:,.0f}/s") for size, ms in line], 0)
        caption = "Measured first: settings that cannot meet the limits are not tried."
        figures.append(Figure(title, Markup(chart.render()), caption))
    return figures


def _effects(result: Tuning) -> list[dict[str, Any]]:
    """Return, per model and axis, the results of its values where nothing else differed from the best one."""
    found = []
    for model, axis in itertools.product(result.best.state, AXES):
        along = [each for each in result.trials if _differs_in(each, result.best) <= {(model, axis)}]
        if len(along) > 1:
            values = {getattr(each.state[model], axis): _value(result, each) for each in along}
            order: Sequence[Any] = sorted(values, key=lambda value: (value is not None, value if value else 0))
            title = f"{model}: {axis}" if len(result.best.state) > 1 else axis
            shown = [("none" if value is None else value, values[value]) for value in order]
            found.append({"axis": title, "values": shown})
    return found


def _differs_in(one: MeasuredSetting, other: MeasuredSetting) -> set[tuple[str, str]]:
    return {
        (model, axis)
        for model, axis in itertools.product(other.state, AXES)
        if getattr(one.state[model], axis) != getattr(other.state[model], axis)
    }
