"""Heavy packages are imported at their first use, and a missing one names the extra to install."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from repo_manager import optional
from repo_manager.errors import MissingDependencyError
from repo_manager.optional import deferred, install_command

LIGHT = {
    "repo_manager.server.client": ("grpc", "numpy", "tritonclient.grpc", "tritonclient.utils"),
    "repo_manager.repository.publish": ("grpc", "numpy", "onnx", "onnxruntime", "obstore", "tritonclient.grpc"),
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


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'triton-repo-manager[rtx]'"),
        ({"url": "file://{here}/a b", "dir_info": {"editable": True}}, "pip install -e '{here}/a b[rtx]'"),
        ({"url": "file://{here}/a%20b", "dir_info": {}}, "pip install '{here}/a b[rtx]'"),
        ({"url": "file://{here}/gone.whl", "archive_info": {}}, "pip install 'triton-repo-manager[rtx]'"),
        (
            {"url": "https://h/x.whl", "archive_info": {}},
            "pip install 'triton-repo-manager[rtx] @ https://h/x.whl'",
        ),
        (
            {"url": "https://h/x", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "pip install 'triton-repo-manager[rtx] @ git+https://h/x@abc'",
        ),
    ],
)
def test_the_hint_installs_an_extra_for_the_copy_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: dict[str, object] | None, command: str
) -> None:
    (tmp_path / "a b").mkdir()
    info = tmp_path / "triton_repo_manager-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: triton-repo-manager\nVersion: 1.0\n")
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin).replace("{here}", str(tmp_path)))
    monkeypatch.syspath_prepend(tmp_path)
    assert install_command("rtx") == command.replace("{here}", str(tmp_path))


def test_a_clone_that_was_never_installed_is_installed_with_the_extra() -> None:
    code = (
        "import importlib.metadata as m, pathlib, repo_manager.optional as o\n"
        "def none(name): raise m.PackageNotFoundError(name)\n"
        "m.distribution = none\n"
        "print(o.install_command('rtx'))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    root = Path(__file__).resolve().parents[2]
    assert ended.stdout.strip() == f"pip install -e '{root}[rtx]'"


def test_an_environment_without_pip_gets_one_for_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = optional.importlib.util.find_spec
    monkeypatch.setattr(optional.importlib.util, "find_spec", lambda name: object() if name == "pip" else find(name))
    assert optional._python_with_pip(tmp_path) == sys.executable
    monkeypatch.setattr(optional.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    python = optional._python_with_pip(tmp_path)
    assert Path(python).is_relative_to(tmp_path)
    said = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, text=True, check=True).stdout
    assert said.startswith("pip ")
