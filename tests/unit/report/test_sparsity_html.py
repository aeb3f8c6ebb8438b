"""The page parses, says what the report says, and no name from a model breaks out of its place."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from support import onnx_models

from repo_manager.report.sparsity_html import sparsity_page
from repo_manager.sparsity import SparsityReport, sparsity_report

VOID = {"meta", "br"}


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(report: SparsityReport) -> Page:
    return Page(sparsity_page(report, title="model"))


def test_the_strip_is_the_network_by_compute() -> None:
    report = sparsity_report(onnx_models.zoo())
    page = page_of(report)
    bars = page.all("rect")
    assert len(bars) == len(report.layers) == 8
    assert sum(float(bar["width"] or 0) for bar in bars) == pytest.approx(1200, abs=0.1)
    assert len({bar["fill"] for bar in bars}) == 2
    assert len(page.all("tr")) == 1 + len(report.layers)
    for layer in report.layers:
        assert layer.node in page.text
        assert layer.reason in page.text
    assert "1.33x" in page.text


def test_hostile_names_stay_text() -> None:
    proto = onnx_models.mlp()
    proto.graph.node[0].name = "<script>alert(1)</script>\"'>"
    text = sparsity_page(sparsity_report(proto), title="</title><script>")
    page = Page(text)
    assert not page.all("script")
    assert "<script>alert(1)</script>" in page.text
    assert "http" not in text, "the page loads nothing"


def test_no_layers_at_all() -> None:
    page = page_of(sparsity_report(onnx_models.embedding()))
    assert "0 of 0" in page.text
    assert "unknown" in page.text
    assert not page.all("rect")
