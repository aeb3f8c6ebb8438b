"""The CI files are valid for GitHub and GitLab, and their linters find nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml
from support.dev_tools import tool

import repo_manager

ROOT = Path(__file__).parents[3]
CI = ROOT / "deploy" / "ci"
STEPS = ("verify", "add", "staging", "gate", "promote", "production")


@pytest.fixture
def github(tmp_path: Path) -> Path:
    """The files where README.md says to copy them."""
    (tmp_path / ".git").mkdir()
    action = tmp_path / ".github" / "actions" / "deploy-model"
    shutil.copytree(CI / "github" / "deploy-model", action)
    shutil.copy2(CI / "pipeline.sh", action)
    workflows = tmp_path / ".github" / "workflows"
    workflows.mkdir()
    shutil.copy2(CI / "github" / "deploy-model.yml", workflows)
    return tmp_path


def test_actionlint(github: Path) -> None:
    done = tool("actionlint", folder=github)
    assert done.returncode == 0, done.stdout + done.stderr


def test_actionlint_would_find(github: Path) -> None:
    workflow = github / ".github" / "workflows" / "deploy-model.yml"
    workflow.write_text(workflow.read_text().replace("inputs.model-name", "inputs.model-nam"))
    assert "model-nam" in tool("actionlint", folder=github).stdout


def test_zizmor(github: Path) -> None:
    # Its low findings ask for `$/` in place of `./`, unknown to actionlint and older runners.
    done = tool("zizmor", "--offline", "--quiet", "--min-severity", "medium", ".", folder=github)
    assert done.returncode == 0, done.stdout + done.stderr


def test_zizmor_would_find(github: Path) -> None:
    action = github / ".github" / "actions" / "deploy-model" / "action.yml"
    action.write_text(action.read_text().replace('"$STEP"', '"${{ inputs.step }}"'))
    done = tool("zizmor", "--offline", "--quiet", "--min-severity", "medium", ".", folder=github)
    assert done.returncode != 0


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The project's own workflows."""
    (tmp_path / ".git").mkdir()
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    return tmp_path


@pytest.mark.parametrize(
    "check", [("actionlint",), ("zizmor", "--offline", "--quiet", "--min-severity", "medium", ".")], ids=lambda c: c[0]
)
def test_the_projects_own_workflows(check: tuple[str, ...], own: Path) -> None:
    done = tool(check[0], *check[1:], folder=own)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_action_is_pinned_by_its_commit() -> None:
    used = [
        line.split("uses:")[1].split("#")[0].strip()
        for file in (ROOT / ".github" / "workflows").iterdir()
        for line in file.read_text(encoding="utf-8").splitlines()
        if "uses:" in line
    ]
    assert used
    assert [action for action in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action)] == []


@pytest.mark.parametrize(
    ("schema", "file", "more"),
    [
        ("vendor.github-workflows", "github/deploy-model.yml", ()),
        ("vendor.github-actions", "github/deploy-model/action.yml", ()),
        ("vendor.gitlab-ci", "gitlab/.gitlab-ci.yml", ("--data-transform", "gitlab-ci")),
        ("vendor.gitlab-ci", "gitlab/deploy-model.yml", ("--data-transform", "gitlab-ci")),
    ],
)
def test_published_schemas(schema: str, file: str, more: tuple[str, ...], tmp_path: Path) -> None:
    done = tool("check-jsonschema", "--builtin-schema", schema, *more, CI / file, folder=CI)
    assert done.returncode == 0, done.stdout + done.stderr
    broken = tmp_path / Path(file).name
    broken.write_text((CI / file).read_text() + "\n1: [2]\nstages: 3\njobs: 3\nruns: 3\n")
    assert tool("check-jsonschema", "--builtin-schema", schema, *more, broken, folder=CI).returncode != 0


def test_both_take_the_steps_of_the_script_in_its_order() -> None:
    script = (CI / "pipeline.sh").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^  ([a-z]+)\)$", script, re.MULTILINE)) == STEPS
    workflow = yaml.safe_load((CI / "github" / "deploy-model.yml").read_text(encoding="utf-8"))
    taken = [
        step["with"]["step"]
        for job in workflow["jobs"].values()
        for step in job["steps"]
        if "step" in step.get("with", {})
    ]
    assert tuple(taken) == STEPS
    jobs = yaml.safe_load((CI / "gitlab" / "deploy-model.yml").read_text(encoding="utf-8"))
    scripts = [
        job["script"][0].rpartition(" ")[2] for job in jobs.values() if isinstance(job, dict) and "script" in job
    ]
    assert tuple(scripts) == STEPS


def test_every_setting_of_the_script_is_documented_and_given() -> None:
    script = (CI / "pipeline.sh").read_text(encoding="utf-8")
    used = set(re.findall(r"\$\{?([A-Z][A-Z_]+)", script)) - {"GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"}
    documented = set(re.findall(r"`([A-Z][A-Z_]+)`", (CI.parent / "README.md").read_text(encoding="utf-8")))
    assert used <= documented


def test_gitlabs_needs_name_jobs_that_come_before() -> None:
    jobs = yaml.safe_load((CI / "gitlab" / "deploy-model.yml").read_text(encoding="utf-8"))
    names = [name for name, job in jobs.items() if isinstance(job, dict) and "script" in job]
    for index, name in enumerate(names):
        assert set(jobs[name].get("needs", [])) <= set(names[:index])
        assert jobs[name]["stage"] in jobs["stages"]


def test_what_is_installed_by_default_is_this_version() -> None:
    action = yaml.safe_load((CI / "github" / "deploy-model" / "action.yml").read_text(encoding="utf-8"))
    assert action["inputs"]["repo-manager"]["default"].endswith(f"=={repo_manager.__version__}")


def test_the_workflow_keeps_no_key_of_a_cloud_and_hands_the_kubeconfig_to_each_roll_out() -> None:
    text = (CI / "github" / "deploy-model.yml").read_text(encoding="utf-8")
    assert "secrets.AWS" not in text
    for job in yaml.safe_load(text)["jobs"].values():
        steps = [step["with"] for step in job["steps"] if "step" in step.get("with", {})]
        given = {step["step"] for step in steps if "kubeconfig" in step}
        assert given == {step["step"] for step in steps} & {"staging", "production"}


def test_gitlab_locks_the_whole_way_and_not_each_job_of_it() -> None:
    parent = yaml.safe_load((CI / "gitlab" / ".gitlab-ci.yml").read_text(encoding="utf-8"))
    (job,) = (job for job in parent.values() if isinstance(job, dict) and "trigger" in job)
    assert job["trigger"] == {"include": [{"local": "ci/deploy-model.yml"}], "strategy": "depend"}
    assert job["resource_group"] == "deploy-$MODEL_NAME"
    assert all("$CI_PIPELINE_SOURCE" in rule["if"] or rule.get("changes") for rule in job["rules"]), "no push alone"
    child = yaml.safe_load((CI / "gitlab" / "deploy-model.yml").read_text(encoding="utf-8"))
    assert not [name for name, job in child.items() if isinstance(job, dict) and "resource_group" in job]
