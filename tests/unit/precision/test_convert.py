from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from repo_manager.errors import CalibrationError, GateError, ModelError, UsageError
from repo_manager.files import sha256_file
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.runtime import RuntimeLimits, end_runtime, runtime_limits
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import signature_of
from repo_manager.onnx_model.source import draft_of
from repo_manager.onnx_model.write import write_draft
from repo_manager.precision import ConvertOptions, convert
from repo_manager.precision.calibration.data import data_of_samples
from repo_manager.precision.proof.checks import check_drift, check_model_signature
from repo_manager.stats.drift import OutputDrift
from repo_manager.types import Precision, as_json

node = helper.make_node
RNG = np.random.default_rng(11)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def data(model, count=8):
    shapes = {spec.name: [d if isinstance(d, int) else 1 for d in spec.shape] for spec in signature_of(model).inputs}
    return data_of_samples([{k: floats(*s) for k, s in shapes.items()} for _ in range(count)], signature_of(model), "t")


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "converted.onnx"


@pytest.fixture
def runaway(save):
    """Its second value exceeds FP16 and its result does not. ONNX Runtime's CPU hides this in FP16."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"], name="before"),
        node("Mul", ["a", "up"], ["b"], name="up"),
        node("Mul", ["b", "down"], ["c"], name="down"),
        node("MatMul", ["c", "w"], ["y"], name="after"),
    ]
    weights = {"w": floats(8, 8), "up": np.float32(3e4), "down": np.float32(1 / 3e4)}
    return save(nodes, {"x": ["N", 8]}, {"y": ["N", 8]}, weights)


@pytest.mark.parametrize("precision", list(Precision))
def test_every_precision_passes_every_check_in_order(cnn, out, precision):
    result = convert(cnn, precision, out, calibration=data(cnn))
    assert [check.name for check in result.checks] == ["checker", "runs", "signature", "2:4 kept", "drift"]
    assert all(check.passed for check in result.checks)
    assert result.files == (out,)
    assert result.source == cnn.digest
    assert result.digest == sha256_file(out)
    assert result.inputs == "calibration"
    assert "1 layers had it, 1 have it" in result.checks[3].detail
    assert list(out.parent.iterdir()) == [out]
    json.dumps(as_json(result))


def test_2_4_holds_in_the_stored_int8(cnn, out):
    convert(cnn, Precision.INT8, out, calibration=data(cnn))
    stored = [
        w
        for w in draft_of(load_model(out)).weights.values()
        if w.data_type == TensorProto.INT8 and w.shape == (8, 8, 3, 3)
    ]
    groups = np.moveaxis(stored[0].load(), 1, -1).reshape(-1, 4)
    assert (np.count_nonzero(groups, axis=1) <= 2).all()


def test_fp32_is_a_copy_byte_for_byte(cnn, out):
    convert(cnn, Precision.FP32, out)
    assert out.read_bytes() == cnn.path.read_bytes()


def test_fp16_halves_the_file_and_needs_no_data(cnn, out):
    result = convert(cnn, Precision.FP16, out)
    assert result.inputs == "natural"
    assert result.kept == ()
    assert result.drift[0].relative_error < 0.01
    assert result.drift[0].rounded_relative_error < 0.01


def test_int8_without_data_says_how_to_give_it(cnn, out):
    with pytest.raises(CalibrationError, match=r"needs calibration data[\s\S]*--calibration DATA.npz"):
        convert(cnn, Precision.INT8, out)
    assert not out.exists()


def test_a_failed_gate_writes_nothing_and_shows_where_drift_began(cnn, out):
    out.write_bytes(b"the version before")
    with pytest.raises(GateError) as caught:
        convert(cnn, Precision.INT8, out, calibration=data(cnn), options=ConvertOptions(max_drift=1e-4))
    assert caught.value.exit_code == 4
    message = str(caught.value)
    assert "FAILED  drift: 'y' relative error" in message
    assert "relative error after each block (int8)" in message
    assert "Conv 'stem'  <- above 0.0001 from here on" in message
    assert out.read_bytes() == b"the version before"
    assert list(out.parent.iterdir()) == [out]


def test_stages_are_shown_beside_each_other(cnn, out):
    with pytest.raises(GateError, match=r"after each block \(int8, then fp16\)"):
        convert(cnn, Precision.INT8_FP16, out, calibration=data(cnn), options=ConvertOptions(max_drift=1e-4))


def test_trap_overflow_that_onnx_runtimes_cpu_hides(runaway, out):
    with pytest.raises(GateError, match=r"relative error inf[\s\S]*FP16 ends at 65504[\s\S]*bf16"):
        convert(runaway, Precision.FP16, out, options=ConvertOptions(keep_overflowing=False))


def test_what_overflows_stays_fp32_and_is_listed(runaway, out):
    result = convert(runaway, Precision.FP16, out)
    assert {kept.node for kept in result.kept} == {"up", "down"}
    assert all("FP16 ends at 65504" in kept.reason for kept in result.kept)
    assert result.drift[0].rounded_relative_error < 0.01


def test_bf16_holds_what_fp16_does_not(runaway, out):
    assert convert(runaway, Precision.BF16, out).kept == ()


def test_auto_keep_finds_the_layer_that_spoils_int8(save, out):
    """One layer whose input has an outlier: INT8 leaves the other values no steps."""
    outlier = np.eye(8, dtype=np.float32)
    outlier[0, 0] = 4000
    undo = np.eye(8, dtype=np.float32)
    undo[0, 0] = 1 / 4000
    nodes = [
        node("MatMul", ["x", "w1"], ["a"], name="good"),
        node("MatMul", ["a", "up"], ["b"], name="outlier"),
        node("MatMul", ["b", "undo"], ["c"], name="bad"),
        node("MatMul", ["c", "w2"], ["y"], name="head"),
    ]
    model = save(
        nodes, {"x": ["N", 8]}, {"y": ["N", 8]}, {"w1": floats(8, 8), "up": outlier, "undo": undo, "w2": floats(8, 8)}
    )
    calibration = data(model)
    with pytest.raises(GateError):
        convert(model, Precision.INT8, out, calibration=calibration)
    result = convert(model, Precision.INT8, out, calibration=calibration, options=ConvertOptions(auto_keep=2))
    assert {kept.node for kept in result.kept} == {"bad"}
    assert "auto_keep" in result.kept[0].reason
    assert result.kept_macs_share == pytest.approx(0.25)
    assert list(out.parent.iterdir()) == [out]


def test_auto_keep_gives_up_within_its_number(cnn, out):
    options = ConvertOptions(max_drift=1e-9, auto_keep=1)
    with pytest.raises(GateError, match="Keeping up to 1 layers"):
        convert(cnn, Precision.INT8, out, calibration=data(cnn), options=options)
    assert list(out.parent.iterdir()) == []


def test_pattern_that_names_nothing(cnn, out):
    with pytest.raises(UsageError, match=r"'stam' names no node[\s\S]*'stem'"):
        convert(cnn, Precision.FP16, out, options=ConvertOptions(keep_fp32=("stam",)))


def test_io_types_follow_when_asked(cnn, out):
    convert(cnn, Precision.FP16, out, options=ConvertOptions(keep_io_types=False))
    assert [spec.dtype for spec in signature_of(load_model(out)).inputs] == ["float16"]


def test_source_that_does_not_run(save, out):
    model = save([node("Reshape", ["x", "s"], ["y"])], {"x": ["N", 3]}, {"y": ["a", "b"]}, {"s": np.int64([7, 11])})
    with pytest.raises(ModelError, match=r"does not run on made-up inputs[\s\S]*--calibration"):
        convert(model, Precision.FP16, out)
    assert not out.exists()


def test_source_that_needs_more_memory_than_it_may_have(tmp_path, out):
    sizes = "[1000, 1000, 1600]"
    text = f'<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float{sizes} y)'
    onnx.save(
        onnx.parser.parse_model(f"{text} {{ s = Constant<value_ints = {sizes}>() y = Expand(x, s) }}"),
        tmp_path / "m.onnx",
    )
    try:
        with (
            runtime_limits(RuntimeLimits(memory_bytes=1 << 29)),
            pytest.raises(ModelError, match="more than --memory allows"),
        ):
            convert(load_model(tmp_path / "m.onnx"), Precision.FP16, out)
    finally:
        end_runtime()


def test_folder_that_is_not_there(cnn, tmp_path):
    with pytest.raises(ModelError, match="its folder does not exist"):
        convert(cnn, Precision.FP16, tmp_path / "no" / "m.onnx")


def test_external_data_is_read_and_copied(cnn, out, tmp_path):
    folder = tmp_path / "external"
    folder.mkdir()
    proto = onnx.load(cnn.path)
    onnx.save(proto, folder / "m.onnx", save_as_external_data=True, location="weights/w.bin", size_threshold=0) if (
        (folder / "weights").mkdir() is None
    ) else None
    model = load_model(folder / "m.onnx")
    assert model.external_files
    copied = convert(model, Precision.FP32, out)
    assert copied.files == (out, out.parent / "weights" / "w.bin")
    moved = tmp_path / "moved"
    shutil.move(out.parent, moved)
    shutil.rmtree(folder)
    assert Session(moved / out.name).run({"x": floats(1, 3, 8, 8)})["y"].shape == (1, 5)


def test_half_from_external_data_is_one_file(cnn, out, tmp_path):
    onnx.save(onnx.load(cnn.path), tmp_path / "e.onnx", save_as_external_data=True, location="e.data", size_threshold=0)
    assert convert(load_model(tmp_path / "e.onnx"), Precision.FP16, out).files == (out,)


def test_writer_moves_weights_out_above_the_limit(cnn, draft, tmp_path):
    written = write_draft(draft, tmp_path / "big.onnx", limit_bytes=100)
    assert written.files == (tmp_path / "big.onnx", tmp_path / "big.onnx.data")
    onnx.checker.check_model(str(written.files[0]), full_check=True)
    x = {"x": floats(1, 3, 8, 8)}
    np.testing.assert_array_equal(Session(written.files[0]).run(x)["y"], Session(cnn.path).run(x)["y"])


def test_writer_writes_what_protobuf_reads(draft, tmp_path):
    written = write_draft(draft, tmp_path / "m.onnx")
    proto = onnx.load(written.files[0])
    assert {t.name: onnx.numpy_helper.to_array(t).tobytes() for t in proto.graph.initializer} == {
        name: weight.load().tobytes() for name, weight in draft.weights.items()
    }
    content = written.files[0].read_bytes()
    for name, place in written.places.items():
        assert content[place.offset_bytes :][: place.length_bytes] == draft.weights[name].load().tobytes()


def drifted(**changes):
    return OutputDrift(**{"output": "y", "cosine": 1.0, "relative_error": 0.0, "max_abs_error": 0.0,
                          "top1_agreement": None, "samples": 4, **changes})  # fmt: skip


@pytest.mark.parametrize(
    ("drift", "options", "inputs", "probabilities", "passes"),
    [
        (drifted(), {}, "natural", (), True),
        (drifted(relative_error=0.03), {}, "natural", (), False),
        (drifted(relative_error=0.03), {"max_drift": 0.05}, "natural", (), True),
        (drifted(relative_error=0.0), {"max_drift": 0}, "natural", (), True),
        (drifted(rounded_relative_error=float("inf")), {}, "natural", (), False),
        (drifted(relative_error=float("nan")), {}, "natural", (), False),
        (drifted(cosine=0.9), {"min_cosine": 0.99}, "natural", (), False),
        (drifted(relative_error=0.5, max_abs_error=1e-5), {}, "natural", ("y",), True),
        (drifted(relative_error=0.5, max_abs_error=1e-5), {}, "natural", (), False),
        (drifted(relative_error=0.5, max_abs_error=0.1), {}, "natural", ("y",), False),
        (drifted(top1_agreement=0.5, rows=100, top1_lost=50), {}, "natural", (), True),
        (drifted(top1_agreement=0.5, rows=100, top1_lost=50), {}, "calibration", (), False),
        (drifted(top1_agreement=0.5, rows=100, top1_lost=1), {}, "calibration", (), True),
        (drifted(top1_agreement=0.75, rows=4, top1_lost=1), {}, "calibration", (), True),
        (drifted(top1_agreement=0.75, rows=4, top1_lost=1), {"min_top1": 1.0}, "calibration", (), False),
    ],
)
def test_limits(drift, options, inputs, probabilities, passes):
    found = check_drift([drift], Precision.FP16, ConvertOptions(**options), inputs, probabilities)
    assert found.passed is passes


def test_the_row_states_the_rule_that_decided():
    items = [drifted(relative_error=0.5, max_abs_error=1e-5), drifted(output="z", relative_error=0.01)]
    check = check_drift(items, Precision.FP16, ConvertOptions(), "natural", ("y",))
    assert check.passed
    assert "largest relative error 0.01 <= 0.02; probabilities 'y' differ by at most 1e-05 <= 0.001" in check.detail
    asked = check_drift(items, Precision.FP16, ConvertOptions(max_drift=0.02), "natural", ("y",))
    assert (asked.passed, "'y' relative error 0.5 > 0.02" in asked.detail) == (False, True)


def test_a_model_without_sparse_weights_has_kept_nothing(save, out):
    model = save([node("MatMul", ["x", "w"], ["y"])], {"x": ["N", 8]}, {"y": ["N", 4]}, {"w": floats(8, 4)})
    check = next(check for check in convert(model, Precision.FP16, out).checks if check.name == "2:4 kept")
    assert (check.passed, check.is_empty) == (True, True)


@pytest.mark.parametrize(("scale", "empty"), [(1e-7, True), (1.0, False)])
def test_answers_that_are_nothing_everywhere_show_nothing(save, out, scale, empty):
    weights = {"w": floats(8, 4) * np.float32(scale)}
    model = save([node("MatMul", ["x", "w"], ["y"])], {"x": ["N", 8]}, {"y": ["N", 4]}, weights)
    check = convert(model, Precision.BF16, out).checks[-1]
    assert (check.name, check.passed, check.is_empty) == ("drift", True, empty)
    assert ("nothing was shown" in check.detail) is empty


@pytest.mark.parametrize("content", ["zeros", "constant", "repeated"])
def test_calibration_that_shows_no_range_is_refused(save, out, content):
    model = save([node("MatMul", ["x", "w"], ["y"])], {"x": ["N", 8]}, {"y": ["N", 4]}, {"w": floats(8, 4)})
    sample = {"zeros": np.zeros((1, 8)), "constant": np.full((1, 8), 7.0), "repeated": floats(1, 8)}[content]
    data = data_of_samples([{"x": sample.astype(np.float32)}] * 4, signature_of(model), "memory")
    with pytest.raises(CalibrationError, match=r"one and the same value|are the same"):
        convert(model, Precision.INT8, out, calibration=data)
    assert not out.exists()


def test_calibration_that_the_source_answers_alike_is_refused(save, out):
    """Inputs so small that only the bias remains show no range."""
    weights = {"w": floats(8, 4), "b": floats(4)}
    model = save(
        [node("MatMul", ["x", "w"], ["z"]), node("Add", ["z", "b"], ["y"])], {"x": ["N", 8]}, {"y": ["N", 4]}, weights
    )
    samples = [{"x": floats(1, 8) * np.float32(1e-30)} for _ in range(4)]
    with pytest.raises(CalibrationError, match="answers the same to every one of these samples"):
        convert(model, Precision.INT8, out, calibration=data_of_samples(samples, signature_of(model), "memory"))
    assert not out.exists()


def test_signature_check_sees_a_changed_output(cnn, save):
    other = save([node("Relu", ["x"], ["z"])], {"x": ["N", 3, 8, 8]}, {"z": ["N", 3, 8, 8]}, name="other.onnx")
    check = check_model_signature(signature_of(cnn), signature_of(other), Precision.FP16, keep_io_types=True)
    assert not check.passed
    assert "z: float32" in check.detail


def test_operator_that_has_no_working_fp16_form_stays_fp32(save, out):
    """ONNX allows FP16 in a ScatterND with the largest value. ONNX Runtime's CPU has no such kernel."""
    nodes = [
        node("Relu", ["x"], ["a"], name="relu"),
        node("ScatterND", ["a", "at", "new"], ["y"], name="scatter", reduction="max"),
    ]
    weights = {"at": np.int64([[0], [2]]), "new": np.float32([5, 6])}
    result = convert(save(nodes, {"x": [4]}, {"y": [4]}, weights, opset=18), Precision.FP16, out)
    assert [kept.node for kept in result.kept] == ["scatter"]
    assert "does not work in fp16" in result.kept[0].reason
    assert list(out.parent.iterdir()) == [out]


def test_what_the_full_checker_rejects_in_the_source_too(save, out):
    """onnx cannot infer MeanVarianceNormalization's own body."""
    model = save([node("MeanVarianceNormalization", ["x"], ["y"])], {"x": [1, 3, 4, 4]}, {"y": [1, 3, 4, 4]})
    result = convert(model, Precision.FP32, out)
    assert result.checks[0].passed


LOWEST = np.finfo(np.float32).min


def masked_attention(save, how, value):
    """Attention over 4 places with an additive mask, a chosen one (Where), or a stored one."""
    rng = np.random.default_rng(9)
    mask = np.zeros((4, 4), np.float32)
    mask[0] = value  # a fully masked row
    weights = {"w": rng.standard_normal((8, 8)).astype(np.float32) / 3, "one": np.float32(1), "low": np.float32(value)}
    masks = {
        "added": [
            helper.make_node("Sub", ["one", "mask"], ["hidden"]),
            helper.make_node("Mul", ["hidden", "low"], ["bias"]),
            helper.make_node("Add", ["scores", "bias"], ["masked"]),
        ],
        "chosen": [
            helper.make_node("Cast", ["mask"], ["shown"], to=TensorProto.BOOL),
            helper.make_node("Where", ["shown", "scores", "low"], ["masked"]),
        ],
        "stored": [helper.make_node("Add", ["scores", "stored"], ["masked"])],
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["q"]),
        helper.make_node("Transpose", ["q"], ["k"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
        *masks[how],
        helper.make_node("Softmax", ["masked"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "q"], ["y"]),
    ]
    if how == "stored":
        weights["stored"] = mask
    inputs = {"x": [1, 4, 8], **({} if how == "stored" else {"mask": [1, 1, 4]})}
    read = {name for node in nodes for name in node.input}
    model = save(nodes, inputs, {"y": [1, 4, 8]}, {name: each for name, each in weights.items() if name in read})
    samples = [
        {"x": rng.standard_normal((1, 4, 8)).astype(np.float32), "mask": np.float32(row).reshape(1, 1, 4)}
        for row in ([1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1])
    ]
    return model, [{name: sample[name] for name in inputs} for sample in samples]


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
@pytest.mark.parametrize("value", [LOWEST, -1e9], ids=["lowest", "-1e9"])
@pytest.mark.parametrize("how", ["added", "chosen", "stored"])
def test_a_row_that_is_masked_as_a_whole_is_right_in_16_bits(save, tmp_path, how, value, precision):
    model, samples = masked_attention(save, how, value)
    calibration = data_of_samples(samples, signature_of(model), "test")
    result = convert(model, precision, tmp_path / "out.onnx", calibration=calibration)
    assert result.drift[0].worst < 0.01
    if precision is Precision.FP16:
        served = Session(tmp_path / "out.onnx")
        for sample in samples:
            want = Session(model.path).run(sample)["y"]
            np.testing.assert_allclose(served.run(sample)["y"], want, rtol=0.02, atol=0.01)
