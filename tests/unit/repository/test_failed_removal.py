"""A removal refused by the file system: nothing is changed, or it goes another way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from repo_manager.errors import RepositoryError
from repo_manager.repository.configuration import set_served_versions
from repo_manager.repository.remove import remove
from repo_manager.repository.scan import find_model
from repo_manager.repository.stores import disk
from repo_manager.repository.tags import model_state, record_deployment, set_tag
from repo_manager.repository.verify import verify

Put = Callable[..., Any]
NOBODY = 65534


@pytest.fixture
def history(root: Path, put: Put) -> Path:
    """m:1..4; 1 and 4 served, 3 and 4 tagged, 4 deployed before 1."""
    for _ in range(4):
        put()
    set_tag(root, "m", "best", 3)
    set_tag(root, "m", "prod", 4)
    record_deployment(root, "m", 4)
    record_deployment(root, "m", 1)
    set_served_versions(root, "m", (1, 4))
    return root


@pytest.fixture
def somebody(history: Path) -> Iterator[None]:
    """Not root, for whom no folder is read-only; the repository is this user's."""
    if os.geteuid() != 0:
        yield
        return
    for path in (history.parent, *history.parent.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    os.chmod(history.parent, 0o755)  # noqa: PTH101 - tmp_path belongs to root, and its parents are closed
    opened = [(parent, parent.stat().st_mode) for parent in history.parent.parents if not parent.stat().st_mode & 1]
    for parent, mode in opened:
        parent.chmod(mode | 0o711)
    remove(history, "m", 2, dry_run=True)  # Imports everything: the packages may be closed to others.
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        for parent, mode in opened:
            parent.chmod(mode & 0o7777)


def everything(root: Path) -> tuple[object, ...]:
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    files.pop(".repo-manager.lock", None)
    return files, model_state(root, "m"), [entry.version for entry in find_model(root, "m").versions]


@pytest.mark.usefixtures("somebody")
@pytest.mark.parametrize("version", [4, None])
def test_a_folder_that_may_not_be_changed_keeps_tags_policy_and_history(history: Path, version: int | None) -> None:
    closed = history if version is None else history / "m"
    before = everything(history)
    closed.chmod(0o555)
    try:
        with pytest.raises(RepositoryError, match=r"Permission denied|cannot be written"):
            remove(history, "m", version, force=True)
    finally:
        closed.chmod(0o755)
    assert everything(history) == before
    assert verify(history, models=False) == ()


@pytest.mark.usefixtures("somebody")
def test_a_version_that_its_owner_made_read_only_goes(history: Path) -> None:
    for path in (history / "m" / "4").rglob("*"):
        path.chmod(0o444)
    (history / "m" / "4").chmod(0o555)
    remove(history, "m", 4, force=True)
    assert [entry.version for entry in find_model(history, "m").versions] == [1, 2, 3]
    assert verify(history, models=False) == ()
    assert not list(history.parent.glob(".*.staging"))


def refused(monkeypatch: pytest.MonkeyPatch, place: Path, code: int) -> None:
    """Let a folder be renamed by nobody, as a folder of an overlay's lower layer cannot (EXDEV)."""
    real = os.rename

    def rename(source: Any, target: Any, **options: Any) -> None:
        if Path(source) == place:
            raise OSError(code, os.strerror(code), str(source))
        real(source, target, **options)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(Path, "rename", lambda path, to: rename(path, to))  # Python 3.10 keeps its own reference


def test_a_folder_of_a_lower_layer_is_deleted_where_it_is(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(monkeypatch, history / "m" / "4", errno.EXDEV)
    remove(history, "m", 4, force=True)
    assert find_model(history, "m").selected == (1,)
    assert model_state(history, "m").tags == {"best": 3}
    assert verify(history, models=False) == ()
    assert not (history / "m" / "4").exists()


def test_a_model_of_a_lower_layer_is_deleted_where_it_is(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(monkeypatch, history / "m", errno.EXDEV)
    remove(history, "m", force=True)
    assert not (history / "m").exists()
    assert model_state(history, "m").highest_version == 4


@pytest.mark.parametrize("failing", ["rename", "record"])
def test_what_was_done_before_a_step_that_fails_is_undone(
    history: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    before = everything(history)
    if failing == "rename":
        refused(monkeypatch, history / "m" / "4", errno.EIO)
    else:
        real, calls = disk.change_state, []

        def change_state(*args: Any, **options: Any) -> Any:
            calls.append(args)
            if len(calls) == 2:  # The number first, the tags and the history last.
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        monkeypatch.setattr(disk, "change_state", change_state)
    with pytest.raises(RepositoryError, match="cannot remove versions of m"):
        remove(history, "m", 4, force=True)
    assert everything(history) == before
