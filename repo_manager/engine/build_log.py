"""The builder's log, kept in memory so that it can be asked for evidence, and on disk when wanted."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

__all__ = ["BuildLog", "logger_for"]


@dataclasses.dataclass
class BuildLog:
    """Messages of one build, in order.

    Attributes:
        entries: (severity, message); severities are TensorRT's: `VERBOSE`, `INFO`, `WARNING`, `ERROR`,
            `INTERNAL_ERROR`.
    """

    entries: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def messages(self) -> list[str]:
        """The messages without their severities."""
        return [message for _, message in self.entries]

    @property
    def errors(self) -> tuple[str, ...]:
        """What went wrong, in the builder's words."""
        return tuple(message for severity, message in self.entries if severity.endswith("ERROR"))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings, each once."""
        return tuple(dict.fromkeys(message for severity, message in self.entries if severity == "WARNING"))

    def text(self) -> str:
        """The whole log, one `[SEVERITY] message` after the other."""
        return "".join(f"[{severity}] {message}\n" for severity, message in self.entries)


def logger_for(library: ModuleType, log: BuildLog) -> Any:
    """Make a TensorRT logger that writes into `log` at every severity.

    Returns:
        An `ILogger` of that library; it has to outlive the builder.
    """

    def __init__(self: Any) -> None:  # noqa: N807 - a method of the class made below
        library.ILogger.__init__(self)

    def write(_: Any, severity: Any, message: str) -> None:
        log.entries.append((severity.name, message))

    return type("RecordingLogger", (library.ILogger,), {"__init__": __init__, "log": write})()
