from __future__ import annotations

import dataclasses
import html
import re
import xml.etree.ElementTree as ElementTree

from repo_manager.report.load_files import compare_markdown, load_junit, load_markdown, load_openmetrics
from repo_manager.report.load_html import compare_page


def test_junit_counts_what_it_holds(report, verdict):
    suite = ElementTree.fromstring(load_junit(report, verdict).split("\n", 1)[1])
    cases = suite.findall("testcase")
    assert int(suite.get("tests")) == len(cases) == len(report.points) + len(verdict.results)
    for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        assert int(suite.get(attribute)) == len(suite.findall(f"testcase/{tag}"))
    assert int(suite.get("failures")) >= 2  # the failed level and its gates
    assert "no <b>thanks</b>" in suite.find("testcase/failure").get("message")


def test_markdown_tables_keep_their_columns(report, verdict, comparisons):
    for text in (load_markdown(report, verdict), load_markdown(report), compare_markdown(comparisons)):
        width = None
        for line in text.splitlines():
            if not line.startswith("|"):
                width = None
                continue
            cells = len(re.findall(r"(?<!\\)\|", line)) - 1
            assert width in (None, cells), line
            width = cells
        assert "<b>" not in text
    assert "❌ fail" in load_markdown(report, verdict)
    assert "concurrency 64 | failed" in load_markdown(report)


def test_openmetrics_is_well_formed(report, verdict):
    lines = load_openmetrics(report, verdict).splitlines()
    assert lines[-1] == "# EOF"
    declared = set()
    for line in lines[:-1]:
        if line.startswith("# TYPE "):
            name = line.split()[2]
            assert name not in declared
            declared.add(name)
            continue
        match = re.fullmatch(r'([a-z_]+)\{((?:[a-z_]+="(?:[^"\\]|\\.)*",?)+)\} (\S+)', line)
        assert match, line
        assert match.group(1) in declared
        float(match.group(3))
    assert sum('quantile="0.99"' in line for line in lines) == 6


def test_where_when_and_how_something_was_measured_is_said(report, comparisons):
    """A report read a month later names server, machine, date, command and precisions."""
    known = {
        "environment": {"machine": "Linux x", "cpu": "EPYC", "cpus": "4"},
        "command": "repo-manager x --flag 'a`b'",
    }
    text = load_markdown(dataclasses.replace(report, **known))
    compared = [
        dataclasses.replace(comparisons[0], **known, started="2026-01-02T03:04:05", precisions=("fp32", "fp16"))
    ]
    for said in (text, compare_markdown(compared)):
        assert "client: Linux x, EPYC (4 CPUs)" in said
        assert "```console\nrepo-manager x --flag 'a`b'\n```" in said
    assert report.started.partition("T")[0] in text
    page = html.unescape(compare_page(compared))
    for said in ("2026-01-02T03:04:05", "repo-manager x --flag 'a`b'", "in fp32, backend", "in fp16, backend"):
        assert said in page
    assert "fp16" in compare_markdown(compared)
