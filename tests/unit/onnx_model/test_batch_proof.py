"""Proofs of a batch axis by the graph, each confirmed by a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import onnx_models

from repo_manager.onnx_model.batch_axis import find_batch_axis, try_batch_axis
from repo_manager.onnx_model.batch_graph import judge_graph
from repo_manager.onnx_model.model import Model, load_model
from repo_manager.onnx_model.signature import signature_of


def samples_are_independent(found: Model) -> bool:
    return judge_graph(found).kind == "independent"


def const(name: str, value: Any, dtype: Any = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value, dtype), name)


def model(
    folder: Path,
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    rank: int = 2,
    opset: int = 17,
    inputs: tuple[str, ...] = ("x",),
) -> Model:
    shape = ["N", 4] if rank == 2 else ["N", 4, 6, 6]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [info(name, TensorProto.FLOAT, shape) for name in inputs],
        [info("y", TensorProto.FLOAT, None)],
        weights,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return load_model(onnx_models.save(proto, folder / "m.onnx"))


def node(op: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, [*inputs], ["y"], name=op, **attributes)


W = const("w", np.ones((4, 4)))
KEPT: list[tuple[onnx.NodeProto, list[onnx.TensorProto], int]] = [
    (node("Relu", "x"), [], 2),
    (node("Add", "x", "b"), [const("b", [1, 2, 3, 4])], 2),
    (node("Add", "x", "b"), [const("b", [[1, 2, 3, 4]])], 2),
    (node("Mul", "x", "x"), [], 2),
    (node("Gemm", "x", "w"), [W], 2),
    (node("Gemm", "x", "w", "b", transB=1), [W, const("b", [1, 2, 3, 4])], 2),
    (node("MatMul", "x", "w"), [W], 2),
    (node("Conv", "x", "k"), [const("k", np.ones((8, 4, 3, 3)))], 4),
    (node("GlobalAveragePool", "x"), [], 4),
    (node("Flatten", "x"), [], 4),
    (node("Softmax", "x", axis=-1), [], 2),
    (node("Reshape", "x", "s"), [const("s", [0, -1], np.int64)], 4),
    (node("Transpose", "x", perm=[0, 2, 3, 1]), [], 4),
    (node("Concat", "x", "x", axis=1), [], 2),
    (node("ReduceMean", "x", axes=[2, 3]), [], 4),
    (node("LayerNormalization", "x", "b", axis=-1), [const("b", [1, 2, 3, 4])], 2),
    (node("Clip", "x", "l"), [const("l", 0.0)], 2),
    (node("Einsum", "x", equation="ij->ij"), [], 2),
]
MIXED: list[tuple[onnx.NodeProto, list[onnx.TensorProto], int]] = [
    (node("Softmax", "x", axis=0), [], 2),
    (node("Concat", "x", "x", axis=0), [], 2),
    (node("Concat", "x", "x", axis=-2), [], 2),
    (node("Concat", "x", "b", axis=1), [const("b", np.ones((1, 4)))], 2),
    (node("Transpose", "x", perm=[1, 0]), [], 2),
    (node("Transpose", "x"), [], 2),
    (node("Reshape", "x", "s"), [const("s", [-1, 4], np.int64)], 4),
    (node("Reshape", "x", "s"), [const("s", [2, 2], np.int64)], 2),
    (node("ReduceMean", "x", axes=[0]), [], 2),
    (node("ReduceMean", "x", axes=[-2]), [], 2),
    (node("ReduceMean", "x"), [], 2),
    (node("Flatten", "x", axis=0), [], 4),
    (node("Flatten", "x", axis=2), [], 4),
    (node("Gemm", "x", "w", transA=1), [const("w", np.ones((3, 4)))], 2),
    (node("Gemm", "w", "x", transB=1), [W], 2),
    (node("MatMul", "w", "x"), [const("w", np.ones((3, 3)))], 2),
    (node("Add", "x", "b"), [const("b", np.ones((3, 4)))], 2),
    (node("Add", "x", "b"), [const("b", np.ones((3, 1, 4)))], 2),
    (node("CumSum", "x", "a"), [const("a", 0, np.int64)], 2),
    (node("Gather", "x", "a", axis=0), [const("a", [0], np.int64)], 2),
    (node("Shape", "x"), [], 2),
    (node("Identity", "w"), [W], 2),
]


@pytest.mark.parametrize(("one", "weights", "rank"), KEPT, ids=lambda value: getattr(value, "op_type", None))
def test_operators_that_keep_samples_apart(
    one: onnx.NodeProto, weights: list[onnx.TensorProto], rank: int, tmp_path: Path
) -> None:
    found = model(tmp_path, [one], weights, rank)
    assert samples_are_independent(found)
    assert try_batch_axis(found, signature_of(found)).batched, "a run says so, too"


@pytest.mark.parametrize(("one", "weights", "rank"), MIXED, ids=lambda value: getattr(value, "op_type", None))
def test_what_mixes_samples_or_is_not_known_proves_nothing(
    one: onnx.NodeProto, weights: list[onnx.TensorProto], rank: int, tmp_path: Path
) -> None:
    assert not samples_are_independent(model(tmp_path, [one], weights, rank))


def test_a_softmax_of_old_opsets_joins_all_axes_behind_the_first(tmp_path: Path) -> None:
    assert samples_are_independent(model(tmp_path, [node("Softmax", "x")], [], 4, opset=11))
    assert not samples_are_independent(model(tmp_path, [node("Softmax", "x", axis=0)], [], 4, opset=11))


def test_random_numbers_prove_nothing(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("RandomNormal", [], ["r"], name="r", shape=[1, 4]),
        node("Add", "x", "r"),
    ]
    assert not samples_are_independent(model(tmp_path, nodes, []))


def test_batch_normalization_that_is_being_trained_uses_the_batch(tmp_path: Path) -> None:
    four = [const(name, [1, 1, 1, 1]) for name in "abcd"]
    plain = node("BatchNormalization", "x", "a", "b", "c", "d")
    assert samples_are_independent(model(tmp_path, [plain], four, 4))
    training = helper.make_node("BatchNormalization", ["x", *"abcd"], ["y", "m", "v"], training_mode=1)
    assert not samples_are_independent(model(tmp_path, [training], four, 4))


def test_no_chance_graph_is_proven_that_a_run_refutes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    proven = 0
    for index in range(60):
        rank = int(random.choice([2, 4]))
        pool = [entry for entry in KEPT + MIXED[:17] if entry[2] == rank]
        weights: dict[str, onnx.TensorProto] = {}
        nodes, last = [], "x"
        for step in range(3):
            one, constants, _ = pool[int(random.integers(len(pool)))]
            copy = onnx.NodeProto()
            copy.CopyFrom(one)
            renamed = {tensor.name: f"{tensor.name}{step}" for tensor in constants}
            for tensor in constants:
                weights[renamed[tensor.name]] = numpy_helper.from_array(
                    numpy_helper.to_array(tensor), renamed[tensor.name]
                )
            copy.input[:] = [last if name == "x" else renamed[name] for name in one.input]
            copy.output[:], copy.name = ["y" if step == 2 else f"v{step}"], f"n{step}"
            last = copy.output[0]
            nodes.append(copy)
        found = model(tmp_path, nodes, list(weights.values()), rank)
        if samples_are_independent(found):
            proven += 1
            tried = try_batch_axis(found, signature_of(found))
            assert tried.batched, (index, [n.op_type for n in nodes], tried.reason)
    assert proven > 5


def test_a_proven_model_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = onnx_models.save(onnx_models.cnn(), tmp_path / "cnn.onnx")
    found = load_model(path)

    def run(*_: Any) -> None:
        raise AssertionError("it was run")

    monkeypatch.setattr("repo_manager.onnx_model.session.Session.run", run)
    assert find_batch_axis(found, signature_of(found)).batched
