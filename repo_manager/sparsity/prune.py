"""One-shot 2:4 magnitude pruning of a model's weights. Everything else of the file stays as it is."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from repo_manager.errors import ModelError
from repo_manager.onnx_model.dtypes import dtype_name, stored_bits
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.walk import tensors_of
from repo_manager.onnx_model.weights import WeightStore
from repo_manager.sparsity.pattern import magnitude_prune, nonzero, two_four_mask, valid_groups
from repo_manager.sparsity.prune_report import PrunedLayer, PruneReport, SkippedLayer
from repo_manager.sparsity.uses import Use, weight_uses
from repo_manager.sparsity.verdict import ASP_IN_MULTIPLE, ASP_OUT_MULTIPLE, is_asp_eligible, obstacle_of
from repo_manager.sparsity.weight import Cast, Dequantize, Quantize, SubtractZeroPoint, Weight, WeightStep

__all__ = ["Chosen", "as_bytes", "choose", "prune", "skip"]


@dataclass(frozen=True)
class Chosen:
    """The weights to prune.

    Attributes:
        uses: place of the stored tensor in the order of `tensors_of` -> its uses.
        skipped: the uses left alone, each with the reason. `prune` adds those it cannot prune.
        macs: multiply-accumulates of the whole model, where they are known.
    """

    uses: dict[int, list[Use]]
    skipped: list[SkippedLayer]
    macs: int


def prune(
    model: Model, *, layers: Sequence[str] = (), exclude: Sequence[str] = (), all_valid: bool = False
) -> tuple[onnx.ModelProto, PruneReport]:
    """Prune weights to 2:4 by magnitude.

    Args:
        model: the model, not changed. Its weights are read one at a time.
        layers: shell patterns of node or weight names to prune. Empty is all.
        exclude: patterns of those to leave alone. Wins over `layers`.
        all_valid: go beyond ASP's default (outputs divide by 8, inputs by 16): prune every weight TensorRT would
            consider.

    Returns:
        A new model in memory (external data loaded), and the report.

    Raises:
        ModelError: a pattern matches no layer, or a weight cannot be read.
    """
    found = choose(model, layers=layers, exclude=exclude, all_valid=all_valid)
    chosen, skipped = found.uses, found.skipped
    results: dict[int, PrunedLayer] = {}

    def replace(place: int, _: onnx.TensorProto) -> bytes | None:
        """Prune one tensor when its turn comes, so one at a time is held besides the new model."""
        if place not in chosen:
            return None
        result = _prune_one(chosen[place], model.weights)
        if isinstance(result, str):
            skipped.extend(skip(use, result) for use in chosen[place])
            return None
        results[place] = result[0]
        return result[1]

    proto = model.rebuild(replace)
    pruned = tuple(results[place] for place in chosen if place in results)
    return proto, PruneReport(model.digest, pruned, tuple(skipped))


def choose(
    model: Model,
    *,
    layers: Sequence[str] = (),
    exclude: Sequence[str] = (),
    all_valid: bool = False,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Chosen:
    """Find the weights for `prune`.

    Args:
        model: the ONNX model. It is not changed.
        layers: names of the only layers to prune, as for `prune`.
        exclude: names of layers to skip, as for `prune`.
        all_valid: also take layers ASP skips, as for `prune`.
        shapes: of the inputs, to count multiply-accumulates. `None` does not count.

    Raises:
        ModelError: a pattern matches no layer, or a weight cannot be read.
    """
    tensors = list(tensors_of(model.graph_only))  # kept alive to the end: id() identifies each tensor
    places = {id(tensor): index for index, tensor in enumerate(tensors)}
    uses = list(weight_uses(model.graph_only, model.weights, shapes))
    _check_patterns(uses, (*layers, *exclude), str(model.path))
    skipped: list[SkippedLayer] = []
    chosen: dict[int, list[Use]] = {}  # index of the tensor -> its uses
    for group in _by_tensor(uses):
        candidates = _candidates(group, layers, exclude, all_valid, skipped)
        place = places.get(id(_weight(candidates[0]).source)) if candidates else None
        if place is not None:
            chosen[place] = candidates
        else:
            skipped.extend(skip(use, "the weight is an attribute, not a tensor") for use in candidates)
    return Chosen(chosen, skipped, sum(use.macs or 0 for use in uses))


def _candidates(
    group: Sequence[Use],
    layers: Sequence[str],
    exclude: Sequence[str],
    all_valid: bool,
    skipped: list[SkippedLayer],
) -> list[Use]:
    """Return the uses of one tensor to be pruned. The others are added to `skipped`."""
    protected = [use for use in group if _matches(use, exclude)]
    candidates = []
    for use in group:
        reason = _reason_against(use, layers, exclude, all_valid)
        if reason is None and protected:
            reason = f"shares its weight with '{protected[0].label}', which is excluded"
        if reason is None:
            candidates.append(use)
        else:
            skipped.append(skip(use, reason))
    return candidates


def _weight(use: Use) -> Weight:
    assert use.weight is not None
    return use.weight


def _by_tensor(uses: Iterable[Use]) -> Iterable[list[Use]]:
    """Group uses by stored tensor, in the graph's order. Each dynamic weight is alone."""
    groups: dict[int, list[Use]] = {}
    for use in uses:
        source = None if use.weight is None else use.weight.source
        groups.setdefault(id(use) if source is None else id(source), []).append(use)
    return groups.values()


def _matches(use: Use, patterns: Sequence[str]) -> bool:
    names = (use.label, use.node.name, "" if use.weight is None else use.weight.name)
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names if name)


def _check_patterns(uses: Sequence[Use], patterns: Sequence[str], where: str) -> None:
    for pattern in patterns:
        if not any(_matches(use, (pattern,)) for use in uses):
            some = ", ".join(dict.fromkeys(use.label for use in uses[:5]))
            raise ModelError(
                f"{where}: no layer matches '{pattern}'",
                hint=f"Layers are, for instance: {some}" if some else "The model has no layers with weights.",
            )


def _reason_against(use: Use, layers: Sequence[str], exclude: Sequence[str], all_valid: bool) -> str | None:
    """Return why a use is left alone, or `None` when it will be pruned."""
    obstacle = obstacle_of(use)
    if obstacle is not None:
        return obstacle[1]
    if _matches(use, exclude):
        return "excluded"
    if layers and not _matches(use, layers):
        return "not among the layers asked for"
    if not all_valid and not is_asp_eligible(use):
        return f"not among ASP's default (outputs divide by {ASP_OUT_MULTIPLE}, inputs by {ASP_IN_MULTIPLE})"
    weight = _weight(use)
    if weight.computed is not None:
        return "the graph computes it from constants: fold them into one tensor first (onnxslim does)"
    if weight.source is None:
        return "one number repeated: there is nothing to choose between"
    if weight.sparse is not None:
        return "a sparse initializer: it stays as it is stored"
    if not weight.scale_is_known:
        return "its scale is computed at run time: its small values are unknown"
    return None


def skip(use: Use, reason: str) -> SkippedLayer:
    """Say why a use is left alone."""
    name = use.weight.name if use.weight is not None else use.node.input[use.site.input]
    return SkippedLayer(use.label, name, reason)


def _prune_one(uses: Sequence[Use], store: WeightStore) -> tuple[PrunedLayer, bytes | None] | str:
    """Prune one stored tensor for all its uses. A string says why it is impossible.

    Returns:
        The layer's record, and the new stored bytes (`None` when nothing changes).
    """
    first, weight = uses[0], _weight(uses[0])
    axis = first.site.axis
    assert axis is not None
    assert weight.source is not None
    stored = store.array(weight.source)
    new, count, lost = magnitude_prune(stored, axis) if not weight.steps else _prune_behind_steps(weight, stored, axis)
    for other in uses[1:]:
        valid, groups = valid_groups(_before_rounding(_weight(other), new), other.site.axis or 0)
        if valid != groups:
            return f"shares its weight with '{other.label}' along another axis"
    layer = PrunedLayer(
        node=first.label,
        weight=weight.name,
        shape=weight.shape,
        axis=axis % len(weight.shape),
        values=weight.size,
        removed=count,
        lost_magnitude=lost,
    )
    return layer, (as_bytes(new, weight.source.data_type) if count else None)


def _prune_behind_steps(weight: Weight, stored: NDArray[Any], axis: int) -> tuple[NDArray[Any], int, float]:
    """As `magnitude_prune`, for a weight whose user sees it in another layout, around a zero point, or scaled."""
    seen = _before_rounding(weight, stored, real=True)
    removed = nonzero(_before_rounding(weight, stored)) & ~two_four_mask(seen, axis)
    count = int(np.count_nonzero(removed))
    if count == 0:
        return stored, 0, 0.0
    keep: NDArray[Any] = ~removed
    for step in reversed(weight.steps):
        keep = step.invert(keep)
    new = np.where(keep, stored, _zeros_as_stored(weight, stored)).astype(stored.dtype, copy=False)
    sizes = np.abs(seen.astype(np.float32, copy=False))
    total, lost = (float(part.sum(dtype=np.float64)) for part in (sizes, np.where(removed, sizes, np.float32(0))))
    return new, count, lost / total if total and np.isfinite(total) else 0.0


def _steps_before_rounding(weight: Weight) -> Iterator[WeightStep]:
    """Yield the steps to the user, without the rounding on the way (Cast, QuantizeLinear) and its inverse."""
    quantised_here = False
    for step in weight.steps:
        if isinstance(step, Quantize):
            quantised_here = True
        elif isinstance(step, SubtractZeroPoint) and quantised_here:
            quantised_here = False
        elif not isinstance(step, Cast):
            yield step


def _before_rounding(weight: Weight, stored: NDArray[Any], *, real: bool = False) -> NDArray[Any]:
    """Return the values in the user's layout, zero points taken off, not rounded on the way.

    Args:
        weight: the constant, with the steps from the storage to the user.
        stored: values in the storage's layout, pruned already or not.
        real: scale them, so sizes compare across channels and blocks of different scales.
    """
    values = weight.real_as_stored(stored) if real else stored
    for step in _steps_before_rounding(weight):
        values = step.real(values) if real and isinstance(step, Dequantize) else step.apply(values)
    return values


def _zeros_as_stored(weight: Weight, stored: NDArray[Any]) -> NDArray[Any]:
    """Return the stored form of zero: 0, or the zero points, carried back to the storage's layout."""
    zeros: NDArray[Any] = np.zeros((), stored.dtype)
    shape = stored.shape
    steps = tuple(_steps_before_rounding(weight))
    for index, step in enumerate(steps):
        if isinstance(step, SubtractZeroPoint) and step.zero_point.any():
            zeros = np.broadcast_to(step.zero_point, shape)
            for earlier in reversed(steps[:index]):
                zeros = earlier.invert(zeros)
        shape = step.apply(np.broadcast_to(np.zeros((), np.int8), shape)).shape
    return zeros.astype(stored.dtype, copy=False)


def as_bytes(values: NDArray[Any], data_type: int) -> bytes:
    """Return values as `raw_data` stores them. Types below a byte are packed, lowest bits first."""
    bits = stored_bits(data_type, "a weight")
    if bits >= 8:
        return np.ascontiguousarray(values).tobytes()
    per_byte = 8 // bits
    flat = values.reshape(-1).view(np.uint8) & np.uint8((1 << bits) - 1)
    if dtype_name(data_type, "a weight") == "float4_e2m1fn":  # stored as sign and magnitude, read as signed
        flat = np.abs(values.reshape(-1)).astype(np.uint8) | np.where(values.reshape(-1) < 0, np.uint8(8), np.uint8(0))
    flat = np.concatenate([flat, np.zeros(-flat.size % per_byte, np.uint8)]).reshape(-1, per_byte)
    packed = np.zeros(flat.shape[0], np.uint8)
    for place in range(per_byte):
        packed |= flat[:, place] << np.uint8(place * bits)
    return packed.tobytes()
