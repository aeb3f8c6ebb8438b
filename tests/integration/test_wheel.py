"""The wheel is complete: without the checkout, in an empty folder, `quickstart` takes the whole way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.json_documents import check_document

pytest.importorskip("hatchling")
pytestmark = [pytest.mark.integration, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def test_quickstart_works_from_the_wheel_alone(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    built = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run([*pip, *built], check=True, capture_output=True, timeout=200)
    (wheel,) = (tmp_path / "dist").iterdir()
    installed = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(installed), str(wheel)], check=True, timeout=200)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(installed),  # before the checkout that this Python has
        **{f"XDG_{name}_HOME": str(tmp_path / name) for name in ("CACHE", "CONFIG")},
        **{name: os.environ[name] for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE") if name in os.environ},
    }
    (tmp_path / "empty").mkdir()

    def python(*words: str) -> str:
        command = [sys.executable, *words]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path / "empty", capture_output=True, text=True, check=False, timeout=250
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    place = Path(python("-c", "import repo_manager; print(repo_manager.__file__)").strip())
    assert place.is_relative_to(installed)
    assert (place.parent / "docs/exit-codes.md").exists(), "hints name documents"
    document = json.loads(python("-m", "repo_manager", "quickstart", "--seconds", "0.5", "--json"))
    check_document("quickstart", document)
    assert (tmp_path / "empty" / document["report"]).exists()
