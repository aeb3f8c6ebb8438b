"""The descent against the whole grid, on servers given by a formula, with a load test's noise."""

from __future__ import annotations

import random

import pytest

from repo_manager.triton_config.config import parse_config
from repo_manager.tuning.search import MeasuredSetting, descend
from repo_manager.tuning.space import BatchTime, Bounds, Setting, Space

CORES = 8
CONFIG = """name: "m"
backend: "onnxruntime"
max_batch_size: 1
instance_group {{ count: {instances} }}
parameters {{ key: "intra_op_thread_count" value {{ string_value: "{threads}" }} }}
{batching}
"""


class Server:
    """A server with a known largest rate for every setting, from the gains and costs of batches, threads and instances.

    Args:
        fixed_ms: of each execution.
        sample_ms: of each sample in it, on one thread.
        parallel: the share of a sample's work that more threads speed up.
        seed: of everything that differs between servers, and of the noise.
        noise: of one measurement, as a share.
    """

    def __init__(self, fixed_ms: float, sample_ms: float, parallel: float, seed: int, noise: float = 0.02) -> None:
        self.fixed_ms, self.sample_ms, self.parallel, self.noise = fixed_ms, sample_ms, parallel, noise
        self.random = random.Random(seed)
        self.asked = 0

    def batch_ms(self, size: int, threads: int) -> float:
        work = self.sample_ms * size
        return self.fixed_ms + work * (1 - self.parallel) + work * self.parallel / threads

    def rate(self, setting: Setting) -> float:
        threads = setting.threads or max(1, CORES // setting.instances)
        batch = 1 if setting.queue_delay is None else max(setting.max_batch_size, 1)
        crowding = max(1.0, setting.instances * threads / CORES)
        waiting = (setting.queue_delay or 0) / 1e3 / 4
        return 1e3 * setting.instances * batch / (self.batch_ms(batch, threads) * crowding + waiting)

    def measure(self, setting: Setting, best: MeasuredSetting | None, margin: float) -> MeasuredSetting:
        self.asked += 1
        seen = self.rate(setting) * (1 + self.random.gauss(0, self.noise))
        against = None if best is None or best.value is None else best.value * (1 + margin)
        is_better = against is None or seen >= against
        return MeasuredSetting(setting, is_better, seen if is_better else None, "", 1.0, against)

    def curve(self) -> list[BatchTime]:
        return [BatchTime(size, self.batch_ms(size, 1) * 1e6) for size in (1, 2, 4, 8, 16, 32, 64)]


def space_of(server: Server, today: Setting) -> Space:
    batching = "" if today.queue_delay is None else "dynamic_batching {}"
    text = CONFIG.format(instances=today.instances, threads=today.threads or 1, batching=batching)
    return Space.of(parse_config(text), Bounds(CORES, 100, 64), server.curve(), latency_ns=50e6)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    ("fixed_ms", "sample_ms", "parallel"),
    [(0.3, 0.01, 0.0), (0.5, 1.0, 0.95), (1.0, 20.0, 0.9), (0.2, 2.0, 0.1), (5.0, 0.5, 0.5)],
)
def test_it_comes_within_a_tenth_of_the_grid_with_few_measurements(
    fixed_ms: float, sample_ms: float, parallel: float, seed: int
) -> None:
    server = Server(fixed_ms, sample_ms, parallel, seed)
    today = Setting(1, 1, None, 1)
    space = space_of(server, today)
    settings = list(space.settings())
    best = descend(space, server.measure(today, None, 0.0), (), server.measure)
    assert server.rate(best.setting) >= 0.9 * max(map(server.rate, settings))
    assert server.asked <= max(12, 0.4 * len(settings))


def test_the_best_configuration_is_kept() -> None:
    changed = 0
    for seed in range(20):
        server = Server(0.5, 1.0, 0.9, seed, noise=0.01)
        space = space_of(server, Setting(1, 1, None, 1))
        ideal = max(space.settings(), key=server.rate)
        best = descend(space, server.measure(ideal, None, 0.0), (), server.measure)
        changed += best.setting != ideal
    assert changed <= 1


def test_of_equals_the_cheaper_one_wins() -> None:
    server = Server(1.0, 0.0, 0.0, 0, noise=0.0)
    server.rate = lambda setting: 100.0 * min(setting.instances, 4)  # type: ignore[method-assign]
    today = Setting(1, 1, None, 1)
    space = space_of(server, today)
    best = descend(space, server.measure(today, None, 0.0), (Setting(8, 1, None, 1),), server.measure)
    assert best.setting.instances == 4


def test_what_was_found_before_the_time_ended_is_known() -> None:
    server, seen = Server(0.5, 1.0, 0.9, 0), []

    def measure(setting: Setting, best: MeasuredSetting | None, margin: float) -> MeasuredSetting:
        if len(seen) == 3:
            raise TimeoutError
        seen.append(server.measure(setting, best, margin))
        return seen[-1]

    today = Setting(1, 1, None, 1)
    with pytest.raises(TimeoutError):
        descend(space_of(server, today), server.measure(today, None, 0.0), (), measure)
    assert len(seen) == 3
