"""A few hundred damaged files of a repository: no traceback, no hang, no damage accepted."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest
from support.repository_cases import Cases, readers

from repo_manager.errors import RepoManagerError, RepositoryError
from repo_manager.repository.adopt import adopt
from repo_manager.repository.scan import scan
from repo_manager.repository.verify import verify


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("batch", range(4))
def test_damaged_files_are_told_or_harmless(batch: int, cases: Cases) -> None:
    for seed in range(batch * 40, batch * 40 + 40):
        try:
            cases.run(seed)
        except Exception as exc:
            raise AssertionError(f"case {seed}: tests/fuzz/fuzz_repository.py --only {seed}") from exc


def test_a_case_does_damage(cases: Cases, tmp_path: Path) -> None:
    assert {cases.run(seed) for seed in range(40)} == {*cases.contents, "repository.yaml"}


def hostile(root: Path) -> None:
    """Names outside UTF-8, with terminal escapes, links in a circle, a pipe and a device."""
    (root / "m/1" / os.fsdecode(b"\xff\xfe.onnx")).touch()
    (root / "m/1/\x1b]0;title\x07").touch()
    (root / "m/1/\u202egnp").touch()
    os.mkfifo(root / "m/1/pipe")
    (root / "m/1/zero").symlink_to("/dev/zero")
    (root / "m/loop").symlink_to("loop")
    (root / "loop").symlink_to("loop")
    (root / os.fsdecode(b"\xff")).mkdir()
    (root / "pipe").mkdir()
    os.mkfifo(root / "pipe/config.pbtxt")


@pytest.mark.timeout(60)
def test_hostile_names_pipes_and_circles_are_told(cases: Cases, tmp_path: Path) -> None:
    root = tmp_path / "models"
    shutil.copytree(cases.good / "models", root)
    hostile(root)
    found = [f"{problem.where} {problem.what}" for problem in verify(root, models=False)]
    for told in (
        "m/1/pipe is not a regular file",
        "m/1/zero is a symbolic link out of the repository, to /dev/zero",
        "m/loop is a link to nothing",
        "pipe/config.pbtxt cannot be read: is not a regular file",
    ):
        assert any(told in line for line in found), found
    assert any(line.startswith(os.fsdecode(b"\xff")) for line in found)
    listed = {model.name: model.problems for model in scan(root, deep=False)}
    assert listed["pipe"][0] == "config.pbtxt cannot be read: is not a regular file"
    for call in readers(root):
        with contextlib.suppress(RepoManagerError):
            call()


def test_a_name_that_is_no_text_is_not_adopted(cases: Cases, tmp_path: Path) -> None:
    root = tmp_path / "models"
    shutil.copytree(cases.good / "models", root)
    (root / "m/1/manifest.json").unlink()
    (root / "m/1" / os.fsdecode(b"\xff")).touch()
    with pytest.raises(RepositoryError, match="name is not UTF-8"):
        adopt(root)
