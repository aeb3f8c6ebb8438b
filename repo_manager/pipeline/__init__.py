"""Composes the stages; no logic of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repo_manager.lazy import lazy_exports

if TYPE_CHECKING:
    from repo_manager.pipeline.add_types import Control
    from repo_manager.pipeline.adding import Added, AddOptions, SparsityMode, add
    from repo_manager.pipeline.inspect import Inspection, inspect_model

__all__ = ["AddOptions", "Added", "Control", "Inspection", "SparsityMode", "add", "inspect_model"]

_MODULES = {
    "add_types": ("Control",),
    "adding": ("AddOptions", "Added", "SparsityMode", "add"),
    "inspect": ("Inspection", "inspect_model"),
}
__getattr__ = lazy_exports(__name__, _MODULES)
