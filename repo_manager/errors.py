"""The whole exception tree, and the exit code of each branch.

    RepoManagerError                  1  unexpected
    ├── UsageError                    2  the command line or a setting is wrong
    ├── InputError                    3  a file or a value that was given is bad
    │   ├── ModelError                   the ONNX model
    │   ├── CalibrationError             the calibration data
    │   ├── ConfigError                  a config.pbtxt
    │   ├── RepositoryError              the model repository on disk
    │   │   ├── ConcurrentChangeError 5  somebody else changes the same: try again
    │   │   ├── LockHeldError         5  another process holds a lock: try again
    │   │   └── StoreUnreachableError 5  the object store gives no usable answer: try again
    │   ├── EngineError                  a TensorRT engine that cannot be built, read or run here
    │   └── MissingDependencyError       an optional package that this step needs
    ├── GateError                     4  a gate (sparsity, drift, objective) failed
    │   └── WiderPrecisionError          layers of an engine in a wider type than the graph asks for
    ├── ServerError                   5  unreachable, refused, or a roll-out that was undone
    │   ├── ServerUnreachableError
    │   ├── ServerRefusedError
    │   └── RolloutUndoneError
    ├── InconclusiveError             6  the measurement does not decide
    ├── RollbackFailedError           7  act by hand
    └── ChangesNeededError            8  --check found changes to make

A message names the subject, the finding, the expectation, and the next step.
"""

from __future__ import annotations

import re

__all__ = [
    "CalibrationError",
    "ChangesNeededError",
    "ConcurrentChangeError",
    "ConfigError",
    "EngineError",
    "GateError",
    "InconclusiveError",
    "InputError",
    "LockHeldError",
    "MissingDependencyError",
    "ModelError",
    "RepoManagerError",
    "RepositoryError",
    "RollbackFailedError",
    "RolloutUndoneError",
    "ServerError",
    "ServerRefusedError",
    "ServerUnreachableError",
    "StoreUnreachableError",
    "UsageError",
    "WiderPrecisionError",
    "keep_secret",
    "redacted",
]


_SECRETS: set[str] = set()
_SHORTEST_SECRET = 6
"""Shorter ones would be found in ordinary words."""


def keep_secret(text: str) -> None:
    """Let a text never be shown: a token, the value of a header, a password."""
    if len(text) >= _SHORTEST_SECRET:
        _SECRETS.add(text)


def redacted(text: str) -> str:
    """Return the text without the secrets this process knows: a server may echo a request."""
    if _SECRETS:
        text = re.sub("|".join(map(re.escape, sorted(_SECRETS, key=len, reverse=True))), "(secret)", text)
    return text


class RepoManagerError(Exception):
    """Root of every error this package raises on purpose.

    Args:
        message: subject, what was found, what was expected.
        hint: the next step for the user, shown on its own line. `None`: there is none.
        is_shown: a command's result, printed before, says it already: with `--json` the error is no second document.
    """

    exit_code: int = 1

    def __init__(self, message: str, *, hint: str | None = None, is_shown: bool = False) -> None:
        message = redacted(message)
        super().__init__(message)
        self.message = message
        self.hint = None if hint is None else redacted(hint)
        self.is_shown = is_shown

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n{self.hint}"


class UsageError(RepoManagerError):
    """The command line or a setting is wrong."""

    exit_code = 2


class InputError(RepoManagerError):
    """A given file or value is bad. Nothing was changed."""

    exit_code = 3


class ModelError(InputError):
    """The ONNX model cannot be read, checked, run or converted."""


class CalibrationError(InputError):
    """The calibration data is missing, unreadable or does not fit the model."""


class ConfigError(InputError):
    """A config.pbtxt cannot be parsed or contradicts the model."""


class RepositoryError(InputError):
    """The model repository, or something in it, is not what it must be."""


class ConcurrentChangeError(RepositoryError):
    """Somebody else changed what this command was changing; the same command succeeds when it is alone."""

    exit_code = 5


class LockHeldError(RepositoryError):
    """Another process holds a lock for longer than this one waits; the same command succeeds once it is free."""

    exit_code = 5


class StoreUnreachableError(RepositoryError):
    """The object store of a repository gives no usable answer; the same command succeeds once it does."""

    exit_code = 5


class EngineError(InputError):
    """A TensorRT engine cannot be built, read or run here."""


class MissingDependencyError(InputError):
    """An optional package this step needs is not installed."""


class GateError(RepoManagerError):
    """A gate failed: sparsity, drift, or a service-level objective."""

    exit_code = 4


class WiderPrecisionError(GateError):
    """Layers of an engine run in a wider type than the graph asks for.

    Args:
        message: subject, what was found, what was expected.
        hint: the next step for the user. `None`: there is none.
        not_in_int8: names of the quantised nodes that run in floating point.

    Attributes:
        not_in_int8: names of the nodes whose data and weight are quantised and that run in floating point.
    """

    def __init__(self, message: str, *, hint: str | None = None, not_in_int8: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint=hint)
        self.not_in_int8 = not_in_int8


class ServerError(RepoManagerError):
    """A Triton server is unreachable, refused, or a roll-out was undone."""

    exit_code = 5


class ServerUnreachableError(ServerError):
    """No answer from the server."""


class ServerRefusedError(ServerError):
    """The server answered with an error. Its reason is quoted.

    Attributes:
        reason: the server's own words. Empty when it gave none.
    """

    reason: str = ""


class RolloutUndoneError(ServerError):
    """The roll-out failed and the previous state was put back."""


class InconclusiveError(RepoManagerError):
    """The measurement decides neither way."""

    exit_code = 6


class RollbackFailedError(RepoManagerError):
    """Putting the previous state back failed. A person must act."""

    exit_code = 7


class ChangesNeededError(RepoManagerError):
    """`--check` found changes to make."""

    exit_code = 8
