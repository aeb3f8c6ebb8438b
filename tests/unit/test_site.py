"""The documentation site builds without a warning, and its reference says what the code says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from repo_manager.cli.commands import COMMANDS
from repo_manager.engine.fit import releases
from repo_manager.triton_config.rules import RULES
from repo_manager.types import Precision

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_command_has_a_page_with_its_options(site: Path) -> None:
    for names in COMMANDS.values():
        for name in names:
            page = (site / f"reference/commands/{name}/index.html").read_text()
            assert "--json" in page, name
    assert "--keep-previous" in (site / "reference/commands/deploy/index.html").read_text()


def test_rules_settings_and_names_are_listed(site: Path) -> None:
    rules = (site / "reference/rules/index.html").read_text()
    assert all(f"<code>{rule.name}</code>" in rules for rule in RULES)
    assert "REPO_MANAGER_SIGNED_BY" in (site / "reference/settings/index.html").read_text()
    api = (site / "reference/api/index.html").read_text()
    assert 'id="repo_manager.pipeline.adding.AddOptions"' in api


def test_compatibility_is_the_data_of_the_code(site: Path) -> None:
    page = (site / "reference/compatibility/index.html").read_text()
    assert all(f"<td>{release.release}</td>" in page for release in releases())
    assert "<td>11.1</td>" in page
    assert "<td>10.5.0 (unverified)</td>" in page
    assert all(f"<code>{precision}</code>" in page for precision in Precision)
    assert "doctor --install-tritonserver" in page


def test_the_schemas_of_json_documents_are_published(site: Path) -> None:
    for names in COMMANDS.values():
        for name in names:
            schema = json.loads((site / f"reference/json/v1/{name}.schema.json").read_text())
            assert schema["title"] == f"repo-manager {name} --json"


def test_the_page_of_json_documents_has_nested_classes(site: Path) -> None:
    page = (site / "reference/json/index.html").read_text()
    assert "<code>speedup_bound_if_pruned</code>" in page
    assert 'href="#sparsityreport"' in page
    assert 'id="sparsityreport"' in page


def test_agents_find_the_pages(site: Path) -> None:
    listed = (site / "llms.txt").read_text()
    assert "(reference/commands/deploy/)" in listed
    assert "(loadtest/)" in listed


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    page = (site / "index.html").read_text()
    assert "fonts.googleapis" not in page
    assert 'src="http' not in page


def test_a_search_weighs_how_to_pages_above_lists_of_parts(site: Path) -> None:
    entries = json.loads((site / "search/search_index.json").read_text())["docs"]
    boosts = {entry["location"]: entry.get("boost", 1) for entry in entries}
    assert boosts["how-to/signatures/"] > boosts["reference/commands/sign/"] > boosts["signing/"]
    assert boosts["signing/"] > boosts["reference/json/#sign"]


def test_pictures_of_reports_are_shown_in_light_and_dark(site: Path) -> None:
    page = (site / "tutorials/first-deployment/index.html").read_text()
    for scheme in ("light", "dark"):
        assert f"report-load-{scheme}.png#only-{scheme}" in page
        assert (site / f"images/report-load-{scheme}.png").exists()
