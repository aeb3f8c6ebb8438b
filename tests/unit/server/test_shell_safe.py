from __future__ import annotations

from pathlib import Path

import pytest

from repo_manager.server.command import shell_safe


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_plain_path_stays(tmp_path: Path) -> None:
    assert shell_safe(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["a b", "a;b", "a$(b)", "a'b", 'a"b', "a&b", "ä", "a\nb", "a*"])
def test_a_path_that_a_shell_would_misread_gets_a_plain_link(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    link = shell_safe(folder)
    assert link != folder
    assert name not in str(link)
    assert link.resolve() == folder.resolve()
    assert shell_safe(folder) == link


def test_a_link_to_something_else_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    link = shell_safe(folder)
    link.unlink()
    link.symlink_to(tmp_path)
    assert shell_safe(folder).resolve() == folder.resolve()


def test_a_cache_with_a_blank_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "my cache"))
    folder = tmp_path / "a b"
    folder.mkdir()
    link = shell_safe(folder)
    assert " " not in str(link)
    assert link.resolve() == folder.resolve()
