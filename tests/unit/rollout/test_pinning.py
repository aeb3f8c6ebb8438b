"""`snapshot`: the frozen copy, and the values file with its pin."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from support.triton_deployment import publish_scaling
from typer.testing import CliRunner, Result

from repo_manager.cli.main import app
from repo_manager.errors import InputError, RepositoryError, UsageError
from repo_manager.pipeline.snapshot import Pinned, snapshot
from repo_manager.repository.configuration import set_served_versions
from repo_manager.repository.publish import publish
from repo_manager.rollout.targets.snapshot_files import read_snapshot, snapshots_of
from repo_manager.triton_config.config import parse_config


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    publish_scaling(folder / "repository", "scale", [2.0, 3.0], folder)
    publish_scaling(folder / "repository", "other", [5.0, 6.0], folder)
    set_served_versions(folder / "repository", "scale", (1,))
    set_served_versions(folder / "repository", "other", (1,))
    return folder / "repository"


@pytest.fixture
def repository(tmp_path: Path, published: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "repository"))


def pinned(made: Pinned) -> dict[str, tuple[int, ...]]:
    return dict(made.pin.models)


def test_without_names_it_holds_what_the_policies_serve(repository: Path) -> None:
    made = snapshot(repository)
    assert pinned(made) == {"other": (1,), "scale": (1,)}
    written = read_snapshot(snapshots_of(repository), made.pin.id)
    assert written is not None
    assert written.models == made.pin.models
    assert made.pin.url == f"{repository}.snapshots/{made.pin.id}"
    assert snapshot(repository).pin.created is False


def test_what_is_pinned_stays_but_for_what_is_named(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "snapshot.yaml"
    first = snapshot(repository, ("other:1",), values=file, mounted="/models/repository")
    assert first.changed
    set_served_versions(repository, "other", (2,))  # the policy moves on; the pins do not
    second = snapshot(repository, ("scale:2",), values=file)
    assert pinned(second) == {"other": (1,), "scale": (2,)}
    assert second.pin.previous == first.pin.url
    assert yaml.safe_load(file.read_text()) == {
        "repository": {
            "url": "/models/repository",
            "snapshot": f"/models/repository.snapshots/{second.pin.id}",
        }
    }
    assert "#   scale: 2" in file.read_text()
    before = file.read_bytes(), file.stat().st_mtime_ns
    again = snapshot(repository, ("scale:2",), values=file)
    assert (again.changed, again.pin.created) == (False, False)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before


def test_without_a_name_a_pinned_file_gets_every_model_anew(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "snapshot.yaml"
    snapshot(repository, values=file, mounted="/models/repository")
    set_served_versions(repository, "other", (2,))
    made = snapshot(repository, values=file)
    assert pinned(made) == {"other": (2,), "scale": (1,)}
    assert made.pin.before == {"other": (1,), "scale": (1,)}


def test_a_dry_run_writes_nothing(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "snapshot.yaml"
    done = run(repository, "scale:2", "--values", str(file), "--mounted", "/models/repository", "--dry-run", "--json")
    assert json.loads(done.stdout)["pin"]["models"] == {"other": [1], "scale": [2]}
    assert not file.exists()
    assert not snapshots_of(repository).exists()  # type: ignore[union-attr]  # a folder's are in a folder


def test_a_pin_whose_snapshot_is_gone_is_refused(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "snapshot.yaml"
    made = snapshot(repository, values=file, mounted="/models/repository")
    shutil.rmtree(snapshots_of(repository) / made.pin.id)  # type: ignore[arg-type]
    with pytest.raises(RepositoryError, match="versions of its other models are not known"):
        snapshot(repository, ("scale:2",), values=file)


@pytest.mark.parametrize(
    "text",
    ["repository:\n  url: s3://b/m\n  region: x\n", "image:\n  tag: x\n", "- a\n", "a: [\n"],
)
def test_a_file_that_holds_more_is_not_overwritten(repository: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(text)
    with pytest.raises(InputError):
        snapshot(repository, values=file)
    assert file.read_text() == text


def test_what_deploy_would_refuse_is_not_pinned(repository: Path) -> None:
    (repository / "scale" / "2" / "model.onnx").write_bytes(b"x")
    with pytest.raises(RepositoryError, match="scale:2"):
        snapshot(repository, ("scale:2",))
    with pytest.raises(UsageError, match="named twice"):
        snapshot(repository, ("other:1", "other:2"))
    assert not snapshots_of(repository).exists()  # type: ignore[union-attr]


def test_what_an_ensemble_needs_comes_along(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "snapshot.yaml"
    snapshot(repository, ("scale:1",), values=file, mounted="/models/repository")
    text = """name: "both" platform: "ensemble" max_batch_size: 8
    input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }
    ensemble_scheduling { step { model_name: "late" model_version: -1
      input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } } }"""
    publish_scaling(repository, "late", [7.0], tmp_path)
    publish(repository, "both", {}, parse_config(text, where="both"), {})
    assert pinned(snapshot(repository, ("both:1",), values=file)) == {
        "both": (1,),
        "late": (1,),
        "other": (1,),
        "scale": (1,),
    }


def run(repository: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["snapshot", *arguments, "--repository", str(repository)])


def test_the_command(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "snapshot.yaml"
    done = run(repository, "scale:2", "--values", str(file))
    assert done.exit_code == 0, done.output
    assert str(file) in done.stdout
    assert "scale 1 2" in " ".join(done.stdout.split())
    assert "say so: --mounted" in " ".join(done.stderr.split())
