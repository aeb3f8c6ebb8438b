"""Optional, heavy packages are imported here and nowhere else."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from repo_manager.errors import MissingDependencyError

__all__ = ["download_wheel", "installed_version", "is_installed", "require"]

_PIP_TIMEOUT_S = 600

_EXTRA_OF_MODULE = {
    "OpenSSL": "sign",
    "cryptography": "sign",
    "lightkube": "k8s",
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
    """Say whether a top-level module can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def installed_version(package: str) -> str | None:
    """Return an installed package's version, without importing it; `None` when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def require(module: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: dotted name, for instance `tensorrt_rtx`.

    Raises:
        MissingDependencyError: it is not installed, or its own libraries are missing; the message
            names the extra to install.
    """
    top_level = module.partition(".")[0]
    extra = _EXTRA_OF_MODULE.get(top_level)
    hint = f"Install it with: pip install 'repo-manager[{extra}]'" if extra else f"Install the package of {top_level}."
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise MissingDependencyError(f"{module} cannot be imported: {exc}", hint=hint) from exc


def download_wheel(requirement: str, folder: Path, platform: str, *, hint: str | None = None) -> Path:
    """Fetch one wheel by pip, without what it depends on; nothing is installed.

    Args:
        requirement: for instance `tritonclient==2.50.0`.
        folder: where to put it, in a folder of its own.
        platform: pip's platform tag.
        hint: the next step when it cannot be had.

    Raises:
        MissingDependencyError: pip cannot fetch it; with pip's words.
    """
    target = folder / requirement
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"),
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
