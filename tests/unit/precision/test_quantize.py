from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from repo_manager.errors import CalibrationError, ModelError, UsageError
from repo_manager.onnx_model.source import draft_of
from repo_manager.precision.calibration.ranges import largest_values, percentile_values
from repo_manager.precision.candidate import Builder, Keep
from repo_manager.precision.options import ConvertOptions
from repo_manager.precision.passes.prepare import prepare
from repo_manager.precision.passes.quantize import channel_scales, quantize, to_int8
from repo_manager.precision.passes.quantize_plan import plan_quantization
from repo_manager.types import Precision

node = helper.make_node
RNG = np.random.default_rng(5)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def quantized(model, samples, tmp_path, **options):
    draft = prepare(draft_of(model), opset=13)
    plan = plan_quantization(draft, quantize_outputs=options.get("quantize_outputs", True), keep=Keep())
    ranges = largest_values(draft, plan.values, samples, tmp_path)
    return draft, plan, quantize(draft, plan, ranges)


def by_name(draft):
    return {n.name: n for n in draft.graph.node}


def producer(draft, name):
    return next((n for n in draft.graph.node if name in n.output), None)


@pytest.mark.parametrize(
    ("layer", "shape", "x", "axis"),
    [
        (node("Conv", ["x", "w"], ["y"], name="n", group=2), (6, 2, 3), [1, 4, 5], 0),
        (node("ConvTranspose", ["x", "w"], ["y"], name="n"), (4, 6, 2), [1, 4, 5], 1),
        (node("ConvTranspose", ["x", "w"], ["y"], name="n", group=2), (4, 3, 2), [1, 4, 5], None),
        (node("Gemm", ["x", "w"], ["y"], name="n"), (4, 6), [2, 4], 1),
        (node("Gemm", ["x", "w"], ["y"], name="n", transB=1), (6, 4), [2, 4], 0),
        (node("MatMul", ["x", "w"], ["y"], name="n"), (4, 6), [2, 3, 4], 1),
        (node("MatMul", ["x", "w"], ["y"], name="n"), (2, 4, 6), [2, 3, 4], None),
        (node("MatMul", ["w", "x"], ["y"], name="n"), (6, 4), [4, 3], 0),
    ],
)
def test_trap_scales_lie_along_the_output_channels(save, run, tmp_path, layer, shape, x, axis):
    """A wrong axis builds in silence and runs in float."""
    weight = floats(*shape)
    if axis is not None:  # channels of very different size: only a scale per channel keeps them all
        weight *= (10.0 ** -np.arange(shape[axis])).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    model = save([layer], {"x": x}, {"y": [None] * len(x)}, {"w": weight.astype(np.float32)})
    sample = {"x": floats(*x)}
    draft, plan, result = quantized(model, [sample], tmp_path)
    assert plan.nodes["n"].channel_axis == axis
    restored = producer(result, by_name(result)["n"].input[plan.nodes["n"].weight_index])
    assert restored.op_type == "DequantizeLinear"
    assert result.weights[restored.input[0]].data_type == TensorProto.INT8
    assert result.weights[restored.input[1]].shape == (() if axis is None else (shape[axis],))
    before, after = run(draft, sample)["y"], run(result, sample)["y"]
    np.testing.assert_allclose(after, before, atol=0.03 * np.abs(before).max())


def test_trap_zero_points_are_zero_and_ranges_symmetric(cnn, tmp_path):
    _, _, result = quantized(cnn, [{"x": floats(2, 3, 8, 8)}], tmp_path)
    for each in result.graph.node:
        if each.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = result.weights[each.input[2]]
            assert zero.data_type == TensorProto.INT8
            assert not zero.load().any()
    for weight in result.weights.values():
        if weight.data_type == TensorProto.INT8 and weight.size:
            assert weight.load().min() >= -127


def test_trap_bias_stays_fp32_and_may_be_shared(cnn, run, tmp_path):
    """`stem` and `body` share a bias: ONNX Runtime's quantizer silently writes a wrong graph for such a model."""
    sample = {"x": floats(2, 3, 8, 8)}
    draft, _, result = quantized(cnn, [sample], tmp_path)
    for name in ("stem", "body", "head"):
        assert result.weights[by_name(result)[name].input[2]].data_type == TensorProto.FLOAT
    before, after = run(draft, sample)["y"], run(result, sample)["y"]
    assert np.linalg.norm(after - before) < 0.05 * np.linalg.norm(before)


def test_trap_opset_below_13_has_no_scales_per_channel(save, tmp_path):
    model = save([node("MatMul", ["x", "w"], ["y"])], {"x": [1, 4]}, {"y": [1, 4]}, {"w": floats(4, 4)}, opset=10)
    _, _, result = quantized(model, [{"x": floats(1, 4)}], tmp_path)
    assert result.proto.opset_import[0].version == 13


def test_activations_are_quantised_after_what_fuses(cnn, tmp_path):
    """Conv - Relu is one kernel, and Conv - Add - Relu another: no pair inside, and one on the skip's branch."""
    _, plan, result = quantized(cnn, [{"x": floats(1, 3, 8, 8)}], tmp_path)
    assert plan.values == ("x", "r0", "r1", "g", "f")[: len(plan.values)] or set(plan.values) >= {"x", "r0", "f"}
    assert "c0" not in plan.readers
    assert "n0" not in plan.readers
    assert "c1" not in plan.readers
    skip = [name for name in by_name(result)["residual"].input if name != "c1"]
    assert producer(result, skip[0]).op_type == "DequantizeLinear"


def test_values_passed_on_share_one_scale(save, tmp_path):
    nodes = [
        node("Conv", ["x", "w"], ["c"], name="a"),
        node("MaxPool", ["c"], ["p"], kernel_shape=[2]),
        node("Conv", ["p", "w"], ["y"], name="b"),
    ]
    model = save(nodes, {"x": [1, 4, 6]}, {"y": [None] * 3}, {"w": floats(4, 4, 1)})
    _, plan, result = quantized(model, [{"x": floats(1, 4, 6)}], tmp_path)
    assert set(plan.values) == {"x", "c", "p"}
    scales = {n.input[0]: result.weights[n.input[1]].load() for n in result.graph.node if n.op_type == "QuantizeLinear"}
    assert scales["c"] == scales["p"]


def test_results_are_left_alone_when_not_asked(save, tmp_path):
    nodes = [
        node("Conv", ["x", "w"], ["c"], name="a"),
        node("MaxPool", ["c"], ["p"], kernel_shape=[2]),
        node("Conv", ["p", "w"], ["y"], name="b"),
    ]
    model = save(nodes, {"x": [1, 4, 6]}, {"y": [None] * 3}, {"w": floats(4, 4, 1)})
    _, plan, _ = quantized(model, [{"x": floats(1, 4, 6)}], tmp_path, quantize_outputs=False)
    assert set(plan.values) == {"x", "p"}


def test_what_is_not_quantised_is_listed(save):
    nodes = [
        node("MatMul", ["x", "x"], ["a"], name="dynamic"),
        node("MatMul", ["a", "v"], ["b"], name="vector"),
        node("LSTM", ["s", "lw", "lr"], ["", "h"], name="lstm", hidden_size=2),
    ]
    weights = {"v": floats(4), "lw": floats(1, 8, 3), "lr": floats(1, 8, 2)}
    model = save(nodes, {"x": [4, 4], "s": [1, 1, 3]}, {"b": [4], "h": [1, 1, 2]}, weights)
    plan = plan_quantization(draft_of(model), quantize_outputs=True, keep=Keep())
    assert plan.kept["dynamic"] == ("MatMul", "no constant weight")
    assert plan.kept["vector"] == ("MatMul", "its weight is a vector")
    assert plan.kept["lstm"][0] == "LSTM"


def test_weighted_operators_in_bodies_are_listed(save):
    body = helper.make_graph([node("MatMul", ["x", "w"], ["t"], name="inner")], "b", [],
                             [helper.make_tensor_value_info("t", 1, [2, 2])])  # fmt: skip
    nodes = [node("If", ["c"], ["y"], name="if", then_branch=body, else_branch=body)]
    c = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    model = save(nodes, {"x": [2, 2], "c": c}, {"y": [2, 2]}, {"w": floats(2, 2)})
    plan = plan_quantization(draft_of(model), quantize_outputs=True, keep=Keep())
    assert any("body" in reason for _, reason in plan.kept.values())


def test_trap_model_that_is_quantised_already(save, tmp_path):
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"), node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    model = save(nodes, {"x": [2]}, {"y": [2]}, {"s": np.float32(1), "z": np.int8(0)})
    with pytest.raises(ModelError, match="quantised already"):
        Builder(draft_of(model), Precision.INT8, ConvertOptions(), [], tmp_path)


def test_samples_on_which_the_source_is_not_finite_are_named(save, tmp_path):
    model = save([node("Log", ["x"], ["y"])], {"x": [1]}, {"y": [1]})
    samples = [{"x": np.float32([1])}, {"x": np.float32([0])}]
    with pytest.raises(CalibrationError, match="sample 2"):
        largest_values(draft_of(model), ["y"], samples, tmp_path)


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=4, max_side=5),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    ),
    st.data(),
)
def test_int8_is_nearest_keeps_zero_and_sign(values, data):
    axis = data.draw(st.sampled_from([None, *range(values.ndim)]))
    scale = channel_scales(values, axis)
    result = to_int8(values, scale, axis)
    assert (scale > 0).all()
    assert (result[values == 0] == 0).all()
    assert (result >= -127).all()
    spread = scale.reshape([-1 if a == axis else 1 for a in range(values.ndim)]) if axis is not None else scale
    error = np.abs(result.astype(np.float64) * spread - values)
    assert (error <= spread.astype(np.float64) * 0.5001 + 1e-30).all()


def test_not_worse_than_onnx_runtimes_own_quantizer(cnn, run, tmp_path):
    quantization = pytest.importorskip("onnxruntime.quantization")
    samples = [{"x": floats(4, 3, 8, 8)} for _ in range(4)]

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.left = iter(samples)

        def get_next(self):
            return next(self.left, None)

    quantization.quantize_static(
        str(cnn.path), str(tmp_path / "theirs.onnx"), Reader(), per_channel=True,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    )  # fmt: skip
    from repo_manager.onnx_model.session import Session

    draft, _, ours = quantized(cnn, samples, tmp_path)
    theirs = Session(tmp_path / "theirs.onnx")
    truth = [run(draft, sample)["y"] for sample in samples]

    def error(results):
        return sum(np.linalg.norm(a - b) for a, b in zip(results, truth, strict=True))

    assert error([run(ours, s)["y"] for s in samples]) <= 1.1 * error([theirs.run(s)["y"] for s in samples])


def test_percentile_clips_the_rarest(save, tmp_path):
    model = save([node("Relu", ["x"], ["y"])], {"x": ["N"]}, {"y": ["N"]})
    x = np.linspace(-1, 1, 10000).astype(np.float32)
    x[0] = -500.0
    samples = [{"x": x}]
    draft = draft_of(model)
    largest = largest_values(draft, ["x", "y"], samples, tmp_path)
    assert largest == {"x": 500.0, "y": 1.0}
    clipped = percentile_values(draft, largest, samples, tmp_path, 99.9)
    assert clipped["x"] == pytest.approx(1.0, abs=0.02)
    assert clipped["y"] == pytest.approx(1.0, abs=2e-3)
    assert percentile_values(draft, largest, samples, tmp_path, 100.0) == largest


@pytest.mark.parametrize("options", [{"calibration_method": "entropy"}, {"percentile": 0}, {"percentile": 100.5}])
def test_wrong_options_are_usage_errors(cnn, tmp_path, options):
    with pytest.raises(UsageError):
        Builder(draft_of(cnn), Precision.INT8, ConvertOptions(**options), [], tmp_path)


def test_percentile_through_the_builder(cnn, run, tmp_path):
    samples = [{"x": floats(2, 3, 8, 8)} for _ in range(4)]
    options = ConvertOptions(calibration_method="percentile", percentile=99.0)
    builder = Builder(draft_of(cnn), Precision.INT8, options, samples, tmp_path)
    candidate = builder.build()
    assert 0 < builder.ranges["x"] < max(float(np.abs(s["x"]).max()) for s in samples)
    assert run(candidate.draft, samples[0])["y"].shape == (2, 5)
