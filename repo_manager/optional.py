"""Optional, heavy packages are imported here and nowhere else."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from repo_manager.errors import MissingDependencyError

__all__ = ["is_installed", "require"]

_EXTRA_OF_MODULE = {
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
