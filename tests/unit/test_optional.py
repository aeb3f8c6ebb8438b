"""Heavy packages are imported when something of them is used, and a missing one says what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

from repo_manager.errors import MissingDependencyError
from repo_manager.optional import deferred

LIGHT = {
    "repo_manager.server": ("grpc", "numpy", "tritonclient.grpc", "tritonclient.utils"),
    "repo_manager.repository": ("grpc", "numpy", "onnx", "onnxruntime", "obstore", "tritonclient.grpc"),
    "repo_manager.rollout.deploy": (
        "grpc",
        "onnx",
        "onnxruntime",
        "pydantic",
        "yaml",
        "repo_manager.engine.builder",
        "repo_manager.precision",
    ),
    "repo_manager.cli.status": ("grpc", "numpy", "onnx", "pydantic", "repo_manager.rollout.engine"),
    "repo_manager.cli.serve": ("grpc", "numpy", "onnx", "pydantic", "repo_manager.rollout"),
    "repo_manager.cli.repository": ("grpc", "numpy", "onnx", "pydantic", "jinja2", "yaml"),
    "repo_manager.cli.inspection": ("grpc", "onnxruntime", "onnx.reference", "pydantic", "jinja2", "yaml"),
}


@pytest.mark.parametrize("module", LIGHT)
def test_what_a_short_command_does_not_need_is_not_imported(module: str) -> None:
    code = f"import {module}, sys\nprint([name for name in {LIGHT[module]!r} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.strip() == "[]"


def test_a_deferred_module_is_the_module() -> None:
    assert deferred("fractions").Fraction is __import__("fractions").Fraction


def test_a_deferred_module_that_is_missing_says_so_when_it_is_used() -> None:
    missing = deferred("obstore_that_is_not_there")
    with pytest.raises(MissingDependencyError, match="cannot be imported"):
        _ = missing.store


def test_an_attribute_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError):
        _ = deferred("fractions").Fractions
