"""The only place to import optional and heavy packages: those perhaps missing, those slow to start."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

from repo_manager.errors import MissingDependencyError

__all__ = [
    "_DISTRIBUTION",
    "deferred",
    "download_wheel",
    "install_command",
    "installed_version",
    "is_installed",
    "require",
]

_DISTRIBUTION = "triton-repo-manager"
"""The package for pip. `repo-manager` in the Python package index is another process's project."""

_PIP_TIMEOUT_S = 600

_EXTRA_OF_MODULE = {
    "OpenSSL": "sign",
    "cryptography": "sign",
    "lightkube": "k8s",
    "mlflow": "mlflow",
    "PIL": "images",
    "model_signing": "sign",
    "obstore": "cloud",
    "pytriton": "server",
    "sklearn": "train",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "rtx",
    "torch": "train",
}


def is_installed(module: str) -> bool:
    """Return whether a top-level module can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def installed_version(package: str) -> str | None:
    """Return an installed package's version, without importing it, or `None` when it is not installed."""
    metadata = importlib.import_module("importlib.metadata")  # imported on demand: short commands do not need it
    try:
        return str(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def install_command(extra: str) -> str:
    """Return the command to add an extra to this copy: a clone, a wheel, a repository's URL, or a release.

    How it was installed is in `direct_url.json` (PEP 610), left out by pip for a package from an index.
    """
    editable, what = "", f"{_DISTRIBUTION}[{extra}]"
    clone = Path(__file__).resolve().parent.parent
    metadata = importlib.import_module("importlib.metadata")
    try:
        text = metadata.distribution(_DISTRIBUTION).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        text = json.dumps({"url": clone.as_uri(), "dir_info": {"editable": True}})
        text = text if (clone / "pyproject.toml").is_file() else None
    origin = json.loads(text) if text else {}
    url = str(origin.get("url", ""))
    path = unquote(urlsplit(url).path)
    if "vcs_info" in origin:
        commit = origin["vcs_info"].get("commit_id", "")
        what = f"{what} @ {origin['vcs_info'].get('vcs', 'git')}+{url}@{commit}"
    elif url.startswith("file:") and Path(path).exists():
        editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
        what = f"{path}[{extra}]"
    elif url and not url.startswith("file:"):
        what = f"{what} @ {url}"
    return f"pip install {editable}{shlex.quote(what)}"


def require(module: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: dotted name, for instance `tensorrt_rtx`.

    Raises:
        MissingDependencyError: it is not installed, or its own libraries are missing. The message names the extra to
            install.
    """
    top_level = module.partition(".")[0]
    extra = _EXTRA_OF_MODULE.get(top_level)
    hint = f"Install it with: {install_command(extra)}" if extra else f"Install the package of {top_level}."
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise MissingDependencyError(f"{module} cannot be imported: {exc}", hint=hint) from exc


def deferred(module: str) -> Any:
    """Return a module, imported at the first use of it.

    It is at the top of a file in place of the import of a heavy package for few of the file's functions, so commands
    without them start quickly. A type checker gets the ordinary import:

        if TYPE_CHECKING:
            import numpy as np
        else:
            np = deferred("numpy")

    Args:
        module: dotted name. One of ours only where a short command would import heavy packages through it.
    """
    return _Deferred(module)


class _Deferred:
    """Represents a module. Each attribute is the module's, kept once it has been asked for."""

    def __init__(self, module: str) -> None:
        self.__module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(require(self.__module), name)
        setattr(self, name, value)
        return value


def _python_with_pip(folder: Path) -> str:
    """Return a Python with pip: the running one, or a new environment where it has none (those of uv).

    Args:
        folder: where the environment is put.

    Raises:
        MissingDependencyError: this Python has no pip and cannot make an environment with it.
    """
    if importlib.util.find_spec("pip") is not None:
        return sys.executable
    command = [sys.executable, "-m", "venv", str(folder / "with-pip")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise MissingDependencyError(
            f"{sys.executable} has no pip, and no environment with pip could be made: {done.stderr.strip()[-300:]}",
            hint="Install pip into this environment, with uv for instance: uv pip install pip",
        )
    return str(folder / "with-pip" / "bin" / "python")


def download_wheel(requirement: str, folder: Path, platform: str, *, hint: str | None = None) -> Path:
    """Fetch one wheel by pip, without its dependencies. Nothing is installed.

    Args:
        requirement: pinned requirement, for instance `tritonclient==2.50.0`.
        folder: where to put it, in a folder of its own.
        platform: platform tag of pip, for instance `manylinux2014_x86_64`.
        hint: the next step if the download fails. `None`: pip's reason alone.

    Raises:
        MissingDependencyError: pip cannot fetch it. With pip's words.
    """
    target = folder / requirement
    command = [
        *(_python_with_pip(folder), "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"),
        *("--only-binary=:all:", "--platform", platform, "--dest", str(target), requirement),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as exc:
        raise MissingDependencyError(f"pip did not fetch {requirement} within {_PIP_TIMEOUT_S} s", hint=hint) from exc
    wheels = sorted(target.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = done.stderr.strip()[-300:]
        raise MissingDependencyError(f"pip could not fetch {requirement} for {platform}: {said}", hint=hint)
    return wheels[0]
