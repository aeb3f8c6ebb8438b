"""Commands for changing a repository, from the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repo_manager import samples
from repo_manager.pipeline.adding import AddOptions, add
from repo_manager.types import Precision


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three versions of the sample; FP32, FP16, FP16."""
    root = tmp_path_factory.mktemp("published") / "repository"
    for precision in (Precision.FP32, Precision.FP16, Precision.FP16):
        add(samples.sample_model(), "digits", root, AddOptions(precision=precision))
    return root


@pytest.fixture
def repository(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "repository"))


Run = Callable[..., Any]


def versions(repository: Path) -> list[str]:
    return sorted(path.name for path in (repository / "digits").iterdir() if path.is_dir())


def test_diff_shows_what_differs(run: Run, repository: Path) -> None:
    ended = run("diff", "digits:1", "digits:2", "-r", repository, "--json")
    assert json.loads(ended.out)["fields"]["precision"] == ["fp32", "fp16"]
    shown = run("diff", "digits:1", "digits:2", "-r", repository).out
    facts = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.split()}
    assert (facts["precision"], facts["backend"]) == (["fp32", "fp16"], ["onnxruntime", "onnxruntime"])
    assert "conversion.digest" not in shown
    assert "conversion.digest" in run("diff", "digits:1", "digits:2", "-r", repository, "--all").out


def test_config_shows_checks_and_writes(run: Run, repository: Path) -> None:
    path = repository / "digits" / "config.pbtxt"
    before = path.read_text()
    assert 'backend: "onnxruntime"' in run("config", "digits", "-r", repository).out
    dry = run("config", "digits", "-r", repository, "--set", "max_batch_size=16", "--dry-run")
    assert "+max_batch_size: 16" in dry.out
    assert "version 1 loads again" in dry.out
    assert path.read_text() == before
    assert run("config", "digits", "-r", repository, "--set", "max_batch_size=16").code == 0
    assert "max_batch_size: 16" in path.read_text()
    assert run("config", "digits", "-r", repository, "--set", "max_batch_size=many").code == 3
    assert run("config", "digits", "-r", repository, "--set", "nonsense").code == 2
    assert "max_batch_size: 16" in path.read_text()


def test_config_is_edited_in_the_persons_editor(run: Run, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = repository / "digits" / "config.pbtxt"
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", "sed -i 's/^max_batch_size: .*/max_batch_size: 16/'")
    dry = run("config", "digits", "-r", repository, "--edit", "--dry-run")
    assert "+max_batch_size: 16" in dry.out
    assert "max_batch_size: 16" not in path.read_text()
    assert run("config", "digits", "-r", repository, "--edit").code == 0
    assert "max_batch_size: 16" in path.read_text()
    assert run("config", "digits", "-r", repository, "--edit", "--clear", "max_batch_size").code == 2


def test_a_refused_edit_is_kept_and_a_failed_editor_changes_nothing(
    run: Run, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = repository / "digits" / "config.pbtxt"
    before = path.read_text()
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", "sed -i 's/^max_batch_size: .*/max_batch_size: {/'")
    refused = run("config", "digits", "-r", repository, "--edit")
    assert refused.code == 3
    kept = Path(refused.err.split("Your text is kept in ")[1].split()[0])
    assert "max_batch_size: {" in kept.read_text()
    kept.unlink()
    kept.parent.rmdir()
    for editor in ("false", "no-such-editor-here", "'"):
        monkeypatch.setenv("EDITOR", editor)
        assert run("config", "digits", "-r", repository, "--edit").code == 2
    monkeypatch.setenv("EDITOR", f"sh -c 'echo \"# first\" | cat - {path} > {path}.new && mv {path}.new {path}' --")
    beaten = run("config", "digits", "-r", repository, "--edit")
    assert "changed by somebody else" in beaten.err
    assert beaten.code == 5, "it would succeed now, so it is no bad input"
    assert path.read_text() == "# first\n" + before
    monkeypatch.setenv("EDITOR", f"sh -c 'sed -i s/^max_batch_size:.*/max_batch_size:3/ {path}' --")
    assert (
        "changed by somebody else at the same time: max_batch_size"
        in run("config", "digits", "-r", repository, "--edit").err
    )
    assert "max_batch_size:3" in path.read_text()


def test_a_whole_config_is_replaced_only_by_a_valid_one(run: Run, repository: Path, tmp_path: Path) -> None:
    path = repository / "digits" / "config.pbtxt"
    before = path.read_text()
    broken = tmp_path / "broken.pbtxt"
    broken.write_text("max_batch_size: {")
    assert run("config", "digits", "-r", repository, "--file", broken).code == 3
    assert path.read_text() == before
    changed = tmp_path / "good.pbtxt"
    changed.write_text("# by hand\n" + before)
    assert run("config", "digits", "-r", repository, "--file", changed).code == 0
    assert path.read_text().startswith("# by hand")


def test_labels_are_set_and_shown(run: Run, repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_text("".join(f"{number}\n" for number in range(10)))
    assert "No output has labels" in run("labels", "digits", "-r", repository).out
    assert run("labels", "digits", "-r", repository, "--output", "logits", "--file", file).code == 0
    assert json.loads(run("labels", "digits", "-r", repository, "--json").out)["logits"][9] == "9"


def test_a_tag_stands_for_a_version_and_protects_it(run: Run, repository: Path) -> None:
    assert run("tag", "digits:2", "stable", "-r", repository).code == 0
    refused = run("remove", "digits:stable", "-r", repository)
    assert refused.code == 3
    assert "stable" in refused.err
    assert versions(repository) == ["1", "2", "3"]
    assert run("tag", "digits", "stable", "--delete", "-r", repository).code == 0
    assert run("remove", "digits:2", "-r", repository).code == 0
    assert versions(repository) == ["1", "3"]


def test_remove_never_takes_what_is_served_unless_told(run: Run, repository: Path) -> None:
    assert run("remove", "digits:1", "-r", repository).code == 3
    alone = run("remove", "digits:1", "-r", repository, "--force")
    assert alone.code == 3
    assert "would serve nothing" in alone.err
    assert run("remove", "digits:2", "-r", repository, "--dry-run").code == 0
    assert versions(repository) == ["1", "2", "3"]
    assert run("remove", "digits", "-r", repository, "--force").code == 0
    assert not (repository / "digits").exists()


def test_gc_keeps_what_is_served_and_the_newest(run: Run, repository: Path) -> None:
    assert "digits" in run("gc", "--keep", "1", "-r", repository, "--dry-run").out
    assert versions(repository) == ["1", "2", "3"]
    assert run("gc", "--keep", "1", "--older-than", "30d", "-r", repository).code == 0
    assert versions(repository) == ["1", "2", "3"]
    assert run("gc", "--keep", "1", "-r", repository).code == 0
    assert versions(repository) == ["1", "3"]
    assert run("gc", "--older-than", "soon", "-r", repository).code == 2


def test_gc_tells_which_model_it_could_not_clean_up(run: Run, repository: Path) -> None:
    (repository / "broken/1").mkdir(parents=True)
    (repository / "broken/config.pbtxt").write_text("nonsense {{")
    result = run("gc", "--keep", "1", "-r", repository, "--json")
    assert result.code == 3
    assert "broken: " in result.err
    assert [removal["versions"] for removal in json.loads(result.out)["removals"]] == [[2]]
    assert json.loads(result.out)["failed"][0].startswith("broken: ")


def test_copy_carries_a_version_with_its_story(run: Run, repository: Path, tmp_path: Path) -> None:
    production = tmp_path / "production"
    assert run("copy", "digits:2", "--into", production, "-r", repository, "--dry-run").code == 0
    assert not production.exists()
    assert run("copy", "digits:2", "--into", production, "-r", repository).code == 0
    manifest = json.loads((production / "digits" / "2" / "manifest.json").read_text())
    assert manifest["precision"] == "fp16"
    again = run("copy", "digits:2", "--into", production, "-r", repository)
    assert "already" in again.out
    assert run("verify", "-r", production).code == 0


def test_adopt_writes_the_missing_manifest(run: Run, repository: Path) -> None:
    path = repository / "digits" / "2" / "manifest.json"
    path.unlink()
    assert run("adopt", "-r", repository, "--dry-run").code == 0
    assert not path.exists()
    assert run("adopt", "-r", repository).code == 0
    assert json.loads(path.read_text())["version"] == 2
    assert "Every version has a manifest" in run("adopt", "-r", repository).out


def test_verify_repairs_from_a_copy(run: Run, repository: Path, published: Path) -> None:
    path = repository / "digits" / "2" / "model.onnx"
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    assert run("verify", "-r", repository).code == 3
    assert run("verify", "-r", repository, "--repair", "--copy", published).code == 0
    assert path.read_bytes() == (published / "digits" / "2" / "model.onnx").read_bytes()
