"""A report with every kind of row, without a server."""

from __future__ import annotations

import numpy as np
import pytest

from repo_manager.loadtest.compare import ComparePlan, Comparison
from repo_manager.loadtest.judge import judge, parse_slo
from repo_manager.loadtest.result import (
    CURVE_QUANTILES,
    ClientUse,
    ErrorCount,
    Intervals,
    Latency,
    LoadPoint,
    LoadTestReport,
    SeriesPoint,
    ServerTimes,
    Window,
)
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.stats.histogram import Histogram
from repo_manager.stats.intervals import Interval
from repo_manager.stats.resampling import ComparedNumber

FACTS = ServedModelFacts(
    "grpc://a:1", "grpc", "triton", "2.51.0", 'm<"&x', "3", "onnxruntime", 8, (), (), False, True, False, False
)


def make_point(level: float, seed: int, series: int = 40) -> LoadPoint:
    values = (np.random.default_rng(seed).lognormal(0, 0.4, 20_000) * level * 1e6).astype(np.int64)
    histogram = Histogram.of(values)
    curve = tuple((q, v) for q in CURVE_QUANTILES if (v := histogram.quantile_ns(q)) is not None)
    return LoadPoint(
        "concurrency", level, "stable", "the last 3 windows agree", 1, ClientUse("native", cpu_share=0.2),
        duration_s=3.0, requests=20_000, throughput_per_s=1000 * level**0.5, latency=Latency.of(histogram),
        intervals=Intervals(p99_ns=Interval(0.9 * histogram.quantile_ns(0.99), 1.1 * histogram.quantile_ns(0.99))),
        server=ServerTimes(20_000, 20_000, 9000, 0, 0, 2e5 * level, 3e4, 4e5, 2e4, 2.2, {1: 1, 4: 5}),
        windows=tuple(Window(n, 1.0, 5000, 0, 5000.0, 1e6, 10**6, 2 * 10**6, n > 0) for n in range(4)),
        series=tuple(SeriesPoint(n / 10, 5000.0, 10**6 + n, 2 * 10**6 + n * 1000, 0, n > 10) for n in range(series)),
        curve=curve, histogram=histogram.to_json(),
    )  # fmt: skip


@pytest.fixture
def report() -> LoadTestReport:
    failed = LoadPoint(
        "concurrency", 64, "failed", "no request ended well: no <b>thanks</b>", 1, ClientUse("native"),
        errors=5, error_messages=(ErrorCount("no <b>thanks</b> | really", 5),),
    )  # fmt: skip
    points = (*(make_point(2.0**n, n) for n in range(6)), failed)
    return LoadTestReport(
        FACTS, {}, points, "2026-01-01T00:00:00+00:00", 30.0, {"cpu": "a & b"}, "repo-manager loadtest 'm'",
        knee="concurrency 8", knee_rule="a rule", notes=("a <note>",),
    )  # fmt: skip


@pytest.fixture
def verdict(report):
    return judge(report, [parse_slo("p99<20ms"), parse_slo("errors<0.1%")])


@pytest.fixture
def comparisons() -> tuple[Comparison, ...]:
    def one(size: int) -> Comparison:
        numbers = tuple(
            ComparedNumber(name, 1000.0, 1100.0, 1.1, Interval(1.05, 1.15), True, "B")
            for name in ("throughput", "p99 latency")
        )
        return Comparison(FACTS, FACTS, "concurrency 4", size, ComparePlan(), numbers, "B", True, {}, ("x",), 1.0, {})

    return tuple(one(size) for size in (1, 8, 64, 256))
