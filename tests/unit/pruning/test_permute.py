"""Permuted channels: the model's answers stay, the graph too, and 2:4 keeps more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from support import onnx_models
from support.onnx_models import value

from repo_manager import samples
from repo_manager.onnx_model.draft import Draft
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import signature_of
from repo_manager.onnx_model.source import draft_of
from repo_manager.onnx_model.write import write_draft
from repo_manager.precision import load_calibration
from repo_manager.pruning import PruneOptions, prune_with_data
from repo_manager.pruning.permute import Permuted, permuted
from repo_manager.sparsity import SparsityVerdict, sparsity_report

node = helper.make_node


class Maker:
    """Weights by shape, with columns of very different sizes and neighbours alike: an order matters."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(31)
        self.tensors: dict[str, np.ndarray] = {}

    def __call__(self, name: str, *shape: int) -> str:
        values = self.random.normal(size=shape)
        if len(shape) > 1:
            axis = 1 if len(shape) == 4 else 0
            sizes = np.repeat(np.exp(self.random.normal(size=shape[axis] // 4 or 1)), 4)[: shape[axis]]
            values *= sizes.reshape([-1 if at == axis else 1 for at in range(len(shape))])
        self.tensors[name] = (values / np.sqrt(max(1, values.size // shape[0]))).astype(np.float32)
        return name


def image(w: Maker, nodes: list[onnx.NodeProto], shape: list[int | str], rank: int = 4) -> onnx.ModelProto:
    if "v" in w.tensors:
        w.tensors["v"] = np.abs(w.tensors["v"]) + 0.1
    tensors = [numpy_helper.from_array(array, name) for name, array in w.tensors.items()]
    graph = helper.make_graph(nodes, "g", [value("x", shape)], [value("y", [None] * rank)], initializer=tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def graphs() -> dict[str, tuple[onnx.ModelProto, set[str]]]:
    """Each way to absorb a permutation: a model, and the weights whose input channels change places."""
    found = {}
    w = Maker()
    chain = [
        node("Conv", ["x", w("a", 32, 4, 3, 3), w("ab", 32)], ["1"], pads=[1] * 4),
        node("BatchNormalization", ["1", w("s", 32), w("o", 32), w("m", 32), w("v", 32)], ["2"]),
        node("HardSwish", ["2"], ["3"]),
        node("MaxPool", ["3"], ["4"], kernel_shape=[2, 2]),
        node("Conv", ["4", w("b", 16, 32, 1, 1)], ["y"]),
    ]
    found["conv, norm, pool"] = (image(w, chain, ["n", 4, 8, 8]), {"b"})
    w = Maker()
    residual = [
        node("Conv", ["x", w("a", 32, 4, 1, 1)], ["1"]),
        node("Conv", ["1", w("b", 32, 32, 3, 3), w("bb", 32)], ["2"], pads=[1] * 4),
        node("Relu", ["2"], ["3"]),
        node("Add", ["1", "3"], ["4"]),
        node("Mul", ["4", w("scale", 1, 32, 1, 1)], ["5"]),
        node("Conv", ["5", w("d", 32, 1, 3, 3), w("db", 32)], ["6"], group=32),  # depthwise, followed
        node("GlobalAveragePool", ["6"], ["7"]),
        node("Conv", ["7", w("q", 8, 32, 1, 1)], ["8"]),
        node("Conv", ["8", w("e", 32, 8, 1, 1)], ["9"]),
        node("HardSigmoid", ["9"], ["10"]),
        node("Mul", ["6", "10"], ["11"]),
        node("Conv", ["11", w("c", 16, 32, 1, 1)], ["y"]),
    ]
    found["branches, depthwise, squeeze"] = (image(w, residual, ["n", 4, 8, 8]), {"b", "q", "e", "c"})
    w = Maker()
    concat = [
        node("Conv", ["x", w("a", 32, 4, 1, 1)], ["1"]),
        node("Conv", ["x", w("b", 16, 4, 1, 1)], ["2"]),
        node("Concat", ["1", "x", "2"], ["3"], axis=1),
        node("Conv", ["3", w("c", 16, 52, 1, 1)], ["y"]),
    ]
    found["concat"] = (image(w, concat, ["n", 4, 8, 8]), {"c"})
    w = Maker()
    transformer = [
        node("MatMul", ["x", w("in", 16, 32)], ["1"]),
        node("Add", [w("ib", 32), "1"], ["2"]),
        node("LayerNormalization", ["2", w("g", 32), w("h", 32)], ["3"], axis=-1),
        node("MatMul", ["3", w("up", 32, 64)], ["4"]),
        node("Tanh", ["4"], ["5"]),
        node("MatMul", ["5", w("down", 64, 32)], ["6"]),
        node("Add", ["2", "6"], ["7"]),
        node("ReduceMean", ["7"], ["8"], axes=[-1]),
        node("Sub", ["7", "8"], ["9"]),
        node("Reshape", ["9", "flat"], ["10"]),
        node("Gemm", ["10", w("head", 8, 32), w("hb", 8)], ["y"], transB=1),
    ]
    w.tensors["flat"] = np.array([-1, 32])
    found["norm, matmul, residual"] = (image(w, transformer, [2, 5, 16], 2), {"up", "down", "head"})
    w = Maker()
    pinned = [
        node("Conv", ["x", w("a", 32, 4, 1, 1)], ["1"]),
        node("Reshape", ["1", "mixed"], ["2"]),  # the batch and half of the channels: their order shows
        node("Conv", ["2", w("b", 8, 16, 1, 1)], ["3"]),
        node("Softmax", ["3"], ["4"], axis=1),
        node("Conv", ["4", w("c", 8, 8, 1, 1)], ["y"]),
    ]
    w.tensors["mixed"] = np.array([-1, 16, 8, 8])
    found["pinned"] = (image(w, pinned, [2, 4, 8, 8]), set())
    return found


def answers(draft: Draft, weights: Permuted | None, path: Path) -> np.ndarray:
    write_draft(Draft(draft.proto, {**draft.weights, **(weights.weights if weights else {})}), path)
    session = Session(path)
    shape = [size if isinstance(size, int) else 3 for size in (signature_of(load_model(path)).inputs[0].shape or ())]
    return session.run({"x": np.random.default_rng(32).normal(size=shape).astype(np.float32)})["y"]


@pytest.mark.parametrize("name", graphs())
def test_permutations_are_absorbed(name: str, tmp_path: Path) -> None:
    proto, wanted = graphs()[name]
    draft = draft_of(load_model(onnx_models.save(proto, tmp_path / "m.onnx")))
    pruned = [weight for weight, tensor in draft.weights.items() if len(tensor.shape) in (2, 4)]
    found = permuted(draft, pruned)
    assert set(found.layers) == wanted
    before, after = answers(draft, None, tmp_path / "a.onnx"), answers(draft, found, tmp_path / "b.onnx")
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())
    if wanted:
        assert found.kept_after > found.kept_before + 0.01
        moved = found.weights[found.layers[0]].load()
        assert not np.array_equal(moved, draft.weights[found.layers[0]].load())
    else:
        assert not found.weights


def test_pruning_with_permuted_channels(tmp_path: Path) -> None:
    model = load_model(samples.dense_twin())
    data = load_calibration(samples.calibration_data(), signature_of(model))
    proto, report = prune_with_data(model, data, PruneOptions(permute=True))
    assert report.source == model.digest
    assert report.evidence is not None
    found = report.evidence.permutation
    assert found is not None
    assert found.layers == ("conv2.weight", "conv3.weight")
    assert found.kept_after > found.kept_before
    assert found.largest_difference < 1e-5
    assert report.evidence.drift[0].relative_error < 0.12
    assert len([layer for layer in sparsity_report(proto).layers if layer.verdict is SparsityVerdict.VALID]) == 3
    source = onnx.load(model.path)
    for one in (proto, source):
        for tensor in one.graph.initializer:
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
    assert proto == source  # names, order, metadata: only weights differ
