"""Pruning: the pattern holds afterwards, nothing else changes, and the report names the loss."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from support import onnx_models
from support.onnx_models import value

from repo_manager.errors import ModelError
from repo_manager.onnx_model.inputs import natural_inputs
from repo_manager.onnx_model.model import Model, load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import signature_of
from repo_manager.onnx_model.write import save_model
from repo_manager.sparsity import SparsityVerdict, prune, sparsity_report, two_four_mask
from repo_manager.types import as_json

T = onnx.TensorProto


def load(proto: onnx.ModelProto, tmp_path: Path) -> Model:
    return load_model(onnx_models.save(proto, tmp_path / "m.onnx"))


def array_of(proto: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(tensor for tensor in proto.graph.initializer if tensor.name == name))


def test_magnitude_pruning_of_each_layer(tmp_path: Path) -> None:
    source = onnx_models.cnn(sparse=False)
    model = load(source, tmp_path)
    before = model.path.read_bytes()
    pruned, report = prune(model, all_valid=True)
    assert model.path.read_bytes() == before
    assert model.proto.SerializeToString() == before
    for name in ("c1", "c2", "fc"):
        old, new = array_of(source, name), array_of(pruned, name)
        np.testing.assert_array_equal(new, np.where(two_four_mask(old, 1), old, np.float32(0)))
        layer = next(layer for layer in report.pruned if layer.weight == name)
        assert layer.removed == old.size // 2
        assert layer.lost_magnitude == pytest.approx(np.abs(old - new).sum() / np.abs(old).sum(), rel=1e-5)
    assert {layer.verdict for layer in sparsity_report(pruned).layers} == {SparsityVerdict.VALID}
    assert report.source == model.digest
    assert "etrain" in report.advice
    assert json.loads(json.dumps(as_json(report)))["pruned"][0]["node"] == "conv1"


def test_asp_sizes_by_default(tmp_path: Path) -> None:
    model = load(onnx_models.cnn(sparse=False), tmp_path)
    _, report = prune(model)
    assert [layer.node for layer in report.pruned] == ["conv2"]
    assert {layer.node: layer.reason for layer in report.skipped} == {
        "conv1": "not among ASP's default (outputs divide by 8, inputs by 16)",
        "head": "not among ASP's default (outputs divide by 8, inputs by 16)",
    }


def test_patterns(tmp_path: Path) -> None:
    model = load(onnx_models.cnn(sparse=False), tmp_path)
    _, report = prune(model, layers=["conv*", "fc"], exclude=["c1"], all_valid=True)
    assert [layer.node for layer in report.pruned] == ["conv2", "head"]
    assert [(layer.node, layer.reason) for layer in report.skipped] == [("conv1", "excluded")]
    with pytest.raises(ModelError, match="no layer matches 'nothing\\*'"):
        prune(model, layers=["nothing*"])


def test_everything_else_survives(tmp_path: Path) -> None:
    proto = onnx_models.zoo()
    proto.producer_name, proto.doc_string, proto.domain, proto.model_version = "maker", "text", "d", 7
    proto.metadata_props.add(key="author", value="someone")
    proto.graph.doc_string = "graph"
    proto.graph.node[0].doc_string = "node"
    proto.graph.initializer[0].doc_string = "tensor"
    proto.graph.quantization_annotation.add(tensor_name="x1")
    proto.opset_import.add(domain="com.example", version=3)
    proto.training_info.add()
    dense = np.array([0, 1, 0, 2], np.float32)
    proto.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            numpy_helper.from_array(dense[[1, 3]], "sp"), numpy_helper.from_array(np.array([1, 3]), "spi"), [4]
        )
    )
    model = load(proto, tmp_path)
    pruned, report = prune(model, all_valid=True)
    names = {layer.weight for layer in report.pruned if layer.removed}
    assert names == {"w_f", "w_flat", "q", "w_e"}
    for tensor in pruned.graph.initializer:
        if tensor.name in names:
            original = next(t for t in proto.graph.initializer if t.name == tensor.name)
            assert tensor.raw_data != original.raw_data
            tensor.raw_data = original.raw_data
    assert pruned.SerializeToString() == proto.SerializeToString()


def test_unknown_fields_survive(tmp_path: Path) -> None:
    extra = onnx_models.mlp(sparse=False).SerializeToString() + b"\xfa\x3f\x05hello"  # field 1023, bytes
    path = tmp_path / "m.onnx"
    path.write_bytes(extra)
    pruned, _ = prune(load_model(path), all_valid=True)
    assert pruned.SerializeToString().endswith(b"\xfa\x3f\x05hello")


def test_quantised_weights_become_their_zero_point(tmp_path: Path) -> None:
    proto = onnx_models.qdq_conv(zero_point=100, dtype=np.uint8)
    values = np.random.default_rng(0).integers(0, 255, (16, 16, 1, 1)).astype(np.uint8)
    for tensor in proto.graph.initializer:
        if tensor.name == "wq":
            tensor.raw_data = values.tobytes()
    pruned, report = prune(load(proto, tmp_path))
    new = array_of(pruned, "wq")
    keep = two_four_mask(values.astype(np.int32) - 100, 1)
    np.testing.assert_array_equal(new, np.where(keep, values, np.uint8(100)))
    assert len(report.pruned) == 1
    assert sparsity_report(pruned).layers[0].verdict is SparsityVerdict.VALID


def test_zero_points_per_channel_behind_a_transpose(tmp_path: Path) -> None:
    zeros = np.arange(16, dtype=np.int8)
    values = np.random.default_rng(0).integers(-100, 100, (16, 16)).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], axis=0),
        helper.make_node("Transpose", ["d"], ["t"]),
        helper.make_node("MatMul", ["x", "t"], ["y"], name="n"),
    ]
    weights: dict[str, np.ndarray | onnx.TensorProto] = {"q": values, "s": np.ones(16, np.float32), "z": zeros}
    proto = onnx_models.model(nodes, [value("x", ["N", 16])], [value("y", ["N", 16])], weights)
    pruned, _ = prune(load(proto, tmp_path))
    keep = two_four_mask(values.astype(np.int32) - zeros[:, None], 1)
    np.testing.assert_array_equal(array_of(pruned, "q"), np.where(keep, values, zeros[:, None]))


@pytest.mark.parametrize("kind", [T.INT4, T.UINT4, T.FLOAT4E2M1])
def test_packed_types_are_packed_again(kind: int, tmp_path: Path) -> None:
    numbers = np.random.default_rng(1).integers(0 if kind == T.UINT4 else -6, 7, (16, 9)).astype(np.float32)
    tensor = helper.make_tensor("w", kind, [16, 9], numbers.reshape(-1))
    before = numpy_helper.to_array(tensor).astype(np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wd"]),
        helper.make_node("MatMul", ["x", "wd"], ["y"], name="n"),
    ]
    weights: dict[str, np.ndarray | onnx.TensorProto] = {"w": tensor, "s": np.float32(0.1).reshape(())}
    proto = onnx_models.model(nodes, [value("x", ["N", 16])], [value("y", ["N", 9])], weights, opset=23, ir_version=11)
    pruned, _ = prune(load(proto, tmp_path), all_valid=True)
    np.testing.assert_array_equal(
        array_of(pruned, "w").astype(np.float32), np.where(two_four_mask(before, 0), before, np.float32(0))
    )


@pytest.mark.parametrize("kind", [T.FLOAT16, T.BFLOAT16, T.DOUBLE])
def test_float_types(kind: int, tmp_path: Path) -> None:
    tensor = helper.make_tensor("w", kind, [16, 8], onnx_models.weight((16, 8)).reshape(-1))
    before = numpy_helper.to_array(tensor)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="n")
    proto = onnx_models.model([node], [value("x", ["N", 16], kind)], [value("y", ["N", 8], kind)], {"w": tensor})
    pruned, _ = prune(load(proto, tmp_path))
    after = array_of(pruned, "w")
    assert after.dtype == before.dtype
    np.testing.assert_array_equal(
        after.astype(np.float64), np.where(two_four_mask(before, 0), before.astype(np.float64), 0.0)
    )


def test_a_weight_along_two_axes_is_left_alone(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], name="rows"),
        helper.make_node("Gemm", ["h", "w"], ["y"], name="columns", transB=1),
    ]
    weights: dict[str, np.ndarray | onnx.TensorProto] = {"w": onnx_models.weight((16, 16))}
    model = load(onnx_models.model(nodes, [value("x", ["N", 16])], [value("y", ["N", 16])], weights), tmp_path)
    pruned, report = prune(model)
    assert report.pruned == ()
    assert [skipped.node for skipped in report.skipped] == ["rows", "columns"]
    assert all("along another axis" in skipped.reason for skipped in report.skipped)
    assert pruned.SerializeToString() == model.path.read_bytes()


def test_a_weight_shared_along_one_axis_is_pruned_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="second"),
    ]
    weights: dict[str, np.ndarray | onnx.TensorProto] = {"w": onnx_models.weight((16, 16))}
    model = load(onnx_models.model(nodes, [value("x", ["N", 16])], [value("y", ["N", 16])], weights), tmp_path)
    pruned, report = prune(model)
    assert [layer.node for layer in report.pruned] == ["first"]
    assert {layer.verdict for layer in sparsity_report(pruned).layers} == {SparsityVerdict.VALID}
    _, spared = prune(model, exclude=["second"])
    assert spared.pruned == ()
    assert spared.skipped[0].reason == "shares its weight with 'second', which is excluded"


def test_constants_in_nodes_and_bodies_are_pruned_where_they_are(tmp_path: Path) -> None:
    weight = onnx_models.weight((16, 8))
    body = [
        helper.make_node("Constant", [], ["own"], value=numpy_helper.from_array(weight)),
        helper.make_node("MatMul", ["a", "own"], ["b"], name="mm"),
    ]
    function = helper.make_function("loc", "F", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    node = helper.make_node("F", ["x"], ["y"], name="f", domain="loc")
    proto = onnx_models.model(
        [node], [value("x", ["N", 16])], [value("y", ["N", 8])], functions=[function], domains=[("loc", 1)]
    )
    pruned, report = prune(load(proto, tmp_path))
    assert [layer.node for layer in report.pruned] == ["f/mm"]
    new = numpy_helper.to_array(pruned.functions[0].node[0].attribute[0].t)
    np.testing.assert_array_equal(new, np.where(two_four_mask(weight, 0), weight, np.float32(0)))


def test_external_data_and_the_result_runs(tmp_path: Path) -> None:
    source = tmp_path / "source.onnx"
    save_model(onnx_models.mlp(sparse=False, width=256), source, external=True)
    model = load_model(source)
    pruned, _ = prune(model, all_valid=True)
    written = save_model(pruned, tmp_path / "out.onnx", external=True)
    again = load_model(written[0])
    assert all(layer.verdict is SparsityVerdict.VALID for layer in sparsity_report(again).layers)
    signature = signature_of(again)
    assert Session(again).run(natural_inputs(signature, batch=2))["y"].shape == (2, 8)


def test_what_require_lists(tmp_path: Path) -> None:
    half_done = onnx_models.cnn(sparse=False)
    report = sparsity_report(half_done)
    assert [layer.node for layer in report.not_valid] == ["conv2"], "ASP leaves the other two dense"
    pruned, _ = prune(load(half_done, tmp_path))
    done = sparsity_report(pruned)
    assert done.not_valid == ()
    assert [layer.node for layer in done.dense] == ["conv1", "head"]
    odd = sparsity_report(onnx_models.mlp(sparse=False, classes=3, width=36))
    assert [layer.node for layer in odd.not_valid] == ["fc1", "fc2"], "nothing is valid: then every layer counts"


def test_totals_and_the_bound() -> None:
    report = sparsity_report(onnx_models.cnn(), shapes={"x": (2, 4, 16, 16)})
    conv1, conv2, head = report.layers
    assert [layer.macs for layer in report.layers] == [2 * 16 * 256 * 36, 2 * 32 * 256 * 144, 2 * 10 * 32]
    totals = report.totals
    assert totals.macs == totals.valid_macs == conv1.macs + conv2.macs + head.macs
    assert totals.speedup_bound == totals.speedup_bound_if_pruned == 2.0
    mixed = onnx_models.cnn()
    mixed.graph.initializer[0].CopyFrom(numpy_helper.from_array(onnx_models.weight((16, 4, 3, 3)), "c1"))
    totals = sparsity_report(mixed, shapes={"x": (2, 4, 16, 16)}).totals
    share = 1 - conv1.macs / totals.macs
    assert totals.gain_share == pytest.approx(share)
    assert totals.speedup_bound == pytest.approx(1 / (1 - share / 2))
    assert totals.speedup_bound_if_pruned == 2.0
    assert totals.parameters == 16 * 36 + 32 * 144 + 320
    with pytest.raises(ModelError, match="has 4 axes; the shape given has 2"):
        sparsity_report(mixed, shapes={"x": (1, 2)})


def test_layers_are_frozen() -> None:
    layer = sparsity_report(onnx_models.mlp()).layers[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.size = 3  # type: ignore[misc]


def slow_real_mask(integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The two largest dequantised magnitudes of each four along axis 0, the lower index first among equals."""
    keep = np.zeros(integers.shape, bool)
    for column in range(integers.shape[1]):
        for start in range(0, integers.shape[0], 4):
            sizes = [abs(float(integers[row, column]) * float(scales[row, column])) for row in range(start, start + 4)]
            for place in sorted(range(4), key=lambda place, sizes=sizes: -sizes[place])[:2]:
                keep[start + place, column] = True
    return keep


@pytest.mark.parametrize(("scales", "axis", "block"), [((16,), 0, 0), ((8, 16), 0, 2), ((16, 4), 1, 4), ((16,), 1, 0)])
@pytest.mark.parametrize("behind", ["", "Transpose"])
@pytest.mark.parametrize("zero", [0, 5])
def test_scales_that_differ_within_a_group(
    scales: tuple[int, ...], axis: int, block: int, behind: str, zero: int, tmp_path: Path
) -> None:
    """Stored integers of different scales do not compare. Their real values do."""
    generator = np.random.default_rng(0)
    scale = generator.permutation(2.0 ** np.arange(-16, -16 + np.prod(scales) % 63)).astype(np.float32)
    scale = np.resize(scale, scales)
    integers = generator.integers(1, 100, (16, 16)).astype(np.int8)
    spread = np.repeat(scale, block, axis) if block else np.expand_dims(scale, 1 - axis)
    keep = slow_real_mask(integers, np.broadcast_to(spread, (16, 16)))
    stored = (integers + zero).astype(np.int8)
    weights: dict[str, np.ndarray | onnx.TensorProto] = {"s": scale, "z": np.full(scales, zero, np.int8)}
    if behind:
        order = helper.make_node("Transpose", ["q"], ["t"])
        weights["q"] = np.ascontiguousarray(stored.T)
    else:
        order = helper.make_node("Identity", ["q"], ["t"])
        weights["q"] = stored
    nodes = [
        order,
        helper.make_node(
            "DequantizeLinear", ["t", "s", "z"], ["w"], axis=axis, **({"block_size": block} if block else {})
        ),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="n"),
    ]
    proto = onnx_models.model(nodes, [value("x", ["N", 16])], [value("y", ["N", 16])], weights, opset=21, ir_version=10)
    pruned, report = prune(load(proto, tmp_path))
    new = array_of(pruned, "q")
    np.testing.assert_array_equal(new.T if behind else new, np.where(keep, stored, np.int8(zero)))
    assert sparsity_report(pruned).layers[0].verdict is SparsityVerdict.VALID
    real = np.abs(integers * spread)
    assert report.pruned[0].lost_magnitude == pytest.approx(real[~keep].sum() / real.sum(), rel=1e-5)


def test_four_bit_floats_of_different_scales(tmp_path: Path) -> None:
    """6 of a small scale against 0.5 of a large one: neither the bits nor their order decide."""
    numbers = np.tile(np.array([[6, 4, 0.5, 1]], np.float32).T, (4, 16))
    scale = np.tile(np.array([[1], [0.5], [32], [4]], np.float32), (4, 16))
    tensor = helper.make_tensor("w", T.FLOAT4E2M1, [16, 16], numbers.reshape(-1))
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wd"], axis=0, block_size=1),
        helper.make_node("MatMul", ["x", "wd"], ["y"], name="n"),
    ]
    weights: dict[str, np.ndarray | onnx.TensorProto] = {"w": tensor, "s": scale}
    proto = onnx_models.model(nodes, [value("x", ["N", 16])], [value("y", ["N", 16])], weights, opset=23, ir_version=11)
    pruned, _ = prune(load(proto, tmp_path))
    kept = np.where(slow_real_mask(numbers, scale), numbers, np.float32(0))
    np.testing.assert_array_equal(array_of(pruned, "w").astype(np.float32), kept)
