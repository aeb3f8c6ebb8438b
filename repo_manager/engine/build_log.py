"""The output of a running build: its progress, its log, and a failed build's log as one error."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from repo_manager.engine.capabilities import Capabilities
from repo_manager.errors import EngineError

__all__ = ["BuildLog", "BuildProgress", "build_error", "logger_for", "monitor_for"]


# Build progress and cancellation.

BuildProgress = Callable[[str, int, int], None]
"""Told (phase, steps done, steps in all) whenever a step of a phase is done. Phases nest."""


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


@dataclasses.dataclass
class BuildLog:
    """Messages of one build, in order.

    Attributes:
        entries: (severity, message). Severities are TensorRT's: `VERBOSE`, `INFO`, `WARNING`, `ERROR`,
            `INTERNAL_ERROR`.
    """

    entries: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def messages(self) -> list[str]:
        """The messages without their severities."""
        return [message for _, message in self.entries]

    @property
    def errors(self) -> tuple[str, ...]:
        """The fault, in the builder's words."""
        return tuple(message for severity, message in self.entries if severity.endswith("ERROR"))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings, each once."""
        return tuple(dict.fromkeys(message for severity, message in self.entries if severity == "WARNING"))

    def text(self) -> str:
        """The whole log, one `[SEVERITY] message` after the other."""
        return "".join(f"[{severity}] {message}\n" for severity, message in self.entries)


def logger_for(library: ModuleType, log: BuildLog) -> Any:
    """Make a TensorRT logger to write into `log` at every severity.

    Returns:
        An `ILogger` of the given library. It must outlive the builder.
    """

    def __init__(self: Any) -> None:  # noqa: N807 - a method of the class made below
        library.ILogger.__init__(self)

    def write(_: Any, severity: Any, message: str) -> None:
        log.entries.append((severity.name, message))

    return type("RecordingLogger", (library.ILogger,), {"__init__": __init__, "log": write})()


# Turn a failed build's log into one error with the next step.

_TURING = re.compile(r"for Turing \(SM75\)")
_HINTS = (
    (
        re.compile(r"workspace limit|requires workspace memory|insufficient workspace", re.IGNORECASE),
        "Give the builder more scratch memory with --workspace, or leave the option out.",
    ),
    (_TURING, "Leave 7.5 out of --compute-capability, or use --precision fp16."),
    (
        re.compile(r"timing cache.*miss|cache miss", re.IGNORECASE),
        "The timing cache lacks a kernel of this model: build once without --deterministic, then again with it.",
    ),
    (
        re.compile(r"CUDA_SUCCESS|cudaError|CUDA initialization|no CUDA-capable device", re.IGNORECASE),
        "This needs a GPU with a driver on the building machine (nvidia-smi shows it). Without one, leave out "
        "--strip, --refit and --optimization-level.",
    ),
    (re.compile(r"out of memory|OutOfMemory", re.IGNORECASE), "Give less with --workspace or --max-batch-size."),
    (
        re.compile(r"optimization profile|kMIN|dimension", re.IGNORECASE),
        "A smallest shape may be too small for the model: give the range with --shape-range NAME:MIN:OPT:MAX.",
    ),
)
_FALLBACK = "Try --precision fp32 to see whether the conversion matters, or use --backend onnxruntime."
_PLACE = re.compile(r" In \w+ at /\S+")


def build_error(path: Path, log: BuildLog, able: Capabilities) -> EngineError:
    """Describe why `build_serialized_network` returned nothing.

    Args:
        path: the ONNX file of the failed build, for the message.
        log: messages of the build so far.
        able: capabilities of the TensorRT library.
    """
    reasons = [_PLACE.sub("", message).strip() for message in dict.fromkeys(log.errors)]
    text = "\n".join(f"  {reason}" for reason in reasons[:3]) or "  it gave no reason"
    everything = " ".join(reasons)
    hint = next((hint for pattern, hint in _HINTS if pattern.search(everything)), _FALLBACK)
    return EngineError(f"{path}: {able.backend} {able.version} cannot build this model:\n{text}", hint=hint)
