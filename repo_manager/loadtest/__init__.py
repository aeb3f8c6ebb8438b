"""Load on a served model: arrival schedules, clients, measurements, gates."""

from repo_manager.loadtest.baseline import judge_against
from repo_manager.loadtest.compare import compare, compare_all, compare_batch_sizes
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
from repo_manager.loadtest.slo import Gate, GateResult, Outcome, Verdict, judge, parse_slo

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
