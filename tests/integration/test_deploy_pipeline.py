"""The steps of deploy/ci, as the workflow and the GitLab file run them, from an ONNX file to two real servers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.serving import running_server

from repo_manager.samples import sample_model
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer

pytestmark = [pytest.mark.integration, pytest.mark.slow]

CI = Path(__file__).parents[2] / "deploy" / "ci"


class Pipeline:
    """A checkout with the files in place, and a CI system's environment."""

    def __init__(self, folder: Path, staging: EmbeddedServer, production: EmbeddedServer) -> None:
        self.folder = folder
        shutil.copytree(CI / "github" / "deploy-model", folder / "action")
        shutil.copy2(CI / "pipeline.sh", folder / "action")
        (folder / "ci").mkdir()
        shutil.copy2(CI / "pipeline.sh", folder / "ci")
        self.output, self.summary = folder / "output", folder / "summary.md"
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "MODEL_FILE": str(sample_model()),
            "MODEL_NAME": "digits",
            "PRECISION": "fp16",
            "BACKEND": "onnxruntime",
            "STAGING_REPOSITORY": staging.options.repository,
            "STAGING_SERVER": staging.grpc_url,
            "PRODUCTION_REPOSITORY": production.options.repository,
            "PRODUCTION_SERVER": production.grpc_url,
            "GATES": "errors<50%\np99<5s\n",
            "CONCURRENCY": "2",
            "DURATION": "1",
            "GITHUB_ACTION_PATH": str(folder / "action"),
            "GITHUB_OUTPUT": str(self.output),
            "GITHUB_STEP_SUMMARY": str(self.summary),
        }

    def run(self, script: str, *, code: int = 0, **more: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env={**self.environment, **more},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def step(self, name: str, *, code: int = 0, **more: str) -> str:
        """Run a step as the composite action does: each of its `run` scripts."""
        action = yaml.safe_load((self.folder / "action" / "action.yml").read_text(encoding="utf-8"))
        *first, last = [step["run"] for step in action["runs"]["steps"]]
        for script in first:
            self.run(script, REQUIREMENT="not-installed-because-it-is-there")
        return self.run(last, code=code, STEP=name, **more)


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[Pipeline]:
    folders = tmp_path / "staging", tmp_path / "production"
    for folder in folders:
        folder.mkdir()
    staging, production = (ServerOptions(repository=str(folder), auto_complete=False) for folder in folders)
    (tmp_path / "checkout").mkdir()
    with running_server(staging) as first, running_server(production) as second:
        yield Pipeline(tmp_path / "checkout", first, second)


def ready(url: str) -> set[int]:
    with TritonClient.connect(url) as client:
        return {version for version, entry in client.versions("digits").items() if entry.state == "READY"}


def test_from_the_file_to_production_and_back_when_production_disagrees(pipeline: Pipeline) -> None:
    production = pipeline.environment["PRODUCTION_SERVER"]
    workflow = yaml.safe_load((CI / "github" / "deploy-model.yml").read_text(encoding="utf-8"))
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            if "step" in step.get("with", {}):
                pipeline.step(step["with"]["step"])
    assert ready(pipeline.environment["STAGING_SERVER"]) == ready(production) == {1}
    assert pipeline.output.read_text().split() == ["version=1", "production-version=1"]
    assert "**digits:1** serves in production." in pipeline.summary.read_text()
    results = pipeline.folder / "pipeline-results"
    assert "<testsuite" in (results / "gate.xml").read_text()
    assert (results / "production.json").is_file()

    # The second version as GitLab runs it: staging's gate stops it, then production's own check sends it back.
    jobs = yaml.safe_load((CI / "gitlab" / "deploy-model.yml").read_text(encoding="utf-8"))
    scripts = {name: job["script"][0] for name, job in jobs.items() if isinstance(job, dict) and "script" in job}
    for name in ("verify", "add", "deploy-staging"):
        pipeline.run(scripts[name], PRECISION="fp32")
    impossible = "p50<1us"
    pipeline.run(scripts["gate"], code=4, GATES=impossible)
    assert ready(production) == {1}
    pipeline.run(scripts["promote"])
    said = pipeline.run(scripts["deploy-production"], code=4, GATES=impossible)
    assert "Deployed" in said
    assert ready(production) == {1}
    assert "failed its check in production; going back" in pipeline.summary.read_text()


def test_steps_out_of_order_say_so(tmp_path: Path) -> None:
    environment = {**os.environ, "MODEL_NAME": "digits", "RESULTS": str(tmp_path / "results")}
    for step in ("staging", "promote", "production"):
        done = subprocess.run(
            ["bash", CI / "pipeline.sh", step], env=environment, capture_output=True, text=True, timeout=20, check=False
        )
        assert done.returncode == 2
        assert "run the steps in order" in done.stderr
    usage = subprocess.run(["bash", CI / "pipeline.sh"], capture_output=True, text=True, timeout=20, check=False)
    assert usage.returncode == 2
    assert "pipeline.sh verify | add" in usage.stderr


@pytest.mark.parametrize(("step", "variable"), [("staging", "STAGING"), ("production", "PRODUCTION")])
def test_an_address_that_answers_no_inference_is_named_before_anything_is_deployed(
    tmp_path: Path, step: str, variable: str
) -> None:
    for name in ("version", "production-version"):
        (tmp_path / name).write_text("1\n")
    environment = {**os.environ, "MODEL_NAME": "digits", "RESULTS": str(tmp_path), "PATH": "/usr/bin:/bin"}
    environment |= {f"{variable}_SERVER": "k8s://models/rel", f"{variable}_REPOSITORY": str(tmp_path)}
    command = ["bash", CI / "pipeline.sh", step]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"set {variable}_INFERENCE to the address that does" in done.stderr
    environment |= {f"{variable}_INFERENCE": "grpc://rel-triton.models:8001"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)
    assert "repo-manager: command not found" in done.stderr, "it goes on to deploy"


def test_a_first_version_that_fails_in_production_is_taken_out_of_service(pipeline: Pipeline) -> None:
    for step in ("add", "promote"):
        pipeline.step(step)
    said = pipeline.step("production", code=4, GATES="p50<1us")
    assert "digits has no earlier deployment to go back to" in said
    assert "It was the first version: **digits:1** was taken out of service." in pipeline.summary.read_text()
    assert ready(pipeline.environment["PRODUCTION_SERVER"]) == set()


def test_gitlab_runs_a_shell_in_the_image() -> None:
    """The image's own entry point is `repo-manager`, so GitLab's shell would be read as a command."""
    image = yaml.safe_load((CI / "gitlab" / "deploy-model.yml").read_text(encoding="utf-8"))["default"]["image"]
    assert image["entrypoint"] == [""]


STAND_IN = """#!/bin/sh
echo "$@" >>"$CALLS"
case "$1" in add) echo '{"version": 1}' ;; copy) echo '{"version": 1}' ;; esac
"""


def test_settings_of_a_roll_out_reach_it_and_a_new_team_has_an_empty_repository(tmp_path: Path) -> None:
    (tmp_path / "repo-manager").write_text(STAND_IN)
    (tmp_path / "repo-manager").chmod(0o755)
    staging = tmp_path / "team" / "staging"
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "RESULTS": str(tmp_path / "results"),
        "MODEL_FILE": "m.onnx",
        "MODEL_NAME": "digits",
        "PRODUCTION_CHECK": "false",
        "CANARY": "10%,100%",
        "DEPLOY_TIMEOUT": "900",
        "SIGN_KEY": "k.pem",
        "SIGNED_BY": "k.pub",
        "STAGING_REPOSITORY": str(staging),
        "STAGING_SERVER": "grpc://s:1",
        "PRODUCTION_REPOSITORY": "s3://production/models",
        "PRODUCTION_SERVER": "kserve://models/digits",
    }
    for step in ("verify", "add", "staging", "promote", "production"):
        command = ["bash", CI / "pipeline.sh", step]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert staging.is_dir(), "the first run verifies an empty repository"
    calls = (tmp_path / "calls").read_text().splitlines()
    how = "--signed-by k.pub --timeout 900"
    assert f"sign digits:1 --key k.pem --repository {staging}" in calls
    assert f"deploy digits:1 --to grpc://s:1 --repository {staging} {how}" in calls
    production = "deploy digits:1 --to kserve://models/digits --repository s3://production/models"
    assert calls[-1] == f"{production} {how} --canary 10%,100% --step 5m"


def test_the_kubeconfig_is_a_file_for_the_step_alone(tmp_path: Path) -> None:
    action = yaml.safe_load((CI / "github" / "deploy-model" / "action.yml").read_text(encoding="utf-8"))
    (tmp_path / "pipeline.sh").write_text(
        'cat "$KUBECONFIG"; env | grep -c KUBECONFIG_CONTENT || true; stat -c %a "$KUBECONFIG"'
    )
    environment = {**os.environ, "GITHUB_ACTION_PATH": str(tmp_path), "RUNNER_TEMP": str(tmp_path), "STEP": "staging"}
    environment["KUBECONFIG_CONTENT"] = "apiVersion: v1\nkind: Config"
    script = action["runs"]["steps"][-1]["run"]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "apiVersion: v1\nkind: Config\n0\n600\n"), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline.sh"]
