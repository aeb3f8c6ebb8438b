"""Plans built on the GPU: their builder's report, and their results."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from repo_manager.engine.capabilities import capabilities_of
from repo_manager.engine.control import _backend_modules, measure_layer_times
from repo_manager.engine.fit import FitTarget, read_plan_header
from repo_manager.engine.fit_check import check_version_fit
from repo_manager.engine.gpu import find_gpus
from repo_manager.engine.options import EngineOptions
from repo_manager.errors import InputError, UsageError
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.signature import signature_of
from repo_manager.pipeline.adding import Added, AddOptions, add
from repo_manager.precision import ConvertOptions
from repo_manager.repository.golden import read_golden
from repo_manager.triton_config.options import ConfigOptions
from repo_manager.types import Precision

pytestmark = pytest.mark.gpu

ENGINE = re.compile(r"model.*\.(plan|engine)")
LOOSE = ConvertOptions(max_drift=10.0, min_top1=0.0)  # made-up weights


def published(
    source: Path, root: Path, library: ModuleType, precision: Precision = Precision.FP16, **options: Any
) -> tuple[Added, Path, dict[str, Any]]:
    """`add` a model. Return the result, the engine's file and the manifest."""
    data = None
    if "int8" in str(precision):
        spec = signature_of(load_model(source)).inputs[0]
        shape = [8, *(dim if isinstance(dim, int) else 8 for dim in (spec.shape or ())[1:])]
        data = str(root.with_suffix(".npz"))
        np.savez(data, **{spec.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)})
    left_out = tuple(os.environ.get("REPO_MANAGER_WITHOUT_TACTICS", "").split())
    options["engine"] = dataclasses.replace(options.get("engine", EngineOptions()), without_tactics=left_out)
    chosen = AddOptions(precision, library.__name__, calibration=data, convert=LOOSE, **options)
    added = add(source, "m", root, chosen)
    folder = Path(str(added.path))
    (engine,) = [path for path in folder.iterdir() if ENGINE.fullmatch(path.name)]
    return added, engine, json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        (Precision.FP32, "float32"),
        (Precision.FP16, "float16"),
        (Precision.INT8, "int8"),
        (Precision.INT8_FP16, "int8"),
    ],
)
def test_every_layer_runs_in_the_precision_that_was_asked(
    precision: Precision, dtype: str, small: Path, tmp_path: Path, library: ModuleType
) -> None:
    _, _, manifest = published(small, tmp_path / "m", library, precision)
    rows = manifest["engine"]["build"]["precision"]
    assert rows, "the builder or the inspector lists the layers"
    assert {row["found"] for row in rows if row["found"]} == {dtype}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.INT8])
def test_an_engine_computes_what_onnx_runtime_computes(
    precision: Precision, small: Path, tmp_path: Path, library: ModuleType
) -> None:
    added, plan, _ = published(small, tmp_path / "m", library, precision)
    golden = read_golden(Path(str(added.path)) / "golden.npz")
    cuda_module, engine_module = _backend_modules()
    engine = engine_module.Engine(library, plan, cuda_module.Cuda(0))
    try:
        outputs = engine.run({name: [array] for name, array in golden.inputs.items()})
        for name, wanted in golden.outputs.items():
            error = np.abs(outputs[name] - wanted).max() / np.abs(wanted).max()
            assert error <= added.golden.tolerance, (name, error)
    finally:
        engine.close()


def test_the_header_tells_the_version_and_the_manifest_the_gpu(
    small: Path, tmp_path: Path, library: ModuleType
) -> None:
    _, plan, manifest = published(small, tmp_path / "m", library)
    assert read_plan_header(plan).version.startswith(library.__version__.split("+")[0])
    gpus = find_gpus()
    if capabilities_of(library).needs_gpu:
        assert manifest["engine"]["compute_capabilities"] == [gpus[0].compute_capability]
        other = FitTarget(compute_capability="7.5")
        assert any(problem.blocks for problem in check_version_fit(plan.parent, manifest, other))


@pytest.mark.usefixtures("device")
def test_the_builder_speaks_of_sparse_kernels_and_the_evidence_agrees(
    wide: Path, tmp_path: Path, library: ModuleType
) -> None:
    _, _, manifest = published(wide, tmp_path / "m", library, config=ConfigOptions(max_batch_size=32))
    section = manifest["engine"]
    rows = {row["layer"]: row for row in section["layers"]}
    assert {row["pattern"] for row in rows.values()} == {"valid"}
    if not capabilities_of(library).needs_gpu:
        pytest.skip("TensorRT-RTX chooses its kernels when the engine is loaded")
    assert section["sparsity_reported"]
    assert all(row["eligible"] for row in rows.values()), rows
    for row in rows.values():
        if row["chosen"] and row["tactic"]:
            assert re.search("spars|spmma", row["tactic"], re.IGNORECASE), row


@pytest.mark.usefixtures("device")
def test_without_the_flag_no_sparse_kernel_is_chosen(wide: Path, tmp_path: Path, library: ModuleType) -> None:
    _, _, manifest = published(wide, tmp_path / "m", library, engine=EngineOptions(sparse=False))
    rows = manifest["engine"]["layers"]
    assert not any(row["chosen"] for row in rows)
    assert not any(re.search("spars|spmma", row["tactic"], re.IGNORECASE) for row in rows)


@pytest.mark.usefixtures("device")
def test_controls_bring_the_times_of_every_layer(wide: Path, tmp_path: Path, library: ModuleType) -> None:
    added, plan, manifest = published(wide, tmp_path / "m", library, control=True)
    assert {control.name for control in added.controls} == {"m__dense", "m__noflag"}
    rows = manifest["engine"]["layers"]
    assert all(row["time_sparse_ns"] and row["time_dense_ns"] for row in rows), rows
    times = measure_layer_times(library, plan, {"x": (8, 512, 14, 14)}, runs=3)
    assert len(times) >= 3
    assert all(time_ns >= 0 for time_ns in times.values())


OPTIONS = [
    {"optimization_level": 0},
    {"workspace_bytes": 1 << 28},
    {"version_compatible": True},
    {"hardware_compatibility": "ampere_plus"},
    {"strip": True},
    {"plan_detail": "layer_names_only"},
    {"refit": True, "sparse": False},
]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_every_option_builds_or_is_refused_with_the_next_step(
    options: dict[str, Any], small: Path, tmp_path: Path, library: ModuleType
) -> None:
    refused: list[str | None] = []
    manifest: dict[str, Any] = {}
    try:
        _, _, manifest = published(small, tmp_path / "m", library, engine=EngineOptions(**options))
    except (InputError, UsageError) as exc:
        refused.append(exc.hint)
    if refused:
        assert refused[0]
        return
    name, value = next(iter(options.items()))
    assert manifest["engine"]["build"]["options"][name] == value


@pytest.mark.usefixtures("device")
def test_the_timing_cache_is_kept_and_pins_a_build(small: Path, tmp_path: Path, library: ModuleType) -> None:
    able = capabilities_of(library)
    if not able.timing_cache:
        pytest.skip(f"{able.backend} measures nothing when it builds")
    cache = tmp_path / "times.cache"
    published(small, tmp_path / "first", library, engine=EngineOptions(timing_cache=cache))
    size = cache.stat().st_size
    assert size > 0
    if "ERROR_ON_TIMING_CACHE_MISS" not in able.builder_flags:
        return
    pinned = EngineOptions(timing_cache=cache, deterministic=True)
    published(small, tmp_path / "again", library, engine=pinned)
    assert cache.stat().st_size == size
    with pytest.raises(InputError):
        published(
            small, tmp_path / "never", library, engine=EngineOptions(timing_cache=tmp_path / "x", deterministic=True)
        )
