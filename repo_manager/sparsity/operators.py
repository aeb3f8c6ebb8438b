"""Where each operator keeps its weight, its axis of reduction, and its cost.

Sources: the ONNX operator specification; those TensorRT considers are in docs/sparsity.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx

from repo_manager.sparsity.scope import Scope, Shape, attribute_of

__all__ = ["OPERATORS", "Site", "sites_of"]


@dataclass(frozen=True)
class Site:
    """One place of a node with a weight, or could.

    Attributes:
        input: index of the weight among the node's inputs.
        axis: the reduction axis of the weight, negative from the end; `None` when there is none to judge.
        zero_point: index of the weight's zero point input; `None` when the operator has none.
        conv_groups: of a convolution; else 1.
        output_axis: axis of the weight for the outputs (K). `None` when there is none.
        unsupported: why the pattern cannot matter here; `None` when it can.
    """

    input: int
    axis: int | None
    zero_point: int | None = None
    conv_groups: int = 1
    output_axis: int | None = None
    unsupported: str | None = None


_IsConstant = Callable[[int], bool]
_RankOf = Callable[[int], int | None]


def sites_of(node: onnx.NodeProto, scope: Scope, is_constant: _IsConstant, rank_of: _RankOf) -> tuple[Site, ...]:
    """Return a node's places for weights. Empty for an operator without a product.

    Args:
        node: node to look at. One outside `OPERATORS` has no places.
        scope: names and attributes visible to the node.
        is_constant: says whether the input of an index is a constant.
        rank_of: rank of the input of an index, `None` when unknown.
    """
    finder = OPERATORS.get((node.domain if node.domain != "ai.onnx" else "", node.op_type))
    return () if finder is None else finder(node, scope, is_constant, rank_of)


def _flag(node: onnx.NodeProto, name: str, scope: Scope, default: int = 0) -> int:
    attribute = attribute_of(node, name, scope)
    return default if attribute is None else int(attribute.i)


def _conv(weight: int, zero_point: int | None) -> Callable[..., tuple[Site, ...]]:
    def find(node: onnx.NodeProto, scope: Scope, is_constant: _IsConstant, rank_of: _RankOf) -> tuple[Site, ...]:
        return (Site(weight, 1, zero_point, max(1, _flag(node, "group", scope, 1)), output_axis=0),)

    return find


def _conv_transpose(node: onnx.NodeProto, scope: Scope, is_constant: _IsConstant, rank_of: _RankOf) -> tuple[Site, ...]:
    return (Site(1, 0, None, max(1, _flag(node, "group", scope, 1)), output_axis=1),)


def _gemm(node: onnx.NodeProto, scope: Scope, is_constant: _IsConstant, rank_of: _RankOf) -> tuple[Site, ...]:
    if is_constant(0) and not is_constant(1):
        axis = 0 if _flag(node, "transA", scope) else 1
        return (Site(0, axis, output_axis=1 - axis),)
    axis = 1 if _flag(node, "transB", scope) else 0
    return (Site(1, axis, output_axis=1 - axis),)


def _matmul(
    left: int, right: int, left_zero: int | None = None, right_zero: int | None = None
) -> Callable[..., tuple[Site, ...]]:
    def find(node: onnx.NodeProto, scope: Scope, is_constant: _IsConstant, rank_of: _RankOf) -> tuple[Site, ...]:
        if is_constant(left) and not is_constant(right):
            axis, output_axis = -1, -2
            if _flag(node, "transA", scope):  # FusedMatMul
                axis, output_axis = output_axis, axis
            return (
                Site(
                    left,
                    axis if rank_of(left) != 1 else -1,
                    left_zero,
                    output_axis=_if_matrix(rank_of(left), output_axis),
                ),
            )
        axis, output_axis = -2, -1
        if _flag(node, "transB", scope):
            axis, output_axis = output_axis, axis
        return (
            Site(
                right,
                axis if rank_of(right) != 1 else -1,
                right_zero,
                output_axis=_if_matrix(rank_of(right), output_axis),
            ),
        )

    return find


def _if_matrix(rank: int | None, axis: int) -> int | None:
    return None if rank == 1 else axis


def _recurrent(node: onnx.NodeProto, scope: Scope, is_constant: _IsConstant, rank_of: _RankOf) -> tuple[Site, ...]:
    reason = f"{node.op_type}: TensorRT has no sparse kernels for recurrent layers"
    return tuple(Site(index, 2, unsupported=reason, output_axis=1) for index in (1, 2))


def _einsum(node: onnx.NodeProto, scope: Scope, is_constant: _IsConstant, rank_of: _RankOf) -> tuple[Site, ...]:
    attribute = attribute_of(node, "equation", scope)
    equation = "" if attribute is None else attribute.s.decode("utf-8", "replace")
    constants = [index for index in range(len(node.input)) if is_constant(index)]
    weight = constants[0] if constants and len(constants) < len(node.input) else len(node.input) - 1
    ranks = [rank_of(index) for index in range(len(node.input))]
    axis, output_axis, reason = _einsum_site(equation, ranks, weight)
    return (Site(weight, axis, output_axis=output_axis, unsupported=reason),)


def _einsum_site(equation: str, ranks: Sequence[int | None], weight: int) -> tuple[int | None, int | None, str | None]:
    """Return (reduction axis, output axis, why not) of operand `weight`.

    Plain means: two operands, no letter twice in one of them, and exactly one letter both have and the output has not.
    It is a matrix product, batched or not.

    Args:
        equation: for instance `bij,jk->bik`; spaces are ignored, the output part may be left out.
        ranks: of the operands, `None` when unknown; needed for an ellipsis before the axis.
        weight: index of the weight's operand.
    """
    text = "".join(equation.split())
    left, arrow, output = text.partition("->")
    terms = left.split(",")
    if len(terms) != 2 or weight >= 2:
        return None, None, f"Einsum '{equation}' with {len(terms)} operands: not a plain product"
    if not arrow:  # ONNX's implicit output: letters that occur once
        letters = left.replace(",", "").replace(".", "")
        output = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    plain = [term.replace("...", "") for term in terms]
    if any(len(set(term)) != len(term) or not term.isalpha() for term in plain if term):
        return None, None, f"Einsum '{equation}': a letter twice in one operand, not a plain product"
    own, other = plain[weight], plain[1 - weight]
    reduced = [letter for letter in own if letter in other and letter not in output]
    if len(reduced) != 1:
        return None, None, f"Einsum '{equation}' with {len(reduced)} reduction axes: not a plain product"
    summed_alone = [letter for letter in own if letter not in other and letter not in output]
    if summed_alone:
        return None, None, f"Einsum '{equation}' sums the weight alone over '{summed_alone[0]}'"
    axis = _axis_of(reduced[0], terms[weight], ranks[weight])
    if axis is None:
        return None, None, f"Einsum '{equation}' with an operand of unknown rank"
    free = [letter for letter in own if letter in output and letter not in other]
    return axis, _axis_of(free[0], terms[weight], ranks[weight]) if len(free) == 1 else None, None


def _axis_of(letter: str, term: str, rank: int | None) -> int | None:
    before, dots, after = term.partition("...")
    if letter in before:
        return before.index(letter)
    if not dots:
        return None
    return None if rank is None else rank - len(after) + after.index(letter)


_CONTRIB = "com.microsoft"
OPERATORS: dict[tuple[str, str], Callable[..., tuple[Site, ...]]] = {
    ("", "Conv"): _conv(1, None),
    ("", "QLinearConv"): _conv(3, 5),
    ("", "ConvInteger"): _conv(1, 3),
    ("", "ConvTranspose"): _conv_transpose,
    ("", "DeformConv"): _conv(1, None),
    ("", "Gemm"): _gemm,
    ("", "MatMul"): _matmul(0, 1),
    ("", "QLinearMatMul"): _matmul(0, 3, 2, 5),
    ("", "MatMulInteger"): _matmul(0, 1, 2, 3),
    ("", "Einsum"): _einsum,
    ("", "LSTM"): _recurrent,
    ("", "GRU"): _recurrent,
    ("", "RNN"): _recurrent,
    (_CONTRIB, "FusedConv"): _conv(1, None),
    (_CONTRIB, "FusedGemm"): _gemm,
    (_CONTRIB, "FusedMatMul"): _matmul(0, 1),
    (_CONTRIB, "MatMulIntegerToFloat"): _matmul(0, 1, 4, 5),
    (_CONTRIB, "DynamicQuantizeMatMul"): _matmul(0, 1, None, 3),
}


def macs_of(node: onnx.NodeProto, scope: Scope, site: Site) -> int | None:
    """Return the multiply-accumulates of a node's use of one weight, or `None` when a shape is not known.

    Convolution: output positions x weight size / groups' share; matrix product: output size x reduction;
    recurrent: steps x batch x weight size.

    Args:
        node: node with the weight among its inputs. `scope` has its shapes.
        scope: names and attributes visible to the node.
        site: position of the weight in the node.
    """
    weight = scope.shape_of(node.input[site.input]) if site.input < len(node.input) else None
    output = scope.shape_of(node.output[0]) if node.output else None
    op = node.op_type
    if op in ("LSTM", "GRU", "RNN"):
        first = scope.shape_of(node.input[0])
        return _product(first[:2], weight[1:]) if first and weight else None
    if op == "Einsum":
        return _einsum_macs(node, scope)
    if weight is None or output is None:
        return None
    if op == "ConvTranspose":
        first = scope.shape_of(node.input[0])
        return _product(first, weight[1:]) if first else None
    if "Conv" in op:
        return _product(output, weight[1:])
    if site.axis is None:
        return None
    return _product(output, (weight[site.axis],)) if weight else None


def _product(*shapes: tuple[int, ...]) -> int:
    return math.prod(math.prod(shape) for shape in shapes)


def _einsum_macs(node: onnx.NodeProto, scope: Scope) -> int | None:
    attribute = attribute_of(node, "equation", scope)
    if attribute is None:
        return None
    terms = attribute.s.decode("utf-8", "replace").replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    shapes: list[Shape] = [scope.shape_of(name) for name in node.input]
    for term, shape in zip(terms, shapes, strict=False):
        if shape is None or "." in term or len(term) != len(shape):
            return None
        for letter, size in zip(term, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return math.prod(sizes.values())
