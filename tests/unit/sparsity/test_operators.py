"""Every operator's weight, in every position, against the operator's definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from support import onnx_models
from support.onnx_models import value

from repo_manager.onnx_model.model import load_model
from repo_manager.sparsity import LayerSparsity, SparsityVerdict, sparsity_report

T = onnx.TensorProto
TYPES = {np.dtype(np.float32): T.FLOAT, np.dtype(np.float16): T.FLOAT16, np.dtype(np.float64): T.DOUBLE}


def layers_of(proto: onnx.ModelProto, tmp_path: Path | None = None) -> tuple[LayerSparsity, ...]:
    """Judge in memory, and from disk when a folder is given: both must agree."""
    report = sparsity_report(proto)
    if tmp_path is not None:
        from_disk = sparsity_report(load_model(onnx_models.save(proto, tmp_path / "m.onnx")))
        assert from_disk.layers == report.layers
        assert from_disk.totals == report.totals
    return report.layers


def one(
    op: str, weight: np.ndarray | onnx.TensorProto, inputs: list[str], *, rank: int = 2, **attributes: object
) -> onnx.ModelProto:
    """A model of one node; `w` among its inputs is the weight, every other name an input of the model."""
    node = helper.make_node(op, inputs, ["y"], name="n", **attributes)
    dtype = weight.data_type if isinstance(weight, onnx.TensorProto) else TYPES.get(weight.dtype, T.FLOAT)
    given_inputs = [value(name, [None] * rank, dtype) for name in inputs if name not in ("w", "")]
    return onnx_models.model([node], given_inputs, [value("y", None, dtype)], {"w": weight})


def reference(vectors: list[np.ndarray]) -> tuple[int, int]:
    """Count groups in reduction vectors: the values summed for one output, in order."""
    valid = groups = 0
    for vector in vectors:
        for start in range(0, len(vector), 4):
            groups += 1
            valid += int(np.sum(vector[start : start + 4].astype(np.float64) != 0) <= 2)
    return valid, groups


def made(shape: tuple[int, ...], seed: int, dtype: type = np.float32) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(shape) * (generator.random(shape) < 0.55)).astype(dtype)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(0, 999),
    st.sampled_from([np.float32, np.float16, np.float64]),
)  # fmt: skip
def test_conv(spatial: int, outputs: int, fours: int, kernel: int, seed: int, dtype: type) -> None:
    weight = made((outputs, 4 * fours, *[kernel] * spatial), seed, dtype)
    (layer,) = layers_of(one("Conv", weight, ["x", "w"], rank=spatial + 2))
    vectors = [weight[(k, slice(None), *place)] for k in range(outputs) for place in np.ndindex(*[kernel] * spatial)]
    assert (layer.valid_groups, layer.groups) == reference(vectors)
    assert (layer.axis, layer.dtype, layer.zeros) == (1, np.dtype(dtype).name, int((weight == 0).sum()))
    assert layer.verdict is (SparsityVerdict.VALID if layer.valid_groups == layer.groups else SparsityVerdict.NOT_24)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_conv_transpose(outputs: int, fours: int, seed: int) -> None:
    weight = made((4 * fours, outputs, 2, 2), seed)
    (layer,) = layers_of(one("ConvTranspose", weight, ["x", "w"], rank=4))
    vectors = [weight[:, k, i, j] for k in range(outputs) for i in range(2) for j in range(2)]
    assert (layer.valid_groups, layer.groups) == reference(vectors)
    assert any("transposed convolution" in hint for hint in layer.hints)
    assert not layer.asp_eligible


@settings(max_examples=60, deadline=None)
@given(st.booleans(), st.booleans(), st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_gemm(left: bool, flipped: bool, outputs: int, fours: int, seed: int) -> None:
    """C = A' B' with the weight on either side, transposed or not."""
    plain = made((4 * fours, outputs), seed)  # [reduction, outputs]
    rows_first = left != flipped
    weight = plain.T.copy() if rows_first else plain
    names = ["w", "x"] if left else ["x", "w"]
    attributes = {("transA" if left else "transB"): int(flipped)}
    (layer,) = layers_of(one("Gemm", weight, names, **attributes))
    assert (layer.valid_groups, layer.groups) == reference(list(plain.T))
    assert layer.axis == (1 if rows_first else 0)


@settings(max_examples=60, deadline=None)
@given(st.booleans(), st.lists(st.integers(1, 3), max_size=2), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_matmul(left: bool, batch: list[int], outputs: int, fours: int, seed: int) -> None:
    """Any rank; the axis is the reduction axis, never a batch axis."""
    plain = made((*batch, 4 * fours, outputs), seed)
    weight = np.swapaxes(plain, -1, -2).copy() if left else plain
    (layer,) = layers_of(one("MatMul", weight, ["w", "x"] if left else ["x", "w"], rank=len(batch) + 2))
    vectors = [plain[(*place, slice(None), k)] for place in np.ndindex(*batch) for k in range(outputs)]
    assert (layer.valid_groups, layer.groups) == reference(vectors)


def test_matmul_by_a_vector() -> None:
    (layer,) = layers_of(one("MatMul", np.array([1, 0, 2, 0], np.float32), ["x", "w"]))
    assert (layer.axis, layer.valid_groups, layer.groups) == (0, 1, 1)


@pytest.mark.parametrize(
    ("equation", "shape", "axis"),
    [
        ("ij,jk->ik", (8, 3), 0),
        ("ij,kj->ik", (3, 8), 1),
        ("bij,jk->bik", (8, 3), 0),
        ("bij,bjk->bik", (2, 8, 3), 1),
        ("nk,hdk->nhd", (2, 3, 8), 2),
        ("...j,jk->...k", (8, 3), 0),
        ("ij , jk", (8, 3), 0),
        ("ij,...jk->...ik", (2, 8, 3), 1),
    ],
)
def test_einsum(equation: str, shape: tuple[int, ...], axis: int, tmp_path: Path) -> None:
    weight = made(shape, 1)
    (layer,) = layers_of(one("Einsum", weight, ["x", "w"], equation=equation), tmp_path)
    moved = np.moveaxis(weight, axis, -1).reshape(-1, shape[axis])
    assert layer.axis == axis
    assert (layer.valid_groups, layer.groups) == reference(list(moved))


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("bhd,hde->be", (4, 4, 4)),
        ("ij,kl->ijkl", (4, 4)),
        ("ij,jj->i", (4, 4)),
        ("ij,jkl->ik", (4, 4, 4)),
        ("i,i,i->", (4,)),
    ],
)
def test_einsum_that_is_no_plain_product(equation: str, shape: tuple[int, ...]) -> None:
    names = ["x", "w"] if equation.count(",") == 1 else ["x", "w", "z"]
    (layer,) = layers_of(one("Einsum", made(shape, 1), names, equation=equation))
    assert layer.verdict is SparsityVerdict.UNSUPPORTED
    assert "Einsum" in layer.reason


def quantised(shape: tuple[int, ...], zero: np.ndarray, seed: int = 0) -> np.ndarray:
    steps = np.random.default_rng(seed).integers(-3, 4, shape) * (np.random.default_rng(seed + 1).random(shape) < 0.5)
    return (steps + zero).astype(zero.dtype)


@pytest.mark.parametrize("zero", [np.uint8(128), np.int8(0), np.int8(-3), np.uint8(0)])
@pytest.mark.parametrize(
    ("op", "names", "shape", "axis"),
    [
        ("QLinearConv", ["x", "s", "z", "w", "ws", "wz", "s", "z"], (4, 8, 1, 1), 1),
        ("ConvInteger", ["x", "w", "z", "wz"], (4, 8, 1, 1), 1),
        ("QLinearMatMul", ["x", "s", "z", "w", "ws", "wz", "s", "z"], (8, 4), 0),
        ("QLinearMatMul", ["w", "ws", "wz", "x", "s", "z", "s", "z"], (4, 8), 1),
        ("MatMulInteger", ["x", "w", "z", "wz"], (8, 4), 0),
        ("MatMulInteger", ["w", "x", "wz", "z"], (4, 8), 1),
    ],
)
def test_integer_operators(
    op: str, names: list[str], shape: tuple[int, ...], axis: int, zero: np.generic, tmp_path: Path
) -> None:
    weight = quantised(shape, np.asarray(zero))
    weights: dict[str, np.ndarray | onnx.TensorProto] = {
        "w": weight,
        "wz": np.asarray(zero),
        "ws": np.float32(1).reshape(()),
    }
    weights |= {"s": np.float32(1).reshape(()), "z": np.zeros((), weight.dtype)}
    kind = numpy_helper.from_array(weight).data_type
    node = helper.make_node(op, names, ["y"], name="n")
    proto = onnx_models.model([node], [value("x", [None] * len(shape), kind)], [value("y", None, kind)], weights)
    (layer,) = layers_of(proto, tmp_path)
    moved = np.moveaxis(weight.astype(np.int32) - int(zero), axis, -1).reshape(-1, 8)
    assert (layer.axis, layer.dtype) == (axis, weight.dtype.name)
    assert (layer.valid_groups, layer.groups) == reference(list(moved))
    assert layer.zeros == int((weight == zero).sum())
    assert any("INT8 output not quantised" in hint for hint in layer.hints) == op.endswith("Integer")


def test_zero_point_per_channel(tmp_path: Path) -> None:
    zeros = np.array([0, 5, -7, 100], np.int8)
    weight = quantised((4, 8, 1, 1), zeros[:, None, None, None])
    node = helper.make_node("ConvInteger", ["x", "w", "z", "wz"], ["y"], name="n")
    weights: dict[str, np.ndarray | onnx.TensorProto] = {"w": weight, "wz": zeros, "z": np.zeros((), np.int8)}
    proto = onnx_models.model([node], [value("x", [None] * 4, T.INT8)], [value("y", None, T.INT32)], weights)
    (layer,) = layers_of(proto, tmp_path)
    moved = (weight.astype(np.int32) - zeros[:, None, None, None]).reshape(4, 8)
    assert (layer.valid_groups, layer.groups) == reference(list(moved))


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_are_not_eligible(op: str) -> None:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    weights: dict[str, np.ndarray | onnx.TensorProto] = {
        "W": made((1, gates * 4, 8), 1),
        "R": made((1, gates * 4, 4), 2),
    }
    node = helper.make_node(op, ["x", "W", "R"], ["y"], name="n", hidden_size=4)
    layers = layers_of(onnx_models.model([node], [value("x", [5, 2, 8])], [value("y", None)], weights))
    assert [layer.verdict for layer in layers] == [SparsityVerdict.UNSUPPORTED] * 2
    assert [layer.macs for layer in layers] == [5 * 2 * gates * 4 * 8, 5 * 2 * gates * 4 * 4]


def test_groups_and_odd_sizes_and_dynamic_weights() -> None:
    (grouped,) = layers_of(one("Conv", made((8, 4, 3, 3), 1), ["x", "w"], rank=4, group=2))
    assert grouped.verdict is SparsityVerdict.GROUPED
    assert "never considered by TensorRT" in grouped.reason
    (odd,) = layers_of(one("Conv", made((8, 3, 3, 3), 1), ["x", "w"], rank=4))
    assert (odd.verdict, odd.reason, odd.groups) == (
        SparsityVerdict.INDIVISIBLE, "reduction size 3 not divisible by 4", 0,
    )  # fmt: skip
    (dynamic,) = layers_of(one("MatMul", made((4, 4), 1), ["x", "z"]))
    assert dynamic.verdict is SparsityVerdict.DYNAMIC
    assert (dynamic.weight, dynamic.density, dynamic.valid_share) == ("z", 1.0, 0.0)


def test_small_layers_get_a_hint_and_large_ones_none() -> None:
    (small,) = layers_of(one("Conv", made((256, 252, 1, 1), 1), ["x", "w"], rank=4))
    assert any(hint.startswith("small: C = 252 below 256") for hint in small.hints)
    (large,) = layers_of(one("Conv", made((256, 256, 1, 1), 1), ["x", "w"], rank=4))
    assert large.hints == ()


PACKED = {T.INT4: (np.int8, 4), T.UINT4: (np.uint8, 4), T.FLOAT4E2M1: (np.float32, 4)}


@pytest.mark.parametrize("kind", list(PACKED))
def test_types_below_a_byte(kind: int, tmp_path: Path) -> None:
    values = made((8, 5), 3) * 3
    numbers = np.abs(values) if kind == T.UINT4 else values
    tensor = helper.make_tensor("w", kind, [8, 5], np.rint(numbers).clip(-8, 7).astype(np.float32).reshape(-1))
    dense = numpy_helper.to_array(tensor).astype(np.float32)
    node = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wd"]),
        helper.make_node("MatMul", ["x", "wd"], ["y"], name="n"),
    ]
    weights: dict[str, np.ndarray | onnx.TensorProto] = {"w": tensor, "s": np.float32(0.1).reshape(())}
    proto = onnx_models.model(node, [value("x", ["N", 8])], [value("y", ["N", 5])], weights, opset=23, ir_version=11)
    (layer,) = layers_of(proto, tmp_path)
    assert (layer.valid_groups, layer.groups) == reference(list(dense.T))
    assert layer.zeros == int((dense == 0).sum())


@pytest.mark.parametrize("kind", [T.BFLOAT16, T.FLOAT8E4M3FN, T.FLOAT8E5M2, T.FLOAT16])
def test_narrow_floats_through_a_cast(kind: int, tmp_path: Path) -> None:
    tensor = helper.make_tensor("w", kind, [8, 5], made((8, 5), 3).reshape(-1))
    dense = numpy_helper.to_array(tensor).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["w"], ["wc"], to=T.FLOAT),
        helper.make_node("MatMul", ["x", "wc"], ["y"], name="n"),
    ]
    proto = onnx_models.model(
        nodes, [value("x", ["N", 8])], [value("y", ["N", 5])], {"w": tensor}, opset=19, ir_version=9
    )
    (layer,) = layers_of(proto, tmp_path)
    assert (layer.valid_groups, layer.groups) == reference(list(dense.T))
    assert layer.via == ("Cast",)


def test_a_cast_can_make_zeros() -> None:
    weight = np.array([[1e-30], [1e-30], [1.0], [1.0]], np.float32)
    nodes = [helper.make_node("Cast", ["w"], ["wc"], to=T.FLOAT16), helper.make_node("MatMul", ["x", "wc"], ["y"])]
    proto = onnx_models.model(
        nodes, [value("x", ["N", 4], T.FLOAT16)], [value("y", ["N", 1], T.FLOAT16)], {"w": weight}
    )
    (layer,) = layers_of(proto)
    assert layer.verdict is SparsityVerdict.VALID


def test_quantising_a_constant_can_make_zeros() -> None:
    weight = np.array([[0.004], [0.002], [1.0], [1.0]], np.float32)
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["wd"]),
        helper.make_node("MatMul", ["x", "wd"], ["y"]),
    ]
    weights: dict[str, np.ndarray | onnx.TensorProto] = {
        "w": weight,
        "s": np.float32(0.01).reshape(()),
        "z": np.int8(4).reshape(()),
    }
    proto = onnx_models.model(nodes, [value("x", ["N", 4])], [value("y", ["N", 1])], weights)
    (layer,) = layers_of(proto)
    assert layer.verdict is SparsityVerdict.VALID
    assert layer.via == ("QuantizeLinear", "DequantizeLinear")


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(3)), st.integers(0, 99))
def test_transposing_the_storage_changes_no_count(order: list[int], seed: int) -> None:
    weight = made((2, 8, 3), seed)
    direct = layers_of(one("MatMul", weight, ["x", "w"], rank=3))[0]
    stored = np.ascontiguousarray(weight.transpose(order))
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=list(np.argsort(order))),
        helper.make_node("MatMul", ["x", "t"], ["y"], name="n"),
    ]
    through = layers_of(onnx_models.model(nodes, [value("x", [None] * 3)], [value("y", None)], {"w": stored}))[0]
    same = ("node", "axis", "groups", "valid_groups", "zeros", "verdict", "reason", "hints", "shape")
    assert [getattr(direct, name) for name in same] == [getattr(through, name) for name in same]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_flipping_trans_b_with_its_weight_changes_no_verdict(outputs: int, fours: int, seed: int) -> None:
    weight = made((4 * fours, outputs), seed)
    plain = layers_of(one("Gemm", weight, ["x", "w"]))[0]
    flipped = layers_of(one("Gemm", weight.T.copy(), ["x", "w"], transB=1))[0]
    same = ("groups", "valid_groups", "zeros", "verdict", "reason", "hints", "asp_eligible", "macs")
    assert [getattr(plain, name) for name in same] == [getattr(flipped, name) for name in same]


def test_every_hiding_place(tmp_path: Path) -> None:
    found = {layer.node: (layer.verdict, layer.via) for layer in layers_of(onnx_models.zoo(), tmp_path)}
    valid, dense = SparsityVerdict.VALID, SparsityVerdict.NOT_24
    assert found == {
        "transposed": (valid, ("Transpose",)),
        "call/inner": (dense, ()),
        "cast": (valid, ("Cast",)),
        "reshaped": (dense, ("Reshape",)),
        "zeros": (valid, ("ConstantOfShape",)),
        "quantised": (dense, ("DequantizeLinear",)),
        "if/yes/mm": (valid, ()),
        "einsum": (dense, ()),
    }


def test_a_function_called_twice_is_two_uses() -> None:
    body = [
        helper.make_node(
            "Constant", [], ["own"], value=numpy_helper.from_array(onnx_models.weight((8, 8), sparse=True, axis=0))
        ),
        helper.make_node("MatMul", ["a", "w"], ["m"], name="given"),
        helper.make_node("MatMul", ["m", "own"], ["b"], name="own"),
    ]
    function = helper.make_function("loc", "F", ["a", "w"], ["b"], body, [helper.make_opsetid("", 17)])
    nodes = [
        helper.make_node("F", ["x", "w1"], ["h"], name="first", domain="loc"),
        helper.make_node("F", ["h", "w2"], ["y"], name="second", domain="loc"),
    ]
    weights: dict[str, np.ndarray | onnx.TensorProto] = {
        "w1": onnx_models.weight((8, 8), sparse=True, axis=0), "w2": onnx_models.weight((8, 8)),
    }  # fmt: skip
    proto = onnx_models.model(
        nodes, [value("x", ["N", 8])], [value("y", ["N", 8])], weights, functions=[function], domains=[("loc", 1)]
    )
    found = {layer.node: layer.verdict for layer in layers_of(proto)}
    assert found == {
        "first/given": SparsityVerdict.VALID, "first/own": SparsityVerdict.VALID,
        "second/given": SparsityVerdict.NOT_24, "second/own": SparsityVerdict.VALID,
    }  # fmt: skip


def test_one_tensor_along_two_axes(tmp_path: Path) -> None:
    weight = onnx_models.weight((8, 8), sparse=True, axis=0)
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], name="rows"),
        helper.make_node("Gemm", ["h", "w"], ["y"], name="columns", transB=1),
    ]
    proto = onnx_models.model(nodes, [value("x", ["N", 8])], [value("y", ["N", 8])], {"w": weight})
    rows, columns = layers_of(proto, tmp_path)
    assert (rows.axis, rows.verdict) == (0, SparsityVerdict.VALID)
    assert columns.axis == 1
    assert columns.verdict is SparsityVerdict.NOT_24


def test_loop_bodies_and_sparse_initializers() -> None:
    dense = onnx_models.weight((4, 4), sparse=True, axis=0)
    place = np.flatnonzero(dense)
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(dense.reshape(-1)[place], "ws"),
        numpy_helper.from_array(place.astype(np.int64), "i"),
        [4, 4],
    )
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("MatMul", ["v", "ws"], ["v2"], name="mm")],
        "body",
        [value("n", [], T.INT64), value("c", [], T.BOOL), value("v", [1, 4])],
        [value("c2", [], T.BOOL), value("v2", [1, 4])],
    )
    loop = helper.make_node("Loop", ["trips", "go", "x"], ["y"], name="loop", body=body)
    weights: dict[str, np.ndarray | onnx.TensorProto] = {"trips": np.int64(3).reshape(()), "go": np.array(True)}
    proto = onnx_models.model([loop], [value("x", [1, 4])], [value("y", [1, 4])], weights)
    proto.graph.sparse_initializer.append(sparse)
    (layer,) = layers_of(proto)
    assert (layer.node, layer.verdict, layer.via) == ("loop/body/mm", SparsityVerdict.VALID, ("sparse",))


def test_weights_that_the_graph_computes_from_constants(tmp_path: Path) -> None:
    """As exporters write an LSTM's gates, and weight normalisation."""
    weight = onnx_models.weight((8, 8), sparse=True, axis=0)
    nodes = [
        helper.make_node("Split", ["w"], ["w1", "w2"], axis=1),
        helper.make_node("Concat", ["w2", "w1"], ["w3"], axis=1),
        helper.make_node("Mul", ["w3", "scale"], ["w4"]),
        helper.make_node("MatMul", ["x", "w4"], ["y"], name="n"),
    ]
    weights: dict[str, np.ndarray | onnx.TensorProto] = {"w": weight, "scale": np.float32(2).reshape(())}
    proto = onnx_models.model(nodes, [value("x", ["N", 8])], [value("y", ["N", 8])], weights)
    (layer,) = layers_of(proto, tmp_path)
    assert (layer.verdict, layer.axis, layer.via) == (SparsityVerdict.VALID, 0, ("Split", "Concat", "Mul"))


def test_constants_that_double_at_each_step_do_not_hang() -> None:
    nodes = [helper.make_node("Add", [f"w{i}", f"w{i}"], [f"w{i + 1}"]) for i in range(50)]
    nodes += [helper.make_node("DequantizeLinear", [f"q{i}", f"q{i}"], [f"q{i + 1}"]) for i in range(50)]
    nodes += [helper.make_node("MatMul", ["x", "w50"], ["h"]), helper.make_node("MatMul", ["h", "q50"], ["y"])]
    weights: dict[str, np.ndarray | onnx.TensorProto] = {
        "w0": onnx_models.weight((4, 4)),
        "q0": np.ones((4, 4), np.int8),
    }
    proto = onnx_models.model(nodes, [value("x", ["N", 4])], [value("y", ["N", 4])], weights)
    first, _ = layers_of(proto)
    assert first.verdict is SparsityVerdict.NOT_24


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex_weights_are_judged_without_a_crash(dtype: type, tmp_path: Path) -> None:
    proto = one("MatMul", np.ones((8, 4), np.float32), ["x", "w"])
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((8, 4), dtype), "w"))
    (layer,) = layers_of(proto, tmp_path)
    assert layer.verdict is SparsityVerdict.UNSUPPORTED
