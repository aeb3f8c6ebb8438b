"""Packages whose public names are imported when they are first used (PEP 562), so that commands start quickly."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["lazy_exports"]


def lazy_exports(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return what a package's `__init__` assigns to `__getattr__`.

    A name must not be that of a module of the package: importing the module would put it in the name's place.

    Args:
        package: the package's full name.
        modules: name of a module below the package -> the public names that it defines.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def find(name: str) -> Any:
        """Import what is asked for."""
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return find
