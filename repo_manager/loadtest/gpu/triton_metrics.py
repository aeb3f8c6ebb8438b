"""GPU utilisation, memory, power and energy over the measured time: Triton's metrics, else NVML."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Mapping

from repo_manager.loadtest.gpu.nvml import GpuReading, Nvml
from repo_manager.loadtest.result import GpuUse

__all__ = ["MetricsSource", "parse_metrics"]

_LINE = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(\{.*\})?\s+(\S+)")
_WANTED = {
    "utilization": "nv_gpu_utilization",
    "memory_used_bytes": "nv_gpu_memory_used_bytes",
    "power_w": "nv_gpu_power_usage",
    "energy_j": "nv_energy_consumption",
}
_TITLES = {
    "utilization": "GPU utilisation",
    "memory_used_bytes": "GPU memory",
    "power_w": "GPU power",
    "energy_j": "energy",
}
_TIMEOUT_S = 2.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # as the load itself goes


def parse_metrics(text: str) -> dict[str, list[float]]:
    """Return metric name -> values over all its label sets, for the GPU metrics that are there."""
    found: dict[str, list[float]] = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match and match.group(1) in _WANTED.values():
            try:
                found.setdefault(match.group(1), []).append(float(match.group(3)))
            except ValueError:
                continue
    return found


class MetricsSource:
    """Samples one server's metrics, and NVML for what they lack. Absence is no error: it is reported as missing.

    Args:
        url: Triton's metrics.
        nvml: the GPUs of this machine, or in words why they cannot be asked.
    """

    def __init__(self, url: str, nvml: Nvml | str = "the server is not known to be on this machine") -> None:
        self._url = url
        self._nvml = nvml
        self._samples: list[dict[str, list[float]]] = []
        self._readings: list[GpuReading] = []
        self._inferences: list[int] = []
        self._problem: str | None = None
        self._has_gpus = True  # until a page shows none: it then is not asked for again, as that costs the server time

    @property
    def tells(self) -> bool:
        """Whether there is anything to sample."""
        return isinstance(self._nvml, Nvml) or self._scrapes

    @property
    def _scrapes(self) -> bool:
        return self._has_gpus and self._problem is None

    def sample(self, inferences: int) -> None:
        """Take one sample; `inferences` is the server's count at the same moment."""
        self._inferences.append(inferences)
        self._samples.append(self._scraped() if self._scrapes else {})
        if isinstance(self._nvml, Nvml):
            self._readings.append(self._nvml.read())

    def _scraped(self) -> dict[str, list[float]]:
        try:
            with _DIRECT.open(self._url, timeout=_TIMEOUT_S) as answer:  # an address that the user gave
                found = parse_metrics(answer.read().decode("utf-8", "replace"))
        except (OSError, ValueError) as exc:
            self._problem = f"no metrics at {self._url}: {exc}"
            return {}
        self._has_gpus = bool(found)
        return found

    def reset(self) -> None:
        """Forget the samples: a new level begins."""
        self._samples, self._inferences, self._readings = [], [], []

    def use(self, first: int = 0) -> GpuUse:
        """Summarise the samples from number `first` on."""
        samples, readings = self._samples[first:], self._readings[first:]
        if not samples:
            return GpuUse(missing=("no metrics were sampled",))
        found = _of_metrics(samples)
        lacking = [name for name, value in found.items() if value is None]
        taken = {name: value for name, value in _of_readings(readings).items() if name in lacking and value is not None}
        found.update(taken)
        missing = [] if self._problem is None else [self._problem]
        absent = [name for name in lacking if name not in taken]
        if absent:
            names = ", ".join(f"{_TITLES[name]} ({_WANTED[name]})" for name in absent)
            why = self._nvml if isinstance(self._nvml, str) else "NVML does not tell it for every GPU"
            missing.append(f"{names}: not in the server's metrics (no GPU, a MIG slice, no DCGM), and {why}")
        inferences = self._inferences[-1] - self._inferences[first]
        energy_j = found["energy_j"]
        return GpuUse(
            **found,
            energy_per_inference_j=energy_j / inferences if energy_j is not None and inferences > 0 else None,
            missing=tuple(missing),
            source=self._source(taken),
        )

    def _source(self, taken: Mapping[str, float]) -> str:
        """Say which numbers are NVML's, and whose they are."""
        if not taken or not isinstance(self._nvml, Nvml):
            return ""
        titles = ", ".join(_TITLES[name] for name in taken)
        return (
            f"{titles}: from NVML, over all {self._nvml.gpus} GPUs of this machine, whatever else runs on them included"
        )


def _of_metrics(samples: list[dict[str, list[float]]]) -> dict[str, float | None]:
    """Return each number as Triton's metrics give it; `None` where they do not."""
    energy_j: float | None = None
    name = _WANTED["energy_j"]
    if len(samples) > 1 and name in samples[0] and name in samples[-1]:
        energy_j = sum(samples[-1][name]) - sum(samples[0][name])
    memory, power = _WANTED["memory_used_bytes"], _WANTED["power_w"]
    return {
        "utilization": _mean([value for sample in samples for value in sample.get(_WANTED["utilization"], [])]),
        "memory_used_bytes": max((sum(sample[memory]) for sample in samples if memory in sample), default=None),
        "power_w": _mean([sum(sample[power]) for sample in samples if power in sample]),
        "energy_j": energy_j,
    }


def _of_readings(readings: list[GpuReading]) -> dict[str, float | None]:
    """Return each number as NVML gives it; `None` where it does not."""
    if not readings:
        return {}
    first, last = readings[0].energy_j, readings[-1].energy_j
    memory = [reading.memory_used_bytes for reading in readings if reading.memory_used_bytes is not None]
    return {
        "utilization": _mean([reading.utilization for reading in readings if reading.utilization is not None]),
        "memory_used_bytes": max(memory, default=None),
        "power_w": _mean([reading.power_w for reading in readings if reading.power_w is not None]),
        "energy_j": None if first is None or last is None or len(readings) < 2 else last - first,
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
