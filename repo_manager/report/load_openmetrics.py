"""A load test as OpenMetrics text, for a push gateway or a node exporter's text file collector."""

from __future__ import annotations

from repo_manager.gates.verdict import Verdict
from repo_manager.loadtest.metrics import METRICS
from repo_manager.loadtest.result import LoadPoint, LoadTestReport

__all__ = ["load_openmetrics"]


def load_openmetrics(report: LoadTestReport, verdict: Verdict | None = None) -> str:
    """Return gauges and latency summaries by model, version and load level, ended by `# EOF`."""
    rows: dict[str, list[str]] = {}
    for point in report.points:
        labels = _labels(report, point)
        for metric in METRICS:
            value = metric.get(point)
            if metric.export is None or value is None:
                continue
            quantile = f',quantile="{metric.export.quantile}"' if metric.export.quantile else ""
            number = value * metric.export.scale
            rows.setdefault(metric.export.family, []).append(f"{{{labels}{quantile}}} {number!r}")
        rows.setdefault("requests", []).append(f"{{{labels}}} {point.requests}")
        rows.setdefault("errors", []).append(f"{{{labels}}} {point.errors}")
        rows.setdefault("stable", []).append(f"{{{labels}}} {int(point.outcome == 'stable')}")
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
