"""The compose files: the published schema, and further rules, each proven by a file with a breach."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command_lines import parse
from support.compose import check_compose, variables
from support.dev_tools import tool
from support.manifests import load_objects

DEPLOY = Path(__file__).parents[3] / "deploy"
COMPOSE = DEPLOY / "compose"
FILES = ("compose.yaml", "compose.gpu.yaml")


@pytest.fixture
def document() -> dict[str, Any]:
    return dict(yaml.safe_load((COMPOSE / "compose.yaml").read_text(encoding="utf-8")))


def test_the_schema(tmp_path: Path) -> None:
    done = tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *FILES, folder=COMPOSE)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "compose.yaml").write_text("services: {a: {image: x, portz: []}}")
    done = tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml", folder=tmp_path)
    assert done.returncode != 0


def test_it_hangs_together(document: dict[str, Any]) -> None:
    assert check_compose(document, COMPOSE) == []


_MUTATIONS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "image": ("is not a variable", lambda s: s["triton"].update(image="tritonserver:latest")),
    "file": ("does not exist", lambda s: s["prometheus"]["volumes"].append("../nothing:/x:ro")),
    "writable": ("mounted writable", lambda s: s["seed"].update(volumes=["../../model_repository:/samples"])),
    "undeclared": ("is not declared", lambda s: s["s3"]["volumes"].append("other:/other")),
    "unused": ("declared and not used", lambda s: s["s3"].update(volumes=[])),
    "twice": ("two mounts at /tmp", lambda s: s["grafana"]["volumes"].append("grafana:/tmp")),
    "missing": ("which is not there", lambda s: s["triton"]["depends_on"].update(x={"condition": "service_healthy"})),
    "unchecked": ("which nobody checks", lambda s: s["triton"].pop("healthcheck")),
    "restarted": ("which is restarted", lambda s: s["seed"].update(restart="always")),
    "started": ("says nothing", lambda s: s["seed"]["depends_on"]["s3"].update(condition="service_started")),
    "circle": ("depends on itself", lambda s: s["s3"].update(depends_on={"triton": {"condition": "service_healthy"}})),
    "open": ("open to others", lambda s: s["triton"].update(ports=["8000:8000"])),
    "port": ("published twice", lambda s: s["grafana"].update(ports=["127.0.0.1:8000:3000"])),
    "root": ("can be written", lambda s: s["triton"].update(read_only=False)),
}


@pytest.mark.parametrize("case", _MUTATIONS)
def test_each_rule_fails_a_file_that_breaks_it(document: dict[str, Any], case: str) -> None:
    expected, mutate = _MUTATIONS[case]
    mutant = copy.deepcopy(document)
    mutate(mutant["services"])
    assert any(expected in found for found in check_compose(mutant, COMPOSE))


def test_the_gpu_overlay_is_of_a_service_that_is_there(document: dict[str, Any]) -> None:
    overlay = yaml.safe_load((COMPOSE / "compose.gpu.yaml").read_text(encoding="utf-8"))
    assert set(overlay["services"]) <= set(document["services"])
    (device,) = overlay["services"]["triton"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_every_variable_is_in_the_example() -> None:
    wanted = {
        name for file in FILES for name, optional in variables((COMPOSE / file).read_text()).items() if not optional
    }
    lines = (COMPOSE / ".env.example").read_text(encoding="utf-8").splitlines()
    given = {line.partition("=")[0] for line in lines if "=" in line}
    assert given == wanted
    assert not any("latest" in line for line in lines)


def test_commands_are_the_tools_own(document: dict[str, Any]) -> None:
    ours = [s for s in document["services"].values() if "REPO_MANAGER_IMAGE" in s["image"] and "command" in s]
    assert ours
    for service in ours:
        parse(service["command"])
    for line in re.findall(r"compose run --rm repo-manager (.+)", (COMPOSE / "compose.yaml").read_text()):
        if line != "COMMAND ...":
            parse(line.split())


def test_triton_runs_with_the_charts_arguments(document: dict[str, Any]) -> None:
    template = (DEPLOY / "helm" / "triton" / "templates" / "deployment.yaml").read_text(encoding="utf-8")
    of_chart = set(re.findall(r"- (--[a-z-]+)", template))
    of_compose = {word.partition("=")[0] for word in document["services"]["triton"]["command"][1:]}
    assert of_compose <= of_chart
    assert "--strict-readiness=false" in document["services"]["triton"]["command"]


def test_names_inside_the_network_are_services(document: dict[str, Any]) -> None:
    scraped = load_objects((DEPLOY / "prometheus" / "prometheus.yaml").read_text(encoding="utf-8"))[0]
    targets = [t for job in scraped["scrape_configs"] for s in job["static_configs"] for t in s["targets"]]
    sources = load_objects((COMPOSE / "grafana" / "datasources.yaml").read_text(encoding="utf-8"))[0]["datasources"]
    targets += [source["url"].removeprefix("http://") for source in sources]
    for target in targets:
        name, _, port = target.partition(":")
        assert f"127.0.0.1:{port}:{port}" in document["services"][name]["ports"]
    mounted = [mount.split(":")[1] for mount in document["services"]["prometheus"]["volumes"]]
    for file in scraped["rule_files"]:
        assert f"/etc/prometheus/{file}" in mounted


def test_grafana_finds_the_dashboards_where_they_are_mounted(document: dict[str, Any]) -> None:
    provider = load_objects((COMPOSE / "grafana" / "dashboards.yaml").read_text(encoding="utf-8"))[0]["providers"][0]
    mounts = dict(reversed(mount.split(":")[:2]) for mount in document["services"]["grafana"]["volumes"])
    assert (COMPOSE / mounts[provider["options"]["path"]] / "triton-fleet.json").is_file()
