"""The files of a release agree with one another, and the forms of the project follow their published schemas."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from support.dev_tools import tool

import repo_manager

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"


def test_changelog_and_citation_name_the_version() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert headings[:2] == ["Unreleased", f"{repo_manager.__version__} ({citation['date-released']})"]
    assert citation["version"] == repo_manager.__version__
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", heading) for heading in headings[1:])


def test_every_supported_python_is_tested_with_and_without_extras() -> None:
    supported = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    jobs = yaml.safe_load((GITHUB / "workflows/ci.yml").read_text())["jobs"]
    for name in ("pythons", "without-extras"):
        assert jobs[name]["strategy"]["matrix"]["python"] == supported, name
    assert {"python": supported[0], "resolution": "lowest-direct"} in jobs["without-extras"]["strategy"]["matrix"][
        "include"
    ]


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", "workflows/*.yml"),
        ("custom.github-workflows-require-timeout", "workflows/*.yml"),
        ("vendor.github-issue-config", "ISSUE_TEMPLATE/config.yml"),
        ("vendor.github-issue-forms", "ISSUE_TEMPLATE/[!c]*.yml"),
        ("vendor.citation-file-format", "../CITATION.cff"),
    ],
)
def test_published_schemas(schema: str, files: str, tmp_path: Path) -> None:
    found = sorted(GITHUB.glob(files))
    assert found
    done = tool("check-jsonschema", "--builtin-schema", schema, "--default-filetype", "yaml", *found, folder=ROOT)
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "broken.yml"
    broken.write_text("jobs: {a: {runs-on: 1}}\nbody: 3\ncontact_links: 4\n")
    assert tool("check-jsonschema", "--builtin-schema", schema, broken, folder=ROOT).returncode != 0
