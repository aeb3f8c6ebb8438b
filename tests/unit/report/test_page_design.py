"""One design for all pages: every cell knows its column, and no page brings styles of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from support import onnx_models

import repo_manager.report
from repo_manager.loadtest.compare import Comparison
from repo_manager.loadtest.judge import Verdict
from repo_manager.loadtest.result import LoadTestReport
from repo_manager.report.load_html import compare_page, load_page
from repo_manager.report.sparsity_html import sparsity_page
from repo_manager.sparsity import sparsity_report

TEMPLATES = Path(repo_manager.report.__file__).parent / "templates"


def titles_and_rows(table: str) -> tuple[list[str], list[list[str]]]:
    head, _, body = table.partition("<tbody>")
    titles = [re.sub(r"<[^>]*>", "", title).strip() for title in re.findall(r"<th\b[^>]*>(.*?)</th>", head, re.S)]
    rows = [re.findall(r'<td data-label="([^"]*)"', row) for row in re.findall(r"<tr\b.*?</tr>", body, re.S)]
    return titles, rows


def test_a_cell_knows_its_column(report: LoadTestReport, verdict: Verdict, comparisons: Sequence[Comparison]) -> None:
    """A narrow window shows a row as a list of titles and values."""
    pages = [
        load_page(report, verdict),
        compare_page(comparisons),
        sparsity_page(sparsity_report(onnx_models.zoo()), title="zoo"),
    ]
    for page in pages:
        tables = re.findall(r"<table\b.*?</table>", page, re.S)
        assert tables
        for table in tables:
            titles, rows = titles_and_rows(table)
            assert titles
            assert all(row in ([], titles) for row in rows), "a row without labels is one text over all columns"
            assert ('class="wide"' in table) == (len(titles) > 8)


def test_why_a_level_is_not_stable_is_in_its_row(report: LoadTestReport) -> None:
    (failed,) = (point for point in report.points if point.outcome == "failed")
    page = load_page(report)
    row = re.search(r"<td[^>]*>concurrency 64</td>.*?</tr>\s*<tr class=\"why\">(.*?)</tr>", page, re.S)
    assert row is not None
    assert failed.reason.partition("<")[0] in row[1]


@pytest.mark.parametrize("template", sorted(TEMPLATES.glob("*.html.j2")), ids=lambda path: path.name)
def test_pages_share_one_style(template: Path) -> None:
    text = template.read_text(encoding="utf-8")
    if "<html" in text:
        assert re.findall(r"<style>(.*?)</style>", text, re.S) == ['\n{% include "style.css.j2" %}\n']
    else:
        assert "<style" not in text
