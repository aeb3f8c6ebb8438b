"""The sparsity report: every use of a weight judged, and the largest possible gain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]  # published without stubs

from repo_manager.errors import ModelError
from repo_manager.files import sha256_bytes
from repo_manager.onnx_model.inputs import usual_shapes
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.weights import WeightStore
from repo_manager.sparsity.pattern import GROUP, count_groups, count_nonzero
from repo_manager.sparsity.uses import Use, weight_uses
from repo_manager.sparsity.verdict import SparsityVerdict, hints_of, is_asp_eligible, obstacle_of
from repo_manager.summary import Summarized
from repo_manager.types import Digest

__all__ = ["LayerSparsity", "SparsityReport", "SparsityTotals", "sparsity_report"]

# (id of the values' holder, axis) -> the counts and the holder. The reference keeps the id unique.
_Cache = dict[tuple[int, int | None], tuple[tuple[int, int, int], object]]

SPARSE_MATH_SPEEDUP = 2.0
"""Peak rate of sparse over dense tensor cores (NVIDIA A100 architecture white paper, structured sparsity)."""


@dataclass(frozen=True)
class LayerSparsity:
    """One operator's use of one weight.

    Attributes:
        node: the node's name, with the bodies and functions around it.
        op_type: operator of the node, such as `Conv`.
        weight: the stored tensor's name. The input's name for a dynamic weight.
        dtype: the stored element type. Empty for a dynamic weight.
        shape: as the node uses it. Empty for a dynamic weight.
        axis: the reduction axis of `shape`. `None` when there is none.
        groups: how many groups of four. 0 when the axis does not divide.
        valid_groups: how many of them hold at most two non-zeros.
        zeros: number of zeros (the zero point, for quantised values).
        size: number of values, zeros included. 0 for a dynamic weight.
        verdict: `VALID`, `NOT_24`, or the obstacle to sparse math, see `SparsityVerdict`.
        reason: the verdict in words, with numbers and source.
        hints: possible obstacles to a faster run.
        macs: multiply-accumulates at the report's shapes. `None` when a shape is not known.
        conv_groups: number of groups of a convolution. 1 for other operators.
        asp_eligible: whether NVIDIA ASP would prune it by default.
        via: operators between the stored tensor and the node.
    """

    node: str
    op_type: str
    weight: str
    dtype: str
    shape: tuple[int, ...]
    axis: int | None
    groups: int
    valid_groups: int
    zeros: int
    size: int
    verdict: SparsityVerdict
    reason: str
    hints: tuple[str, ...]
    macs: int | None
    conv_groups: int = 1
    asp_eligible: bool = False
    via: tuple[str, ...] = ()

    @property
    def valid_share(self) -> float:
        """Share of valid groups, 0 to 1. 0 when there are no groups."""
        return self.valid_groups / self.groups if self.groups else 0.0

    @property
    def density(self) -> float:
        """Share of nonzero values, 0 to 1. 1 for a dynamic weight."""
        return 1.0 - self.zeros / self.size if self.size else 1.0


@dataclass(frozen=True)
class SparsityTotals:
    """Sums over all layers.

    Attributes:
        parameters: values of all judged weights. One shared by several layers counts once.
        valid_parameters: of those whose verdict is valid in every use.
        eligible_parameters: of those valid or able to be (right shape, considered by TensorRT).
        macs: multiply-accumulates of all layers whose shapes are known, dynamic weights included.
        valid_macs: of those whose verdict is valid.
        eligible_macs: of those valid or able to be.
        uncounted_layers: layers whose multiply-accumulates are not known and so not in the sums.
        gain_share: share of the compute with a gain now, 0 to 1. `None` when nothing is counted.
        speedup_bound: `1 / (1 - share + share / 2)` (Amdahl): no more is possible, and less is usual.
        speedup_bound_if_pruned: the same if every layer able to be 2:4 were.
    """

    parameters: int
    valid_parameters: int
    eligible_parameters: int
    macs: int
    valid_macs: int
    eligible_macs: int
    uncounted_layers: int
    gain_share: float | None
    speedup_bound: float | None
    speedup_bound_if_pruned: float | None


@dataclass(frozen=True, repr=False)
class SparsityReport(Summarized):
    """The 2:4 state of a model.

    Attributes:
        source: digest of the model, of its serialised form if it was given in memory.
        layers: one entry per use of a weight, in the graph's order.
        totals: sums over `layers`, and bounds of the speed-up.
        shapes: input shapes for the count of the compute.
    """

    source: Digest
    layers: tuple[LayerSparsity, ...]
    totals: SparsityTotals
    shapes: Mapping[str, tuple[int, ...]]

    def _summary(self) -> Mapping[str, Any]:
        return {
            "2:4": self.share_text,
            "not 2:4": len(self.dense),
            "speedup at most": _times(self.totals.speedup_bound),
        }

    @property
    def share_text(self) -> str:
        """How many layers are 2:4, in words."""
        return f"{len(self.valid)} of {len(self.layers)} layers"

    @property
    def valid(self) -> tuple[LayerSparsity, ...]:
        """Layers with the 2:4 pattern."""
        return tuple(layer for layer in self.layers if layer.verdict is SparsityVerdict.VALID)

    @property
    def dense(self) -> tuple[LayerSparsity, ...]:
        """Layers TensorRT would consider, with a shape for 2:4, but without the pattern."""
        return tuple(layer for layer in self.layers if layer.verdict is SparsityVerdict.NOT_24)

    @property
    def not_valid(self) -> tuple[LayerSparsity, ...]:
        """Layers lacking the 2:4 pattern, as listed by `--sparsity require`.

        Those of `dense` ASP prunes by default: a model trained by its recipe leaves the others dense on purpose (first
        layer, odd-sized heads). All of `dense` when no layer is valid at all.
        """
        expected = tuple(layer for layer in self.dense if layer.asp_eligible)
        return expected or (() if self.valid else self.dense)


def _times(ratio: float | None) -> str | None:
    return None if ratio is None else f"{ratio:.2f} x"


def sparsity_report(
    model: Model | onnx.ModelProto, *, shapes: Mapping[str, Sequence[int]] | None = None
) -> SparsityReport:
    """Judge every use of a weight in a model.

    Args:
        model: a loaded model, or a whole model in memory (then its digest is that of its serialised form, and it must
            be below 2 GB).
        shapes: input name -> shape, batch axis included. `None`: the model's own shapes.

    Raises:
        ModelError: a weight cannot be read, or a given shape contradicts an input or is of none.
    """
    if isinstance(model, onnx.ModelProto):
        proto, store, digest = model, WeightStore(), _digest_of(model)
    else:
        proto, store, digest = model.graph_only, model.weights, model.digest
    given = usual_shapes(proto)
    if unknown := sorted(set(shapes or ()) - {value.name for value in proto.graph.input}):
        known = ", ".join(repr(value.name) for value in proto.graph.input) or "none"
        raise ModelError(f"the model has no input {', '.join(map(repr, unknown))}", hint=f"Its inputs are {known}.")
    given |= {name: tuple(int(size) for size in shape) for name, shape in (shapes or {}).items()}
    cache: _Cache = {}
    layers = tuple(_judge(use, store, cache) for use in weight_uses(proto, store, given))
    return SparsityReport(digest, layers, totals_of(layers), given)


def _digest_of(proto: onnx.ModelProto) -> Digest:
    try:
        return sha256_bytes(proto.SerializeToString())
    except (EncodeError, ValueError) as exc:
        raise ModelError(
            "the model in memory is above 2 GB", hint="Save it with external data, and load it from there."
        ) from exc


def _judge(use: Use, store: WeightStore, cache: _Cache) -> LayerSparsity:
    weight, site = use.weight, use.site
    obstacle = obstacle_of(use)
    if weight is None:
        name = use.node.input[site.input] if site.input < len(use.node.input) else ""
        verdict, reason = obstacle if obstacle is not None else (SparsityVerdict.DYNAMIC, "")
        return LayerSparsity(
            use.label, use.node.op_type, name, "", (), None, 0, 0, 0, 0, verdict, reason, (), use.macs, site.conv_groups
        )
    axis = site.axis if site.axis is not None and -len(weight.shape) <= site.axis < len(weight.shape) else None
    axis = axis if axis is None else axis % len(weight.shape)
    valid, groups, filled = _count(use, axis, store, cache)
    if obstacle is not None:
        verdict, reason = obstacle
    elif valid == groups:
        verdict, reason = SparsityVerdict.VALID, "valid"
    else:
        share = 100.0 * valid / groups
        shown = f"{min(share, 99.9):.1f}" if share >= 0.05 or valid == 0 else "under 0.1"
        verdict, reason = SparsityVerdict.NOT_24, f"not 2:4 ({shown} % of groups)"
    return LayerSparsity(
        node=use.label,
        op_type=use.node.op_type,
        weight=weight.name,
        dtype=weight.dtype,
        shape=weight.shape,
        axis=axis,
        groups=groups,
        valid_groups=valid,
        zeros=weight.size - filled,
        size=weight.size,
        verdict=verdict,
        reason=reason,
        hints=hints_of(use),
        macs=use.macs,
        conv_groups=site.conv_groups,
        asp_eligible=is_asp_eligible(use),
        via=weight.via,
    )


def _count(use: Use, axis: int | None, store: WeightStore, cache: _Cache) -> tuple[int, int, int]:
    """Return (valid groups, groups, non-zero values) of a use."""
    weight = use.weight
    assert weight is not None
    divisible = axis is not None and weight.shape[axis] % GROUP == 0
    single = weight.single_value()
    if single is not None:
        filled = weight.size if count_nonzero(single.reshape(1)) else 0
        groups = weight.size // GROUP if divisible else 0
        return (0 if filled else groups), groups, filled
    key = (id(weight.holder), axis)
    if not weight.steps and key in cache:
        return cache[key][0]
    values = weight.values(store)
    result = count_groups(values, axis) if divisible and axis is not None else (0, 0, count_nonzero(values))
    if not weight.steps:
        cache[key] = (result, weight.holder)
    return result


def _stored(layers: Iterable[LayerSparsity], among: Iterable[LayerSparsity] | None = None) -> int:
    """Return how many values layers store: a weight of several layers once, and only if all its layers are `among`."""
    sizes: dict[tuple[object, ...], int] = {}
    wanted = None if among is None else {id(layer) for layer in among}
    for layer in layers:
        key = (layer.weight, layer.shape, layer.dtype) if layer.weight else (id(layer),)
        size = layer.size if wanted is None or id(layer) in wanted else 0
        sizes[key] = min(sizes.get(key, size), size)
    return sum(sizes.values())


def totals_of(layers: Iterable[LayerSparsity]) -> SparsityTotals:
    """Sum layers up, and bound the speed-up (Amdahl's law, with sparse math twice as fast as dense)."""
    layers = tuple(layers)
    valid = [layer for layer in layers if layer.verdict is SparsityVerdict.VALID]
    eligible = [layer for layer in layers if layer.verdict in (SparsityVerdict.VALID, SparsityVerdict.NOT_24)]
    macs, valid_macs, eligible_macs = (sum(layer.macs or 0 for layer in some) for some in (layers, valid, eligible))
    return SparsityTotals(
        parameters=_stored(layers),
        valid_parameters=_stored(layers, valid),
        eligible_parameters=_stored(layers, eligible),
        macs=macs,
        valid_macs=valid_macs,
        eligible_macs=eligible_macs,
        uncounted_layers=sum(layer.macs is None for layer in layers),
        gain_share=valid_macs / macs if macs else None,
        speedup_bound=_amdahl(valid_macs, macs),
        speedup_bound_if_pruned=_amdahl(eligible_macs, macs),
    )


def _amdahl(gaining: int, total: int) -> float | None:
    if not total:
        return None
    share = gaining / total
    return 1.0 / (1.0 - share + share / SPARSE_MATH_SPEEDUP)
