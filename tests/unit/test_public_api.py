from __future__ import annotations

import subprocess
import sys

import pytest

import repo_manager


@pytest.mark.parametrize("name", repo_manager.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(repo_manager, name).__doc__
    assert name in dir(repo_manager)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = repo_manager.nothing


def test_importing_the_package_imports_no_stage() -> None:
    code = (
        "import sys, repo_manager; print([m for m in sys.modules if m.startswith(('repo_manager.', 'numpy', 'onnx'))])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"
