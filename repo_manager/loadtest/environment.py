"""The load client's machine, for the report."""

from __future__ import annotations

import os
import platform

import numpy as np

import repo_manager

__all__ = ["environment"]


def environment() -> dict[str, str]:
    """Return the client's machine and versions."""
    return {
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpus": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "repo_manager": repo_manager.__version__,
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123  # read line by line
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        return "unknown"
    return "unknown"
