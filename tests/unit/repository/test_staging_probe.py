"""Nothing of ours appears in the root while a command stages: a server listing it would stumble over it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from repo_manager.errors import RepositoryError
from repo_manager.repository.stores import staging


def test_staging_leaves_the_root_alone(tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    before = root.stat().st_mtime_ns
    with staging.staged(root) as entry:
        assert entry.parent == tmp_path / ".models.staging"
    assert root.stat().st_mtime_ns == before


def test_another_mount_is_staged_in_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "models"
    root.mkdir()
    monkeypatch.setattr(staging, "_mount_of", lambda folder: "1" if root in (folder, *folder.parents) else "2")
    with staging.staged(root) as entry:
        assert entry.parent == root / staging.STAGING_IN_ROOT


def test_without_the_kernels_word_a_file_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "models"
    root.mkdir()
    monkeypatch.setattr(staging, "_mount_of", lambda _: None)
    renamed: list[Path] = []
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        renamed.append(target)
        if path.name == "probe" and path.parent.parent == tmp_path / ".models.staging":
            raise OSError(errno.EXDEV, "cross-device")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with staging.staged(root) as entry:
        assert entry.parent == root / staging.STAGING_IN_ROOT
    assert len(renamed) == 2
    with pytest.raises(RepositoryError), staging.staged(tmp_path / "missing"):
        pass
