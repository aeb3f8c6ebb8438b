"""The page parses, agrees with the report, and no name from a model breaks out of its place."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest
from support import onnx_models

from repo_manager.engine.evidence import LayerEvidence
from repo_manager.report.sparsity_html import sparsity_page
from repo_manager.sparsity import SparsityReport, sparsity_report

VOID = {"meta", "br", "wbr"}


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


def test_a_name_breaks_between_its_words() -> None:
    proto = onnx_models.mlp()
    proto.graph.node[0].name = "/encoder/layer.0/self_attn/MatMul"
    text = sparsity_page(sparsity_report(proto), title="names")
    assert ">/encoder/<wbr>layer.<wbr>0/<wbr>self_<wbr>attn/<wbr>MatMul<" in text


def test_no_layers_at_all() -> None:
    page = page_of(sparsity_report(onnx_models.embedding()))
    assert "0 of 0" in page.text
    assert "unknown" in page.text
    assert not page.all("rect")


def evidence(**fields: Any) -> LayerEvidence:
    values = {
        "layer": "/fc<1>",
        "op_type": "Gemm",
        "pattern": "valid",
        "engine_layer": "/fc<1> + relu",
        "eligible": True,
        "chosen": True,
        "tactic": "sm90_sparse_gemm",
        "reason": "a sparse kernel was chosen",
    }
    return LayerEvidence(**{**values, **fields})


def test_the_evidence_of_an_engine_stands_on_the_page() -> None:
    report = sparsity_report(onnx_models.mlp())
    assert "Sparse kernels in the engine" not in sparsity_page(report, title="m")
    page = sparsity_page(
        report, title="m", evidence=[evidence(time_sparse_ns=12_345), evidence(chosen=None, tactic="")]
    )
    assert "Sparse kernels in the engine" in page
    assert "/fc&lt;1&gt; + relu" in page
    assert "12.3 µs" in page
    assert page.count("not reported") == 2
    assert "us</td>" not in sparsity_page(report, title="m", evidence=[evidence()]), "nothing was timed"
