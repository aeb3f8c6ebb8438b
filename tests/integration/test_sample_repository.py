"""The sample repository is current, standard and sparse, and a real Triton answers from it as ONNX Runtime does."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from support.serving import running_server

from repo_manager import samples
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.session import Session
from repo_manager.repository.configuration import set_served_versions
from repo_manager.repository.scan import scan
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.sparsity import sparsity_report
from repo_manager.triton_config.config import read_config

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
REPOSITORY = ROOT / "model_repository"
VERSIONS = [("digits", 1, "fp32"), ("digits", 2, "fp16"), ("digits_int8", 1, "int8")]
SPARSE_LAYERS = {"conv2", "conv3", "linear1"}
BATCH = 8

each_version = pytest.mark.parametrize(("name", "version", "precision"), VERSIONS)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "examples" / "make_sample_repository.py"
    spec = importlib.util.spec_from_file_location("make_sample_repository", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonClient]:
    """A real tritonserver on a copy with one difference: both versions of `digits` are served."""
    copy = tmp_path_factory.mktemp("served") / "model_repository"
    shutil.copytree(REPOSITORY, copy)
    set_served_versions(copy, "digits", (1, 2))
    options = ServerOptions(repository=str(copy), load=("digits", "digits_int8"))
    with running_server(options) as server, TritonClient.connect(server.grpc_url) as client:
        yield client


def model_of(name: str, version: int) -> Path:
    return REPOSITORY / name / str(version) / "model.onnx"


def test_repository_is_what_add_writes_today(script: ModuleType) -> None:
    assert script.differences(REPOSITORY) == []
    assert [(v.name, v.version, str(v.precision)) for v in script.VERSIONS] == VERSIONS


def test_a_stale_repository_is_noticed(script: ModuleType, tmp_path: Path) -> None:
    stale = tmp_path / "model_repository"
    shutil.copytree(REPOSITORY, stale)
    shutil.copyfile(samples.dense_twin(), stale / "digits" / "1" / "model.onnx")
    shutil.rmtree(stale / "digits" / "2")
    config = stale / "digits_int8" / "config.pbtxt"
    config.write_text(config.read_text() + "model_warmup { name: 'x' }\n")
    found = "\n".join(script.differences(stale))
    for place in ("digits/1", "digits/2: missing", "digits_int8/config.pbtxt: differs"):
        assert place in found


def test_an_official_triton_finds_what_it_expects() -> None:
    folders = sorted(path.name for path in REPOSITORY.iterdir() if path.is_dir())
    assert folders == sorted({name for name, _, _ in VERSIONS})
    assert not list(REPOSITORY.rglob("*.py"))
    for entry in scan(REPOSITORY):
        assert entry.backend == "onnxruntime"
        assert entry.selected == (1,)
        assert [str(v.manifest.precision) for v in entry.versions if v.manifest] == [
            precision for name, _, precision in VERSIONS if name == entry.name
        ]
        config = read_config(REPOSITORY / entry.name / "config.pbtxt").message()
        # The native backend's own file name, and nothing only the embedded server's Python backend knows.
        assert config.default_model_filename in ("", "model.onnx")
        assert config.runtime in ("", "libtriton_onnxruntime.so")


@each_version
def test_two_of_four_holds(name: str, version: int, precision: str) -> None:
    layers = sparsity_report(load_model(model_of(name, version))).layers
    valid = {layer.node for layer in layers if layer.groups and layer.valid_groups == layer.groups}
    assert {layer for layer in SPARSE_LAYERS if any(layer in node for node in valid)} == SPARSE_LAYERS


@each_version
def test_a_server_answers_as_onnx_runtime_does(served: TritonClient, name: str, version: int, precision: str) -> None:
    with np.load(samples.held_out()) as data:
        images, labels = data["image"], data["labels"]
    local = Session(load_model(model_of(name, version))).run({"image": images})["logits"]
    answers = [
        served.infer(name, version, {"image": images[start : start + BATCH]})["logits"]
        for start in range(0, len(images), BATCH)
    ]
    remote = np.concatenate(answers)
    np.testing.assert_allclose(remote, local, rtol=1e-2, atol=1e-2 * np.abs(local).max())
    accuracy_here = (local.argmax(axis=1) == labels).mean()
    accuracy_there = (remote.argmax(axis=1) == labels).mean()
    assert accuracy_there == accuracy_here
    assert accuracy_there > 0.98
