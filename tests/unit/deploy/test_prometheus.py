"""Recording rules, alerts and the dashboard: run by promtool, and compared with a real Triton's recorded metrics."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.promql import metric_names, recorded_metrics, run_promtool, scrape

DEPLOY = Path(__file__).parents[3] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
DASHBOARD = DEPLOY / "grafana" / "triton-fleet.json"
RULE_FILES = ("objectives.yaml", "recording.yaml", "alerts.yaml")
RULE_TESTS = ("tests.yaml", "tests-day.yaml")
SCRAPES = ("scrape_0.txt", "scrape_1.txt", "scrape_2.txt", "scrape_3.txt", "gpu.txt")
# Prometheus's own labels, of every target and every alert.
OWN = {"up", "ALERTS"}
# Of kube-state-metrics, as the panel's title says.
KUBE = {"kube_pod_container_status_restarts_total"}
TARGET_LABELS = frozenset({"instance", "job", "namespace", "pod"})


def rules() -> list[dict[str, Any]]:
    files = [yaml.safe_load((PROMETHEUS / name).read_text(encoding="utf-8")) for name in RULE_FILES]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def recorded_names() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def known_names() -> set[str]:
    return set(recorded_metrics(SCRAPES)) | OWN | recorded_names()


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PROMETHEUS, tmp_path / "prometheus"))


def test_files_are_valid() -> None:
    done = run_promtool("check", "config", "prometheus.yaml", folder=PROMETHEUS)
    assert done.returncode == 0, done.stdout + done.stderr
    linted = run_promtool("check", "rules", "--lint=all", "--lint-fatal", *RULE_FILES, folder=PROMETHEUS)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_rules_do_what_their_tests_say() -> None:
    done = run_promtool("test", "rules", *RULE_TESTS, folder=PROMETHEUS)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", RULE_TESTS)
def test_groups_are_tested_in_the_order_in_which_they_read_one_another(name: str) -> None:
    """promtool takes any order otherwise, and one test in fifteen then fails."""
    groups = [yaml.safe_load((PROMETHEUS / file).read_text(encoding="utf-8"))["groups"] for file in RULE_FILES]
    tested = yaml.safe_load((PROMETHEUS / name).read_text(encoding="utf-8"))
    assert tested["group_eval_order"] == [group["name"] for file in groups for group in file]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("recording.yaml", "/ sum by (namespace, job, model, version) (rate(nv_inference_exec_count[5m]))", ""),
        ("recording.yaml", 'quantile="0.99"}) / 1e6', 'quantile="0.5"}) / 1e6'),
        ("alerts.yaml", "rate5m > 0.01", "rate5m > 0.9"),
        ("alerts.yaml", "> 0.95", "> 0.99"),
        ("alerts.yaml", "for: 2m", "for: 2h"),
        ("alerts.yaml", "[10m]) > 100", "[1m]) > 100"),
        ("alerts.yaml", "triton:servers_with_model[6h]", "triton:servers_with_model[5m]"),
        ("alerts.yaml", "increase1h >= 10", "increase1h >= 0"),
        ("alerts.yaml", "and on (namespace, job) triton:targets", ""),
        ("recording.yaml", "sum by (namespace, job, model, version) (increase", "sum by (job, model) (increase"),
        ("recording.yaml", "count by (namespace, job) (up", "count by (job) (up"),
        ("objectives.yaml", "vector(0.05)", "vector(0.5)"),
    ],
)
def test_a_changed_rule_fails_them(copied: Path, file: str, old: str, new: str) -> None:
    text = (copied / file).read_text(encoding="utf-8")
    assert old in text
    (copied / file).write_text(text.replace(old, new), encoding="utf-8")
    assert any(run_promtool("test", "rules", name, folder=copied).returncode != 0 for name in RULE_TESTS)


def rule_tests() -> list[dict[str, Any]]:
    files = [yaml.safe_load((PROMETHEUS / name).read_text(encoding="utf-8")) for name in RULE_TESTS]
    return [test for file in files for test in file["tests"]]


def test_every_rule_has_a_test() -> None:
    asserted = [check["expr"] for test in rule_tests() for check in test.get("promql_expr_test", ())]
    records = {name for expression in asserted for name in metric_names(expression)}
    assert recorded_names() <= records
    checks = [check for test in rule_tests() for check in test.get("alert_rule_test", ())]
    fired = {check["alertname"] for check in checks if check["exp_alerts"]}
    assert {rule["alert"] for rule in rules() if "alert" in rule} <= fired


def test_inputs_have_the_labels_that_triton_was_recorded_with() -> None:
    known = recorded_metrics(SCRAPES)
    for test in rule_tests():
        for entry in test["input_series"]:
            name, _, labels = entry["series"].partition("{")
            keys = frozenset(re.findall(r"(\w+)=", labels))
            if name not in OWN:
                assert keys - TARGET_LABELS in known[name], entry["series"]


def test_a_healthy_server_as_recorded_raises_no_alert(copied: Path) -> None:
    before, after = scrape("scrape_1.txt"), scrape("scrape_2.txt")
    series = [{"series": 'up{job="triton",instance="a:8002"}', "values": "1x90"}]
    for (metric, labels), value in before.items():
        text = ",".join(f'{key}="{label}"' for key, label in sorted(labels))
        # The two were 8 s apart; go on at this pace.
        step = max(0.0, (after[metric, labels] - value) * 60 / 8) if not metric.endswith("summary_us") else 0.0
        step = 0.0 if "cpu" in metric or "pool" in metric else step
        name = f'{metric}{{job="triton",instance="a:8002"{"," + text if text else ""}}}'
        series.append({"series": name, "values": f"{value:f}+{step:f}x90"})
    alerts = [rule["alert"] for rule in rules() if "alert" in rule]
    assert len(series) > 50
    document = {
        "rule_files": list(RULE_FILES),
        "tests": [
            {
                "interval": "1m",
                "input_series": series,
                "alert_rule_test": [{"alertname": name, "eval_time": "80m", "exp_alerts": []} for name in alerts],
            }
        ],
    }
    (copied / "healthy.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    done = run_promtool("test", "rules", "healthy.yaml", folder=copied)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_read_only_what_exists() -> None:
    for rule in rules():
        unknown = metric_names(rule["expr"]) - known_names()
        assert not unknown, f"{rule.get('record') or rule.get('alert')}: {unknown}"


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('sum by (job, a) (rate(x_y{a=~"b|c", d="e f"}[5m])) / on (job) group_left () z:r', {"x_y", "z:r"}),
        ('label_replace(vector(0.05), "a", "b", "", "") or up{job=~"$job"} offset 1d > 1e-9', {"up"}),
        ("min_over_time(q[10m]) > bool 3 unless inf", {"q"}),
    ],
)
def test_metric_names(expression: str, names: set[str]) -> None:
    assert metric_names(expression) == names


def test_alerts_say_what_to_do() -> None:
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in {"page", "ticket"}
            assert {"summary", "action"} <= set(rule["annotations"])


def test_the_autoscalers_metric_is_served(copied: Path) -> None:
    (rule,) = yaml.safe_load((PROMETHEUS / "adapter-rules.yaml").read_text(encoding="utf-8"))["rules"]["custom"]
    template = (DEPLOY / "helm" / "triton" / "templates" / "autoscaling.yaml").read_text(encoding="utf-8")
    assert f"name: {rule['name']['as']}\n" in template
    assert re.fullmatch(rule["name"]["matches"], rule["seriesQuery"].partition("{")[0])
    query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", 'namespace="n"')
    assert metric_names(query) <= set(recorded_metrics(SCRAPES))
    series = [
        {"series": f'nv_inference_{name}{{namespace="n",pod="{pod}"}}', "values": f"0+{step}x10"}
        for name, pod, step in (
            ("queue_duration_us", "a", 6_000_000),
            ("request_success", "a", 600),
            ("queue_duration_us", "b", 0),
            ("request_success", "b", 0),
        )
    ]
    samples = [{"labels": '{pod="a"}', "value": 0.01}, {"labels": '{pod="b"}', "value": 0}]
    test = {"interval": "1m", "input_series": series}
    test["promql_expr_test"] = [{"expr": query, "eval_time": "5m", "exp_samples": samples}]
    (copied / "adapter.yaml").write_text(yaml.safe_dump({"rule_files": [], "tests": [test]}), encoding="utf-8")
    done = run_promtool("test", "rules", "adapter.yaml", folder=copied)
    assert done.returncode == 0, done.stdout + done.stderr


def dashboard() -> dict[str, Any]:
    return dict(json.loads(DASHBOARD.read_text(encoding="utf-8")))


def expressions(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for panel in document["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for note in document["annotations"]["list"]:
        if note["datasource"]["type"] == "prometheus":
            yield note["name"], note["expr"]


def test_every_expression_of_the_dashboard_is_valid_and_reads_what_exists(tmp_path: Path) -> None:
    variables = {entry["name"] for entry in dashboard()["templating"]["list"]}
    found = []
    for number, (title, expression) in enumerate(expressions(dashboard())):
        used = set(re.findall(r"\$\{?(\w+)\}?", expression))
        assert used <= variables, f"{title}: {used - variables}"
        unknown = metric_names(expression) - known_names()
        assert unknown <= (KUBE if "kube-state-metrics" in title else set()), title
        found.append({"record": f"check:{number}", "expr": re.sub(r"\$\{?\w+\}?", ".*", expression)})
    assert len(found) > 20
    rules_file = tmp_path / "dashboard.yaml"
    rules_file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": found}]}), encoding="utf-8")
    done = run_promtool("check", "rules", rules_file, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboards_variables_ask_for_labels_that_exist() -> None:
    for entry in dashboard()["templating"]["list"]:
        if entry["type"] == "query":
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", entry["definition"])
            assert match is not None
            (name,) = metric_names(match[1])
            labels = set().union(*recorded_metrics(SCRAPES)[name]) | TARGET_LABELS
            assert match[2] in labels


def test_the_dashboards_panels_have_their_places() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies over another"
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["title"]


def test_the_dashboard_stays_readable_with_hundreds_of_gpus_and_tells_namespaces_apart() -> None:
    for title, expression in expressions(dashboard()):
        for selector in re.findall(r"\{([^}]*)\}", expression):
            names = dict(re.findall(r"(\w+)=~?\"([^\"]*)\"", selector))
            assert "objective" in expression or names.get("namespace") == "$namespace", f"{title}: {selector}"
        per_server = re.search(r"\bnv_(gpu|cpu)_|gpu_memory_ratio|pending_request", expression)
        few = ("sum(", "quantile(", "topk(", "max(", "count(")
        assert not per_server or expression.startswith(few), f"{title}: one line for each server"
        assert not re.match(r"sum\(triton:\w+_per_", expression), f"{title}: a sum of ratios"
    everything = next(entry for entry in dashboard()["templating"]["list"] if entry["name"] == "namespace")
    assert everything["allValue"] == ".*", "static targets have no namespace"
    for panel in dashboard()["panels"]:
        if panel["type"] == "timeseries":
            assert panel["options"]["legend"]["displayMode"] == "table", panel["title"]


def test_every_rule_is_shown_or_used() -> None:
    used = {name for _, expression in expressions(dashboard()) for name in metric_names(expression)}
    used |= {name for rule in rules() for name in metric_names(rule["expr"])}
    assert recorded_names() - used == {"triton:inferences:rate5m", "triton:queue_p99_seconds"}
