"""The effects of one row for a percentile: gates of both kinds, intervals, the page, OpenMetrics, JSON and back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from repo_manager.loadtest.derive import intervals_of
from repo_manager.loadtest.judge import judge, parse_slo
from repo_manager.loadtest.merge import report_from_json
from repo_manager.loadtest.worker.recorder import Slice
from repo_manager.report.load_files import load_openmetrics
from repo_manager.report.load_html import load_page
from repo_manager.rollout.options import parse_gates
from repo_manager.stats.histogram import Histogram
from repo_manager.types import as_json


def test_p995_is_in_gates_reports_and_intervals(report):
    true_ns = {point.label: Histogram.from_json(point.histogram).quantile_ns(0.995) for point in report.points[:-1]}
    assert {point.label: point.latency.p995_ns for point in report.points[:-1]} == true_ns
    assert '<th scope="col">p99.5</th>' in load_page(report)
    lines = [line for line in load_openmetrics(report).splitlines() if 'quantile="0.995"' in line]
    assert [float(line.split()[-1]) for line in lines] == pytest.approx([value / 1e9 for value in true_ns.values()])

    (gate,) = parse_gates("p99.5<20ms")
    assert parse_slo("p99.5<20ms") == gate
    results = judge(report, [gate]).results
    assert [result.value for result in results[:-1]] == list(true_ns.values())

    rng = np.random.default_rng(0)
    slices = [
        Slice(number, 10**8, Histogram.of((rng.lognormal(0, 0.5, 400) * 1e6).astype(np.int64))) for number in range(40)
    ]
    interval = intervals_of(slices, batch_size=1).p995_ns
    assert interval.low < 1e6 * np.exp(0.5 * 2.576) < interval.high
    assert report_from_json(json.loads(json.dumps(as_json(report)))) == report
