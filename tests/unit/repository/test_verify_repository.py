from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.repository.adopt import adopt
from repo_manager.repository.layout import triton_version, version_number
from repo_manager.repository.location import as_location
from repo_manager.repository.manifest import read_manifest
from repo_manager.repository.repair import repair
from repo_manager.repository.scan import find_model, scan
from repo_manager.repository.stores import disk as disk_module
from repo_manager.repository.tags import begin_trial, model_state, record_deployment
from repo_manager.repository.verify import verify
from repo_manager.triton_config.problems import Severity

Put = Callable[..., Any]


def check(root: Path) -> list[str]:
    return [f"{p.severity.value} {p}" for p in verify(root, models=False)]


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def only(root: Path, text: str) -> str:
    found = check(root)
    assert len(found) == 1, found
    assert text in found[0]
    return found[0]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize("file", ["1/model.onnx", "1/model.plan", "1/weights/a.bin", "config.pbtxt"])
def test_a_git_lfs_pointer_is_named(root: Path, put: Put, file: str) -> None:
    model = put().path.parent
    (model / "1" / "manifest.json").unlink()
    (model / file).parent.mkdir(exist_ok=True)
    (model / file).write_text(POINTER)
    (found,) = [problem for problem in verify(root) if problem.severity is Severity.ERROR]
    assert found.where == f"m/{file}"
    assert "is a Git LFS pointer, not the file itself" in found.what
    assert "git lfs pull" in found.hint
    with pytest.raises((RepositoryError, ConfigError), match="Git LFS pointer"):
        adopt(root)
    assert not (model / "1" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda v: (v / "model.onnx").write_bytes(b"MODEL " * 100), "m/1/model.onnx: was changed"),
        (lambda v: (v / "model.onnx").write_bytes(b"x"), "has 1 bytes; the manifest says 600"),
        (lambda v: (v / "model.onnx.data").unlink(), "m/1/model.onnx.data: is missing"),
        (lambda v: (v / "extra").write_text(""), "m/1/extra: was added after publishing"),
        (lambda v: (v / "manifest.json").write_text("{"), "is not JSON"),
        (lambda v: (v / "manifest.json").write_text("[]"), "not a JSON object"),
        (lambda v: v.rename(v.parent / "3"), "is of m:1, but is in m:3"),
        (lambda v: (v.parent / "2.tmp").mkdir(), "takes this folder for version 2"),
        (lambda v: (v.parent / "+2").mkdir(), "takes this folder for version 2"),
        (lambda v: (v.parent / ("9" * 20)).mkdir(), "beyond 64 bits"),
        (lambda v: (v.parent.parent / ".git").mkdir(), "hidden folder, which Triton takes for a model"),
        (lambda v: (v.parent / "config.pbtxt").write_text("{"), "config.pbtxt"),
        (lambda v: (v.parent.parent / ".repo-manager.json").write_text("[1"), "damaged"),
    ],
)
def test_what_is_wrong_is_an_error(root: Path, put: Put, break_it: Callable[[Path], object], message: str) -> None:
    path = put().path
    put()
    assert check(root) == []
    break_it(path)
    found = [line for line in check(root) if line.startswith("error")]
    assert any(message in line for line in found), check(root)


def test_what_is_not_to_be_removed_is_not_advised_to_be(root: Path, put: Put) -> None:
    put()
    (root / "lost+found").mkdir()
    (found,) = verify(root, models=False)
    assert (found.where, found.hint) == ("lost+found", "leave it, and make a folder beside it the repository")
    (root / "lost+found").rmdir()
    (root / "notes").mkdir()
    assert "remove the folder" in [each.hint for each in verify(root, models=False)]
    (root / "notes" / "data.bin").write_text("")
    hints = [each.hint for each in verify(root, models=False)]
    assert "add a version, or move the folder out of the repository" in hints
    assert "remove the folder" not in hints


def test_data_files_of_warm_up_and_initial_states(root: Path, put: Put) -> None:
    folder = put().path.parent
    (folder / "config.pbtxt").write_text(
        'backend: "onnxruntime" model_warmup { name: "w" batch_size: 1'
        ' inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 2, 3 ] input_data_file: "x.bin" } }'
        ' inputs { key: "s" value { data_type: TYPE_STRING dims: 1 input_data_file: "s" } } }'
        'sequence_batching { state { input_name: "i" output_name: "o" data_type: TYPE_INT64 dims: 2'
        ' initial_state { name: "n" data_type: TYPE_INT64 dims: 2 data_file: "i.bin" } } }',
    )

    def found() -> list[str]:
        return [str(each) for each in verify(root, models=False) if each.rule == "data-file"]

    (folder / "warmup").mkdir()
    (folder / "initial_state").mkdir()
    (folder / "initial_state" / "i.bin").write_bytes(bytes(15))
    assert found() == [
        "m/warmup/s: is missing, and warm-up sample 'w', input 's' reads it",
        "m/warmup/x.bin: is missing, and warm-up sample 'w', input 'x' reads it",
        "m/initial_state/i.bin: has 15 bytes, and the initial state of 'i' needs 16",
    ]
    (folder / "warmup" / "x.bin").write_bytes(bytes(24))
    (folder / "warmup" / "s").write_bytes(b"")
    (folder / "initial_state" / "i.bin").write_bytes(bytes(16))
    assert found() == []
    config = folder / "config.pbtxt"
    config.write_text(config.read_text().replace('"x.bin"', '"deep/x.bin"'))
    assert found() == ["m/warmup/deep/x.bin: is missing, and warm-up sample 'w', input 'x' reads it"]
    (folder / "warmup" / "deep").mkdir()
    (folder / "warmup" / "deep" / "x.bin").write_bytes(bytes(24))
    assert found() == []


@pytest.mark.parametrize(
    ("path", "missing"),
    [
        ("$$TRITON_MODEL_DIRECTORY/env.tar.gz", ["m/env.tar.gz"]),
        ("$$TRITON_MODEL_DIRECTORY/./envs/one", ["m/envs/one"]),
        ("$$TRITON_MODEL_DIRECTORY/../shared.tar.gz", []),
        ("/opt/env.tar.gz", []),
    ],
)
def test_the_environment_of_a_python_model_is_looked_for(root: Path, put: Put, path: str, missing: list[str]) -> None:
    folder = put().path.parent
    parameter = f'parameters {{ key: "EXECUTION_ENV_PATH" value {{ string_value: "{path}" }} }}'
    (folder / "config.pbtxt").write_text(f'backend: "python" {parameter}')

    def found() -> list[str]:
        return [each.where for each in verify(root, models=False) if each.rule == "data-file"]

    assert found() == missing
    for file in missing:
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_bytes(b"")
    assert found() == []


def test_a_runtime_that_the_server_must_have_is_named(root: Path, put: Put) -> None:
    folder = put().path.parent

    def found(runtime: str) -> list[tuple[str, str]]:
        (folder / "config.pbtxt").write_text(f'backend: "onnxruntime" runtime: "{runtime}"')
        return [(each.severity.value, each.what) for each in verify(root, models=False) if each.rule == "runtime"]

    assert found("libtriton_onnxruntime.so") == []
    missing = [("warning", "runtime is 'libmine.so', which has to be in the server's folder of backend 'onnxruntime'")]
    assert found("libmine.so") == missing
    (folder / "libmine.so").write_bytes(b"")
    assert found("libmine.so") == []
    assert len(found("model.py")) == 1


def test_a_digest_is_compared_only_when_wanted(root: Path, put: Put) -> None:
    path = put().path
    (path / "model.onnx").write_bytes(b"MODEL " * 100)
    assert verify(root, digests=False, models=False) == ()


@pytest.mark.parametrize(
    ("do_it", "message"),
    [
        (lambda m: (m / "02").mkdir(), "Triton ignores it"),
        (lambda m: (m / "old").mkdir(), "Triton ignores it"),
        (lambda m: (m / "notes.txt").write_text(""), "reload every version"),
        (lambda m: (m / "config.pbtxt").unlink(), "is missing; Triton derives one"),
        (lambda m: (m / "1/manifest.json").unlink(), "has no manifest.json"),
        (lambda m: append(m / "config.pbtxt", "future { }\n"), "unknown to this repo-manager: future"),
        (lambda m: (m.parent / ".repo-manager.staging").mkdir(), "repo-manager's own"),
    ],
)
def test_what_triton_bears_is_a_warning(root: Path, put: Put, do_it: Callable[[Path], object], message: str) -> None:
    put()
    do_it(root / "m")
    assert only(root, message).startswith("warning")


def test_policies_that_name_missing_versions(root: Path, put: Put) -> None:
    put()
    put()
    path = root / "m/config.pbtxt"
    path.write_text(path.read_text().replace("versions: [1]", "versions: [1, 9]"))
    assert only(root, "asks to serve 9, which do not exist").startswith("warning")
    path.write_text(path.read_text().replace("versions: [1, 9]", "versions: [9]"))
    assert only(root, "nothing would load").startswith("error")


def test_links(root: Path, put: Put, tmp_path: Path) -> None:
    path = put().path
    put("n")
    shutil.move(path / "model.onnx", tmp_path / "outside")
    (path / "model.onnx").symlink_to(tmp_path / "outside")
    assert "symbolic link out of the repository" in only(root, "m/1/model.onnx")
    (path / "model.onnx").unlink()
    shutil.move(tmp_path / "outside", path / "model.onnx")
    (root / "alias").symlink_to("n")
    assert any("warning" in line and "alias" in line for line in check(root))
    shutil.move(root / "n", tmp_path / "n")
    (root / "n").symlink_to(tmp_path / "n")
    assert any("error n: is a symbolic link out of the repository" in line for line in check(root))


def test_devices_in_a_version(root: Path, put: Put) -> None:
    path = put().path
    os.mkfifo(path / "pipe")
    assert any("not a regular file" in line for line in check(root))


def test_configuration_against_manifest(root: Path, put: Put) -> None:
    put()
    path = root / "m/config.pbtxt"
    path.write_text(path.read_text().replace("dims: [3]", "dims: [4]"))
    assert "does not fit this version: input 'x'" in only(root, "m/1/manifest.json")
    path.write_text(
        path.read_text().replace("dims: [4]", "dims: [3]").replace("max_batch_size: 8", "max_batch_size: 4")
    )
    assert check(root) == []


def test_a_newer_manifest_is_read_as_far_as_it_goes(root: Path, put: Put) -> None:
    path = put().path / "manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 9, "future": {"a": 1}'))
    assert read_manifest(path).extra["future"] == {"a": 1}
    assert only(root, "schema_version 9").startswith("warning")


def test_models_are_compared_with_the_configuration(root: Path, put: Put) -> None:
    put()
    found = verify(root)
    assert len(found) == 1
    assert "ONNX Runtime" in found[0].what


def test_one_model_or_an_unknown_one(root: Path, put: Put) -> None:
    put()
    put("n")
    (root / "n/1/model.onnx").unlink()
    assert verify(root, "m", models=False) == ()
    with pytest.raises(RepositoryError, match="no model 'x'"):
        verify(root, "x")
    with pytest.raises(RepositoryError, match="does not exist"):
        verify(root / "nowhere")


def test_a_foreign_repository_is_listed_checked_and_adopted(tmp_path: Path) -> None:
    model = tmp_path / "resnet"
    for version in ("1", "3", "03", "3.bak"):
        (model / version).mkdir(parents=True)
        (model / version / "model.plan").write_bytes(version.encode())
    (model / "config.pbtxt").write_text('platform: "tensorrt_plan"\nmax_batch_size: 4\n')
    entry = scan(tmp_path)[0]
    assert (entry.name, entry.backend, entry.max_batch_size) == ("resnet", "tensorrt", 4)
    assert [version.version for version in entry.versions] == [1, 3]
    assert entry.selected == (3,)
    assert [p.where for p in verify(tmp_path) if p.severity == Severity.ERROR] == ["resnet/3.bak"]
    planned = adopt(tmp_path, dry_run=True)
    assert [(a.version, a.served, a.applied) for a in planned] == [(1, False, False), (3, True, False)]
    assert not (model / "1/manifest.json").exists()
    assert all(adoption.applied for adoption in adopt(tmp_path))
    assert read_manifest(model / "3").extra == {"adopted": True}
    assert [p.where for p in verify(tmp_path)] == ["resnet/03", "resnet/3.bak"]
    assert adopt(tmp_path) == ()
    assert model_state(tmp_path, "resnet").highest_version == 3


def test_odd_names_and_links_of_others_can_be_looked_at(tmp_path: Path) -> None:
    (tmp_path / "my model/1").mkdir(parents=True)
    (tmp_path / "my model/config.pbtxt").write_text('backend: "python"\n')
    (tmp_path / "alias").symlink_to("my model")
    assert [entry.name for entry in scan(tmp_path)] == ["alias", "my model"]
    assert find_model(tmp_path, "alias").backend == "python"
    assert [p.what for p in verify(tmp_path, "my model") if "model's name" in p.what]
    adopt(tmp_path, "my model")
    assert read_manifest(tmp_path / "my model/1").model == "my model"


def test_links_are_not_adopted(tmp_path: Path) -> None:
    (tmp_path / "m/1").mkdir(parents=True)
    (tmp_path / "m/1/model.onnx").symlink_to("/etc/hostname")
    with pytest.raises(RepositoryError, match="prove nothing"):
        adopt(tmp_path)


def test_a_model_that_cannot_be_adopted_stops_no_other(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "1/model.onnx").write_bytes(name.encode())
    (tmp_path / "b/config.pbtxt").write_text("no config {{")
    with pytest.raises(RepositoryError, match=r"1 of 3 models cannot be adopted; b: ") as told:
        adopt(tmp_path)
    assert "(2 versions)" in str(told.value.hint)
    assert [(tmp_path / name / "1/manifest.json").exists() for name in ("a", "b", "c")] == [True, False, True]
    with pytest.raises(ConfigError):
        adopt(tmp_path, "b")


def test_repair_restores_what_another_place_still_has(root: Path, put: Put, tmp_path: Path) -> None:
    put()
    put()
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    (root / "m/1/model.onnx").write_bytes(b"broken")
    planned = repair(root, dry_run=True)
    assert [step.where for step in planned] == ["m/1/model.onnx"]
    assert check(root) != []
    assert all(step.applied for step in repair(root))
    assert check(root) == []
    for version in ("1", "2"):
        (root / "m" / version / "model.onnx").unlink()
    assert repair(root) == ()
    assert len(repair(root, copies=(copy, tmp_path / "nowhere"))) == 2
    assert check(root) == []


def test_repair_of_configuration_and_state(root: Path, put: Put) -> None:
    put()
    put()
    text = (root / "m/config.pbtxt").read_text()
    (root / "m/config.pbtxt").unlink()
    repair(root)
    assert find_model(root, "m").selected == (2,)
    (root / "m/config.pbtxt").write_text(text.replace("versions: [1]", "versions: [1, 7]"))
    (root / ".repo-manager.json").write_text("broken")
    assert {step.where for step in repair(root)} == {"m/config.pbtxt", ".repo-manager.json"}
    assert check(root) == []
    assert put().version == 3


@pytest.mark.parametrize(
    ("folder", "triton", "ours"),
    [
        ("1", 1, 1),
        ("10", 10, 10),
        ("0", 0, 0),
        ("01", None, None),
        ("3.tmp", 3, None),
        ("3abc", 3, None),
        (" 4", 4, None),
        ("+5", 5, None),
        ("-1", -1, None),
        ("1e3", 1, None),
        ("abc", None, None),
        (".1", None, None),
        ("warmup", None, None),
        ("", None, None),
        ("\u0663", None, None),
        ("9" * 30, int("9" * 30), None),
        (str(2**63), 2**63, None),
    ],
)
def test_version_folders_as_stoll_reads_them(folder: str, triton: int | None, ours: int | None) -> None:
    assert triton_version(folder) == triton
    assert version_number(folder) == ours


def test_a_file_that_comes_and_goes_is_no_finding(root: Path, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands about to write rename a file into the root and away."""
    put()
    probe = root / ".repo-manager.stage-0.probe"
    probe.touch()
    real = disk_module.is_folder

    def is_folder(entry: os.DirEntry[str]) -> bool:
        if entry.name == probe.name:
            probe.unlink(missing_ok=True)
        return real(entry)

    monkeypatch.setattr(disk_module, "is_folder", is_folder)
    assert verify(root, models=False) == ()
    assert not probe.exists()


def test_a_configuration_that_is_a_link_to_nothing(root: Path, put: Put) -> None:
    put()
    (root / "m/config.pbtxt").unlink()
    (root / "m/config.pbtxt").symlink_to("elsewhere")
    assert "is missing; Triton derives one" in only(root, "m/config.pbtxt")
    (model,) = scan(root, deep=False)
    assert "has no config.pbtxt" in model.problems[0]


def test_labels_that_are_no_file(root: Path, put: Put) -> None:
    put(labels={"y": ("cat", "dog")})
    (root / "m/labels_0_y.txt").unlink()
    (root / "m/labels_0_y.txt").mkdir()
    assert any("m/labels_0_y.txt: is missing" in line for line in check(root)), check(root)


def test_a_version_on_trial_is_named_until_it_is_proven(root: Path, put: Put) -> None:
    put()
    put()
    begin_trial(as_location(root), "m", 2, (1,))
    found = only(root, "m/2: is on trial since ")
    assert found.startswith("warning")
    assert "rollback undoes it" in found
    record_deployment(as_location(root), "m", 2)
    assert check(root) == []
