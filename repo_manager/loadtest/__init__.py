"""Load on a served model: arrival schedules, clients, measurements, gates.

A module is imported when something of it is first used: a load worker, which needs few of them, stays small.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repo_manager.loadtest.baseline import judge_against
    from repo_manager.loadtest.comparing import compare, compare_all, compare_batch_sizes
    from repo_manager.loadtest.comparison import ComparedNumber, ComparePlan, CompareProgress, Comparison
    from repo_manager.loadtest.document import read_report, report_from_json
    from repo_manager.loadtest.histogram import Histogram
    from repo_manager.loadtest.merge import merge_reports
    from repo_manager.loadtest.options import LoadTestOptions, parse_levels, parse_rates
    from repo_manager.loadtest.perf_analyzer import find_perf_analyzer
    from repo_manager.loadtest.perf_install import PerfAnalyzer, install_perf_analyzer
    from repo_manager.loadtest.result import (
        ClientUse,
        ErrorCount,
        GpuUse,
        Interval,
        Intervals,
        Latency,
        LoadPoint,
        LoadTestReport,
        Progress,
        SeriesPoint,
        ServerTimes,
        Window,
    )
    from repo_manager.loadtest.run import LoadTestInterrupted, run_load_test
    from repo_manager.loadtest.schedule import Schedule
    from repo_manager.loadtest.slo import Gate, GateResult, Outcome, Verdict, combine_verdicts, judge, parse_slo

__all__ = [
    "ClientUse",
    "ComparePlan",
    "CompareProgress",
    "ComparedNumber",
    "Comparison",
    "ErrorCount",
    "Gate",
    "GateResult",
    "GpuUse",
    "Histogram",
    "Interval",
    "Intervals",
    "Latency",
    "LoadPoint",
    "LoadTestInterrupted",
    "LoadTestOptions",
    "LoadTestReport",
    "Outcome",
    "PerfAnalyzer",
    "Progress",
    "Schedule",
    "SeriesPoint",
    "ServerTimes",
    "Verdict",
    "Window",
    "combine_verdicts",
    "compare",
    "compare_all",
    "compare_batch_sizes",
    "find_perf_analyzer",
    "install_perf_analyzer",
    "judge",
    "judge_against",
    "merge_reports",
    "parse_levels",
    "parse_rates",
    "parse_slo",
    "read_report",
    "report_from_json",
    "run_load_test",
]

_MODULE_OF = {
    "ClientUse": "result",
    "ComparePlan": "comparison",
    "CompareProgress": "comparison",
    "ComparedNumber": "comparison",
    "Comparison": "comparison",
    "ErrorCount": "result",
    "Gate": "slo",
    "GateResult": "slo",
    "GpuUse": "result",
    "Histogram": "histogram",
    "Interval": "result",
    "Intervals": "result",
    "Latency": "result",
    "LoadPoint": "result",
    "LoadTestInterrupted": "run",
    "LoadTestOptions": "options",
    "LoadTestReport": "result",
    "Outcome": "slo",
    "PerfAnalyzer": "perf_install",
    "Progress": "result",
    "Schedule": "schedule",
    "SeriesPoint": "result",
    "ServerTimes": "result",
    "Verdict": "slo",
    "Window": "result",
    "combine_verdicts": "slo",
    "compare": "comparing",
    "compare_all": "comparing",
    "compare_batch_sizes": "comparing",
    "find_perf_analyzer": "perf_analyzer",
    "install_perf_analyzer": "perf_install",
    "judge": "slo",
    "judge_against": "baseline",
    "merge_reports": "merge",
    "parse_levels": "options",
    "parse_rates": "options",
    "parse_slo": "slo",
    "read_report": "document",
    "report_from_json": "document",
    "run_load_test": "run",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
