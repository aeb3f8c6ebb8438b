"""One finding about a configuration or a repository, worded the same way everywhere."""

from __future__ import annotations

import dataclasses
import enum

__all__ = ["Problem", "Severity"]


class Severity(str, enum.Enum):
    """The meaning of a finding for serving."""

    ERROR = "error"
    """Triton refuses it, serves something else, or the content is not the published one."""
    WARNING = "warning"
    """Triton serves it all the same. A person should look."""

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class Problem:
    """A finding.

    Attributes:
        where: the subject: a path below the repository's root, or a field of a configuration.
        what: the finding and the expectation.
        severity: an error where Triton refuses it or serves something else, see `Severity`.
        hint: the next step. Empty when there is none.
        rule: the name of the deciding rule of Triton. Empty for findings of our own.
    """

    where: str
    what: str
    severity: Severity = Severity.ERROR
    hint: str = ""
    rule: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" ({self.hint})" if self.hint else "")
