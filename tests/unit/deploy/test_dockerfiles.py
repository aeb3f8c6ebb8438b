"""The container files: linted, and their pins held against the project's own dependencies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support.dev_tools import tool

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "deploy" / "docker"
FILES = ("Dockerfile.cli", "Dockerfile.triton")


@pytest.mark.parametrize("name", FILES)
def test_hadolint(name: str) -> None:
    done = tool("hadolint", name, folder=DOCKER)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_would_find(tmp_path: Path) -> None:
    text = (DOCKER / "Dockerfile.triton").read_text(encoding="utf-8")
    (tmp_path / "Dockerfile").write_text(text.replace("==${TENSORRT_RTX}", ""))
    assert tool("hadolint", "Dockerfile", folder=tmp_path).returncode != 0


@pytest.mark.parametrize("name", FILES)
def test_the_base_is_the_users_and_root_is_nobodys(name: str) -> None:
    text = (DOCKER / name).read_text(encoding="utf-8")
    assert re.search(r"^ARG BASE$", text, re.MULTILINE), "no default: the registry is the user's to name"
    assert all(line.startswith("FROM ${BASE}") for line in text.splitlines() if line.startswith("FROM"))
    assert re.findall(r"^USER (\d+:\d+)$", text, re.MULTILINE)[-1] != "0:0"


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_exists_and_is_not_ignored(name: str) -> None:
    ignored = (DOCKER / f"{name}.dockerignore").read_text(encoding="utf-8").split()
    for line in (DOCKER / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("COPY") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert list(ROOT.glob(source)), source
                assert source.partition("/")[0] not in ignored


def test_every_dependency_is_pinned_to_a_version_that_it_allows() -> None:
    lines = (DOCKER / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9_.-]+)==([^ ;]+)", line)
            assert match is not None, line
            pins[canonicalize_name(match[1])] = Version(match[2])
    for requirement in map(Requirement, project_dependencies()):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not pinned: the file's second line says how it is made"
        assert requirement.specifier.contains(pins[name], prereleases=True), requirement


def project_dependencies() -> list[str]:
    """Read the image's requirements out of pyproject.toml (tomllib is not in Python 3.10)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    blocks = [re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)]
    blocks += [re.search(rf"^{extra} = \[(.*?)\]$", text, re.MULTILINE) for extra in ("cloud", "k8s", "sign")]
    found = [item for block in blocks if block is not None for item in re.findall(r'"([^"]+)"', block[1])]
    assert len(found) > 12
    return found
