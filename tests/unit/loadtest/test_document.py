from __future__ import annotations

import json

import pytest

from repo_manager.errors import InputError
from repo_manager.loadtest.merge import read_report, report_from_json
from repo_manager.loadtest.result import (
    ClientUse,
    ErrorCount,
    Latency,
    LoadPoint,
    LoadTestReport,
    SeriesPoint,
    ServerTimes,
    Window,
)
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.request_data.tensors import InputFacts
from repo_manager.stats.histogram import Histogram
from repo_manager.types import as_json

X = InputFacts("x", "FP32", (-1, 4))
FACTS = ServedModelFacts(
    "grpc://a:1", "grpc", "triton", "2.51.0", "m", "1", "b", 8, (X,), ("y",), False, True, False, False
)


def report(values, *, outcome="stable", errors=0):
    histogram = Histogram.of(values)
    point = LoadPoint(
        "concurrency", 4, outcome, "why", 2, ClientUse("native", cpu_share=0.1), duration_s=2.0,
        requests=histogram.count, errors=errors, error_messages=(ErrorCount("no", errors),),
        throughput_per_s=histogram.count / 2.0, latency=Latency.of(histogram),
        server=ServerTimes(5, 5, 3, 0, 0, 1.0, 2.0, 3.0, 4.0, 1.5, {1: 2, 2: 1}),
        windows=(Window(0.0, 1.0, 5, 0, 5.0, 1.0, 1, 2, True),), series=(SeriesPoint(0.0, 5.0, 1, 2, 0, True),),
        curve=((0.5, 7),), histogram=histogram.to_json(),
    )  # fmt: skip
    return LoadTestReport(FACTS, {"seed": 0}, (point,), "now", 2.0, {"cpu": "c"}, notes=("n",))


def test_a_report_survives_json(tmp_path):
    made = report([1, 2, 3_000_000])
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**as_json(made), "verdict": None}))
    restored = read_report(path)
    assert restored == made
    assert restored.points[0].server.batches == {1: 2, 2: 1}
    assert restored.target.inputs[0].shape == (-1, 4)


@pytest.mark.parametrize(
    "document", [None, [], {"points": []}, {"schema_version": 2, "points": []}, {"schema_version": 1, "points": [{}]}]
)
def test_what_is_no_report_is_refused(document):
    with pytest.raises(InputError):
        report_from_json(document)
