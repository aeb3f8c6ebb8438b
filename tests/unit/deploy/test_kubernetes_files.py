"""deploy/kserve, deploy/gateway and deploy/loadtest: schemas, and how their files hang together."""

from __future__ import annotations

import copy
import json
import py_compile
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from support.command_lines import parse
from support.manifests import Object, load_objects
from support.manifests_links import check_set

DEPLOY = Path(__file__).parents[3] / "deploy"
SCHEMA = json.loads((DEPLOY / "kserve" / "schema.json").read_text(encoding="utf-8"))
CUSTOM = [
    "kserve/serving-runtime.yaml",
    "kserve/inference-service.yaml",
    "kserve/canary.yaml",
    "gateway/http-route.yaml",
]
VALUES = {
    "TRITON_IMAGE": "tritonserver:26.07-py3",
    "REPO_MANAGER_IMAGE": "repo-manager:0.1.0",
    "MODEL": "digits",
    "SERVER": "grpc://rel-triton.models:8001",
    "START_AT": "1790000000",
}


def objects(name: str) -> list[Object]:
    """Read a file as `envsubst` leaves it."""
    text = re.sub(r"\$(?=\()", "$$", (DEPLOY / name).read_text(encoding="utf-8"))
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return load_objects(string.Template(code).substitute(VALUES))


def only(name: str) -> Object:
    (item,) = objects(name)
    return item


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_resources_hold_the_fields_that_exist(name: str) -> None:
    jsonschema.validate(only(name), SCHEMA)


def test_the_schema_itself() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        ("kserve/canary.yaml", lambda o: o["spec"]["predictor"].update(canaryTrafficPercent=110)),
        ("kserve/canary.yaml", lambda o: o["spec"].update(canaryTrafficPercent=10)),
        ("kserve/inference-service.yaml", lambda o: o["spec"]["predictor"]["model"].update(storageUri="models/x")),
        ("kserve/inference-service.yaml", lambda o: o["spec"]["predictor"]["model"].pop("modelFormat")),
        ("kserve/serving-runtime.yaml", lambda o: o["spec"]["containers"][0].update(name="triton")),
        ("kserve/serving-runtime.yaml", lambda o: o["spec"].update(protocolVersions=["v3"])),
        ("gateway/http-route.yaml", lambda o: o["spec"]["rules"][0]["backendRefs"][0].update(weight=-1)),
        ("gateway/http-route.yaml", lambda o: o["spec"]["rules"][0]["matches"][0]["path"].update(type="Prefix")),
        ("gateway/http-route.yaml", lambda o: o["spec"].pop("parentRefs")),
    ],
)
def test_the_schema_fails_what_breaks_it(name: str, mutate: Callable[[Any], object]) -> None:
    mutant = copy.deepcopy(only(name))
    mutate(mutant)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(mutant, SCHEMA)


def test_the_runtime_and_its_service_fit() -> None:
    runtime, service, canary = (only(name) for name in CUSTOM[:3])
    for item in (service, canary):
        model = item["spec"]["predictor"]["model"]
        assert model["runtime"] == runtime["metadata"]["name"]
        assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
        formats = [(each["name"], each["version"]) for each in runtime["spec"]["supportedModelFormats"]]
        assert (model["modelFormat"]["name"], model["modelFormat"]["version"]) in formats
    assert canary["spec"]["predictor"]["model"]["storageUri"].startswith(
        service["metadata"]["annotations"]["repo-manager/snapshots"] + "/"
    )


def test_the_runtimes_ports_and_arguments_fit() -> None:
    spec = only(CUSTOM[0])["spec"]
    (container,) = spec["containers"]
    ports = {str(port["containerPort"]) for port in container["ports"]}
    assert {arg.partition("=")[2] for arg in container["args"] if arg.startswith("--http-port")} == ports
    assert str(container["readinessProbe"]["httpGet"]["port"]) in ports
    template = (DEPLOY / "helm" / "triton" / "templates" / "deployment.yaml").read_text(encoding="utf-8")
    assert {a.partition("=")[0] for a in container["args"]} - {"--http-port", "--grpc-port"} <= set(
        re.findall(r"- (--[a-z-]+)", template)
    )
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    assert container["image"] == VALUES["TRITON_IMAGE"]


def test_the_role_for_kserve_allows_what_roll_outs_status_and_gc_ask_for_and_no_more() -> None:
    role, binding = objects("kserve/role.yaml")
    for item in (role, binding):
        kubernetes_validate.validate(item, "1.37", strict=True)
    assert check_set([role, binding]) == []
    allowed = [
        (resource, verb, "resourceNames" in rule)
        for rule in role["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    ]
    assert sorted(allowed) == [
        ("deployments", "list", False),
        ("inferenceservices", "get", True),
        ("inferenceservices", "list", False),
        ("inferenceservices", "patch", True),
        ("pods", "list", False),
        ("replicasets", "list", False),
        ("revisions", "list", False),
    ]
    service = only("kserve/inference-service.yaml")["metadata"]
    assert role["rules"][0]["resourceNames"] == [service["name"]]
    assert role["metadata"]["namespace"] == binding["metadata"]["namespace"]


SERVICES = frozenset({"Service/stable-triton", "Service/canary-triton"})
ROUTE_MUTATIONS: dict[str, Callable[[Any], object]] = {
    "weights": lambda o: [backend.update(weight=0) for backend in o["spec"]["rules"][0]["backendRefs"]],
    "twice": lambda o: o["spec"]["rules"][0]["backendRefs"][1].update(name="stable-triton"),
    "missing": lambda o: o["spec"]["rules"][0]["backendRefs"][1].update(name="other"),
    "parents": lambda o: o["spec"].update(parentRefs=[]),
}


def test_the_route_leads_to_the_charts_services() -> None:
    assert check_set(objects("gateway/http-route.yaml"), external=SERVICES) == []


@pytest.mark.parametrize("case", ROUTE_MUTATIONS)
def test_a_route_that_leads_nowhere_fails(case: str) -> None:
    mutant = only("gateway/http-route.yaml")
    ROUTE_MUTATIONS[case](mutant)
    assert {finding.rule for finding in check_set([mutant], external=SERVICES)} == {"route"}


def load_jobs() -> list[Object]:
    return [*objects("loadtest/job.yaml"), *objects("loadtest/merge.yaml")]


def test_the_load_jobs() -> None:
    for item in load_jobs():
        kubernetes_validate.validate(item, "1.37", strict=True)
    assert check_set(load_jobs()) == []


@pytest.mark.parametrize(
    ("rule", "mutate"),
    [
        ("job", lambda job: job["spec"].pop("completions")),
        ("job", lambda job: job["spec"].update(parallelism=9)),
        ("job", lambda job: job["spec"]["template"]["spec"].update(restartPolicy="Always")),
        ("job", lambda job: job["spec"].pop("activeDeadlineSeconds")),
        ("environment", lambda job: job["spec"]["template"]["spec"]["containers"][0]["env"].pop()),
        (
            "reference",
            lambda job: job["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"].update(claimName="x"),
        ),
    ],
)
def test_a_load_job_that_breaks_a_rule_fails(rule: str, mutate: Callable[[Any], object]) -> None:
    found = load_jobs()
    mutate(next(item for item in found if item["metadata"]["name"] == "loadtest"))
    assert rule in {finding.rule for finding in check_set(found)}


def test_all_pods_of_the_job_start_together_and_each_has_its_own_file() -> None:
    job = next(item for item in load_jobs() if item["metadata"]["name"] == "loadtest")
    assert job["spec"]["completions"] == job["spec"]["parallelism"], "else they do not measure at the same time"
    args = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert [arg for arg in args if arg.startswith("--report")] == ["--report=/results/part-$(INDEX).json"]
    assert any(arg.startswith("--start-at=") for arg in args)
    parse([arg.replace("$(INDEX)", "0").replace("$(MODEL)", "digits") for arg in args])


def test_the_locust_file_compiles(tmp_path: Path) -> None:
    py_compile.compile(str(DEPLOY / "loadtest" / "locustfile.py"), cfile=str(tmp_path / "x.pyc"), doraise=True)
