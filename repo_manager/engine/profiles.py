"""Optimization profiles: the smallest, the most usual and the largest shape of every input."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from repo_manager.errors import ModelError, UsageError
from repo_manager.onnx_model.inputs import find_sizes, natural_inputs
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import Signature
from repo_manager.types import TensorSpec

__all__ = ["DEFAULT_BATCH", "DimRange", "ShapeRange", "derive_profile", "find_dim_ranges", "parse_shape_range"]

DEFAULT_BATCH = 8
_GROWTH = 4


@dataclasses.dataclass(frozen=True)
class DimRange:
    """Sizes of one dynamic dimension. Kernels are chosen for `opt`."""

    min: int
    opt: int
    max: int


@dataclasses.dataclass(frozen=True)
class ShapeRange:
    """Shapes of one input, batch axis included. `min <= opt <= max` on every axis."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    @property
    def is_fixed(self) -> bool:
        """Whether there is only one shape."""
        return self.min == self.max


def parse_shape_range(text: str) -> tuple[str, ShapeRange]:
    """Read `NAME:1,3,224,224` (one shape) or `NAME:MIN:OPT:MAX`, each a list of sizes.

    Raises:
        UsageError: another form, or `min <= opt <= max` does not hold.
    """
    form = f"{text}: expected NAME:MIN:OPT:MAX, for instance image:1,3,64,64:8,3,224,224:8,3,640,640, or NAME:SIZES"
    parts = text.rsplit(":", 3)
    if len(parts) != 4 or not all(_sizes(part) for part in parts[1:]):
        name, _, sizes = text.rpartition(":")
        parts = [name, sizes, sizes, sizes]
    shapes = [_sizes(part) for part in parts[1:]]
    low, opt, high = shapes
    if not parts[0] or not low or not opt or not high:
        raise UsageError(form)
    found = ShapeRange(low, opt, high)
    _check_order(parts[0], found)
    return parts[0], found


def _sizes(text: str) -> tuple[int, ...] | None:
    fields = text.split(",")
    return tuple(int(field) for field in fields) if all(field.isdecimal() for field in fields) else None


def derive_profile(
    signature: Signature,
    *,
    batched: bool,
    max_batch_size: int | None = None,
    free: Mapping[str, DimRange] | None = None,
    overrides: Mapping[str, ShapeRange] | None = None,
) -> dict[str, ShapeRange]:
    """Give every input its range of shapes.

    Args:
        signature: the model's inputs and outputs.
        batched: whether the first axis is a batch axis.
        max_batch_size: the batch axis runs from 1 to this, tuned for this. `None` and 0 take 8.
        free: ranges of the other dynamic dimensions, by symbol or by `input:axis`, from `find_dim_ranges`. `None`:
            there are none.
        overrides: input -> range, in place of the derived one. `None`: derive all ranges.

    Raises:
        UsageError: an override names no input, has another rank, or contradicts a fixed dimension.
        ModelError: a dimension has no range, or an input no known rank.
    """
    overrides = overrides or {}
    names = {spec.name for spec in signature.inputs}
    for name in overrides:
        if name not in names:
            raise UsageError(f"--shape-range {name}: there is no such input; the model has {', '.join(sorted(names))}")
    batch = max_batch_size or DEFAULT_BATCH
    known = dict(free or {})
    if batched:
        for spec in signature.inputs:
            if spec.shape and not isinstance(spec.shape[0], int):
                known[_key(spec, 0)] = DimRange(1, batch, batch)
    profile = {}
    for spec in signature.inputs:
        given = overrides.get(spec.name)
        profile[spec.name] = _derived(spec, known) if given is None else _checked(spec, given)
    return profile


def find_dim_ranges(
    model: Model, signature: Signature, *, batched: bool, sample: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, DimRange]:
    """Find ranges for the dynamic dimensions other than the batch, each end proven by running the model.

    `opt` is the sample's size, or one proven in ONNX Runtime. `min` is 1 and `max` four times `opt` where the model
    runs with those too, else `opt`.

    Args:
        model: the model to try sizes on.
        signature: names, types and dynamic axes of the model's inputs.
        batched: whether the first axis is a batch axis, with a range of its own.
        sample: input -> shape of real data, batch axis included. `None` looks for sizes.

    Returns:
        Symbol, or `input:axis` for a dimension without a name, -> range. Empty when there is none.

    Raises:
        ModelError: the model runs with no size tried.
    """
    keys = sorted(_free_keys(signature, batched=batched))
    if not keys:
        return {}
    session = Session(model)
    if sample is None:
        made = natural_inputs(signature, sizes=find_sizes(session, signature))
        sample = {name: array.shape for name, array in made.items()}
    usual: dict[str, int] = {}
    for spec in signature.inputs:
        for axis, size in enumerate(sample[spec.name]):
            usual.setdefault(_key(spec, axis), size)
    opt = {key: max(usual[key], 1) for key in keys}
    low = _if_it_runs(session, signature, dict.fromkeys(keys, 1)) or opt
    high = _if_it_runs(session, signature, {key: size * _GROWTH for key, size in opt.items()}) or opt
    return {key: DimRange(low[key], opt[key], high[key]) for key in keys}


def _if_it_runs(session: Session, signature: Signature, sizes: dict[str, int]) -> dict[str, int] | None:
    try:
        outputs = session.run(natural_inputs(signature, sizes=sizes))
    except ModelError:
        return None
    return sizes if all(array.size for array in outputs.values()) else None


def _free_keys(signature: Signature, *, batched: bool) -> Iterator[str]:
    batch_keys = {_key(spec, 0) for spec in signature.inputs if batched and spec.shape}
    for spec in signature.inputs:
        for axis, dim in enumerate(spec.shape or ()):
            if not isinstance(dim, int) and (key := _key(spec, axis)) not in batch_keys:
                yield key


def _key(spec: TensorSpec, axis: int) -> str:
    dim = (spec.shape or ())[axis]
    return dim if isinstance(dim, str) else f"{spec.name}:{axis}"


def _derived(spec: TensorSpec, known: Mapping[str, DimRange]) -> ShapeRange:
    if spec.shape is None:
        raise ModelError(
            f"input '{spec.name}' has no known rank, and an engine needs one",
            hint="Export the model with a rank for every input, or use --backend onnxruntime.",
        )
    ranges = []
    for axis, dim in enumerate(spec.shape):
        found = DimRange(dim, dim, dim) if isinstance(dim, int) else known.get(_key(spec, axis))
        if found is None:
            raise ModelError(
                f"input {spec}: axis {axis} is dynamic and no range of sizes is known for it",
                hint=f"Give one: --shape-range {spec.name}:MIN:OPT:MAX",
            )
        ranges.append(found)
    return ShapeRange(tuple(r.min for r in ranges), tuple(r.opt for r in ranges), tuple(r.max for r in ranges))


def _checked(spec: TensorSpec, given: ShapeRange) -> ShapeRange:
    _check_order(spec.name, given)
    if spec.shape is None:
        return given
    if len(spec.shape) != len(given.opt):
        raise UsageError(f"--shape-range {spec.name}: {len(given.opt)} sizes given, and the model has {spec}")
    for axis, dim in enumerate(spec.shape):
        if isinstance(dim, int) and (given.min[axis], given.max[axis]) != (dim, dim):
            raise UsageError(f"--shape-range {spec.name}: axis {axis} is fixed to {dim} in the model {spec}")
    return given


def _check_order(name: str, given: ShapeRange) -> None:
    if not len(given.min) == len(given.opt) == len(given.max):
        raise UsageError(f"--shape-range {name}: min, opt and max have different numbers of sizes")
    for axis, (low, opt, high) in enumerate(zip(given.min, given.opt, given.max, strict=True)):
        if not low <= opt <= high:
            raise UsageError(
                f"--shape-range {name}: axis {axis} must have min <= opt <= max, found {low}, {opt}, {high}"
            )
