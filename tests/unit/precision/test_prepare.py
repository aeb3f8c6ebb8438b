from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from repo_manager.errors import ModelError
from repo_manager.onnx_model.draft import opset_of
from repo_manager.onnx_model.source import draft_of
from repo_manager.precision.candidate import Keep
from repo_manager.precision.passes.fold_batchnorm import fold_batchnorm
from repo_manager.precision.passes.fold_constants import fold_constants
from repo_manager.precision.passes.lower import lower
from repo_manager.precision.passes.prepare import prepare
from repo_manager.precision.passes.raise_opset import raise_opset

node = helper.make_node
RNG = np.random.default_rng(3)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def statistics(channels: int) -> dict[str, np.ndarray]:
    return {"s": floats(channels), "o": floats(channels), "m": floats(channels), "v": np.abs(floats(channels)) + 0.1}


def ops(draft):
    return [n.op_type for n in draft.graph.node]


BATCHNORM = node("BatchNormalization", ["c", "s", "o", "m", "v"], ["y"], name="bn")


@pytest.mark.parametrize(
    ("producer", "weights", "x", "channels"),
    [
        (node("Conv", ["x", "w"], ["c"], name="p"), {"w": floats(6, 4, 3, 3)}, [1, 4, 5, 5], 6),
        (node("Conv", ["x", "w", "b"], ["c"], name="p", group=2), {"w": floats(6, 2, 3), "b": floats(6)}, [2, 4, 5], 6),
        (node("ConvTranspose", ["x", "w", "b"], ["c"], name="p"), {"w": floats(4, 6, 2, 2), "b": floats(6)},
         [1, 4, 3, 3], 6),
        (node("Gemm", ["x", "w", "b"], ["c"], name="p", transB=1), {"w": floats(6, 4), "b": floats(6)}, [2, 4], 6),
        (node("Gemm", ["x", "w", "b"], ["c"], name="p", beta=0.5, alpha=2.0), {"w": floats(4, 6), "b": floats(1)},
         [2, 4], 6),
    ],
)  # fmt: skip
def test_batchnorm_is_folded_exactly(save, run, producer, weights, x, channels):
    model = save([producer, BATCHNORM], {"x": x}, {"y": [None] * len(x)}, {**weights, **statistics(channels)})
    source = draft_of(model)
    folded = fold_batchnorm(source)
    assert ops(folded) == [producer.op_type]
    assert folded.graph.node[0].name == "p"
    sample = {"x": floats(*x)}
    np.testing.assert_allclose(run(folded, sample)["y"], run(source, sample)["y"], rtol=2e-4, atol=2e-5)


def test_trap_variance_beyond_fp16_that_cannot_be_folded(save, run):
    """In FP16 a variance of 1e6 is infinite, and every result 0."""
    stats = {**statistics(3), "v": np.full(3, 1e6, np.float32), "s": np.full(3, 1e3, np.float32)}
    model = save([node("BatchNormalization", ["x", "s", "o", "m", "v"], ["y"])], {"x": [2, 3]}, {"y": [2, 3]}, stats)
    source = draft_of(model)
    low = lower(prepare(source, opset=1), TensorProto.FLOAT16, keep_io_types=True, keep=Keep()).draft
    sample = {"x": floats(2, 3)}
    np.testing.assert_allclose(run(low, sample)["y"], run(source, sample)["y"], rtol=1e-2, atol=1e-2)


def test_convolution_with_two_readers_is_not_folded(save):
    nodes = [node("Conv", ["x", "w"], ["c"]), BATCHNORM, node("Relu", ["c"], ["z"])]
    model = save(nodes, {"x": [1, 4, 3]}, {"y": [None] * 3, "z": [None] * 3}, {"w": floats(2, 4, 1), **statistics(2)})
    assert "BatchNormalization" in ops(fold_batchnorm(draft_of(model)))


def test_trap_weight_shared_with_an_unfolded_reader_keeps_its_values(save, run):
    nodes = [node("Conv", ["x", "w"], ["c"]), BATCHNORM, node("Conv", ["x", "w"], ["z"])]
    model = save(nodes, {"x": [1, 4, 3]}, {"y": [None] * 3, "z": [None] * 3}, {"w": floats(2, 4, 1), **statistics(2)})
    sample = {"x": floats(1, 4, 3)}
    before, after = run(draft_of(model), sample), run(fold_batchnorm(draft_of(model)), sample)
    for name in ("y", "z"):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-4, atol=1e-5)


def test_folding_keeps_zero_weights_zero(draft):
    folded = fold_batchnorm(draft)
    stem = next(n for n in folded.graph.node if n.name == "stem")
    assert folded.weights[stem.input[1]].load().any()
    body = next(n for n in folded.graph.node if n.name == "body")
    assert not folded.weights[body.input[1]].load()[:, 0::4].any()


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Identity", ["w"], ["k"])],
        [node("Transpose", ["t"], ["k"], perm=[1, 0])],
        [node("Reshape", ["flat", "shape"], ["k"])],
        [node("Unsqueeze", ["flat", "axis"], ["u"]), node("Reshape", ["u", "shape"], ["k"])],
        [node("Cast", ["half"], ["k"], to=1)],
        [node("Constant", [], ["c"], value_floats=[1.0] * 12), node("Reshape", ["c", "shape"], ["k"])],
        [node("ConstantOfShape", ["dims"], ["k"], value=helper.make_tensor("v", 1, [1], [0.5]))],
    ],
)
def test_weights_are_found_behind_relabelling_operators(save, run, nodes):
    weights = {
        "w": floats(3, 4), "t": floats(4, 3), "flat": floats(12), "half": floats(3, 4).astype(np.float16),
        "shape": np.int64([3, -1]), "axis": np.int64([0]), "dims": np.int64([3, 4]),
    }  # fmt: skip
    model = save([*nodes, node("MatMul", ["x", "k"], ["y"])], {"x": [2, 3]}, {"y": [2, 4]}, weights)
    source = draft_of(model)
    folded = fold_constants(source)
    assert ops(folded) == ["MatMul"]
    sample = {"x": floats(2, 3)}
    np.testing.assert_array_equal(run(folded, sample)["y"], run(source, sample)["y"])


def test_narrowing_casts_are_not_folded(save):
    nodes = [node("Cast", ["w"], ["k"], to=7), node("Cast", ["k"], ["f"], to=1), node("Mul", ["x", "f"], ["y"])]
    model = save(nodes, {"x": [2]}, {"y": [2]}, {"w": np.float32([1.5, 2.5])})
    assert ops(fold_constants(draft_of(model)))[0] == "Cast"


def test_opset_is_raised_with_the_weights_kept(save, run):
    nodes = [
        node("Unsqueeze", ["x"], ["u"], axes=[0]),
        node("Squeeze", ["u"], ["q"], axes=[0]),
        node("MatMul", ["q", "w"], ["m"], name="big"),
        node("Softmax", ["m"], ["y"], axis=1),
    ]
    model = save(nodes, {"x": [2, 40]}, {"y": [2, 40]}, {"w": floats(40, 40)}, opset=11)
    raised = raise_opset(draft_of(model), 13)
    assert opset_of(raised.proto) == 13
    assert raised.weights["w"].shape == (40, 40)
    sample = {"x": floats(2, 40)}
    np.testing.assert_allclose(run(raised, sample)["y"], run(draft_of(model), sample)["y"], rtol=1e-5)


def test_opset_that_is_high_enough_is_left_alone(draft):
    assert raise_opset(draft, 13) is draft


def test_functions_are_inlined(save, run):
    function = helper.make_function("own", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])],
                                    [helper.make_opsetid("", 17)])  # fmt: skip
    model = save([node("Twice", ["x"], ["y"], domain="own")], {"x": [2]}, {"y": [2]}, functions=[function],
                 domains={"own": 1})  # fmt: skip
    draft = draft_of(model)
    assert ops(draft) == ["Add"]
    np.testing.assert_array_equal(run(draft, {"x": np.float32([1, 2])})["y"], [2, 4])


def test_every_node_has_a_name_of_its_own(save):
    nodes = [
        node("Relu", ["x"], ["a"], name="same"),
        node("Relu", ["a"], ["b"], name="same"),
        node("Relu", ["b"], ["y"]),
    ]
    names = [n.name for n in draft_of(save(nodes, {"x": [1]}, {"y": [1]})).graph.node]
    assert names[0] == "same"
    assert len(set(names)) == 3
    assert all(names)


def test_nodes_and_weights_that_nothing_reads_are_dropped(save):
    nodes = [node("Relu", ["x"], ["y"]), node("Mul", ["x", "w"], ["unused"])]
    draft = draft_of(save(nodes, {"x": [2]}, {"y": [2]}, {"w": floats(2)}))
    assert ops(draft) == ["Relu"]
    assert not draft.weights


def test_opset_that_onnx_cannot_reach_is_a_clear_error(draft):
    with pytest.raises(ModelError, match=r"of opset 17 and this precision needs 999[\s\S]*Export the model again"):
        raise_opset(draft, 999)


def test_trap_weights_listed_as_inputs_before_ir_4(save, run, tmp_path):
    weight = floats(4, 4)
    model = save([node("MatMul", ["x", "w"], ["y"])], {"x": [1, 4], "w": [4, 4]}, {"y": [1, 4]}, {"w": weight}, opset=8)
    model.graph_only.ir_version = 3
    source = draft_of(model)
    assert [value.name for value in source.graph.input] == ["x"]
    np.testing.assert_allclose(run(source, {"x": np.ones((1, 4), np.float32)})["y"], weight.sum(0)[None], rtol=1e-5)


def test_trap_raising_the_opset_keeps_symbols_of_dims_and_bodies(save, run):
    def body(name: str, op: str):
        return helper.make_graph([node(op, ["a"], [f"{name}o"], name=name)], name, [],
                                 [helper.make_tensor_value_info(f"{name}o", 1, ["batch", None])])  # fmt: skip

    nodes = [
        node("Relu", ["x"], ["a"]),
        node("If", ["c"], ["y"], then_branch=body("t", "Neg"), else_branch=body("e", "Abs")),
    ]
    inputs = {"x": ["batch", None], "c": helper.make_tensor_value_info("c", TensorProto.BOOL, [])}
    model = save(nodes, inputs, {"y": ["batch", None]}, opset=13)
    source = draft_of(model)
    raised = prepare(source, opset=22)
    assert list(raised.graph.input) == list(source.graph.input)
    assert list(raised.graph.output) == list(source.graph.output)
    low = lower(raised, TensorProto.BFLOAT16, keep_io_types=True, keep=Keep())
    assert low.kept == {}
    sample = {"x": floats(2, 3), "c": np.array(True)}
    np.testing.assert_array_equal(run(raised, sample)["y"], run(source, sample)["y"])
