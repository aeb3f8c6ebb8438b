from __future__ import annotations

import concurrent.futures
import threading
from pathlib import Path

import pytest

from repo_manager.errors import RepositoryError
from repo_manager.repository.layout import open_root


def test_a_new_repository_is_made_by_all_who_come_at_once(tmp_path: Path) -> None:
    count = 8
    for number in range(40):
        root, together = tmp_path / str(number) / "models", threading.Barrier(count)

        def make(root: Path = root, together: threading.Barrier = together) -> Path:
            together.wait()
            return open_root(root, create=True)

        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            made = [pool.submit(make) for _ in range(count)]
        assert {each.result() for each in made} == {root.resolve()}


def test_what_is_no_repository_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for create in (False, True):
        with pytest.raises(RepositoryError, match="is not a folder"):
            open_root(tmp_path / "file", create=create)
    with pytest.raises(RepositoryError, match="does not exist"):
        open_root(tmp_path / "none")
    assert not (tmp_path / "none").exists()
