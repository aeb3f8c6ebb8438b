"""Which backend a version is built for, and why."""

from __future__ import annotations

import dataclasses

from repo_manager.engine.gpu import find_gpus
from repo_manager.errors import UsageError
from repo_manager.optional import is_installed
from repo_manager.types import Backend

__all__ = ["BackendChoice", "choose_backend"]

_AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class BackendChoice:
    """A backend and the reason for it, in words for the user."""

    backend: Backend
    reason: str


def choose_backend(wanted: str = _AUTO) -> BackendChoice:
    """Resolve `--backend`.

    Args:
        wanted: `auto` or a `Backend`'s name. `auto` takes tensorrt where a GPU and the library are
            there, else onnxruntime.

    Raises:
        UsageError: there is no such backend.
    """
    if wanted != _AUTO:
        try:
            return BackendChoice(Backend(wanted), "asked for")
        except ValueError:
            known = ", ".join([_AUTO, *(backend.value for backend in Backend)])
            raise UsageError(f"--backend {wanted}: there is no such backend; expected one of {known}") from None
    gpus = find_gpus()
    if not gpus:
        return BackendChoice(Backend.ONNXRUNTIME, "no NVIDIA GPU on this machine")
    if not is_installed("tensorrt"):
        return BackendChoice(
            Backend.ONNXRUNTIME,
            f"{gpus[0].name} found, but the tensorrt package is not installed (pip install 'repo-manager[tensorrt]')",
        )
    return BackendChoice(Backend.TENSORRT, f"{gpus[0].name} and the tensorrt package found")
