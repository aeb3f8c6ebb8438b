"""Models without config.pbtxt, and files Triton takes for a second one."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.triton_deployment import publish_scaling
from typer.testing import CliRunner

from repo_manager.cli.main import app
from repo_manager.errors import UsageError
from repo_manager.repository.scan import find_model
from repo_manager.repository.verify import verify
from repo_manager.rollout.checks import CheckOutcome, check_version
from repo_manager.triton_config.config import parse_config
from repo_manager.triton_config.problems import Severity


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    publish_scaling(tmp_path / "repository", "scale", [2.0], tmp_path)
    return tmp_path / "repository"


@pytest.fixture
def bare(repository: Path) -> Path:
    (repository / "scale" / "config.pbtxt").unlink()
    return repository


def test_verify_says_what_triton_derives(bare: Path) -> None:
    problems = verify(bare, "scale")
    assert {problem.severity for problem in problems} == {Severity.WARNING}
    assert any("is served with what Triton derives from it" in str(problem) for problem in problems)
    assert any("adopt --write-config" in str(problem) for problem in problems)


def test_a_roll_out_is_refused_before_anything(bare: Path) -> None:
    checks = check_version(bare, find_model(bare, "scale"), 1)
    (check,) = (check for check in checks if check.name == "config")
    assert check.outcome is CheckOutcome.REFUSED
    assert "repo-manager adopt scale --write-config" in check.hint


def test_adopt_writes_down_what_is_derived(bare: Path) -> None:
    path = bare / "scale" / "config.pbtxt"
    run = ["adopt", "scale", "--write-config", "--repository", str(bare)]
    planned = CliRunner().invoke(app, [*run, "--dry-run"])
    assert (planned.exit_code, path.exists()) == (0, False), planned.output
    done = CliRunner().invoke(app, run)
    assert done.exit_code == 0, done.output
    config = parse_config(path.read_text())
    assert [(each.name, tuple(each.dims)) for each in config.message().input] == [("x", (4,))]
    assert not [problem for problem in verify(bare, "scale") if problem.severity is Severity.ERROR]
    checks = check_version(bare, find_model(bare, "scale"), 1)
    assert CheckOutcome.REFUSED not in {check.outcome for check in checks}


@pytest.mark.parametrize("name", ["conf", "config", "config.pb", "c"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_look_alike_is_an_error_and_is_not_deployed(repository: Path, name: str, folder: bool) -> None:
    place = repository / "scale" / name
    place.mkdir() if folder else place.write_text("x")
    assert "config-lookalike" in {problem.rule for problem in verify(repository, "scale")}
    checks = check_version(repository, find_model(repository, "scale"), 1)
    (check,) = (check for check in checks if check.name == "files")
    assert check.outcome is CheckOutcome.REFUSED


def test_a_server_to_ask_needs_something_to_write(repository: Path) -> None:
    done = CliRunner().invoke(app, ["adopt", "scale", "--to", "grpc://127.0.0.1:1", "--repository", str(repository)])
    assert isinstance(done.exception, UsageError)


@pytest.mark.parametrize(
    ("name", "file", "config", "told"),
    [
        ("m", "weights.bin", "max_batch_size: 1", False),
        ("m", "model.dali", "max_batch_size: 1", False),
        ("video.dali", "weights.bin", "max_batch_size: 1", True),
        ("m", "model.py", "max_batch_size: 1", True),
        ("m", "model.py", 'default_model_filename: "weights.bin"', False),
        ("m", "weights.bin", 'default_model_filename: "model.plan"', True),
        ("m", "weights.bin", 'backend: "mine"', True),
        ("m", "weights.bin", None, False),
        ("video.dali", "weights.bin", None, True),
    ],
)
def test_triton_has_to_be_told_the_backend_by_configuration_file_or_name(
    tmp_path: Path, name: str, file: str, config: str | None, told: bool
) -> None:
    (tmp_path / name / "1").mkdir(parents=True)
    (tmp_path / name / "1" / file).write_text("x")
    if config is not None:
        (tmp_path / name / "config.pbtxt").write_text(config)
    found = [each for each in verify(tmp_path, models=False) if "not tell Triton which" in each.what]
    assert [each.severity for each in found] == ([] if told else [Severity.ERROR])
