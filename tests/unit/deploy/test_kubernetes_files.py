"""deploy/kserve, deploy/gateway and deploy/loadtest: schemas, and how their files hang together."""

from __future__ import annotations

import copy
import json
import os
import py_compile
import re
import shutil
import string
import subprocess
import sys
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
        ("events", "create", False),
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


# Triton's HTTP API (server, `src/http_server.cc`): requests clients may make from outside, and some they may not.
ALLOWED = [
    *(("GET", path) for path in ("/v2", "/v2/health/live", "/v2/health/ready")),
    *(("GET", f"/v2/models/digits{path}") for path in ("", "/ready", "/config")),
    *(("POST", f"/v2/models/digits/{path}") for path in ("infer", "generate", "generate_stream")),
]
FORBIDDEN = [
    f"{base}{path}"
    for base in ("", "/v2/models/digits", "/v2/models/digits/versions/2", "/v2/models/other")
    for path in ("/v2/trace/setting", "/trace/setting", "/stats")
] + [
    *(
        "/v2/logging",
        "/v2/repository/index",
        "/v2/repository/models/digits/load",
        "/v2/repository/models/digits/unload",
    ),
    *("/v2/systemsharedmemory/status", "/v2/systemsharedmemory/region/a/register", "/v2/cudasharedmemory/status"),
    *("/metrics", "/", "/v2/models/other/infer", "/v2/models/digits/infer/../trace/setting"),
]


def _is_routed(method: str, path: str) -> bool:
    """Say whether a rule of the route takes a request, as the Gateway API matches."""
    for rule in only("gateway/http-route.yaml")["spec"]["rules"]:
        assert rule["matches"], "a rule without matches takes everything"
        for match in rule["matches"]:
            wanted = match["path"]["value"]
            inside = path == wanted or path.startswith(wanted.rstrip("/") + "/")
            fits = path == wanted if match["path"]["type"] == "Exact" else inside
            if fits and match.get("method", method) == method:
                return True
    return False


def test_the_route_lets_clients_infer_and_nothing_else() -> None:
    assert all(_is_routed(*request) for request in ALLOWED)
    routed = [(method, path) for path in FORBIDDEN for method in ("GET", "POST") if _is_routed(method, path)]
    assert routed == []
    assert not _is_routed("POST", "/v2/models/digits/config")


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


KUBECTL = """#!/bin/sh
case "$1 $2" in
  "create namespace") printf 'apiVersion: v1\\nkind: Namespace\\nmetadata: {name: %s}\\n' "$3" ;;
  "apply "*) echo --- >>"$APPLIED"; cat >>"$APPLIED" ;;
  *) echo "$*" >>"$APPLIED.waits" ;;
esac
"""


def test_the_readmes_load_test_runs_as_written(tmp_path: Path) -> None:
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^## loadtest/\n\n```sh\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    (tmp_path / "kubectl").write_text(KUBECTL, encoding="utf-8")
    (tmp_path / "kubectl").chmod(0o755)
    if shutil.which("envsubst") is None:  # of GNU gettext
        stand_in = f"#!{sys.executable}\nimport os, sys\nsys.stdout.write(os.path.expandvars(sys.stdin.read()))\n"
        (tmp_path / "envsubst").write_text(stand_in, encoding="utf-8")
        (tmp_path / "envsubst").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {"PATH": path, "APPLIED": str(tmp_path / "applied")}
    script = f"set -euo pipefail\n{found[1]}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=DEPLOY.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    items = load_objects((tmp_path / "applied").read_text(encoding="utf-8"))
    for item in items:
        kubernetes_validate.validate(item, "1.37", strict=True)
    assert [item["kind"] for item in items] == ["Namespace", "PersistentVolumeClaim", "Job", "Job"]
    jobs = [item["spec"]["template"]["spec"]["containers"][0] for item in items if item["kind"] == "Job"]
    assert {job["image"] for job in jobs} == {"repo-manager:0.1.0"}
    given = {entry["name"]: entry.get("value") for entry in jobs[0]["env"] if "value" in entry}
    assert all(given.values()), given
    waits = (tmp_path / "applied.waits").read_text(encoding="utf-8")
    assert "job/loadtest" in waits, "the parts are there before they are merged"
