"""The shell completes commands, choices, and the names, versions and tags of a local repository; errors are silent."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from repo_manager.repository.tags import set_tag

ROOT = Path(__file__).parents[3]


def complete(*words: str, repository: object = ROOT / "model_repository", shell: str = "zsh") -> list[str]:
    """Return the shell's offers for the last word."""
    line = " ".join(("repo-manager", *words))
    instruction = {"zsh": "complete_zsh", "fish": "complete_fish", "bash": "complete_bash"}[shell]
    environment = {
        **os.environ,
        "_REPO_MANAGER_COMPLETE": instruction,
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words)),
        "REPO_MANAGER_REPOSITORY": str(repository),
    }
    command = [sys.executable, "-m", "repo_manager"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.stderr == ""
    return ended.stdout.replace('"', " ").replace("'", " ").split()


@pytest.mark.parametrize("command", ["show", "deploy", "rollback", "loadtest", "remove"])
def test_names_of_models(command: str) -> None:
    assert {"digits", "digits_int8"} <= set(complete(command, "dig", shell="bash"))


@pytest.mark.parametrize("command", ["deploy", "diff", "tag", "sign", "compare"])
def test_versions_after_a_name(command: str) -> None:
    offered = complete(command, "digits:", shell="fish")
    assert {"digits:1", "digits:2"} <= set(offered)
    assert "digits_int8:1" not in offered


def test_the_repository_of_the_command_line_counts(tmp_path: Path) -> None:
    there = str(ROOT / "model_repository")
    assert "digits" in complete("show", "-r", there, "d", repository=tmp_path, shell="bash")


def test_tags_after_a_name(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "model_repository", tmp_path / "models")
    set_tag(tmp_path / "models", "digits", "stable", 1)
    assert "digits:stable" in complete("deploy", "digits:s", repository=tmp_path / "models", shell="fish")


@pytest.mark.parametrize("repository", ["/nonexistent", "s3://bucket/prefix", "s3://"])
def test_what_cannot_be_looked_at_offers_nothing(repository: str) -> None:
    assert complete("show", "d", repository=repository, shell="bash") == []


def test_choices_and_commands() -> None:
    assert set(complete("add", "--backend", "tensorrt", shell="bash")) == {"tensorrt", "tensorrt_rtx"}
    assert set(complete("con", shell="bash")) == {"config", "convert"}
