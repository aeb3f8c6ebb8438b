"""INT8 is judged by the graph's arithmetic, on samples outside the calibration, by numbers and not choices."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from repo_manager.errors import CalibrationError, GateError
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import signature_of
from repo_manager.precision import ConvertOptions, convert
from repo_manager.precision.calibration.data import data_of_samples
from repo_manager.types import Precision

RNG = np.random.default_rng
INT8 = [Precision.INT8, Precision.INT8_FP16]


def node(op_type, inputs, outputs, **attributes):
    return helper.make_node(op_type, inputs, outputs, **{"name": outputs[0], **attributes})


def of(model, arrays, name="x"):
    return data_of_samples([{name: array} for array in arrays], signature_of(model), "test")


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "converted.onnx"


def saturating(save):
    """Non-negative inputs: 16-bit sums of u8 x s8 products saturate on a CPU without VNNI."""
    weight = (RNG(5).standard_normal((16, 8)) * 0.05).astype(np.float32)
    model = save([node("MatMul", ["x", "w"], ["y"])], {"x": ["N", 16]}, {"y": ["N", 8]}, {"w": weight})
    return model, of(model, RNG(6).integers(0, 9, (32, 1, 16)).astype(np.float32))


@pytest.mark.parametrize("precision", INT8)
def test_the_arithmetic_of_the_file_decides(save, out, precision):
    model, calibration = saturating(save)
    result = convert(model, precision, out, calibration=calibration)
    (drift,) = result.drift
    assert drift.relative_error < 0.01
    assert drift.served_relative_error < 0.01  # with the kernels the embedded backend asks for
    assert "as ONNX Runtime serves it on " in result.checks[1].detail
    assert "no optimisations" in result.checks[1].detail


def test_what_a_tensorrt_engine_is_made_from_is_not_run_as_onnx_runtime_serves_it(save, out):
    model, calibration = saturating(save)
    options = ConvertOptions(judge_served=False)
    result = convert(model, Precision.INT8, out, calibration=calibration, options=options)
    assert result.drift[0].served_relative_error is None
    assert "serves it" not in result.checks[1].detail


EMULATOR = shutil.which("qemu-x86_64")
VERDICT = """
import sys
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.signature import signature_of
from repo_manager.precision import convert, load_calibration
from repo_manager.types import Precision
from pathlib import Path
model = load_model(Path(sys.argv[1]))
calibration = load_calibration(sys.argv[3], signature_of(model))
found = convert(model, Precision.INT8, Path(sys.argv[2]), calibration=calibration)
print("verdict", found.digest, found.drift[0].relative_error, found.drift[0].served_relative_error)
"""


def emulated(cpu: str, *command: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run this Python on an emulated CPU."""
    assert EMULATOR is not None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [EMULATOR, "-cpu", cpu, sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        env=environment,
    )


@pytest.mark.skipif(EMULATOR is None, reason="needs qemu-x86_64 (Debian: qemu-user), which emulates a CPU without VNNI")
def test_a_cpu_without_vnni_gives_the_same_file_and_verdict(save, out, tmp_path):
    """Haswell has AVX2 and no VNNI; fused kernels are off by 0.2 there."""
    model, _ = saturating(save)
    np.savez(tmp_path / "data.npz", x=RNG(6).integers(0, 9, (32, 16)).astype(np.float32))
    arguments = [str(model.path), str(out), str(tmp_path / "data.npz")]
    there = emulated("Haswell", "-c", VERDICT, *arguments, timeout_s=280)
    assert there.returncode == 0, there.stderr[-2000:]
    here = subprocess.run([sys.executable, "-c", VERDICT, *arguments], capture_output=True, text=True, check=True)
    (first, digest, error, served), (_, same, expected, _) = (
        text.split() for text in (there.stdout.strip(), here.stdout.strip())
    )
    assert (first, digest) == ("verdict", same)
    assert float(error) == pytest.approx(float(expected), rel=1e-3)
    assert float(served) < 0.01


@pytest.mark.timeout(900)
@pytest.mark.skipif(EMULATOR is None, reason="needs qemu-x86_64 (Debian: qemu-user), which emulates a CPU without VNNI")
def test_the_tests_of_conversions_pass_without_vnni():
    """A CPU-dependent gate would show here: half a minute of emulated CPU time."""
    tests = Path(__file__).with_name("test_convert.py")
    done = emulated(
        "Haswell", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests), timeout_s=800
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("precision", INT8)
def test_activations_that_differ_as_cpus_do_give_the_same_file(save, out, precision):
    """Float kernels with and without AVX-512 differ by about 1e-5 after a few layers."""
    model, _ = overfitting(save)
    samples = RNG(9).standard_normal((32, 1, 8)).astype(np.float32)
    first = convert(model, precision, out, calibration=of(model, samples))
    other = convert(model, precision, out, calibration=of(model, samples * np.float32(1 + 1e-5)))
    assert first.digest == other.digest


@pytest.mark.parametrize("precision", INT8)
@pytest.mark.parametrize("kind", ["Conv", "Gemm", "MatMul"])
def test_a_dead_channel_with_a_bias_does_not_overflow_int32(save, out, kind, precision):
    """onnxruntime#25278: |bias| / (activation scale x weight scale) beyond int32."""
    rng, channels = RNG(1), 8
    shape = {"Conv": (channels, 4, 1, 1), "Gemm": (4, channels), "MatMul": (4, channels)}[kind]
    weight = rng.standard_normal(shape).astype(np.float32)
    index = (3,) if kind == "Conv" else (slice(None), 3)
    weight[index] *= 1e-12
    bias = rng.standard_normal(channels).astype(np.float32)
    bias[3] = 5.0
    if kind == "Conv":
        nodes, x, y = [node("Conv", ["x", "w", "b"], ["y"])], ["N", 4, 6, 6], ["N", channels, 6, 6]
    elif kind == "Gemm":
        nodes, x, y = [node("Gemm", ["x", "w", "b"], ["y"])], ["N", 4], ["N", channels]
    else:
        nodes = [node("MatMul", ["x", "w"], ["m"]), node("Add", ["b", "m"], ["y"])]
        x, y = ["N", 4], ["N", channels]
    model = save(nodes, {"x": x}, {"y": y}, {"w": weight, "b": bias})
    samples = rng.standard_normal((32, 1, *x[1:])).astype(np.float32)
    result = convert(model, precision, out, calibration=of(model, samples))
    assert result.drift[0].served_relative_error < 0.02
    served = Session(out, exact_int8=True).run({"x": samples[0]})["y"]
    channel = served[:, 3]
    assert np.allclose(channel, 5.0, rtol=0.02), channel.reshape(-1)[:4]


def overfitting(save):
    model = save(
        [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["r"]), node("MatMul", ["r", "v"], ["y"])],
        {"x": ["N", 8]},
        {"y": ["N", 4]},
        {
            "w": RNG(2).standard_normal((8, 16)).astype(np.float32),
            "v": RNG(3).standard_normal((16, 4)).astype(np.float32),
        },
    )
    samples = RNG(4).standard_normal((32, 1, 8)).astype(np.float32)
    held_out = {sample["x"].tobytes() for sample in of(model, samples).split()[1].batches()}
    for sample in samples:
        if sample.tobytes() in held_out:
            sample *= 40  # far beyond the values behind the scales
    return model, of(model, samples)


def test_the_gate_judges_samples_that_no_scale_was_made_from(save, out):
    model, calibration = overfitting(save)
    with pytest.raises(
        GateError, match=r"relative error 0\.\d+ > 0\.2.*\(8 held-out samples; 0\.0\d+ on those that it"
    ):
        convert(model, Precision.INT8, out, calibration=calibration)
    assert not out.exists()
    result = convert(model, Precision.INT8, out, calibration=calibration, options=ConvertOptions(max_drift=2))
    assert (result.inputs, result.samples) == ("held-out", 8)
    assert result.drift[0].calibration_relative_error < 0.05 < 0.2 < result.drift[0].relative_error
    # 16-bit precisions need no scales, so all samples judge them.
    assert convert(model, Precision.FP16, out, calibration=calibration).inputs == "calibration"


def test_too_few_samples_to_hold_any_out_are_said_so(save, out):
    model, _ = saturating(save)
    calibration = of(model, RNG(6).integers(0, 9, (8, 1, 16)).astype(np.float32))
    result = convert(model, Precision.INT8, out, calibration=calibration)
    assert (result.inputs, result.samples) == ("calibration", 8)
    assert "fewer than 16, so none was held out" in result.checks[-1].detail


def in_a_body(nms):
    """Return nodes with NonMaxSuppression inside an If, as detectors have it when there are any scores."""
    kept = helper.make_tensor_value_info("kept_here", TensorProto.INT64, None)
    inner = node("NonMaxSuppression", nms.input, ["kept_here"])
    none = helper.make_tensor("none", TensorProto.INT64, [0, 3], [])
    then = helper.make_graph([inner], "some", [], [kept])
    other = helper.make_graph([node("Constant", [], ["kept_here"], value=none)], "none", [], [kept])
    return [
        node("ReduceMax", ["scores"], ["best"], keepdims=0),
        node("Greater", ["best", "lowest"], ["any"]),
        node("If", ["any"], ["kept"], then_branch=then, else_branch=other),
    ]


def detector(save, *, tail=(), inside=False, no_object=False):
    """Boxes and scores by a convolution each, NonMaxSuppression, and the kept boxes."""
    rng = RNG(7)
    nms = node("NonMaxSuppression", ["boxes", "scores", "most", "iou", "threshold"], ["kept"])
    nodes = [
        node("Conv", ["x", "wb"], ["box_map"]),
        node("Reshape", ["box_map", "box_shape"], ["boxes"]),
        node("Conv", ["x", "ws", "bs"], ["score_map"]),
        node("Reshape", ["score_map", "score_shape"], ["logits"]),
        node("Sigmoid", ["logits"], ["scores"]),
        *(in_a_body(nms) if inside else [nms]),
        node("Gather", ["kept", "two"], ["index"], axis=1),
        node("Squeeze", ["boxes", "zero_axis"], ["all_boxes"]),
        node("Gather", ["all_boxes", "index"], ["chosen"]),
        *tail,
    ]
    weights = {
        "wb": rng.standard_normal((4, 8, 1, 1)).astype(np.float32),
        "ws": rng.standard_normal((3, 8, 1, 1)).astype(np.float32),
        "bs": np.full(3, -14 if no_object else 0, np.float32),
        "lowest": np.float32(0),
        "box_shape": np.array([1, -1, 4], np.int64),
        "score_shape": np.array([1, 3, -1], np.int64),
        "most": np.array([20], np.int64),
        "iou": np.array([0.5], np.float32),
        "threshold": np.array([0 if no_object else 0.6], np.float32),
        "two": np.array(2, np.int64),
        "zero_axis": np.array([0], np.int64),
        "head": rng.standard_normal((4, 5)).astype(np.float32),
    }
    outputs = {
        "chosen": helper.make_tensor_value_info("chosen", TensorProto.FLOAT, ["K", 4]),
        "kept": helper.make_tensor_value_info("kept", TensorProto.INT64, ["K", 3]),
    }
    if tail:
        outputs = {"head_out": helper.make_tensor_value_info("head_out", TensorProto.FLOAT, ["K", 5])}
    model = save(nodes, {"x": [1, 8, 12, 12]}, outputs, weights)
    return model, of(model, rng.standard_normal((24, 1, 8, 12, 12)).astype(np.float32))


@pytest.mark.parametrize("precision", [*INT8, Precision.FP16])
def test_a_detector_is_judged_by_the_boxes_and_scores_that_it_chooses_from(save, out, precision):
    model, calibration = detector(save)
    result = convert(model, precision, out, calibration=calibration, options=ConvertOptions(max_drift=0.05))
    by_name = {item.output: item for item in result.drift}
    selected = [item for item in result.drift if item.judged_by]
    if precision in INT8:
        assert {item.output for item in selected} == {"chosen", "kept"}
    for item in selected:
        assert {"scores"} <= set(item.judged_by)
        assert all(by_name[value].relative_error <= 0.05 and not by_name[value].is_output for value in item.judged_by)
    assert "inf" not in result.checks[-1].detail


def test_a_detector_whose_scores_are_wrong_is_refused(save, out):
    model, calibration = detector(save)
    with pytest.raises(GateError, match=r"'(boxes|box_map|scores|score_map)' relative error"):
        convert(model, Precision.INT8, out, calibration=calibration, options=ConvertOptions(max_drift=1e-4))


def test_weights_after_a_selection_are_judged_themselves(save, out):
    """A second stage's result from the boxes is more than a choice."""
    model, calibration = detector(save, tail=[node("MatMul", ["chosen", "head"], ["head_out"])])
    with pytest.raises(GateError, match=r"'head_out' relative error (0\.[2-9]|inf)") as caught:
        convert(model, Precision.INT8, out, calibration=calibration)
    assert "Convert the part up to the selection" in (caught.value.hint or "")
    unlimited = ConvertOptions(max_drift=float("inf"), min_top1=0)
    assert convert(model, Precision.INT8, out, calibration=calibration, options=unlimited).drift[0].judged_by == ()


@pytest.mark.parametrize("precision", INT8)
def test_a_selection_inside_a_body_is_one(save, out, precision):
    """As exporters write it: NonMaxSuppression only where there is any candidate."""
    model, calibration = detector(save, inside=True)
    result = convert(model, precision, out, calibration=calibration, options=ConvertOptions(max_drift=0.05))
    selected = [item for item in result.drift if item.judged_by]
    assert {item.output for item in selected} == {"chosen", "kept"}
    for item in selected:
        assert {"boxes", "scores"} <= set(item.judged_by)


def rounding(save, kind):
    """An image of bytes, a mask: the number, rounded or held against a threshold, is the output."""
    weight = (RNG(2).standard_normal((3, 3, 3, 3)) * 0.2).astype(np.float32)
    tails = {
        "bytes": [
            node("Sigmoid", ["c"], ["p"]),
            node("Mul", ["p", "scale"], ["level"]),
            node("Round", ["level"], ["whole"]),
            node("Cast", ["whole"], ["y"], to=TensorProto.UINT8),
        ],
        "mask": [node("Greater", ["c", "zero"], ["y"])],
    }
    element = {"bytes": TensorProto.UINT8, "mask": TensorProto.BOOL}[kind]
    model = save(
        [node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]), *tails[kind]],
        {"x": ["N", 3, 8, 8]},
        {"y": helper.make_tensor_value_info("y", element, ["N", 3, 8, 8])},
        {"w": weight, "scale": np.float32(255), "zero": np.float32(0)},
    )
    return model, of(model, RNG(3).standard_normal((32, 1, 3, 8, 8)).astype(np.float32))


@pytest.mark.parametrize("precision", INT8)
@pytest.mark.parametrize(("kind", "judge"), [("bytes", "whole"), ("mask", "c")])
def test_whole_numbers_are_judged_by_what_is_rounded(save, out, kind, judge, precision):
    model, calibration = rounding(save, kind)
    limit = ConvertOptions(max_drift=0.02 if kind == "bytes" else 0.1)
    result = convert(model, precision, out, calibration=calibration, options=limit)
    (drift, *values) = result.drift
    if kind == "bytes":
        assert drift.relative_error > 0.02, "most bytes differ by one"
        assert [(item.output, item.calibration_relative_error is None) for item in values] == [(judge, False)]
    tight = ConvertOptions(max_drift=1e-5)
    with pytest.raises(GateError, match=f"'{judge}' relative error"):
        convert(model, precision, out, calibration=calibration, options=tight)


def test_scores_that_mean_no_are_no_drift_where_boxes_are_chosen_by_them(save, out):
    """Of a probability of 1e-6 the relative error says nothing, an output or not."""
    model, calibration = detector(save, no_object=True)
    result = convert(model, Precision.INT8, out, calibration=calibration, options=ConvertOptions(max_drift=0.02))
    judged = {item.output: item for item in result.drift}
    assert judged["kept"].judged_by
    assert judged["scores"].max_abs_error < 1e-3
    assert judged["scores"].relative_error > 0.02


def test_a_class_number_is_judged_by_its_scores(save, out):
    rng = RNG(8)
    weight = np.repeat(rng.standard_normal((8, 1)), 6, axis=1) + rng.standard_normal((8, 6)) * 1e-3
    number = helper.make_tensor_value_info("label", TensorProto.INT64, ["N"])
    model = save(
        [node("MatMul", ["x", "w"], ["scores"]), node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0)],
        {"x": ["N", 8]},
        {"label": number},
        {"w": weight.astype(np.float32)},
    )
    calibration = of(model, rng.standard_normal((32, 1, 8)).astype(np.float32))
    options = ConvertOptions(min_top1=0.0)  # its classes are almost equal: most of them change places
    result = convert(model, Precision.INT8, out, calibration=calibration, options=options)
    label, scores = result.drift
    assert (label.output, label.judged_by, scores.output, scores.is_output) == ("label", ("scores",), "scores", False)
    assert label.relative_error > 0.2 > scores.relative_error
    assert onnx.checker.check_model(str(out)) is None
    assert load_model(out).digest == result.digest


def recurrent(save):
    """An LSTM and a convolution without names, and a product inside an If: only one node could become INT8."""
    rng = RNG(9)
    branch = [
        helper.make_graph(
            [helper.make_node("MatMul", ["h", weight], [f"o_{weight}"])],
            weight,
            [],
            [helper.make_tensor_value_info(f"o_{weight}", TensorProto.FLOAT, None)],
        )
        for weight in ("then", "else")
    ]
    nodes = [
        helper.make_node("LSTM", ["x", "w", "r"], ["s"], hidden_size=16),
        helper.make_node("Squeeze", ["s", "one"], ["h"]),
        helper.make_node("ReduceMax", ["h"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["y"], then_branch=branch[0], else_branch=branch[1]),
    ]
    weights = {
        "w": rng.standard_normal((1, 64, 8)).astype(np.float32) * 0.3,
        "r": rng.standard_normal((1, 64, 16)).astype(np.float32) * 0.3,
        "then": rng.standard_normal((16, 4)).astype(np.float32),
        "else": rng.standard_normal((16, 4)).astype(np.float32),
        "one": np.array([1], np.int64),
        "zero": np.float32(0),
    }
    model = save(nodes, {"x": [5, 1, 8]}, {"y": [5, 1, 4]}, weights)
    return model, of(model, rng.standard_normal((16, 5, 1, 8)).astype(np.float32))


def test_int8_in_which_nothing_is_int8_is_refused_unless_allowed(save, out):
    model, calibration = recurrent(save)
    with pytest.raises(GateError, match=r"no operator can become INT8\n[\s\S]*LSTM: ") as caught:
        convert(model, Precision.INT8, out, calibration=calibration)
    assert "--allow-unchanged" in (caught.value.hint or "")
    assert not out.exists()
    result = convert(model, Precision.INT8, out, calibration=calibration, options=ConvertOptions(allow_unchanged=True))
    assert result.kept_macs_share == 1.0
    assert sorted(node.op_type for node in result.kept) == ["LSTM", "MatMul", "MatMul"]


def test_the_share_of_what_is_kept_counts_nodes_without_names(save, out):
    rng = RNG(10)
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])]
    weights = {
        "a": rng.standard_normal((8, 8)).astype(np.float32),
        "b": rng.standard_normal((8, 24)).astype(np.float32),
    }
    model = save(nodes, {"x": ["N", 8]}, {"y": ["N", 24]}, weights)
    calibration = of(model, rng.standard_normal((16, 1, 8)).astype(np.float32))
    result = convert(model, Precision.INT8, out, calibration=calibration, options=ConvertOptions(keep_fp32=("h",)))
    assert result.kept_macs_share == pytest.approx(0.25)


@pytest.mark.parametrize("kind", ["Cast and Mul", "float16", "Concat"])
def test_weights_that_constants_make_become_int8(save, out, kind):
    stored = RNG(11).integers(-127, 128, (32, 8)).astype(np.int8)
    if kind == "Cast and Mul":
        made = [node("Cast", ["q"], ["c"], to=1), node("Mul", ["c", "s"], ["w"])]
        weights = {"q": stored, "s": np.full((8,), 0.01, np.float32)}
    elif kind == "float16":
        made, weights = [node("Cast", ["q"], ["w"], to=1)], {"q": (stored * 0.01).astype(np.float16)}
    else:
        made = [node("Concat", ["a", "b"], ["w"], axis=0)]
        values = (stored * 0.01).astype(np.float32)
        weights = {"a": values[:12], "b": values[12:]}
    model = save([*made, node("MatMul", ["x", "w"], ["y"])], {"x": ["N", 32]}, {"y": ["N", 8]}, weights)
    samples = RNG(12).standard_normal((32, 1, 32)).astype(np.float32)
    result = convert(model, Precision.INT8, out, calibration=of(model, samples))
    assert result.kept == ()
    assert sum(tensor.data_type == TensorProto.INT8 for tensor in onnx.load(out).graph.initializer) >= 2
    assert result.drift[0].relative_error < 0.02


def cached(save):
    """A decoder's step: the rows of the cache go before the new row."""
    rng = RNG(13)
    nodes = [
        node("MatMul", ["x", "w"], ["new"]),
        node("MatMul", ["past", "v"], ["old"]),
        node("Concat", ["old", "new"], ["present"], axis=1),
    ]
    weights = {name: rng.standard_normal((8, 8)).astype(np.float32) for name in ("w", "v")}
    return save(nodes, {"x": ["N", 1, 8], "past": ["N", "P", 8]}, {"present": ["N", "Q", 8]}, weights)


@pytest.mark.parametrize("method", ["minmax", "percentile"])
@pytest.mark.parametrize("filled", [0, 8], ids=["always empty", "empty at first"])
def test_an_empty_cache_calibrates(save, out, filled, method):
    model, rng = cached(save), RNG(14)
    samples = [
        {
            "x": rng.standard_normal((1, 1, 8)).astype(np.float32),
            "past": rng.standard_normal((1, index % 4 if index < filled else 0, 8)).astype(np.float32),
        }
        for index in range(16)
    ]
    calibration = data_of_samples(samples, signature_of(model), "test")
    options = ConvertOptions(calibration_method=method)
    result = convert(model, Precision.INT8, out, calibration=calibration, options=options)
    assert result.drift[0].relative_error < 0.1
    assert result.kept == ()


def test_a_sample_without_any_number_is_refused(save):
    model = cached(save)
    nothing = {"x": np.zeros((1, 1, 8), np.float32)[:, :0], "past": np.zeros((1, 0, 8), np.float32)}
    with pytest.raises(CalibrationError, match="'x' has shape"):
        data_of_samples([nothing] * 4, signature_of(model), "test")
    no_row = {"x": np.zeros((0, 1, 8), np.float32), "past": np.zeros((1, 2, 8), np.float32)}
    with pytest.raises(CalibrationError, match="'x' is empty"):
        data_of_samples([no_row] * 4, signature_of(model), "test")
