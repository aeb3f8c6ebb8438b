"""What this machine has, and what each missing thing would bring."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

from repo_manager.engine import Gpu, find_gpus
from repo_manager.errors import RepoManagerError
from repo_manager.loadtest import find_perf_analyzer
from repo_manager.optional import installed_version
from repo_manager.server.installation import find_triton

__all__ = ["Machine", "Package", "examine_machine"]

_PACKAGES = {
    "onnx": "reading models",
    "onnxruntime": "checking models, and serving them on the embedded server",
    "tritonclient": "talking to Triton",
    "nvidia-pytriton": "the embedded tritonserver: pip install 'repo-manager[server]'",
    "tensorrt": "building TensorRT plans: pip install 'repo-manager[tensorrt]'",
    "tensorrt-rtx": "building TensorRT-RTX engines: pip install 'repo-manager[rtx]'",
    "obstore": "repositories on object storage: pip install 'repo-manager[cloud]'",
    "model-signing": "signed versions: pip install 'repo-manager[sign]'",
}


@dataclasses.dataclass(frozen=True)
class Package:
    """A package that some step uses: its version, `None` when it is not installed, and what it is for."""

    name: str
    version: str | None
    purpose: str


@dataclasses.dataclass(frozen=True)
class Machine:
    """What was found.

    Attributes:
        system: the operating system and processor.
        python: the interpreter's version.
        cpus: processors that this process may use.
        memory_bytes: the machine's memory.
        gpus: NVIDIA GPUs; empty when there is none or no driver.
        packages: what is installed.
        tritonserver: the embedded server's binary; `None` when there is none.
        perf_analyzer: the binary that `--client perf_analyzer` would run; `None` when there is none.
    """

    system: str
    python: str
    cpus: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    packages: tuple[Package, ...]
    tritonserver: Path | None
    perf_analyzer: Path | None

    def has(self, package: str) -> bool:
        """Say whether a package of the list is installed."""
        return any(item.name == package and item.version is not None for item in self.packages)


def examine_machine() -> Machine:
    """Look at the machine; changes nothing."""
    return Machine(
        system=platform.platform(),
        python=platform.python_version(),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=find_gpus(),
        packages=tuple(Package(name, installed_version(name), purpose) for name, purpose in _PACKAGES.items()),
        tritonserver=_tritonserver(),
        perf_analyzer=_perf_analyzer(),
    )


def _tritonserver() -> Path | None:
    try:
        return find_triton().binary
    except RepoManagerError:
        return None


def _perf_analyzer() -> Path | None:
    try:
        return find_perf_analyzer().binary
    except RepoManagerError:
        return None
