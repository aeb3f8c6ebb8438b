"""The GPUs of this machine, and the backend they suggest for a version."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess

from repo_manager.errors import UsageError
from repo_manager.optional import install_command, is_installed
from repo_manager.types import Backend

__all__ = ["BackendChoice", "Gpu", "choose_backend", "find_gpus"]


_FIELDS = ("name", "compute_cap", "driver_version", "memory.total", "uuid")
_TIMEOUT_S = 10.0


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        name: the product's name, for instance `NVIDIA A100-SXM4-80GB`.
        compute_capability: as `nvidia-smi` reports it, `MAJOR.MINOR`, for instance `8.0`.
        driver_version: version of the NVIDIA driver as `nvidia-smi` reports it, for instance `550.54.15`.
        memory_bytes: the card's whole memory in bytes, free or in use.
        uuid: as Triton's metrics name it, `GPU-...`. Empty when it is not known.
    """

    name: str
    compute_capability: str
    driver_version: str
    memory_bytes: int
    uuid: str = dataclasses.field(default="", metadata={"json": False})

    @property
    def has_sparse_tensor_cores(self) -> bool:
        """Whether it has Sparse Tensor Cores: Ampere (8.0) and newer."""
        return float(self.compute_capability) >= 8.0


def find_gpus() -> tuple[Gpu, ...]:
    """List the GPUs reported by `nvidia-smi`. Empty where there is no driver or no card."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    command = [tool, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(answer.stdout)


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Read the answer of `nvidia-smi --query-gpu=... --format=csv,noheader,nounits`.

    A line without all fields (a card that has fallen off the bus prints `[N/A]`) is skipped.
    """
    gpus = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != len(_FIELDS):
            continue
        name, capability, driver, memory_mib, uuid = fields
        if capability.replace(".", "", 1).isdigit() and memory_mib.isdigit():
            gpus.append(Gpu(name, capability, driver, int(memory_mib) * 1024 * 1024, uuid))
    return tuple(gpus)


# Choose the backend of a version, with the reason.

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
            f"{gpus[0].name} found, but the tensorrt package is not installed ({install_command('tensorrt')})",
        )
    return BackendChoice(Backend.TENSORRT, f"{gpus[0].name} and the tensorrt package found")
