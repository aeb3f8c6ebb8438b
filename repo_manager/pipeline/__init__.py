"""Composes the stages; no logic of its own."""

from repo_manager.pipeline.add import Added, AddOptions, SparsityMode, add
from repo_manager.pipeline.add_types import Control
from repo_manager.pipeline.inspect import Inspection, inspect_model

__all__ = ["AddOptions", "Added", "Control", "Inspection", "SparsityMode", "add", "inspect_model"]
