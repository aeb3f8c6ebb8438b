"""Packages that import their public names when they are used."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import repo_manager

ROOT = Path(repo_manager.__file__).parent
LAZY = sorted(path for path in ROOT.rglob("__init__.py") if "lazy_exports(" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", LAZY, ids=lambda path: path.parent.name)
def test_what_is_promised_is_there_and_no_module_takes_its_place(path: Path) -> None:
    package = ".".join(("repo_manager", *path.parent.relative_to(ROOT).parts))
    module = importlib.import_module(package)
    modules = {each.stem for each in path.parent.iterdir()}
    lazily = {name for names in module._MODULES.values() for name in names}
    assert not lazily & modules
    assert all(getattr(module, name) is not None for name in module.__all__)
    checked = {
        alias.name
        for block in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(block, ast.If)
        for line in block.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }
    assert checked == lazily


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_this"):
        _ = importlib.import_module("repo_manager.engine").nothing_of_this


def test_a_roll_out_needs_no_builder_and_no_converter() -> None:
    heavy = ("onnx", "onnxruntime", "pydantic", "yaml", "repo_manager.engine.builder", "repo_manager.precision")
    code = f"import sys, repo_manager.rollout.deploy\nprint([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
