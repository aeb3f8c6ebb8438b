from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from repo_manager.loadtest.result import LoadTestReport
from repo_manager.report.load_html import compare_page, load_page

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Balanced(HTMLParser):
    """Checks that every element is closed, and collects references and texts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        assert all(value is not None for name, value in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parsed(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.S)]


def test_the_page_stands_alone_and_is_small(report, verdict):
    page = load_page(report, verdict)
    found = parsed(page)
    assert found.references == []
    assert "script" not in found.tags
    assert "url(" not in page
    assert "@import" not in page
    assert len(page.encode()) < 100_000


def test_every_level_gate_and_note_is_in_it(report, verdict):
    text = parsed(load_page(report, verdict)).text
    for point in report.points:
        assert point.label in text
    assert text.count("p99<20ms") >= 7
    for words in (
        'm<"&x',
        "a <note>",
        "a & b",
        "no <b>thanks</b> | really",
        "repo-manager loadtest",
        "inconclusive"[:4],
    ):
        assert words in text


def test_charts_are_images_with_names_and_numbers(report, verdict):
    images = svgs(load_page(report, verdict))
    assert len(images) == 3 + 5  # the failed level has no time line
    for image in images:
        assert image.get("role") == "img"
        assert image.get("aria-label")
        assert image.find("title").text
        assert image.find("desc").text
    first = images[0]
    marks = [circle.get("aria-label") for circle in first.iter("circle")]
    assert sum("p99" in mark for mark in marks) == 6
    assert any(mark.startswith("knee") for mark in marks)
    assert any(text.text == "p99<20ms" for text in first.iter("text"))


def test_nothing_is_drawn_outside_its_chart(report, verdict):
    for image in svgs(load_page(report, verdict)):
        _, _, width, height = map(float, image.get("viewBox").split())
        for circle in image.iter("circle"):
            assert 0 <= float(circle.get("cx")) <= width
            assert 0 <= float(circle.get("cy")) <= height
        for path in image.iter("path"):
            pairs = re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path.get("d"))
            assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in pairs)
        for rect in image.iter("rect"):
            assert 0 <= float(rect.get("x")) <= float(rect.get("x")) + float(rect.get("width")) <= width


@pytest.mark.parametrize("count", [0, 1])
def test_a_report_with_little_in_it_has_a_page(report, count):
    few = LoadTestReport(report.target, {}, report.points[-count:] if count else (), "now", 1.0, {})
    page = load_page(few)
    parsed(page)
    assert "No level gave a measurement" in page


def test_light_dark_and_print(report):
    page = load_page(report)
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert '<html lang="en">' in page


def test_a_comparison_has_its_page(comparisons):
    page = compare_page(comparisons)
    found = parsed(page)
    assert "Batch size 256" in found.text
    assert len(svgs(page)) == 2
    assert len(page.encode()) < 100_000
