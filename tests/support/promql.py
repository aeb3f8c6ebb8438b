"""PromQL and recorded scrapes, read for the tests of alerts and dashboards."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

RECORDINGS = Path(__file__).parents[1] / "data" / "triton_metrics"
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_NAME = re.compile(r"(?<![\w:.$])[A-Za-z_:][\w:]*(?!\s*\()(?![\w:])")
_WORDS = frozenset({"and", "or", "unless", "offset", "bool", "inf", "nan"})
_DURATION = re.compile(r"\b\d+(?:\.\d+)?(?:ms|[smhdwy])\b|\b\d[\d.]*(?:e-?\d+)?\b")
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def promtool() -> str:
    """Return promtool's path; the test is skipped, with the reason, where it is missing."""
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not in PATH (Debian: apt-get install prometheus)")
    return found


def run_promtool(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [promtool(), *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


def metric_names(expression: str) -> set[str]:
    """Return the metrics an expression reads (not functions, labels, durations or keywords)."""
    text = _GROUPING.sub(" ", re.sub(r"\{[^}]*\}", " ", _STRING.sub('""', expression)))
    text = _DURATION.sub(" ", text)
    return {name for name in _NAME.findall(text) if name.lower() not in _WORDS}


def scrape(name: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Read a recorded scrape: (metric, labels) -> value."""
    text = (RECORDINGS / name).read_text(encoding="utf-8")
    return {
        (metric, frozenset(_LABEL.findall(labels))): float(value) for metric, labels, value in _SAMPLE.findall(text)
    }


def recorded_metrics(names: Sequence[str]) -> Mapping[str, set[frozenset[str]]]:
    """Return the metrics in these scrapes, each with its label names."""
    found: dict[str, set[frozenset[str]]] = {}
    for name in names:
        for metric, labels in scrape(name):
            found.setdefault(metric, set()).add(frozenset(key for key, _ in labels))
    return found
