"""The equipment of this machine, and the gain from each missing part."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

from repo_manager.engine.fit import FitProblem, FitTarget
from repo_manager.engine.fit_check import check_version_fit
from repo_manager.engine.gpu import Gpu, find_gpus
from repo_manager.errors import RepoManagerError
from repo_manager.loadtest.perf_analyzer.drive import find_perf_analyzer
from repo_manager.optional import install_command, installed_version
from repo_manager.repository.location import Location, LocationLike, as_location, local_folder
from repo_manager.repository.manifest import Manifest
from repo_manager.repository.scan import scan
from repo_manager.server.installation import find_triton
from repo_manager.types import Backend

__all__ = ["EngineFit", "Machine", "Package", "examine_engines", "examine_machine"]

_PACKAGES = {
    "onnx": "reading models",
    "onnxruntime": "checking models, and serving them on the embedded server",
    "tritonclient": "talking to Triton",
    "nvidia-pytriton": "the embedded tritonserver",
    "tensorrt": "building TensorRT plans",
    "tensorrt-rtx": "building TensorRT-RTX engines",
    "obstore": "repositories on object storage",
    "model-signing": "signed versions",
}
_EXTRAS = {
    "nvidia-pytriton": "server",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "rtx",
    "obstore": "cloud",
    "model-signing": "sign",
}


@dataclasses.dataclass(frozen=True)
class Package:
    """A package some step uses.

    Attributes:
        name: name of its distribution, as pip takes it, for instance `nvidia-pytriton`.
        version: `None` when it is not installed.
        purpose: the steps in need of it.
        install: the command to install it. Empty where it is there, or comes with every installation.
    """

    name: str
    version: str | None
    purpose: str
    install: str = ""


@dataclasses.dataclass(frozen=True)
class EngineFit:
    """One version with an engine: the library behind it, and the objections to its load on a server.

    Attributes:
        model: the version with the engine, as `NAME:VERSION`.
        backend: the backend for the engine.
        built_with: the library's version. Empty where it is not on record.
        compute_capabilities: GPUs it is for. Empty where they are not on record.
        problems: reasons for a failed load first.
    """

    model: str
    backend: str
    built_with: str
    compute_capabilities: tuple[str, ...]
    problems: tuple[FitProblem, ...]


@dataclasses.dataclass(frozen=True)
class Machine:
    """The findings.

    Attributes:
        system: the operating system and processor.
        python: version of the running interpreter, such as `3.12.3`.
        cpus: processors this process may use.
        memory_bytes: the machine's physical memory, without regard to a container's limit.
        gpus: NVIDIA GPUs. Empty when there is none or no driver.
        packages: installed packages with their versions.
        tritonserver: the embedded server's binary. `None` when there is none.
        perf_analyzer: the binary for `--client perf_analyzer`. `None` when there is none.
        engines: the engines of a repository against a server. Empty where none was asked about.
    """

    system: str
    python: str
    cpus: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    packages: tuple[Package, ...]
    tritonserver: Path | None
    perf_analyzer: Path | None
    engines: tuple[EngineFit, ...] = ()

    def has(self, package: str) -> bool:
        """Return whether a package of the list is installed."""
        return any(item.name == package and item.version is not None for item in self.packages)


def examine_machine() -> Machine:
    """Look at the machine. Changes nothing."""
    return Machine(
        system=platform.platform(),
        python=platform.python_version(),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=find_gpus(),
        packages=tuple(_package(name, purpose) for name, purpose in _PACKAGES.items()),
        tritonserver=_tritonserver(),
        perf_analyzer=_perf_analyzer(),
    )


def examine_engines(repository: LocationLike, target: FitTarget) -> tuple[EngineFit, ...]:
    """Say of every engine in a repository whether it will load on a server, before anything is loaded.

    Args:
        repository: on disk its engines' own heads are read. In object storage the manifests are believed.
        target: release, GPU and libraries of the server (`fit_target_of`).

    Raises:
        RepositoryError: the repository cannot be read.
    """
    repository = as_location(repository)
    engines = (str(Backend.TENSORRT), str(Backend.TENSORRT_RTX))
    return tuple(
        _fit(f"{model.name}:{version.version}", model.backend, version.path, version.manifest, target)
        for model in scan(repository)
        if model.backend in engines
        for version in model.versions
    )


def _fit(model: str, backend: str, path: Location, manifest: Manifest | None, target: FitTarget) -> EngineFit:
    extra = {} if manifest is None else manifest.extra
    section = extra.get("engine") or {}
    problems = check_version_fit(local_folder(path) or {}, extra, target)
    version, kinds = str(section.get("plan_version", "")), tuple(section.get("compute_capabilities", ()))
    return EngineFit(model, backend, version, kinds, problems)


def _package(name: str, purpose: str) -> Package:
    version = installed_version(name)
    missing = version is None and name in _EXTRAS
    return Package(name, version, purpose, install_command(_EXTRAS[name]) if missing else "")


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
