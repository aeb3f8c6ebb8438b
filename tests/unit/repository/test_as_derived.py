"""A version's model is loaded again only when something could have changed since it was published."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from repo_manager import samples
from repo_manager.pipeline.adding import add
from repo_manager.repository.configuration import change_config, is_as_derived
from repo_manager.repository.look import existing_model, with_versions
from repo_manager.repository.stores import open_store
from repo_manager.repository.verify import verify
from repo_manager.triton_config.config import parse_config


@pytest.fixture
def root(tmp_path: Path) -> Path:
    add(samples.sample_model(), "digits", tmp_path / "models")
    return tmp_path / "models"


def as_derived(root: Path) -> bool:
    store = open_store(root)
    view = with_versions(store, existing_model(store, "digits"))
    config = parse_config((root / "digits/config.pbtxt").read_text(), where="config.pbtxt")
    return is_as_derived(view.contents[1], config, root / "digits/1/model.onnx")


def replace_in(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.chmod(0o644)
    file.write_text(text.replace(old, new))


def test_what_was_just_published_is_as_derived(root: Path) -> None:
    assert as_derived(root)
    change_config(root, "digits", {"instance_group.count": "2", "dynamic_batching.max_queue_delay_microseconds": "5"})
    assert as_derived(root)


@pytest.mark.parametrize(
    ("old", "new"),
    [("dims: [10]", "dims: [11]"), ("max_batch_size: 8", "max_batch_size: 0"), ("TYPE_FP32", "TYPE_FP16")],
)
def test_other_tensors_are_compared_with_the_model(root: Path, old: str, new: str) -> None:
    text = (root / "digits/config.pbtxt").read_text().replace("dims: 10", "dims: [10]")
    (root / "digits/config.pbtxt").write_text(text)
    replace_in(root / "digits/config.pbtxt", old, new)
    assert not as_derived(root)
    assert verify(root, "digits")


def test_another_file_is_loaded(root: Path) -> None:
    file = root / "digits/1/model.onnx"
    file.chmod(0o644)
    file.write_bytes(samples.dense_twin().read_bytes())
    assert not as_derived(root)


def test_another_release_of_onnx_runtime_loads_it(root: Path) -> None:
    manifest = root / "digits/1/manifest.json"
    release = json.loads(manifest.read_text())["tools"]["onnxruntime"]
    replace_in(manifest, f'"onnxruntime": "{release}"', '"onnxruntime": "0.0.1"')
    assert not as_derived(root)


@pytest.mark.parametrize("command", [["verify"], ["config", "digits"]])
def test_the_commands_then_need_no_onnx_runtime(root: Path, command: list[str]) -> None:
    arguments = ["repo-manager", *command, "-r", str(root)]
    code = (
        f"import sys; sys.argv = {arguments!r}\nfrom repo_manager.cli.main import main\ntry: main()\n"
        "except SystemExit as end: print(end.code, 'onnxruntime' in sys.modules, file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stderr.split()[-2:] == ["0", "False"]
