"""deploy/progressive: held to the CRDs of Argo Rollouts and Flagger; their queries judge the new pods alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.crds import check_custom
from support.manifests import Object
from support.promql import metric_names, recorded_metrics, run_promtool

FOLDER = Path(__file__).parents[3] / "deploy" / "progressive"
FILES = sorted(FOLDER.glob("*.yaml"))
NEW, OLD = "rel-triton-7c9f-x2x4z", "rel-triton-5d8b-abcde"
# How each names the new pods -> the pods in service until then.
GIVEN = {
    "{{args.rollout}}": "rel-triton",
    "{{args.hash}}": "7c9f",
    "{{ namespace }}": "models",
    "{{ target }}": "rel-triton",
    "{{ interval }}": "2m",
}


def objects(path: Path) -> list[Object]:
    return [item for item in yaml.safe_load_all(path.read_text(encoding="utf-8")) if item]


def queries(item: Object) -> dict[str, str]:
    if item["kind"] == "MetricTemplate":
        return {item["metadata"]["name"]: item["spec"]["query"]}
    found = item["spec"].get("metrics", ()) if item["kind"] == "AnalysisTemplate" else ()
    return {metric["name"]: metric["provider"]["prometheus"]["query"] for metric in found}


QUERIES = {
    (path.name, name): query for path in FILES for item in objects(path) for name, query in queries(item).items()
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_object_is_what_its_crd_takes(path: Path) -> None:
    for item in objects(path):
        check_custom(item)


def test_what_names_another_object_names_one_that_is_there() -> None:
    everything = [item for path in FILES for item in objects(path)]
    names = {(item["kind"], item["metadata"]["name"]) for item in everything}
    (canary,) = (item for item in everything if item["kind"] == "Canary")
    for metric in canary["spec"]["analysis"]["metrics"]:
        assert ("MetricTemplate", metric["templateRef"]["name"]) in names
    (rollout,) = (item for item in everything if item["kind"] == "Rollout")
    (template,) = (item for item in everything if item["kind"] == "AnalysisTemplate")
    needed = {arg["name"] for arg in template["spec"]["args"] if "value" not in arg}
    steps = [step["analysis"] for step in rollout["spec"]["strategy"]["canary"]["steps"] if "analysis" in step]
    assert steps
    for step in steps:
        assert [("AnalysisTemplate", each["templateName"]) in names for each in step["templates"]] == [True]
        assert {arg["name"] for arg in step["args"]} == needed


@pytest.mark.parametrize("key", QUERIES, ids=lambda key: f"{key[0]}: {key[1]}")
def test_a_query_reads_the_new_pods_and_has_no_value_without_requests(key: tuple[str, str], tmp_path: Path) -> None:
    query = QUERIES[key]
    for name, value in GIVEN.items():
        query = query.replace(name, value)
    assert "{{" not in query
    assert metric_names(query) <= set(recorded_metrics(("scrape_0.txt", "scrape_1.txt", "scrape_2.txt")))
    old = OLD if key[0] == "argo-rollouts.yaml" else "rel-triton-primary-5d8b-abcde"

    def series(pod: str, failed: int, p99_us: int, succeeded: int) -> list[dict[str, Any]]:
        labels = f'namespace="models",pod="{pod}"'
        return [
            {"series": f"nv_inference_request_failure{{{labels}}}", "values": f"0+{failed}x10"},
            {"series": f"nv_inference_request_success{{{labels}}}", "values": f"0+{succeeded}x10"},
            {"series": f'nv_inference_request_summary_us{{{labels},quantile="0.99"}}', "values": f"{p99_us}x10"},
        ]

    share = {"errors": 0.25, "triton-errors": 25}.get(key[1])
    samples = [{"labels": "{}", "value": 0.2 if share is None else share}]
    given = [*series(NEW, 1, 200_000, 3), *series(old, 60, 900_000, 60)]
    tests = [{"interval": "1m", "input_series": given, "promql_expr_test": [_check(query, samples)]}]
    tests.append({"interval": "1m", "input_series": given[3:], "promql_expr_test": [_check(query, [])]})
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump({"rule_files": [], "tests": tests}), encoding="utf-8")
    done = run_promtool("test", "rules", "tests.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def _check(query: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {"expr": query, "eval_time": "8m", "exp_samples": samples}


def test_neither_condition_holds_without_a_value() -> None:
    (template,) = (item for path in FILES for item in objects(path) if item["kind"] == "AnalysisTemplate")
    for metric in template["spec"]["metrics"]:
        for condition in ("successCondition", "failureCondition"):
            assert re.match(r"len\(result\) > 0 && result\[0\] (<|>=) \{\{args\.", metric[condition])
