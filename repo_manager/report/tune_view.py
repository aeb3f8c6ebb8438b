"""A tuning as tables on a terminal, and as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.layout import key_values, make_table
from repo_manager.report.load_tables import comparison_view
from repo_manager.report.page import Figure, render_page
from repo_manager.report.svg import Axis, Chart
from repo_manager.tuning.result import BETTER, Tuning
from repo_manager.tuning.search import Trial
from repo_manager.tuning.space import AXES

__all__ = ["tune_page", "tune_view"]

_HEADLINES = {
    "better": "Better",
    "kept": "Kept: today's configuration stays",
    "none holds": "No configuration holds",
    "undecided": "Undecided",
}


def tune_view(result: Tuning, *, written: bool) -> list[RenderableType]:
    """Return what a terminal shows of a tuning.

    Args:
        result: the tuning.
        written: the model's config.pbtxt has been changed to it.
    """
    pairs: list[tuple[str, object]] = [
        ("model", f"{result.model}:{result.version}"),
        ("sought", result.objective),
        ("today", f"{result.today.setting.label}: {_value(result, result.today)}"),
        ("best", f"{result.best.setting.label}: {_value(result, result.best)}"),
        ("measured", f"{len(result.trials)} of {result.settings} settings in {result.seconds:.0f} s"),
        ("record", result.journal),
    ]
    views: list[RenderableType] = [Text(_HEADLINES[result.outcome], style="bold"), Text(result.reason)]
    views.append(key_values(pairs))
    rows = [
        [trial.setting.label, _value(result, trial), "yes" if trial.is_better else "no", trial.reason]
        for trial in result.trials
    ]
    views.append(make_table("Settings", ["setting", "holds", "better", "why"], rows, right="holds", drop="why"))
    if result.comparison is not None:
        views += comparison_view([result.comparison])
    if result.outcome == BETTER and not written:
        sets = " ".join(f"--set {field}={value}" for field, value in result.changes.items() if value is not None)
        clears = " ".join(f"--clear {field}" for field, value in result.changes.items() if value is None)
        words = " ".join(part for part in (sets, clears) if part)
        views.append(Text(f"\nTake it: repo-manager config {result.model} {words}"))
    elif written:
        views.append(
            Text(f"\nWrote {result.model}/config.pbtxt. Serve it: repo-manager deploy {result.model}:{result.version}")
        )
    return views


def tune_page(result: Tuning) -> str:
    """Return the page of a tuning: a complete HTML document that refers to nothing outside itself."""
    return render_page(
        "tune.html.j2",
        result=result,
        headline=_HEADLINES[result.outcome],
        rows=[
            {
                "label": trial.setting.label,
                "value": _value(result, trial),
                "is_better": trial.is_better,
                "is_best": trial is result.best,
                "reason": trial.reason,
                "seconds": f"{trial.seconds:.1f}",
            }
            for trial in result.trials
        ],
        figures=_figures(result),
        effects=_effects(result),
        numbers=[] if result.comparison is None else result.comparison.numbers,
    )


def _value(result: Tuning, trial: Trial) -> str:
    """Return what a setting holds, in the objective's unit."""
    if trial.value is None:
        return "-" if trial.against is None else f"less than {_text(result, trial.against)}"
    return _text(result, trial.value)


def _text(result: Tuning, value: float) -> str:
    is_rate = result.objective.startswith("the largest rate")
    return f"{value:,.4g}/s" if is_rate else f"p99 {value / 1e6:.3g} ms"


def _figures(result: Tuning) -> list[Figure]:
    figures = []
    points = [
        (trial, level["throughput_per_s"], level["p99_ns"] / 1e6)
        for trial in result.trials
        for level in trial.levels
        if level["p99_ns"] and level["throughput_per_s"]
    ]
    if points:
        x = Axis.around("inferences/s", [point[1] for point in points])
        y = Axis.around("p99, ms", [point[2] for point in points], is_log=True)
        chart = Chart("Throughput against p99", "Each measured load level of each setting.", x, y)
        for series, name, chosen in (
            (3, "others", [p for p in points if p[0] not in (result.today, result.best)]),
            (1, "today", [p for p in points if p[0] == result.today]),
            (0, "best", [p for p in points if p[0] == result.best and result.best != result.today]),
        ):
            if chosen:
                chart.marks(
                    [(rate, p99, f"{t.setting.label}: {rate:.4g}/s, p99 {p99:.3g} ms") for t, rate, p99 in chosen],
                    series,
                )
                chart.line(name, sorted((rate, p99) for _, rate, p99 in chosen) if name != "others" else [], series)
        figures.append(
            Figure(
                "Throughput against p99",
                Markup(chart.render()),  # its texts are escaped
                "Each point is a load level that was measured; further right and lower is better.",
            )
        )
    if len(result.curve) > 1:
        x = Axis.around("samples in a batch", [each.size for each in result.curve], is_log=True)
        y = Axis.around("ms a batch", [each.median_ns / 1e6 for each in result.curve])
        chart = Chart("Time of one batch", "The mean time of a batch by its size.", x, y)
        line = [(float(each.size), each.median_ns / 1e6) for each in result.curve]
        chart.line("", line, 0)
        chart.marks([(size, ms, f"{size:g} samples: {ms:.3g} ms, {size / ms * 1e3:,.0f}/s") for size, ms in line], 0)
        figures.append(
            Figure(
                "Time of one batch", Markup(chart.render()), "Measured first: what cannot meet the limits is not tried."
            )
        )
    return figures


def _effects(result: Tuning) -> list[dict[str, Any]]:
    """Return, per axis, what its values led to where nothing else differed from the best one."""
    best = result.best
    found = []
    for axis in AXES:
        along = [trial for trial in result.trials if _differs_in(trial, best) <= {axis}]
        if len(along) > 1:
            values = {getattr(trial.setting, axis): _value(result, trial) for trial in along}
            order: Sequence[Any] = sorted(values, key=lambda value: -1 if value is None else value)
            found.append(
                {"axis": axis, "values": [("none" if value is None else value, values[value]) for value in order]}
            )
    return found


def _differs_in(one: Trial, other: Trial) -> set[str]:
    return {name for name in AXES if getattr(one.setting, name) != getattr(other.setting, name)}
