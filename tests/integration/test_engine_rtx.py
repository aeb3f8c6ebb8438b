"""Engines by the real TensorRT-RTX builder. It needs no GPU."""

from __future__ import annotations

import dataclasses
import json
import mmap
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import onnx_models

from repo_manager.engine.artifact import EngineSource, build_artifact
from repo_manager.engine.builder import build_engine
from repo_manager.engine.capabilities import StrongTyping, capabilities_of
from repo_manager.engine.fit import read_plan_header
from repo_manager.engine.options import EngineOptions
from repo_manager.engine.profiles import ShapeRange, derive_profile
from repo_manager.errors import EngineError, GateError, UsageError
from repo_manager.onnx_model.model import Model, load_model
from repo_manager.onnx_model.signature import signature_of
from repo_manager.optional import is_installed, require
from repo_manager.precision import ConvertOptions, convert, load_calibration
from repo_manager.types import Backend, Precision

pytestmark = pytest.mark.integration

if not is_installed("tensorrt_rtx"):
    pytest.skip("tensorrt_rtx is not installed: pip install 'triton-repo-manager[rtx]'", allow_module_level=True)

RTX = Backend.TENSORRT_RTX


@pytest.fixture(scope="module")
def library() -> ModuleType:
    return require("tensorrt_rtx")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_models.save(onnx_models.cnn(), tmp_path_factory.mktemp("model") / "cnn.onnx")


def converted(source: Path, precision: Precision, folder: Path) -> tuple[Path, ...]:
    model = load_model(source)
    signature = signature_of(model)
    calibration = None
    if precision in (Precision.INT8, Precision.INT8_FP16):
        generator = np.random.default_rng(0)
        shape = [dim if isinstance(dim, int) else 8 for dim in signature.inputs[0].shape or ()]
        np.savez(folder / "data.npz", **{signature.inputs[0].name: generator.standard_normal(shape).astype(np.float32)})
        calibration = load_calibration(folder / "data.npz", signature)
    output = folder / "model.onnx"
    return convert(model, precision, output, calibration=calibration, options=ConvertOptions(max_drift=1.0)).files


def profile_of(model: Model, batch: int = 4) -> dict[str, ShapeRange]:
    return derive_profile(signature_of(model), batched=True, max_batch_size=batch)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        (Precision.FP32, "float32"),
        (Precision.FP16, "float16"),
        (Precision.INT8, "int8"),
        (Precision.INT8_FP16, "int8"),
    ],
)
def test_every_precision_builds_and_every_weighted_layer_runs_in_it(
    source: Path, precision: Precision, dtype: str, tmp_path: Path
) -> None:
    files = converted(source, precision, tmp_path)
    artifact = build_artifact(files, RTX, source=EngineSource(precision, max_batch_size=4))
    build = artifact.facts["build"]
    assert {row.found for row in build.precision if row.found} == {dtype}
    assert artifact.facts["precision_unverified"] == ()
    assert artifact.files["model.engine"].stat().st_size == build.size_bytes > 10_000
    assert all(shape.max[0] == 4 for shape in build.profile.values())


def test_sparse_kernels_are_never_claimed(source: Path, tmp_path: Path) -> None:
    artifact = build_artifact(converted(source, Precision.FP16, tmp_path), RTX, source=EngineSource(Precision.FP16))
    rows = artifact.facts["layers"]
    assert artifact.facts["build"].options.sparse
    assert not artifact.facts["sparsity_reported"]
    assert any(row.pattern == "valid" for row in rows)
    assert all(row.eligible is None and row.chosen is None for row in rows)
    assert all("not reported by this builder" in row.reason for row in rows if row.pattern == "valid")


def test_the_installed_builder_has_the_wording_that_the_parser_reads(library: ModuleType) -> None:
    folder = Path(library.tensorrt_rtx_libs.__file__).parent
    (path,) = sorted(folder.glob("libtensorrt_rtx.so*"))[:1]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for text in (
            b"(Sparsity) Found ",
            b"eligible to use sparse tactics",
            b"(Sparsity) Chose ",
            b"using sparse tact",
        ):
            assert data.find(text) >= 0, text


def quantised_on_one_side(data: bool) -> onnx.ModelProto:
    """A convolution whose data or whose weight alone is quantised: builds without a word, runs in float."""
    scale, zero = numpy_helper.from_array(np.array(0.05, np.float32), "s"), numpy_helper.from_array(np.int8(0), "z")
    weight = np.random.default_rng(0).integers(-100, 100, (16, 16, 3, 3)).astype(np.float32 if data else np.int8)
    nodes = [helper.make_node("Conv", ["xd" if data else "x", "w" if data else "wd"], ["y"], name="the_conv")]
    if data:
        nodes.insert(0, helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], name="dq"))
        nodes.insert(0, helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], name="q"))
    else:
        nodes.insert(0, helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"], name="dq"))
    info = helper.make_tensor_value_info
    shape = ["N", 16, 8, 8]
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, shape)],
        [info("y", TensorProto.FLOAT, ["N", 16, 6, 6])],
        [scale, zero, numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


@pytest.mark.parametrize(("data", "side"), [(True, "data"), (False, "weight")])
def test_a_convolution_that_runs_in_float_although_int8_was_asked_is_an_error(
    data: bool, side: str, tmp_path: Path
) -> None:
    path = onnx_models.save(quantised_on_one_side(data), tmp_path / "m.onnx")
    with pytest.raises(GateError, match=f"the_conv.*asked for int8, runs in float32: only its {side}"):
        build_artifact((path,), RTX, source=EngineSource(Precision.INT8))
    assert not (tmp_path / "engine" / "model.engine").exists()


def test_parser_errors_name_node_operator_reason_and_next_step(tmp_path: Path, library: ModuleType) -> None:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Unique", ["x"], ["y"], name="odd_one")],
        "g",
        [info("x", TensorProto.FLOAT, [8])],
        [info("y", TensorProto.FLOAT, [None])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    model = load_model(onnx_models.save(proto, tmp_path / "m.onnx"))
    with pytest.raises(EngineError, match=r"node 'odd_one' \(Unique\): not supported") as caught:
        build_engine(model, library, tmp_path / "out.engine", profile_of(model))
    assert "--backend onnxruntime" in str(caught.value)
    assert not (tmp_path / "out.engine").exists()


def test_unnamed_dimensions_and_nodes_are_told_apart(tmp_path: Path, library: ModuleType) -> None:
    proto = onnx_models.cnn(batch=None, size=None)
    for node in proto.graph.node:
        node.name = ""
    path = onnx_models.save(proto, tmp_path / "m.onnx")
    model = load_model(path)
    name = signature_of(model).inputs[0].name
    channels = (signature_of(model).inputs[0].shape or ())[1]
    assert isinstance(channels, int)
    shapes = ShapeRange((1, channels, 16, 16), (2, channels, 16, 32), (4, channels, 32, 64))
    build = build_engine(model, library, tmp_path / "out.engine", {name: shapes})
    found = [row.found for row in build.precision]
    assert found
    assert set(found) == {"float32"}
    assert path.read_bytes() == proto.SerializeToString(), "the model's own file is not touched"


def test_external_data_is_read_from_beside_the_model(tmp_path: Path, library: ModuleType) -> None:
    proto = onnx_models.cnn(batch=None)  # renamed for the parser, weights still outside
    onnx.save_model(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    model = load_model(tmp_path / "m.onnx")
    assert model.external_files
    build = build_engine(model, library, tmp_path / "out.engine", profile_of(model))
    assert build.size_bytes > 10_000


def test_cancelling_leaves_nothing(source: Path, tmp_path: Path, library: ModuleType) -> None:
    cancelled = threading.Event()
    seen: list[tuple[str, int, int]] = []

    def stop_at_the_third_step(phase: str, done: int, steps: int) -> None:
        seen.append((phase, done, steps))
        if len(seen) == 3:
            cancelled.set()

    model = load_model(source)
    with pytest.raises(EngineError, match="cancelled"):
        build_engine(
            model,
            library,
            tmp_path / "out.engine",
            profile_of(model),
            progress=stop_at_the_third_step,
            cancelled=cancelled,
        )
    assert list(tmp_path.iterdir()) == []
    assert len(seen) < 20, "the build went on after it was cancelled"


def test_an_earlier_engine_of_that_name_does_not_outlive_a_failed_build(
    source: Path, tmp_path: Path, library: ModuleType
) -> None:
    output = tmp_path / "out.engine"
    output.write_bytes(b"old")
    model = load_model(source)
    with pytest.raises(EngineError):
        build_engine(model, library, output, profile_of(model), options=EngineOptions(workspace_bytes=1))
    assert list(tmp_path.iterdir()) == []


def test_progress_is_reported_in_nested_phases(source: Path, tmp_path: Path, library: ModuleType) -> None:
    seen: list[tuple[str, int, int]] = []
    model = load_model(source)
    build_engine(
        model,
        library,
        tmp_path / "out.engine",
        profile_of(model),
        progress=lambda phase, done, steps: seen.append((phase, done, steps)),
    )
    outermost = seen[0][0]
    assert seen[-1] == (outermost, seen[0][2], seen[0][2])
    assert len({phase for phase, _, _ in seen}) > 3
    assert all(0 <= done <= steps for _, done, steps in seen)


OPTIONS = [
    ({"workspace_bytes": 1 << 10}, "--workspace"),
    ({"compute_capabilities": ("7.5",)}, "--compute-capability"),
    ({"refit": True, "sparse": False}, "GPU"),
    ({"strip": True}, "GPU"),
]


@pytest.mark.parametrize(("options", "hint"), OPTIONS)
def test_an_option_that_cannot_be_met_is_an_error_with_the_next_step(
    options: dict[str, object], hint: str, source: Path, tmp_path: Path, library: ModuleType
) -> None:
    model = load_model(source)
    with pytest.raises(EngineError) as caught:
        build_engine(
            model,
            library,
            tmp_path / "out.engine",
            profile_of(model),
            options=EngineOptions(**options),  # type: ignore[arg-type]
        )
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("target", ["8.0", "8.6", "8.9", "12.0"])
def test_compute_capabilities_are_in_the_engine(target: str, source: Path, tmp_path: Path, library: ModuleType) -> None:
    model = load_model(source)
    output = tmp_path / "out.engine"
    build_engine(model, library, output, profile_of(model), options=EngineOptions(compute_capabilities=(target,)))
    header = read_plan_header(output)
    assert header.compute_capabilities == (target,)
    assert header.backend is RTX
    assert header.version == library.__version__


def test_without_a_target_the_engine_is_for_ampere_and_newer(source: Path, tmp_path: Path, library: ModuleType) -> None:
    model = load_model(source)
    build_engine(model, library, tmp_path / "out.engine", profile_of(model))
    targets = read_plan_header(tmp_path / "out.engine").compute_capabilities
    assert {"8.0", "8.6", "8.9"} <= set(targets)
    assert "7.5" not in targets


@pytest.mark.parametrize(("detail", "listed"), [("none", False), ("layer_names_only", False), ("detailed", True)])
def test_the_plans_detail_decides_whether_precision_can_be_read_back(
    detail: str, listed: bool, source: Path, tmp_path: Path, library: ModuleType
) -> None:
    model = load_model(source)
    options = EngineOptions(plan_detail=detail)
    build = build_engine(model, library, tmp_path / "out.engine", profile_of(model), options=options)
    assert any(row.found for row in build.precision) is listed


class Recorder:
    """Notes the settings of a real configuration, and passes them on."""

    def __init__(self, config: object) -> None:
        object.__setattr__(self, "config", config)
        object.__setattr__(self, "calls", [])

    def __getattr__(self, name: str) -> object:
        value = getattr(self.config, name)
        if not callable(value):
            return value

        def call(*args: object) -> object:
            self.calls.append((name, args))
            return value(*args)

        return call

    def __setattr__(self, name: str, value: object) -> None:
        self.calls.append((name, (value,)))
        setattr(self.config, name, value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"optimization_level": 0}, ("builder_optimization_level", "0")),
        ({"workspace_bytes": 1 << 28}, ("set_memory_pool_limit", str(1 << 28))),
        ({"version_compatible": True}, ("set_flag", "VERSION_COMPATIBLE")),
        ({"version_compatible": True}, ("set_flag", "EXCLUDE_LEAN_RUNTIME")),
        ({}, ("set_flag", "SPARSE_WEIGHTS")),
        ({"refit": True, "sparse": False}, ("set_flag", "REFIT")),
        ({"strip": True}, ("set_flag", "REFIT_IDENTICAL")),
        ({"plan_detail": "none"}, ("profiling_verbosity", "NONE")),
    ],
)
def test_every_option_reaches_the_builder(
    options: dict[str, object], expected: tuple[str, str], library: ModuleType
) -> None:
    from repo_manager.engine.network import create_config

    builder = library.Builder(library.Logger(library.Logger.ERROR))

    class Factory:
        def create_builder_config(self) -> Recorder:
            return Recorder(builder.create_builder_config())

    able = capabilities_of(library)
    config = create_config(library, Factory(), EngineOptions(**options), able, Precision.FP32)  # type: ignore[arg-type]
    calls = [(name, str(args)) for name, args in config.calls]
    assert any(name == expected[0] and expected[1] in args for name, args in calls), calls


def test_sparse_weights_are_not_asked_for_when_switched_off(library: ModuleType) -> None:
    from repo_manager.engine.network import create_config

    builder = library.Builder(library.Logger(library.Logger.ERROR))
    able = capabilities_of(library)
    config = create_config(library, builder, EngineOptions(sparse=False), able, Precision.FP32)
    assert not config.get_flag(library.BuilderFlag.SPARSE_WEIGHTS)


def test_the_capability_table_fits_the_installed_builder(library: ModuleType) -> None:
    able = capabilities_of(library)
    assert able.backend is RTX
    assert able.version == library.__version__
    assert able.progress_monitor
    assert able.parser_names_nodes
    assert not able.needs_gpu
    assert not able.timing_cache
    assert "SPARSE_WEIGHTS" in able.builder_flags
    modern = tuple(int(part) for part in able.version.split(".")[:2]) >= (1, 6)
    assert able.strong_typing is (StrongTyping.ALWAYS if modern else StrongTyping.ASK)
    assert bool(able.precision_flags) is not modern
    assert {"8.0", "8.6", "8.9", "12.0"} <= set(able.compute_capabilities)


def test_a_contradiction_is_refused_before_anything_is_parsed(tmp_path: Path, library: ModuleType) -> None:
    path = tmp_path / "gone.onnx"
    onnx_models.save(onnx_models.cnn(), path)
    model = load_model(path)
    path.unlink()
    with pytest.raises(UsageError, match="contradicts sparse"):
        build_engine(model, library, tmp_path / "o", profile_of(model), options=EngineOptions(refit=True))


def test_the_facts_are_json(source: Path, tmp_path: Path) -> None:
    from repo_manager.types import as_json

    artifact = build_artifact(converted(source, Precision.FP32, tmp_path), RTX)
    facts = json.loads(json.dumps(as_json(artifact.facts)))
    assert facts["build"]["profile"]
    assert str(tmp_path) not in json.dumps(facts), "no path of the building machine"
    assert dataclasses.is_dataclass(artifact.facts["build"])


def test_a_build_in_this_thread_lets_other_threads_run(source: Path, tmp_path: Path, library: ModuleType) -> None:
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    model = load_model(source)
    build_engine(model, library, tmp_path / "out.engine", profile_of(model))
    stop.set()
    thread.join()
    assert ticks


_AFTER_GARBAGE = """
import gc, sys
from pathlib import Path
import tensorrt_rtx
from repo_manager.engine import builder
from repo_manager.engine.build_log import BuildLog
from repo_manager.engine.profiles import derive_profile
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.signature import signature_of

class Cycle:
    pass

class Entries(list):
    # The first message finds garbage: an old builder in a cycle, and objects enough to begin a collection.

    def append(self, entry):
        super().append(entry)
        if old:
            cycle = Cycle()
            cycle.itself, cycle.builder = cycle, old.pop()
            del cycle
            [[] for _ in range(10)]

old = [tensorrt_rtx.Builder(tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR))]
model = load_model(Path(sys.argv[1]))
profile = derive_profile(signature_of(model), batched=True, max_batch_size=4)
builder.BuildLog = lambda: BuildLog(Entries())
gc.set_threshold(1)
builder.build_engine(model, tensorrt_rtx, Path(sys.argv[2]), profile)
print(gc.isenabled(), old)
"""


def test_an_old_builder_in_a_cycle_does_not_stop_the_next_build(source: Path, tmp_path: Path) -> None:
    """The logger's callback would collect it while TensorRT holds the lock its destructor takes."""
    command = [sys.executable, "-c", _AFTER_GARBAGE, str(source), str(tmp_path / "out.engine")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert (done.stdout, done.returncode) == ("True []\n", 0), done.stderr[-2000:]
