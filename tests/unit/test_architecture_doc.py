"""docs/architecture.md names only existing files, and leaves no package out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "repo_manager"
DOCUMENT = ROOT / "docs" / "architecture.md"


def named_paths() -> list[str]:
    quoted = re.findall(r"`([\w./*-]+)`", DOCUMENT.read_text(encoding="utf-8"))
    return sorted({text for text in quoted if text.endswith((".py", "/"))})


@pytest.mark.parametrize("name", named_paths())
def test_named_path_exists(name: str) -> None:
    places = [*ROOT.glob(name), *PACKAGE.glob(name), *PACKAGE.glob(f"*/{name}")]
    assert places, f"docs/architecture.md names {name}: correct the document"


def test_every_package_has_its_row() -> None:
    packages = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert packages <= set(named_paths())
