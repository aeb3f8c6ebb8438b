"""A load test as OpenMetrics text, for a push gateway or a node exporter's text file collector."""

from __future__ import annotations

from repo_manager.loadtest.result import LoadPoint, LoadTestReport
from repo_manager.loadtest.slo import Verdict

__all__ = ["load_openmetrics"]

_QUANTILES = (("0.5", "p50_ns"), ("0.9", "p90_ns"), ("0.95", "p95_ns"), ("0.99", "p99_ns"), ("0.999", "p999_ns"))


def load_openmetrics(report: LoadTestReport, verdict: Verdict | None = None) -> str:
    """Return gauges and latency summaries by model, version and load level, ended by `# EOF`."""
    rows: dict[str, list[str]] = {}
    for point in report.points:
        labels = _labels(report, point)
        rows.setdefault("throughput_per_second", []).append(f"{{{labels}}} {point.throughput_per_s!r}")
        rows.setdefault("requests", []).append(f"{{{labels}}} {point.requests}")
        rows.setdefault("errors", []).append(f"{{{labels}}} {point.errors}")
        rows.setdefault("stable", []).append(f"{{{labels}}} {int(point.outcome == 'stable')}")
        for quantile, field in _QUANTILES:
            value = getattr(point.latency, field)
            if value is not None:
                rows.setdefault("latency_seconds", []).append(f'{{{labels},quantile="{quantile}"}} {value / 1e9!r}')
        if point.gpu.energy_per_inference_j is not None:
            energy = point.gpu.energy_per_inference_j
            rows.setdefault("energy_joules_per_inference", []).append(f"{{{labels}}} {energy!r}")
    for result in verdict.results if verdict is not None else ():
        labels = (
            f'model="{_escaped(report.target.model)}",gate="{_escaped(result.gate)}",level="{_escaped(result.level)}"'
        )
        rows.setdefault("gate_passed", []).append(f"{{{labels}}} {int(result.outcome.value == 'pass')}")
    lines = []
    for name, samples in rows.items():
        lines.append(f"# TYPE repo_manager_loadtest_{name} gauge")
        lines += [f"repo_manager_loadtest_{name}{sample}" for sample in samples]
    return "\n".join([*lines, "# EOF"]) + "\n"


def _labels(report: LoadTestReport, point: LoadPoint) -> str:
    target = report.target
    pairs = {
        "model": target.model,
        "version": target.version,
        "protocol": target.protocol,
        "mode": point.mode,
        "level": f"{point.level:g}",
        "batch_size": str(point.batch_size),
    }
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs.items())


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
