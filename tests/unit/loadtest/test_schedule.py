from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from repo_manager.errors import InputError, UsageError
from repo_manager.loadtest.level import jobs_of
from repo_manager.loadtest.measure import Level
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.wire.connection import Endpoint
from repo_manager.loadtest.worker.schedule import Schedule, load_replay


def first(schedule: Schedule, count: int) -> np.ndarray:
    chunks = []
    for chunk in schedule.chunks():
        chunks.append(chunk)
        if sum(map(len, chunks)) >= count:
            break
    return np.concatenate(chunks)[:count]


def test_constant_gaps_do_not_drift():
    moments = first(Schedule("constant", 300.0), 9000)
    assert np.abs(moments - np.arange(9000) * 1e9 / 300).max() <= 1


def test_poisson_gaps_are_exponential_and_seeded():
    moments = first(Schedule("poisson", 1000.0, seed=3), 20_000)
    gaps = np.diff(moments)
    assert np.mean(gaps) == pytest.approx(1e6, rel=0.03)
    assert np.std(gaps) == pytest.approx(1e6, rel=0.05)
    assert np.mean(gaps > 2e6) == pytest.approx(np.exp(-2), abs=0.01)
    assert np.array_equal(moments, first(Schedule("poisson", 1000.0, seed=3), 20_000))
    assert not np.array_equal(moments, first(Schedule("poisson", 1000.0, seed=4), 20_000))


def test_bursts_come_together_at_the_mean_rate():
    moments = first(Schedule("burst", 100.0, burst_size=10), 1000)
    assert np.unique(moments).size == 100
    assert set(np.diff(np.unique(moments))) == {100_000_000}


@pytest.mark.parametrize(("start", "end"), [(0.0, 100.0), (10.0, 200.0), (200.0, 50.0), (50.0, 50.0)])
def test_a_ramp_reaches_its_rate(start, end):
    moments = first(Schedule("ramp", end, ramp_from_per_s=start, ramp_s=10.0), 5000) / 1e9
    assert (np.diff(moments) >= 0).all()
    assert np.sum(moments < 10) == pytest.approx((start + end) / 2 * 10, abs=2)
    assert np.sum(moments < 5) == pytest.approx((start + (start + end) / 2) / 2 * 5, abs=2)
    assert np.sum((moments >= 12) & (moments < 22)) == pytest.approx(end * 10, abs=2)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_workers_shares_make_the_whole_schedule(workers):
    schedule = Schedule("poisson", 500.0, seed=1)
    shares = [
        list(itertools.islice(itertools.chain.from_iterable(schedule.share(w, workers)), 9000 // workers))
        for w in range(workers)
    ]
    merged = sorted(itertools.chain.from_iterable(shares))
    assert merged[:5000] == first(schedule, 5000).tolist()


def test_a_replay_gives_the_recorded_moments(tmp_path):
    seconds = [10.0, 10.5, 12.25]
    (tmp_path / "a.json").write_text(json.dumps(seconds))
    (tmp_path / "b.json").write_text(json.dumps({"timestamps_ns": [int(s * 1e9) for s in seconds]}))
    (tmp_path / "c.csv").write_text("id,timestamp_s\n" + "\n".join(f"x,{s}" for s in seconds))
    (tmp_path / "d.csv").write_text("\n".join(map(str, seconds)) + "\n")
    for name in ("a.json", "b.json", "c.csv", "d.csv"):
        offsets = load_replay(tmp_path / name)
        assert offsets == (0, 500_000_000, 2_250_000_000), name
    assert np.concatenate(list(Schedule("replay", offsets_ns=offsets).chunks())).tolist() == list(offsets)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "{}"),
        ("b.json", "["),
        ("c.csv", "a\nb\n"),
        ("d.json", "[]"),
        ("e.csv", "nan\n"),
        ("f.csv", "-1e300\n1e300\n"),
        ("g.csv", "-1.7e308\n1.7e308\n"),
        ("h.json", "[0, 31536001]"),
    ],
)
def test_a_bad_replay_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=name):
        load_replay(tmp_path / name)


@pytest.mark.parametrize(
    "arguments",
    [("constant", 0.0), ("constant", float("nan")), ("poisson", -1.0), ("none", 1.0), ("replay", 1.0), ("ramp", 5.0)],
)
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(UsageError):
        Schedule(*arguments)


@pytest.mark.parametrize(
    ("level", "asked", "connections"),
    [
        (Level("concurrency", 16, ""), None, [2, 2]),
        (Level("concurrency", 15, ""), None, [2, 1]),
        (Level("concurrency", 16, ""), 3, [3, 3]),
        (Level("rate", 2000.0, "constant"), None, [1, 1]),
    ],
)
def test_many_requests_in_flight_take_two_connections(level: Level, asked: int | None, connections: list[int]) -> None:
    options = LoadTestOptions("grpc://127.0.0.1:1", "m", concurrency=(1,), connections=asked)
    endpoint = Endpoint("127.0.0.1", 1, "h", "/p", (), (b"m",), (0,), 10**9)
    for changes, expected in (({}, connections), ({"decoupled": True}, [1, 1] if asked is None else connections)):
        jobs = jobs_of(level, dataclasses.replace(endpoint, **changes), options, 2)
        assert [job.connections for job in jobs] == expected
