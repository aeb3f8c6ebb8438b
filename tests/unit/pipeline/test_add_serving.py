"""The output of `add` beyond the model: accelerator, plans per GPU kind, named configurations, controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from repo_manager import samples
from repo_manager.engine.fit import ContainerRelease, FitTarget
from repo_manager.engine.options import EngineOptions
from repo_manager.engine.triton_options import AcceleratorOptions
from repo_manager.errors import GateError, MissingDependencyError, RepositoryError, UsageError
from repo_manager.optional import is_installed
from repo_manager.pipeline.adding import Added, AddOptions, add
from repo_manager.repository.scan import scan
from repo_manager.repository.verify import verify
from repo_manager.triton_config.config import parse_config, read_config
from repo_manager.types import Precision

ORT = "onnxruntime"
ALL = frozenset({"triton", "tensorrt", "cuda", "driver"})
R2607 = ContainerRelease("26.07", "2.71.0", "11.1", "13.3.0.035", "610.43.02", ALL, ())


def added(root: Path, name: str = "digits", **options: Any) -> Added:
    return add(samples.sample_model(), name, root, AddOptions(**options))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir()) if root.exists() else []


def plan(path: Path, *version: int) -> Path:
    path.write_bytes(b"ftrt" + bytes(20) + bytes(version or (11, 1, 0, 5)) + bytes(100))
    return path


def test_the_accelerator_is_in_the_config_with_the_shapes_beforehand(tmp_path: Path) -> None:
    accelerator = AcceleratorOptions(precision=Precision.FP16, engine_cache="/cache")
    added(tmp_path, backend=ORT, accelerator=accelerator)
    message = read_config(tmp_path / "digits").message()
    (found,) = message.optimization.execution_accelerators.gpu_execution_accelerator
    assert (found.name, found.parameters["precision_mode"], found.parameters["trt_engine_cache_path"]) == (
        "tensorrt",
        "FP16",
        "/cache",
    )
    assert found.parameters["trt_profile_max_shapes"] == "image:8x1x8x8"


def test_an_accelerator_on_a_model_without_one_is_refused_as_it_would_not_take_effect(tmp_path: Path) -> None:
    added(tmp_path, backend=ORT)
    with pytest.raises(UsageError, match=r"config\.pbtxt that all its versions share has another optimization"):
        added(tmp_path, backend=ORT, accelerator=AcceleratorOptions())
    again = added(tmp_path, "fast", backend=ORT, accelerator=AcceleratorOptions())
    assert again.config_kept == ()
    assert "optimization" in added(tmp_path, "fast", backend=ORT).config_kept, "said, not silently ignored"


def test_bf16_for_onnx_runtime_is_refused_before_anything_runs(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(UsageError, match=r"--precision bf16 with the onnxruntime backend: .* no BF16 operators"):
        add(samples.sample_model(), "digits", tmp_path, AddOptions(backend=ORT, precision=Precision.BF16),
            report=said.append)  # fmt: skip
    assert names(tmp_path) == []
    assert not any("Converting" in line for line in said)


@pytest.mark.skipif(is_installed("tensorrt"), reason="TensorRT is installed")
def test_a_missing_builder_is_named_before_the_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="tensorrt cannot be imported"):
        add(tmp_path / "missing.onnx", "m", tmp_path / "r", AddOptions(backend="tensorrt"))


def test_plans_built_elsewhere_are_adopted_without_the_library(tmp_path: Path) -> None:
    plans = {"8.0": plan(tmp_path / "a.plan"), "9.0": plan(tmp_path / "b.plan")}
    root = tmp_path / "models"
    result = added(root, backend="tensorrt", engine=EngineOptions(plans=plans))
    assert set(result.files) == {"model_sm80.plan", "model_sm90.plan", "golden.npz"}
    config = read_config(root / "digits").message()
    assert dict(config.cc_model_filenames) == {"8.0": "model_sm80.plan", "9.0": "model_sm90.plan"}
    section = json.loads((result.path / "manifest.json").read_text())["engine"]
    assert section["plans"]["9.0"]["built"] == "elsewhere"
    assert section["plans"]["9.0"]["plan"]["version"] == "11.1.0.5"
    assert section["plans"]["9.0"]["plan"]["source"] == "b.plan"
    assert section["compute_capabilities"] == ["8.0", "9.0"]
    assert {row["chosen"] for row in section["layers"]} == {None}, "nothing is claimed of kernels"
    assert verify(root) == ()
    with pytest.raises(UsageError, match="cc_model_filenames"):
        added(root, backend="tensorrt", engine=EngineOptions(plans={"8.0": plans["8.0"]}))


def test_an_engine_that_will_not_load_on_the_server_it_is_for_is_not_published(tmp_path: Path) -> None:
    engine = EngineOptions(plans={"8.0": plan(tmp_path / "a.plan", 10, 5, 0, 1)})
    root = tmp_path / "models"
    with pytest.raises(GateError, match=r"plans for compute capability 8\.0; the server's GPU has 9\.0"):
        added(root, backend="tensorrt", engine=engine, target=FitTarget(R2607, "9.0"))
    result = added(root, backend="tensorrt", engine=engine, target=FitTarget(R2607, "8.0"))
    (problem,) = result.fit
    assert not problem.blocks, "whether it is version-compatible is not known of a plan that others built"
    assert "built with TensorRT 10.5.0.1; the server's release 26.07 has TensorRT 11.1" in problem.message


def test_a_named_configuration_comes_with_the_first_version_and_never_changes(tmp_path: Path) -> None:
    overrides = tmp_path / "big.pbtxt"
    overrides.write_text("max_batch_size: 64")
    root = tmp_path / "models"
    added(root, backend=ORT, model_configs={"big": str(overrides)})
    path = root / "digits" / "configs" / "big.pbtxt"
    variant = parse_config(path.read_text())
    assert variant.max_batch_size == 64
    assert variant.backend == ORT
    assert verify(root) == ()
    before = path.stat().st_mtime_ns
    added(root, backend=ORT, model_configs={"big": str(overrides)})
    added(root, backend=ORT)
    assert path.stat().st_mtime_ns == before, "anything beside the versions that changes reloads every version"
    overrides.write_text("max_batch_size: 32")
    with pytest.raises(RepositoryError, match=r"configs/big\.pbtxt: it says something else"):
        added(root, backend=ORT, model_configs={"big": str(overrides)})
    with pytest.raises(RepositoryError, match=r"configs/new\.pbtxt: there is none"):
        added(root, backend=ORT, model_configs={"new": str(overrides)})
    assert [entry.version for entry in scan(root)[0].versions] == [1, 2, 3]


def test_controls_are_matched_twins_beside_the_model(tmp_path: Path) -> None:
    result = added(tmp_path, backend=ORT, precision=Precision.FP16, control=True)
    assert names(tmp_path) == ["digits", "digits__dense"]
    (control,) = result.controls
    assert (control.name, control.version) == ("digits__dense", 1)
    twin = tmp_path / "digits__dense" / "1"
    section = json.loads((twin / "manifest.json").read_text())
    assert (section["control"]["of"], section["control"]["dense"], section["precision"]) == ("digits", True, "fp16")
    assert section["control"]["filled_weights"]
    assert json.loads((result.path / "manifest.json").read_text())["controls"] == {"digits__dense": 1}

    def graph(folder: Path) -> onnx.ModelProto:
        return onnx.load(folder / "model.onnx")

    sparse, dense = graph(Path(str(result.path))), graph(twin)
    assert [node.op_type for node in sparse.graph.node] == [node.op_type for node in dense.graph.node]
    zeros = {t.name: int(np.sum(numpy_helper.to_array(t) == 0)) for t in dense.graph.initializer}
    assert all(zeros[name] == 0 for name in section["control"]["filled_weights"] if name in zeros)
    same = read_config(tmp_path / "digits").message()
    twins = read_config(tmp_path / "digits__dense").message()
    same.name = twins.name = ""
    assert same == twins


def test_a_dry_run_names_the_controls_and_writes_nothing(tmp_path: Path) -> None:
    result = added(tmp_path / "models", backend=ORT, control=True, dry_run=True)
    assert [control.name for control in result.controls] == ["digits__dense"]
    assert names(tmp_path / "models") == []


def test_a_dense_model_has_no_control_and_nothing_is_published(tmp_path: Path) -> None:
    from repo_manager.errors import ModelError

    with pytest.raises(ModelError, match="no denser twin"):
        add(samples.dense_twin(), "d", tmp_path / "models", AddOptions(backend=ORT, control=True))
    assert names(tmp_path / "models") == []


def test_an_error_names_the_file_that_was_given_not_the_scratch_copy(tmp_path: Path) -> None:
    from repo_manager.errors import RepoManagerError
    from repo_manager.pipeline.adding import _speaking_of

    work, given = tmp_path / "w", Path("mine.onnx")
    scratch = f"{work}/m__dense/converted/model.onnx: node 'a' failed"
    wanted = r"^mine\.onnx \(converted\): node 'a' failed\nsee mine\.onnx \(pruned\)$"
    with pytest.raises(GateError, match=wanted), _speaking_of(given, work):
        raise GateError(scratch, hint=f"see {work}/pruned/model.onnx")
    with pytest.raises(RepoManagerError, match=r"^other$"), _speaking_of(given, work):
        raise UsageError("other")
