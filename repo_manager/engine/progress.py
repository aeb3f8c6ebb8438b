"""A build's progress, and the way to cancel it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["BuildProgress", "monitor_for"]

BuildProgress = Callable[[str, int, int], None]
"""Told (phase, steps done, steps in all) whenever a step of a phase is done; phases nest."""


def monitor_for(library: ModuleType, progress: BuildProgress, cancelled: threading.Event) -> Any:
    """Make a TensorRT progress monitor.

    Args:
        library: `tensorrt` from 9.0 on, or `tensorrt_rtx`.
        progress: called in the building thread.
        cancelled: once set, the build stops at its next step.
    """
    steps_of_phase: dict[str, int] = {}

    def __init__(self: Any) -> None:  # noqa: N807 - a method of the class made below
        library.IProgressMonitor.__init__(self)

    def phase_start(_: Any, phase: str, __: str | None, steps: int) -> None:
        steps_of_phase[phase] = steps
        progress(phase, 0, steps)

    def phase_finish(_: Any, phase: str) -> None:
        steps = steps_of_phase.pop(phase, 0)
        progress(phase, steps, steps)

    def step_complete(_: Any, phase: str, step: int) -> bool:
        progress(phase, step + 1, steps_of_phase.get(phase, step + 1))
        return not cancelled.is_set()

    members = {
        "__init__": __init__,
        "phase_start": phase_start,
        "phase_finish": phase_finish,
        "step_complete": step_complete,
    }
    return type("CancellableMonitor", (library.IProgressMonitor,), members)()
