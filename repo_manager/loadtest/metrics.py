"""Triton's Prometheus metrics: GPU utilisation, memory, power and energy over the measured time."""

from __future__ import annotations

import re
import urllib.error
import urllib.request

from repo_manager.loadtest.result import GpuUse

__all__ = ["MetricsSource", "parse_metrics"]

_LINE = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(\{.*\})?\s+(\S+)")
_WANTED = {
    "nv_gpu_utilization": "GPU utilisation",
    "nv_gpu_memory_used_bytes": "GPU memory",
    "nv_gpu_power_usage": "GPU power",
    "nv_energy_consumption": "energy",
}
_TIMEOUT_S = 2.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # as the load itself goes


def parse_metrics(text: str) -> dict[str, list[float]]:
    """Return metric name -> values over all its label sets, for the GPU metrics that are there."""
    found: dict[str, list[float]] = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match and match.group(1) in _WANTED:
            try:
                found.setdefault(match.group(1), []).append(float(match.group(3)))
            except ValueError:
                continue
    return found


class MetricsSource:
    """Samples one server's metrics. Absence is no error: it is reported as missing."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._samples: list[dict[str, list[float]]] = []
        self._inferences: list[int] = []
        self._problem: str | None = None

    def sample(self, inferences: int) -> None:
        """Take one sample; `inferences` is the server's count at the same moment."""
        if self._problem is not None:
            return
        try:
            with _DIRECT.open(self._url, timeout=_TIMEOUT_S) as answer:  # an address that the user gave
                self._samples.append(parse_metrics(answer.read().decode("utf-8", "replace")))
                self._inferences.append(inferences)
        except (OSError, ValueError) as exc:
            self._problem = f"no metrics at {self._url}: {exc}"

    def reset(self) -> None:
        """Forget the samples: a new level begins."""
        self._samples, self._inferences = [], []

    def use(self, first: int = 0) -> GpuUse:
        """Summarise the samples from number `first` on."""
        samples = self._samples[first:]
        if self._problem is not None or not samples:
            return GpuUse(missing=(self._problem or "no metrics were sampled",))
        missing = tuple(
            f"{title}: {name} is not reported (no GPU, a MIG slice, or a server without DCGM)"
            for name, title in _WANTED.items()
            if not any(name in sample for sample in samples)
        )
        energy_j: float | None = None
        if all("nv_energy_consumption" in sample for sample in (samples[0], samples[-1])) and len(samples) > 1:
            energy_j = sum(samples[-1]["nv_energy_consumption"]) - sum(samples[0]["nv_energy_consumption"])
        inferences = self._inferences[-1] - self._inferences[first]
        return GpuUse(
            utilization=_mean([value for sample in samples for value in sample.get("nv_gpu_utilization", [])]),
            memory_used_bytes=max(
                (sum(sample["nv_gpu_memory_used_bytes"]) for sample in samples if "nv_gpu_memory_used_bytes" in sample),
                default=None,
            ),
            power_w=_mean([sum(sample["nv_gpu_power_usage"]) for sample in samples if "nv_gpu_power_usage" in sample]),
            energy_j=energy_j,
            energy_per_inference_j=energy_j / inferences if energy_j is not None and inferences > 0 else None,
            missing=missing,
        )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
