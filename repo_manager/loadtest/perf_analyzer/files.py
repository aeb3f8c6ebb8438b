"""perf_analyzer's files: the CSV of the levels and the profile export, of the versions of the last three years."""

from __future__ import annotations

import csv
import json
from typing import Any

__all__ = ["parse_csv", "parse_profile_export"]


def parse_csv(text: str) -> list[dict[str, float]]:
    """Return the rows of a perf_analyzer CSV (microseconds), by column; cells that are no numbers are left out.

    Columns come and go between versions and models (cache columns, GPU columns), so they are found by name; GPU cells
    (`GPU-...:12;GPU-...:13`) are left out.
    """
    rows: list[dict[str, float]] = []
    for record in csv.DictReader(text.splitlines()):
        row: dict[str, float] = {}
        for name, cell in record.items():
            try:
                row[(name or "").strip()] = float(cell)
            except (TypeError, ValueError):
                continue
        if "Inferences/Second" in row:
            rows.append(row)
    return rows


def parse_profile_export(text: str) -> dict[str, float]:
    """Return `requests` and `duration_s` of a profile export, empty when there is none.

    The export holds every request of the run; the ones inside the last three windows are what the row was made of.
    """
    try:
        experiments: list[dict[str, Any]] = json.loads(text).get("experiments", []) if text else []
    except ValueError:
        return {}
    if not experiments:
        return {}
    requests = experiments[-1].get("requests", [])
    bounds = [int(moment) for moment in experiments[-1].get("window_boundaries", [])]
    answers = [int(request["response_timestamps"][-1]) for request in requests if request.get("response_timestamps")]
    if len(bounds) >= 2:
        low, high = bounds[max(len(bounds) - 4, 0)], bounds[-1]
    elif answers:
        low, high = min(int(request["timestamp"]) for request in requests), max(answers)
    else:
        return {}
    inside = sum(low <= answer <= high for answer in answers)
    return {"requests": float(inside), "duration_s": (high - low) / 1e9}
