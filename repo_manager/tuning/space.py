"""The tunable settings of a model, and their bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from repo_manager.errors import UsageError
from repo_manager.triton_config.config import ModelConfig

__all__ = [
    "AXES",
    "LEAST_GAIN",
    "THREADS",
    "BatchTime",
    "Bounds",
    "Setting",
    "Space",
    "curve_sizes",
    "left_out",
    "runs_on_gpu",
    "setting_of",
]

THREADS = "intra_op_thread_count"
"""The parameter of config.pbtxt for the threads of an instance on ONNX Runtime."""
AXES = ("max_batch_size", "queue_delay", "preferred", "threads", "instances")
"""In the order of appearance searched: a change of `instances` alone reloads no model, so it comes last."""
_LARGEST_BATCH = 64
LEAST_GAIN = 0.97  # share of throughput: a measured curve cannot show smaller gains
_DELAYS = (0.25, 0.5, 1.0)
_ENGINES = ("tensorrt", "tensorrt_rtx")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One configuration, by its tunable fields.

    Attributes:
        instances: of the model, in its one instance group.
        max_batch_size: 0 for a model without a batch axis of Triton's.
        queue_delay: how long a request waits for others, in microseconds. `None`: Triton forms no batches.
        threads: of ONNX Runtime in each instance. `None` leaves it to the backend.
        preferred: batch sizes the batcher waits for. `None` leaves today's.
    """

    instances: int
    max_batch_size: int
    queue_delay: int | None
    threads: int | None = None
    preferred: tuple[int, ...] | None = None

    @property
    def cost(self) -> tuple[int, int, int, int]:
        """Its use of the machine: of two equally good ones, the smaller one is the better one."""
        return self.instances, self.instances * (self.threads or 1), self.max_batch_size, self.queue_delay or 0

    @property
    def label(self) -> str:
        """In words."""
        parts = [f"{self.instances} instance{'s' * (self.instances > 1)}"]
        if self.max_batch_size:
            delay = "no batching" if self.queue_delay is None else f"delay {self.queue_delay} µs"
            parts += [f"batch {self.max_batch_size}", delay]
        if self.preferred is not None:
            parts.append(f"preferred {' '.join(map(str, self.preferred)) or 'none'}")
        if self.threads is not None:
            parts.append(f"{self.threads} thread{'s' * (self.threads > 1)} each")
        return ", ".join(parts)

    def changes(self, today: Setting) -> dict[str, str | None]:
        """Return the fields of config.pbtxt different from today's, as `repository.change_config` takes them."""
        changes: dict[str, str | None] = {}
        if self.instances != today.instances:
            changes["instance_group.count"] = str(self.instances)
        if self.max_batch_size != today.max_batch_size:
            changes["max_batch_size"] = str(self.max_batch_size)
        if self.queue_delay != today.queue_delay:
            key = "dynamic_batching"
            is_off = self.queue_delay is None
            changes[key if is_off else f"{key}.max_queue_delay_microseconds"] = (
                None if is_off else str(self.queue_delay)
            )
        if self.preferred is not None:
            sizes = ", ".join(map(str, self.preferred))
            changes["dynamic_batching.preferred_batch_size"] = f"[{sizes}]" if sizes else None
        if self.threads != today.threads:
            changes[f"parameters.{THREADS}"] = None if self.threads is None else str(self.threads)
        return changes


@dataclasses.dataclass(frozen=True)
class BatchTime:
    """How long one batch takes: a point of the curve measured first.

    Attributes:
        size: samples in the batch, all sent in one request.
        median_ns: of requests with the whole batch, one at a time.
    """

    size: int
    median_ns: float

    @property
    def per_s(self) -> float:
        """Samples a second."""
        return self.size / self.median_ns * 1e9


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Bounds set by the machine and the model.

    Attributes:
        cores: CPUs of the server, the limit of instances times threads. 0 where the model runs on a GPU.
        instances: largest number with room in memory.
        batch: the largest batch the model takes.
        profile: the batch size the engine's kernels were chosen for. `None` where it is no engine.
        least_batch: the smallest `max_batch_size` the model's ensembles allow.
    """

    cores: int
    instances: int
    batch: int
    profile: int | None = None
    least_batch: int = 0


def setting_of(config: ModelConfig, name: str | None = None) -> Setting:
    """Return the tunable settings of a configuration.

    Args:
        config: configuration of the model (config.pbtxt).
        name: name of the model, for the error. `None` takes the one in the configuration, perhaps empty.

    Raises:
        UsageError: the model is of an untunable kind.
    """
    message = config.message()
    kinds = {
        "an ensemble": message.HasField("ensemble_scheduling"),
        "a sequence model": message.HasField("sequence_batching"),
        "decoupled": message.model_transaction_policy.decoupled,
    }
    kind = next((kind for kind, holds in kinds.items() if holds), None)
    if kind is not None:
        raise UsageError(
            f"{name or config.name} is {kind}, which cannot be tuned",
            hint="Tune the models it is made of." if "ensemble" in kind else None,
        )
    groups = message.instance_group
    if len(groups) > 1:
        raise UsageError(
            f"{name or config.name} has {len(groups)} instance groups, expected one",
            hint="Set their counts by `repo-manager config`: the one to grow is unknown.",
        )
    batching = message.dynamic_batching
    delay = int(batching.max_queue_delay_microseconds) if message.HasField("dynamic_batching") else None
    threads = message.parameters[THREADS].string_value if THREADS in message.parameters else ""
    return Setting(
        max((group.count for group in groups), default=1) or 1,
        int(message.max_batch_size),
        delay,
        int(threads) if threads.isdigit() and int(threads) else None,
    )


@dataclasses.dataclass(frozen=True)
class Space:
    """The settings tried.

    Attributes:
        axes: axis -> its values, in rising order (`None` first).
        cores: CPUs that instances times threads may use. 0: on a GPU, or not known.
        today: today's `max_batch_size` and `queue_delay`, allowed together whatever they are.
    """

    axes: Mapping[str, tuple[Any, ...]]
    cores: int
    today: tuple[int, int | None] = (0, None)

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        bounds: Bounds,
        curve: Sequence[BatchTime],
        *,
        latency_ns: float | None,
        search: Sequence[str] = AXES,
    ) -> Space:
        """Return the space for a model.

        Args:
            config: configuration of the model (config.pbtxt).
            bounds: bounds set by the machine and the model.
            curve: the time of batches. A size whose batch alone takes longer than the limit is left out, and so is one
                with fewer samples a second than a smaller one.
            latency_ns: the upper limit of the latency. `None` has none.
            search: the axes searched. Others keep today's value.
        """
        today = setting_of(config)
        axes: dict[str, tuple[Any, ...]] = {axis: (getattr(today, axis),) for axis in AXES}
        most = max(min(bounds.instances, bounds.cores or 4), today.instances)
        if "instances" in search:
            axes["instances"] = _with(_powers(most), today.instances)
        if "threads" in search and bounds.cores and config.backend == "onnxruntime":
            axes["threads"] = _with(_powers(bounds.cores), today.threads)
        if today.max_batch_size:
            useful = _useful(curve, latency_ns)
            if "max_batch_size" in search:
                sizes = [each.size for each in useful if each.size >= bounds.least_batch]
                axes["max_batch_size"] = _with(sizes or [today.max_batch_size], today.max_batch_size)
            if "queue_delay" in search:
                best = max(useful, key=lambda each: each.per_s, default=None)
                delays = [] if best is None else [round(best.median_ns / 1e3 * share) for share in _DELAYS]
                within = [delay for delay in delays if latency_ns is None or delay * 1e3 < latency_ns]
                axes["queue_delay"] = _with([None, 0, *within], today.queue_delay)
            if "preferred" in search and bounds.profile is not None and bounds.profile > 1:
                present = tuple(config.message().dynamic_batching.preferred_batch_size)
                axes["preferred"] = (None, *(each for each in ((), (bounds.profile,)) if each != present))
        return cls(axes, bounds.cores, (today.max_batch_size, today.queue_delay))

    @property
    def size(self) -> int:
        """How many settings there are."""
        return sum(1 for _ in self.settings())

    def settings(self) -> Iterator[Setting]:
        """Return every setting, the cheapest first."""
        names = list(self.axes)
        found: list[dict[str, Any]] = [{}]
        for name in names:
            found = [{**each, name: value} for each in found for value in self.axes[name]]
        yield from sorted((Setting(**each) for each in found if self.allows(Setting(**each))), key=lambda s: s.cost)

    def allows(self, setting: Setting) -> bool:
        """Return whether a setting makes sense: no more threads than cores, and batches both wanted and formed."""
        size, delay = setting.max_batch_size, setting.queue_delay
        if setting.preferred is not None and (delay is None or max(setting.preferred, default=1) > size):
            return False
        if self.as_by_default(setting) != setting:
            return False
        if size > self.axes["max_batch_size"][0] and delay is None and (size, delay) != self.today:
            return False
        if self.cores and setting.threads is not None and setting.instances * setting.threads > self.cores:
            return setting.instances == 1 or setting.threads == 1
        return not (size == 1 and delay)

    def along(self, setting: Setting, axis: str) -> tuple[tuple[Setting, ...], tuple[Setting, ...]]:
        """Return the settings different in one axis, upwards and downwards from it, the nearest first.

        Related axes move together: threads and instances share the cores, and a larger batch must be formed by
        somebody.
        """
        values = self.axes[axis]
        place = values.index(getattr(setting, axis))
        up, down = values[place + 1 :], values[:place][::-1]
        return (
            tuple(self._moved(setting, axis, value) for value in up),
            tuple(self._moved(setting, axis, value) for value in down),
        )

    def across(self, setting: Setting) -> tuple[Setting, ...]:
        """Return the settings with an instance more and smaller batches, and the other way round.

        Where a latency limits both, each alone is worse: more instances make the batches too slow, smaller batches
        alone lose throughput.
        """
        found: list[Setting] = []
        for more, less in (("instances", "max_batch_size"), ("max_batch_size", "instances")):
            up, _ = self.along(setting, more)
            if up:
                found += self.along(up[0], less)[1][:1]
        return tuple(found)

    def _moved(self, setting: Setting, axis: str, value: Any) -> Setting:
        candidate = dataclasses.replace(setting, **{axis: value})
        if axis == "max_batch_size" and candidate.queue_delay is None and 0 in self.axes["queue_delay"]:
            candidate = dataclasses.replace(candidate, queue_delay=0)
        if axis == "queue_delay" and value is None:
            candidate = dataclasses.replace(candidate, max_batch_size=self.axes["max_batch_size"][0], preferred=None)
        return self.as_by_default(self._within_cores(candidate, axis))

    def as_by_default(self, setting: Setting) -> Setting:
        """Return the setting without threads, left to the backend, where the result is the same: the cores, shared
        out."""
        is_same = setting.threads == max(1, self.cores // setting.instances)
        if self.cores and is_same and None in self.axes["threads"]:
            return dataclasses.replace(setting, threads=None)
        return setting

    def _within_cores(self, setting: Setting, axis: str) -> Setting:
        if not self.cores or setting.threads is None or setting.instances * setting.threads <= self.cores:
            return setting
        if axis == "instances":
            fit = max(1, self.cores // setting.instances)
            threads = max((each for each in self.axes["threads"] if each is not None and each <= fit), default=None)
            return dataclasses.replace(setting, threads=threads or setting.threads)
        fit = max(1, self.cores // (setting.threads or 1))
        instances = max((each for each in self.axes["instances"] if each <= fit), default=setting.instances)
        return dataclasses.replace(setting, instances=instances)


def _useful(curve: Sequence[BatchTime], latency_ns: float | None) -> list[BatchTime]:
    """Return the batch sizes within the limit that answer more samples a second than every smaller one."""
    useful: list[BatchTime] = []
    for each in sorted(curve, key=lambda point: point.size):
        if latency_ns is not None and each.median_ns > latency_ns:
            break
        if not useful or each.per_s > useful[-1].per_s * LEAST_GAIN:
            useful.append(each)
    return useful


def _powers(most: int) -> list[int]:
    """Return 1, 2, 4, ... up to a number, the last of them."""
    found = [1]
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    return found if found[-1] == most else [*found, most]


def _with(values: Sequence[Any], today: Any) -> tuple[Any, ...]:
    return tuple(sorted({*values, today}, key=lambda value: -1 if value is None else value))


def curve_sizes(bounds: Bounds) -> tuple[int, ...]:
    """Return the batch sizes whose time is measured: powers of two up to the largest the model takes."""
    return tuple(_powers(min(bounds.batch, _LARGEST_BATCH))) if bounds.batch else ()


def runs_on_gpu(config: ModelConfig) -> bool:
    """Return whether a model's instances are on GPUs, as far as its configuration tells."""
    groups = config.message().instance_group
    return config.backend in _ENGINES or any(group.kind == 1 for group in groups)


def left_out(
    space: Space, curve: Sequence[BatchTime], tried: Collection[Setting], search: Sequence[str], config: ModelConfig
) -> Iterator[str]:
    """Yield the values of a model's axes not tried, and why.

    Args:
        space: the searched axes of one model, with their values.
        curve: the time of its batches.
        tried: measured settings of this model. A value in none of them is reported.
        search: names of the axes searched. Each of the others is reported as such.
        config: configuration of the model (config.pbtxt).
    """
    missing = [axis for axis in AXES if axis not in search]
    if missing:
        yield f"{', '.join(missing)}: not among what was to be searched (--search)"
    for axis, values in space.axes.items():
        if axis in missing:
            continue
        if len(values) == 1:
            yield f"{axis}: {_why_single(axis, space, config)}"
            continue
        unseen = [value for value in values if value not in {getattr(setting, axis) for setting in tried}]
        if unseen:
            words = ", ".join("none" if value is None else str(value) for value in unseen)
            yield f"{axis} {words}: the search did not get there"
    unused = [str(each.size) for each in curve if each.size not in space.axes["max_batch_size"]]
    if unused and "max_batch_size" in search:
        why = "one takes longer than the limit, or answers fewer samples a second than a smaller one"
        yield f"batches of {', '.join(unused)}: {why}"


def _why_single(axis: str, space: Space, config: ModelConfig) -> str:
    """Return why an axis to search has one value."""
    if axis == "preferred" and config.message().max_batch_size:
        return "only for engines whose record says what batch they were built for"
    if axis in ("max_batch_size", "queue_delay", "preferred") and not config.message().max_batch_size:
        return "the model has no batch axis of Triton's"
    if axis == "threads" and (config.backend != "onnxruntime" or runs_on_gpu(config)):
        return "only of ONNX Runtime on CPUs"
    if axis == "threads" and not space.cores:
        return "the cores of a server elsewhere are not known"
    return "the cores, the memory or the limit allow one value"
