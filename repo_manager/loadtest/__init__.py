"""Load on a served model: arrival schedules, clients, measurements, gates."""

from repo_manager.loadtest.histogram import Histogram
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
from repo_manager.loadtest.run import run_load_test
from repo_manager.loadtest.schedule import Schedule
from repo_manager.loadtest.slo import Gate, GateResult, Outcome, Verdict, judge, parse_slo

__all__ = [
    "ClientUse",
    "ErrorCount",
    "Gate",
    "GateResult",
    "GpuUse",
    "Histogram",
    "Interval",
    "Intervals",
    "Latency",
    "LoadPoint",
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
    "find_perf_analyzer",
    "install_perf_analyzer",
    "judge",
    "parse_levels",
    "parse_rates",
    "parse_slo",
    "run_load_test",
]
