"""`add` of a model whose samples depend on each other, and `verify` on earlier ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from support import onnx_models
from support.onnx_models import value

from repo_manager.errors import ConfigError
from repo_manager.pipeline.add_types import Added, AddOptions
from repo_manager.pipeline.adding import add
from repo_manager.report.added_view import added_view
from repo_manager.report.terminal import Terminal
from repo_manager.repository.manifest import read_manifest
from repo_manager.repository.verify import verify
from repo_manager.triton_config.options import ConfigOptions
from repo_manager.triton_config.problems import Severity

REASON = "node 'loudest' (ReduceMax) reduces over the batch axis"


def loudest() -> onnx.ModelProto:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], name="loudest", keepdims=0),
        helper.make_node("Div", ["x", "m"], ["y"]),
    ]
    return onnx_models.model(nodes, [value("x", ["N", 4])], [value("y", ["N", 4])])


def added(tmp_path: Path, proto: onnx.ModelProto, size: int | None = None) -> Added:
    tmp_path.mkdir(exist_ok=True)
    path = onnx_models.save(proto, tmp_path / "m.onnx")
    options = AddOptions(backend="onnxruntime", config=ConfigOptions(max_batch_size=size))
    return add(path, "m", tmp_path / "repository", options)


def shown(result: Added, capsys: pytest.CaptureFixture[str]) -> str:
    Terminal(as_json=False, quiet=False).result(result, *added_view(result))
    return " ".join(capsys.readouterr().out.split())


def test_it_is_unbatched_and_the_node_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = added(tmp_path, loudest())
    assert "max_batch_size: 0" in result.config
    assert result.conversion.files == (Path("model.onnx"),)  # Not in the temporary folder, gone by now.
    assert REASON in shown(result, capsys)
    recorded = read_manifest(tmp_path / "repository" / "m" / "1").extra["batch_axis"]
    assert recorded == {"kind": "unbatched", "reason": REASON, "stackable": True, "forced": False}
    assert verify(tmp_path / "repository") == ()


def test_a_given_max_batch_size_is_kept_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = added(tmp_path, loudest(), 4)
    assert "max_batch_size: 4" in result.config
    assert "an answer can depend on other clients' requests" in shown(result, capsys)
    recorded = read_manifest(tmp_path / "repository" / "m" / "1").extra["batch_axis"]
    assert recorded == {"kind": "batched", "reason": REASON, "stackable": True, "forced": True}
    (problem,) = verify(tmp_path / "repository")
    assert problem.severity is Severity.WARNING
    assert REASON in problem.what


def test_shapes_that_cannot_be_stacked_are_refused_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_batch_size is 4, but the model cannot be batched: .*fixed first dim"):
        added(tmp_path, onnx_models.mlp(batch=1), 4)


def test_verify_finds_what_an_earlier_release_has_published(tmp_path: Path) -> None:
    added(tmp_path, loudest(), 4)
    manifest = tmp_path / "repository" / "m" / "1" / "manifest.json"
    document = json.loads(manifest.read_text())
    del document["batch_axis"]
    manifest.write_text(json.dumps(document))
    (problem,) = verify(tmp_path / "repository")
    assert (problem.severity, problem.where) == (Severity.ERROR, "m/1/model.onnx")
    assert REASON in problem.what
    assert "other clients' data" in problem.hint


def test_verify_finds_a_size_that_was_raised_by_hand(tmp_path: Path) -> None:
    added(tmp_path, loudest(), 4)
    manifest = tmp_path / "repository" / "m" / "1" / "manifest.json"
    document = json.loads(manifest.read_text())
    document["batch_axis"] = {"kind": "unbatched", "reason": REASON, "stackable": True, "forced": False}
    manifest.write_text(json.dumps(document))
    (problem,) = verify(tmp_path / "repository")
    assert problem.severity is Severity.ERROR


def test_verify_says_nothing_of_models_that_keep_samples_apart(tmp_path: Path) -> None:
    added(tmp_path, onnx_models.mlp())
    assert "batch_axis" in read_manifest(tmp_path / "repository" / "m" / "1").extra
    assert verify(tmp_path / "repository") == ()


def test_an_output_whose_rank_nobody_knows(tmp_path: Path) -> None:
    """Triton needs the rank for batches. Nobody asked for batches, and no message says otherwise."""
    nodes = [
        helper.make_node("Shape", ["x"], ["all"]),
        helper.make_node("Compress", ["all", "both"], ["some"]),
        helper.make_node("Reshape", ["x", "some"], ["y"]),
    ]
    weights = {"both": np.array([True, True])}
    proto = onnx_models.model(nodes, [value("x", ["N", 4])], [value("y", None)], weights)
    result = added(tmp_path, proto)
    assert "max_batch_size: 0" in result.config
    assert result.batch_axis.reason == "output 'y' has no shape in the file, and Triton needs its rank"
    with pytest.raises(ConfigError, match="cannot be batched: output 'y' has no shape"):
        added(tmp_path / "again", proto, 4)


def test_an_output_without_a_shape_that_the_runtime_infers(tmp_path: Path) -> None:
    proto = onnx_models.model([helper.make_node("Relu", ["x"], ["y"])], [value("x", ["N", 4])], [value("y", None)])
    assert "max_batch_size: 8" in added(tmp_path, proto).config
