"""Cards of versions: every chapter of the story, as HTML and as Markdown, and an index with links to them."""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from support.onnx_models import mlp
from typer.testing import CliRunner

from repo_manager.cli.main import app
from repo_manager.loadtest.result import LoadTestReport
from repo_manager.pipeline.adding import AddOptions, add
from repo_manager.pipeline.cards import version_cards
from repo_manager.precision import ConvertOptions
from repo_manager.report.card import Section, card_html, card_markdown, index_html, version_card
from repo_manager.repository.difference import recorded_checks
from repo_manager.repository.scan import find_model
from repo_manager.repository.state import ModelState
from repo_manager.repository.tags import set_tag
from repo_manager.types import Precision, as_json


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cards")
    onnx.save(mlp(), root / "<b>|`x`.onnx")
    for precision in (Precision.FP32, Precision.FP16):
        options = AddOptions(precision=precision, convert=ConvertOptions(keep_fp32=("fc2",)))
        add(root / "<b>|`x`.onnx", "m", root / "models", options if precision is Precision.FP16 else AddOptions())
    set_tag(root / "models", "m", "stable", 2)
    return root / "models"


@pytest.fixture
def load(report: LoadTestReport) -> LoadTestReport:
    return dataclasses.replace(report, target=dataclasses.replace(report.target, model="m", version="2"))


def test_a_card_tells_the_whole_story(repository: Path, load: LoadTestReport) -> None:
    (card,) = version_cards(repository, "m:stable", loads=[load])
    assert (card.title, dict(card.headline)["precision"]) == ("m:2", "fp16")
    titles = [section.title for section in card.sections]
    wanted = ["State", "Source", "Checks", "Drift", "Sparsity", "Configuration", "Files", "Load tests"]
    assert titles == wanted, "nothing is said about what there is not: no engine, no pruning, no deployment"
    sections = {section.title: section for section in card.sections}
    assert ("tags", "stable") in sections["State"].facts
    assert [row[0] for row in sections["Checks"].rows][:3] == ["checker", "runs", "signature"]
    assert "left in higher precision" in sections["Checks"].note
    assert dict(card.headline)["drift"] == sections["Drift"].rows[0][1], "one number for one thing"
    assert len(sections["Load tests"].rows) == len(load.points)
    assert 'name: "m"' in sections["Configuration"].code
    other = version_cards(repository, "m:1", loads=[load])[0]
    assert "Load tests" not in [section.title for section in other.sections], "it is of version 2"


def test_a_check_that_had_nothing_to_look_at_did_not_pass(repository: Path) -> None:
    manifest = find_model(repository, "m").version(1).manifest
    assert manifest is not None
    found = [("a", True, True), ("b", True, False), ("c", False, True), ("d", True, None)]
    checks = [{"name": name, "passed": passed, "is_empty": empty, "detail": "x"} for name, passed, empty in found]
    judged = recorded_checks(dataclasses.replace(manifest, conversion={"checks": checks}))
    assert [outcome for _, outcome, _ in judged] == ["no evidence", "passed", "failed", "passed"]


def test_a_card_says_where_nothing_runs_sparse_and_what_a_builder_chose(repository: Path) -> None:
    """ONNX Runtime has no sparse kernels, whatever pattern the weights hold; of an engine its evidence is shown."""
    model = find_model(repository, "m")
    entry = model.version(1)
    assert entry.manifest is not None

    def sections(**changes: Any) -> dict[str, Section]:
        manifest = dataclasses.replace(entry.manifest, **changes)
        card = version_card(model, dataclasses.replace(entry, manifest=manifest), ModelState())
        return {section.title: section for section in card.sections}

    assert "nothing of this version runs sparse" in sections()["Sparsity"].note
    layers = [{"layer": "fc1", "pattern": "valid", "eligible": True, "chosen": None, "reason": "no line says so"}]
    built = sections(backend="tensorrt", extra={"engine": {"build": {"library": "tensorrt"}, "layers": layers}})
    assert built["Sparsity"].note == ""
    assert built["Engine"].rows == (("fc1", "valid", "yes", "not reported", "no line says so"),)


def test_the_page_of_add_is_the_card_with_its_layers(tmp_path: Path) -> None:
    onnx.save(mlp(), tmp_path / "m.onnx")
    given = ("add", str(tmp_path / "m.onnx"), "-n", "m", "-r", str(tmp_path / "models"))
    for page, more in (("card.html", ()), ("dry.html", ("--dry-run",))):
        ended = CliRunner().invoke(app, [*given, "--html", str(tmp_path / page), *more])
        assert ended.exit_code == 0, ended.output
    text = (tmp_path / "card.html").read_text()
    for said in ("Checks", "Drift", "Configuration", 'svg class="strip"', "nothing of this version runs sparse"):
        assert said in text, said
    assert text.count("fc1") == (tmp_path / "dry.html").read_text().count("fc1"), "the layers are listed once"


def test_both_forms_say_the_same_and_nothing_breaks_out(repository: Path, load: LoadTestReport) -> None:
    (card,) = version_cards(repository, "m:2", loads=[load])
    page, text = card_html(card), card_markdown(card)
    assert "<b>|" not in page
    assert "\n# " not in text.partition("# m:2")[2]
    read = html.unescape(re.sub(r"<[^>]*>", "", page))
    assert "<b>|`x`.onnx" in read
    for section in card.sections:
        assert f"## {section.title}" in text
        for name, value in section.facts:
            assert name in read
            assert value in read
        assert all(cell in read for row in section.rows for cell in row)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) > 20
    for head, rule in itertools.pairwise(tables):
        if set(rule) <= set("| -"):
            assert head.count("|") == rule.count("|")


def test_an_index_links_to_each_card(repository: Path) -> None:
    cards = version_cards(repository)
    page = index_html("models", cards)
    assert re.findall(r'href="([^"]*)"', page) == ["m-1.html", "m-2.html"]
    assert page.count("<tr") == 3


def test_the_command(repository: Path, load: LoadTestReport, tmp_path: Path) -> None:
    def run(*words: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["report", "-r", str(repository), *map(str, words)])
        return getattr(result.exception, "exit_code", result.exit_code), result.stdout

    assert run("m:2")[1].startswith("# m:2\n")
    (tmp_path / "load.json").write_text(json.dumps({**as_json(load), "verdict": None}))
    assert run("m:2", "-o", tmp_path / "card.html", "--loadtest", tmp_path / "load.json")[0] == 0
    assert "Load tests" in (tmp_path / "card.html").read_text()
    assert run("m", "-o", tmp_path / "site")[0] == 0
    assert {path.name for path in (tmp_path / "site").iterdir()} == {"index.html", "m-1.html", "m-2.html"}
    assert run("m")[0] == 2
    assert run("-o", tmp_path / "card.md")[0] == 2
    assert run("absent:1")[0] == 3
    assert json.loads(run("m:1", "--json")[1])["cards"][0]["version"] == 1
