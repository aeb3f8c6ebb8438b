from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repo_manager.errors import RepositoryError
from repo_manager.repository.configuration import set_served_versions
from repo_manager.repository.publish import plan_publish, publish
from repo_manager.repository.scan import find_model
from repo_manager.repository.tags import model_state
from repo_manager.repository.verify import verify
from repo_manager.triton_config.config import ModelConfig, parse_config, read_config
from repo_manager.triton_config.version_policy import version_policy
from repo_manager.types import as_json

Put = Callable[..., Any]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leftovers(root: Path) -> list[str]:
    return [p.name for p in (*root.parent.iterdir(), *root.iterdir()) if "staging" in p.name or "probe" in p.name]


def test_a_first_version_brings_the_whole_model(root: Path, put: Put, files: dict[str, Path]) -> None:
    published = put()
    assert (published.version, published.first, published.served) == (1, True, True)
    assert published.path == root / "m" / "1"
    assert names(root / "m") == ["1", "config.pbtxt"]
    assert (root / "m/1/model.onnx").read_bytes() == files["model.onnx"].read_bytes()
    assert version_policy(read_config(root / "m")) == (1,)
    assert [entry.name for entry in root.iterdir() if entry.is_dir()] == ["m"]
    assert leftovers(root) == []
    assert verify(root, models=False) == ()
    json.dumps(as_json(published))


def test_a_later_version_changes_nothing_that_is_there(root: Path, put: Put) -> None:
    put()
    before = snapshot(root / "m")
    published = put()
    assert (published.version, published.first, published.served) == (2, False, False)
    after = snapshot(root / "m")
    assert {key: after[key] for key in before} == before
    assert find_model(root, "m").selected == (1,)


def test_under_a_latest_policy_a_new_version_is_served_at_the_next_load(root: Path, put: Put) -> None:
    put()
    path = root / "m/config.pbtxt"
    path.write_text(path.read_text().replace("specific {\n    versions: [1]", "latest {\n    num_versions: 1"))
    assert put().served


def test_the_plan_says_what_publish_then_does(
    root: Path, put: Put, files: dict[str, Path], config: ModelConfig
) -> None:
    plan = plan_publish(root, "m", files, config)
    assert (plan.version, plan.first, plan.served, plan.size_bytes) == (1, True, True, 8600)
    assert not root.exists()
    put()
    before = snapshot(root)
    plan = plan_publish(root, "m", files, config)
    assert (plan.version, plan.first, plan.served) == (2, False, False)
    assert snapshot(root) == before


def test_the_manifest_tells_the_versions_story(root: Path, files: dict[str, Path], config: ModelConfig) -> None:
    details = {"precision": "int8", "conversion": {"drift": [float("nan")]}, "note": "mine"}
    manifest = publish(root, "m", files, config, details).manifest
    assert manifest.precision == "int8"
    assert manifest.conversion == {"drift": [None]}
    assert manifest.extra == {"note": "mine"}
    assert manifest.size_bytes == 8600
    assert parse_config(manifest.config).max_batch_size == 8
    document = json.loads((root / "m/1/manifest.json").read_text())
    assert document["note"] == "mine"
    assert document["schema_version"] == 1
    with pytest.raises(RepositoryError, match="version"):
        publish(root, "m", files, config, {"version": 9})


def test_a_number_is_never_given_out_twice(root: Path, put: Put) -> None:
    put()
    put()
    for path in sorted((root / "m/2").iterdir()):
        path.unlink()
    (root / "m/2").rmdir()  # Behind our back: only the state file remembers.
    assert put().version == 3
    assert model_state(root, "m").highest_version == 3
    (root / ".repo-manager.json").unlink()
    (root / "m/7.tmp").mkdir()  # Triton takes it for 7.
    assert put().version == 8


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"size": 4}, "input 'x'"),
        ({"max_batch_size": 4}, "max_batch_size"),
        ({"model_filename": "b.onnx"}, "model file"),
    ],
)
def test_what_does_not_fit_the_model_needs_another_name(
    root: Path, put: Put, files: dict[str, Path], options: dict[str, Any], difference: str
) -> None:
    put()
    files["b.onnx"] = files["model.onnx"]
    before = snapshot(root.parent)
    with pytest.raises(RepositoryError, match=difference) as caught:
        put(**options)
    assert "another model name" in str(caught.value)
    assert snapshot(root.parent) == before


def test_labels_are_written_once_and_never_changed(root: Path, put: Put) -> None:
    put(labels={"y": ("cat", "dog")})
    assert (root / "m/labels_0_y.txt").read_text() == "cat\ndog\n"
    put(labels={"y": ("cat", "dog")})
    put()
    with pytest.raises(RepositoryError, match="other labels"):
        put(labels={"y": ("dog", "cat")})
    put("plain")
    with pytest.raises(RepositoryError, match="has no labels") as refused:
        put("plain", labels={"y": ("cat", "dog")})
    assert "repo-manager labels plain --output OUTPUT --file FILE" in (refused.value.hint or "")


def test_a_model_without_a_configuration_is_refused(root: Path, put: Put) -> None:
    (root / "m/1").mkdir(parents=True)
    with pytest.raises(RepositoryError, match=r"no config\.pbtxt"):
        put()
    (root / "m/1").rmdir()
    assert put().first  # An empty folder is as good as none.


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../m", ".hidden", "-x", "a b", "a\nb", "$(x)", "é", "x" * 129, "m."]
)
def test_names_that_triton_or_a_shell_would_misread_are_refused(root: Path, put: Put, name: str) -> None:
    with pytest.raises(RepositoryError, match="model's name"):
        put(name)
    assert not (root / "m").exists()


@pytest.mark.parametrize("file", ["../x", "/x", "a//b", "", ".hidden", "manifest.json", "a\\b", "a\nb", "x" * 300])
def test_file_names_that_leave_the_version_are_refused(
    root: Path, files: dict[str, Path], config: ModelConfig, file: str
) -> None:
    with pytest.raises(RepositoryError):
        publish(root, "m", {**files, file: files["model.onnx"]}, config, {})


def test_the_served_file_must_be_among_the_files(root: Path, files: dict[str, Path], config: ModelConfig) -> None:
    with pytest.raises(RepositoryError, match=r"model\.onnx"):
        publish(root, "m", {"other.onnx": files["model.onnx"]}, config, {})
    with pytest.raises(RepositoryError, match="of model 'm'"):
        publish(root, "n", files, config, {})


@pytest.mark.parametrize("kind", ["folder", "missing", "pipe"])
def test_what_is_no_file_is_not_published(
    root: Path, put: Put, files: dict[str, Path], config: ModelConfig, tmp_path: Path, kind: str
) -> None:
    put()
    before = snapshot(root.parent)
    odd = tmp_path / "odd"
    if kind == "folder":
        odd.mkdir()
    elif kind == "pipe":
        os.mkfifo(odd)
    with pytest.raises(RepositoryError, match="regular file"):
        publish(root, "m", {**files, "extra": odd}, config, {})
    assert snapshot(root.parent) == before


def test_links_and_files_in_the_models_place_are_refused(root: Path, put: Put, tmp_path: Path) -> None:
    root.mkdir(parents=True)
    (root / "m").symlink_to(tmp_path)
    with pytest.raises(RepositoryError, match="symbolic link"):
        put()
    (root / "n").write_text("")
    with pytest.raises(RepositoryError, match="is a file"):
        put("n")


def test_a_root_that_is_a_file_or_a_link(tmp_path: Path, files: dict[str, Path], config: ModelConfig) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(RepositoryError, match="not a folder"):
        publish(tmp_path / "f", "m", files, config, {})
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert publish(tmp_path / "link", "m", files, config, {}).path == tmp_path / "real/m/1"


def test_a_damaged_state_file_stops_before_anything_is_written(root: Path, put: Put) -> None:
    put()
    (root / ".repo-manager.json").write_text("{")
    before = snapshot(root.parent)
    with pytest.raises(RepositoryError, match="damaged"):
        put()
    assert snapshot(root.parent) == before


def test_links_among_the_sources_are_copied_as_content(root: Path, files: dict[str, Path], config: ModelConfig) -> None:
    link = files["model.onnx"].with_name("link")
    link.symlink_to(files["model.onnx"])
    publish(root, "m", {"model.onnx": link, "sub/deep.bin": link}, config, {})
    assert not (root / "m/1/model.onnx").is_symlink()
    assert (root / "m/1/sub/deep.bin").read_bytes() == link.read_bytes()
    assert verify(root, models=False) == ()


def test_folders_are_readable_by_the_servers_user(root: Path, put: Put) -> None:
    old = os.umask(0o022)
    try:
        put()
    finally:
        os.umask(old)
    assert (root / "m").stat().st_mode & 0o777 == 0o755
    assert (root / "m/1/model.onnx").stat().st_mode & 0o777 == 0o644


def test_policy_changes_are_atomic_and_checked(root: Path, put: Put) -> None:
    put()
    put()
    path = root / "m/config.pbtxt"
    path.write_text("# mine\n" + path.read_text())
    assert set_served_versions(root, "m", (2,)) == (1,)
    assert path.read_text().startswith("# mine\n")
    assert find_model(root, "m").selected == (2,)
    before = path.stat()
    assert set_served_versions(root, "m", (2,)) == (2,)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino
    with pytest.raises(RepositoryError, match="no version 3"):
        set_served_versions(root, "m", (2, 3))
    with pytest.raises(RepositoryError, match="no model 'n'"):
        set_served_versions(root, "n", (1,))
    assert names(root / "m") == ["1", "2", "config.pbtxt"]
