from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.triton_deployment import publish_scaling

from repo_manager.errors import RepositoryError
from repo_manager.repository import transfer
from repo_manager.repository.configuration import change_config
from repo_manager.repository.difference import compare_versions
from repo_manager.repository.manifest import read_manifest
from repo_manager.repository.publish import publish
from repo_manager.repository.relabel import read_labels, set_labels
from repo_manager.repository.remove import remove
from repo_manager.repository.scan import find_model
from repo_manager.repository.tags import model_state
from repo_manager.repository.transfer import CopyOptions, copy_version
from repo_manager.repository.verify import verify

Put = Callable[..., Any]


def test_a_version_goes_to_production_with_its_story(root: Path, put: Put, tmp_path: Path) -> None:
    put(labels={"y": ("cat", "dog")})
    put()
    path = root / "m/config.pbtxt"
    path.write_text("# tuned\n" + path.read_text() + "future { }\n")
    production = tmp_path / "production"
    planned = copy_version(root, "m", 2, production, dry_run=True)
    assert (planned.version, planned.published) == (2, None)
    assert not production.exists()
    done = copy_version(root, "m", 2, production)
    assert (done.version, done.identical) == (2, False)
    text = (production / "m/config.pbtxt").read_text()
    assert text.startswith("# tuned\n")
    assert "future { }" in text
    assert find_model(production, "m").selected == (2,)
    assert (production / "m/labels_0_y.txt").read_text() == "cat\ndog\n"
    manifest = read_manifest(production / "m/2")
    assert manifest.precision == "fp16"
    assert manifest.extra["copied_from"]["version"] == 2
    assert manifest.digest == read_manifest(root / "m/2").digest
    assert [p for p in verify(production, models=False) if p.severity == "error"] == []


@pytest.fixture
def other(put: Put, files: dict[str, Path]) -> Put:
    """Publish a version of other content than any before."""

    def put_other(**options: object) -> Any:
        with files["model.onnx"].open("ab") as file:
            file.write(b"more")
        return put(**options)

    return put_other


def test_numbers_are_kept_where_they_are_free(root: Path, other: Put, tmp_path: Path) -> None:
    for _ in range(4):
        other()
    production = tmp_path / "production"
    assert [copy_version(root, "m", version, production).version for version in (3, 1)] == [3, 1]
    assert model_state(production, "m").skipped == (2,)
    remove(production, "m", 1)
    for dry_run in (True, False):  # 1 was there before, and no number is given out twice
        with pytest.raises(RepositoryError, match=r"m:1 cannot keep its number: version 1 may have been there") as no:
            copy_version(root, "m", 1, production, dry_run=dry_run)
        assert "--new-number" in (no.value.hint or "")
    assert copy_version(root, "m", 1, production, CopyOptions(keep_number=False)).version == 4
    with pytest.raises(RepositoryError, match="version 4 is there already, with other content"):
        copy_version(root, "m", 4, production)
    assert copy_version(root, "m", 2, production).version == 2
    assert model_state(production, "m").skipped == ()


def test_the_configuration_comes_along_when_told(root: Path, tmp_path: Path) -> None:
    publish_scaling(root, "m", [2.0], tmp_path)
    production = tmp_path / "production"
    copy_version(root, "m", 1, production)
    publish_scaling(root, "m", [3.0], tmp_path)
    labels = ("cat", "cow", "dog", "eel")
    set_labels(root, "m", "y", labels)
    change_config(root, "m", {"instance_group.count": "3"})
    with pytest.raises(RepositoryError, match="has no labels") as refused:
        copy_version(root, "m", 2, production)
    assert "--with-config" in (refused.value.hint or "")
    planned = copy_version(root, "m", 2, production, CopyOptions(with_config=True), dry_run=True)
    assert planned.config is not None
    assert "instance_group" in planned.config.fields
    assert versions_of(production) == [1]
    done = copy_version(root, "m", 2, production, CopyOptions(with_config=True))
    assert (done.version, done.config is not None and done.config.applied) == (2, True)
    assert "count: 3" in (production / "m/config.pbtxt").read_text()
    assert read_labels(production, "m")["y"] == labels
    assert find_model(production, "m").selected == (1,), "the policy there stays"
    assert [p for p in verify(production, models=False) if p.severity == "error"] == []


def test_what_stays_different_is_named(root: Path, other: Put, tmp_path: Path) -> None:
    other()
    copy_version(root, "m", 1, tmp_path / "p")
    other()
    path = root / "m/config.pbtxt"
    path.write_text(path.read_text().replace("count: 1", "count: 3"))
    assert copy_version(root, "m", 2, tmp_path / "p").left_behind == ("instance_group",)


def versions_of(repository: Path) -> list[int]:
    return [each.version for each in find_model(repository, "m").versions]


def test_copying_again_does_nothing(root: Path, put: Put, tmp_path: Path) -> None:
    put()
    copy_version(root, "m", 1, tmp_path / "p")
    again = copy_version(root, "m", 1, tmp_path / "p")
    assert (again.version, again.identical, again.published) == (1, True, None)
    assert len(find_model(tmp_path / "p", "m").versions) == 1


def test_within_a_repository_under_another_name(root: Path, put: Put) -> None:
    put()
    copy_version(root, "m", 1, root, CopyOptions(target_name="m-canary"))
    assert 'name: "m-canary"' in (root / "m-canary/config.pbtxt").read_text()
    assert verify(root, models=False) == ()


def test_configurations_for_model_config_name_travel_with_the_model(
    root: Path, put: Put, files: dict[str, Path], tmp_path: Path
) -> None:
    put()
    (root / "m/configs").mkdir()
    (root / "m/configs/h100.pbtxt").write_text((root / "m/config.pbtxt").read_text() + "# for the H100\n")
    copy_version(root, "m", 1, tmp_path / "p", CopyOptions(target_name="m-canary"))
    copied = (tmp_path / "p/m-canary/configs/h100.pbtxt").read_text()
    assert 'name: "m-canary"' in copied
    assert copied.endswith("# for the H100\n")
    next(iter(files.values())).write_bytes(b"another")
    put()
    (root / "m/configs/h100.pbtxt").write_text((root / "m/config.pbtxt").read_text())
    with pytest.raises(RepositoryError, match=r"configs/h100.pbtxt: it says something else"):
        copy_version(root, "m", 2, tmp_path / "p", CopyOptions(target_name="m-canary"))


@pytest.mark.parametrize("damage", ["content", "missing", "added", "manifest"])
def test_a_damaged_source_never_reaches_the_target(root: Path, put: Put, tmp_path: Path, damage: str) -> None:
    version = put().path
    if damage == "content":
        (version / "model.onnx").write_bytes(b"MODEL " * 100)
    elif damage == "missing":
        (version / "model.onnx.data").unlink()
    elif damage == "added":
        (version / "more").write_text("")
    else:
        (version / "manifest.json").unlink()
    with pytest.raises(RepositoryError) as refused:
        copy_version(root, "m", 1, tmp_path / "p")
    assert "FileRecord" not in refused.value.message
    assert not (tmp_path / "p").exists() or not any(p.is_dir() for p in (tmp_path / "p").iterdir())


def test_a_target_that_serves_something_else_refuses(root: Path, put: Put, tmp_path: Path, files: Any) -> None:
    put()
    other = put("n", size=5)
    copy_version(root, "n", other.version, tmp_path / "p", CopyOptions(target_name="m"))
    with pytest.raises(RepositoryError, match="another model name"):
        copy_version(root, "m", 1, tmp_path / "p")


def test_unknown_versions(root: Path, put: Put, tmp_path: Path) -> None:
    put()
    with pytest.raises(RepositoryError, match="no version 4"):
        copy_version(root, "m", 4, tmp_path / "p")


def test_differences(root: Path, put: Put, files: dict[str, Path], config: Any) -> None:
    put()
    files["model.onnx"].write_bytes(b"other")
    details = {"precision": "int8", "conversion": {"drift": [{"output": "y", "cosine": 0.5}]}}
    publish(root, "m", files, config, details)
    model = find_model(root, "m")
    difference = compare_versions(model.version(1), model.version(2))
    assert (difference.a, difference.b) == ("m:1", "m:2")
    assert difference.fields["precision"] == ("fp16", "int8")
    assert difference.fields["conversion.drift.y.cosine"] == (None, 0.5)
    assert [(f.name, f.size_bytes) for f in difference.files] == [("model.onnx", (600, 5))]
    assert difference.signature == ()
    assert difference.config == ""
    same = compare_versions(model.version(1), model.version(1))
    assert (same.fields, same.files) == ({}, ())
    (root / "m/2/manifest.json").unlink()
    assert compare_versions(model.version(1), find_model(root, "m").version(2)).problems


@pytest.mark.parametrize("name", ["../x", "a b", "-x"])
def test_a_refused_name_leaves_no_empty_repository(
    root: Path, put: Put, tmp_path: Path, files: dict[str, Path], config: Any, name: str
) -> None:
    put()
    with pytest.raises(RepositoryError, match="cannot be a model's name"):
        copy_version(root, "m", 1, tmp_path / "production", CopyOptions(target_name=name))
    with pytest.raises(RepositoryError, match="cannot be a model's name"):
        publish(tmp_path / "production", name, files, config, {})
    assert not (tmp_path / "production").exists()


def test_two_copies_at_a_time_with_new_numbers_bring_the_content_once(
    root: Path, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put()
    production = tmp_path / "production"
    meanwhile: list[int] = []
    publish_now = transfer.publish

    def publish_late(*arguments: Any, **options: Any) -> Any:
        """Another command copies the same between the look for an identical version and the claim of a number."""
        monkeypatch.undo()
        meanwhile.append(copy_version(root, "m", 1, production, CopyOptions(keep_number=False)).version)
        return publish_now(*arguments, **options)

    monkeypatch.setattr(transfer, "publish", publish_late)
    late = copy_version(root, "m", 1, production, CopyOptions(keep_number=False))
    assert meanwhile == [1]
    assert (late.version, late.identical, late.published) == (1, True, None)
    assert [each.version for each in find_model(production, "m").versions] == [1]
    assert model_state(production, "m").highest_version == 1
