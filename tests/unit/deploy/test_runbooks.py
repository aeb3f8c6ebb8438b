"""docs/runbooks: a page for each alert, whose commands, queries and links are real."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command_lines import command_lines, parse
from support.promql import metric_names, recorded_metrics

ROOT = Path(__file__).parents[3]
RUNBOOKS = ROOT / "docs" / "runbooks"
PROMETHEUS = ROOT / "deploy" / "prometheus"
PAGES = sorted(path for path in RUNBOOKS.glob("*.md") if path.name != "README.md")
SCRAPES = ("scrape_0.txt", "scrape_1.txt", "scrape_2.txt", "scrape_3.txt", "gpu.txt")
# The verbs of kubectl 1.37 allowed on the pages, and the options of each.
KUBECTL = {
    "get": {"-n", "-l", "-o", "--sort-by", "--field-selector"},
    "describe": {"-n"},
    "logs": {"-n", "-l", "--tail", "--previous", "--prefix"},
    "delete": {"-n"},
    "scale": {"-n", "--replicas"},
    "top": {"-n", "-l"},
    "rollout": {"-n", "--timeout"},
    "exec": {"-n"},
}
KINDS = {
    "pod",
    "pods",
    "deployment",
    "deployments",
    "hpa",
    "nodes",
    "events",
    "status",
    "undo",
    "deployment/rel-triton",
}


def rules(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / name).read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = [rule["alert"] for rule in rules("alerts.yaml")]


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in found for line in block.splitlines() if line.strip()]


def test_every_alert_has_its_page_and_every_page_its_alert() -> None:
    assert sorted(ALERTS) == [page.stem for page in PAGES]
    index = (RUNBOOKS / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(\w+)\]\((\w+)\.md\) \| (\w+) \|$", index, flags=re.MULTILINE) == [
        (rule["alert"], rule["alert"], rule["labels"]["severity"]) for rule in rules("alerts.yaml")
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_says_what_it_means_what_to_look_at_and_what_to_type(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    heads = re.findall(r"^#+ .*$", text, flags=re.MULTILINE)
    assert heads == [f"# {page.stem}", "## What it means", "## What to look at", "## What to type"]
    assert blocks(page, "promql")
    assert blocks(page, "sh")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_exists(page: Path) -> None:
    for line in blocks(page, "sh"):
        tool, *words = shlex.split(line, comments=True)
        if tool == "repo-manager":
            (found,) = command_lines(line)
            parse(found.words)
            continue
        assert tool == "kubectl", line
        verb, *rest = words
        rest = rest[: rest.index("--")] if "--" in rest else rest
        options = {word.partition("=")[0] for word in rest if word.startswith("-")}
        assert options <= KUBECTL[verb], line
        assert verb in ("logs", "exec") or rest[0] in KINDS, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_query_of_a_page_reads_metrics_that_exist(page: Path) -> None:
    recorded = {rule["record"] for rule in rules("recording.yaml")} | {"triton:objective_p99_seconds"}
    known = set(recorded_metrics(SCRAPES)) | recorded | {"up"}
    for line in blocks(page, "promql"):
        assert metric_names(line) <= known, line


@pytest.mark.parametrize("name", ["alerts.yaml", "recording.yaml"])
def test_the_chart_has_the_same_rules(name: str) -> None:
    chart = ROOT / "deploy" / "helm" / "triton" / "files" / name
    assert chart.read_bytes() == (PROMETHEUS / name).read_bytes(), (
        f"cp deploy/prometheus/{name} deploy/helm/triton/files/"
    )
