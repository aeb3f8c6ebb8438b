"""Find out, from the graph or by a run, whether a model treats its first axis as a batch of independent samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from repo_manager.errors import ModelError
from repo_manager.onnx_model.batch_proof import samples_are_independent
from repo_manager.onnx_model.index_limits import index_limits
from repo_manager.onnx_model.inputs import find_sizes, natural_inputs, usual_shapes
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.shape_inference import infer_at, largest_value_bytes
from repo_manager.onnx_model.signature import Signature
from repo_manager.types import TensorSpec

__all__ = ["BatchAxis", "find_batch_axis", "try_batch_axis"]

_TOLERANCE = {"float16": 2e-2, "bfloat16": 5e-2}  # share of the largest magnitude; others 1e-3
_ROUNDING_AT_MOST = 0.05  # share of the largest magnitude; a larger change is no rounding
_Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class BatchAxis:
    """Whether Triton may stack requests along the first axis, and why (not)."""

    kind: Literal["batched", "unbatched"]
    reason: str

    @property
    def batched(self) -> bool:
        """Whether the first axis is a batch axis."""
        return self.kind == "batched"


def find_batch_axis(model: Model, signature: Signature, samples: Mapping[str, NDArray[Any]] | None = None) -> BatchAxis:
    """Decide whether a model's first axis is a batch axis.

    It is when every input and output has a dynamic first dimension, and when the graph proves it, or two samples
    stacked give what the two give alone, within 0.1 % of the largest magnitude (2 % in float16, 5 % in bfloat16).

    Args:
        model: the model to run.
        signature: of the same model.
        samples: real inputs with the batch axis first; rows 0 and 1 are used. `None`, or fewer than
            two rows, takes made inputs.

    Raises:
        ModelError: ONNX Runtime does not take the model at all.
    """
    reason = _static_reason(signature)
    if reason is not None:
        return BatchAxis("unbatched", reason)
    if samples_are_independent(model):
        return BatchAxis("batched", "every operator works on each sample by itself")
    return try_batch_axis(model, signature, samples)


def try_batch_axis(model: Model, signature: Signature, samples: _Arrays | None = None) -> BatchAxis:
    """Decide by running: whether two samples stacked give what the two give alone. See `find_batch_axis`."""
    reason = _size_reason(model)
    if reason is not None:
        return BatchAxis("unbatched", reason)
    session = Session(model)
    try:
        first, second = _two_samples(session, signature, samples, index_limits(model))
        alone = [session.run(first), session.run(second)]
    except ModelError as exc:
        return BatchAxis("unbatched", f"it could not be tried out on made inputs: {exc.message}")
    stacked = {name: np.concatenate([first[name], second[name]]) for name in first}
    try:
        together = session.run(stacked)
    except ModelError as exc:
        return BatchAxis("unbatched", f"it fails on two samples stacked: {exc.message}")
    for name, value in together.items():
        reason = _shape_reason(name, value, [result[name] for result in alone])
        expected = np.concatenate([result[name] for result in alone]) if reason is None else value
        if not _close(value, expected, tolerance=None):
            if _close(value, expected, tolerance=_ROUNDING_AT_MOST):
                reason = _neighbour_reason(session, name, value, first, second)
            else:
                reason = f"output '{name}' changes when two samples are stacked"
        if reason is not None:
            return BatchAxis("unbatched", reason)
    return BatchAxis("batched", "two samples stacked give the same outputs as each alone")


def _static_reason(signature: Signature) -> str | None:
    """Return why the declared shapes rule a batch axis out, or `None`."""
    if not signature.inputs:
        return "it has no inputs"
    if not signature.outputs:
        return "it has no outputs"
    symbols: dict[str, str] = {}
    for role, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for spec in specs:
            # An output of unknown rank is judged by the trial run; an input cannot be made without one.
            reason = "has no declared rank" if spec.shape is None and role == "input" else _first_axis_reason(spec)
            if reason is not None:
                return f"{role} '{spec.name}' {reason}"
            if spec.shape and isinstance(spec.shape[0], str) and role == "input":
                symbols.setdefault(spec.shape[0], spec.name)
    if len(symbols) > 1:
        pairs = " and ".join(f"'{name}' ({symbol})" for symbol, name in list(symbols.items())[:2])
        return f"inputs {pairs} have different first dimensions"
    return None


def _size_reason(model: Model) -> str | None:
    """Return why a model is too large to be tried out on this machine, or `None`."""
    inferred = infer_at(model.graph_only, usual_shapes(model.graph_only))
    if inferred is None:
        return None
    largest, limit = largest_value_bytes(inferred), available_bytes() // 4
    if largest <= limit:
        return None
    sizes = f"{largest / 2**30:.1f} GiB, and {limit / 2**30:.1f} GiB is the limit here"
    return f"it was not tried out: one of its tensors takes {sizes}"


def available_bytes() -> int:
    """Return how much memory this machine has free, without swapping; 8 GiB where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 8 << 30
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields.get("MemAvailable", "8388608 kB").split()[0]) * 1024


def _first_axis_reason(spec: TensorSpec) -> str | None:
    if spec.shape is None:
        return None  # not stated: the run decides
    if not spec.shape:
        return "is a scalar"
    if isinstance(spec.shape[0], int):
        return f"has a fixed first dimension of {spec.shape[0]}"
    return None


def _two_samples(
    session: Session, signature: Signature, samples: _Arrays | None, limits: Mapping[str, int]
) -> tuple[_Arrays, _Arrays]:
    if samples is not None and all(name in samples for name in session.input_names):
        rows = {name: np.asarray(samples[name]) for name in session.input_names}
        if all(value.ndim > 0 and value.shape[0] >= 2 for value in rows.values()):
            return (
                {name: value[:1] for name, value in rows.items()},
                {name: value[1:2] for name, value in rows.items()},
            )
    sizes = find_sizes(session, signature)
    first, second = (natural_inputs(signature, seed=seed, sizes=sizes, limits=limits) for seed in (1, 2))
    return first, second


def _shape_reason(name: str, together: NDArray[Any], alone: list[NDArray[Any]]) -> str | None:
    """Return why an output's shapes show that samples are not stacked, or `None`."""
    if any(value.ndim == 0 for value in (together, *alone)):
        return f"output '{name}' is a scalar"
    if any(value.shape[0] != 1 for value in alone):
        return f"output '{name}' has {alone[0].shape[0]} rows for one sample"
    if together.shape != (2, *alone[0].shape[1:]) or alone[0].shape != alone[1].shape:
        return f"output '{name}' has shape {list(together.shape)} for two samples, {list(alone[0].shape)} for one"
    return None


def _neighbour_reason(
    session: Session, name: str, together: NDArray[Any], first: _Arrays, second: _Arrays
) -> str | None:
    """Tell rounding apart from dependence, for an output that changed when two samples were stacked.

    Another batch size takes other kernels, and a model can blow their rounding up (a normalisation over
    nearly constant values). The same batch size takes the same kernels: if a sample's row stays the same
    whatever stands beside it, on either place, the samples are independent.
    """
    expected = np.concatenate([together[:1], together[:1]])
    try:
        doubled = session.run({key: np.concatenate([first[key], first[key]]) for key in first})[name]
        swapped = session.run({key: np.concatenate([second[key], first[key]]) for key in first})[name]
    except ModelError as exc:
        return f"it fails on two samples stacked: {exc.message}"
    rows = np.concatenate([swapped[1:], swapped[1:]])
    if doubled.shape == rows.shape == expected.shape:
        exact = 1e-6
        if _close(doubled, expected, tolerance=exact) and _close(rows, expected, tolerance=exact):
            return None
    return f"output '{name}' of a sample changes with the sample stacked beside it"


def _close(found: NDArray[Any], expected: NDArray[Any], *, tolerance: float | None) -> bool:
    """Compare two outputs of one shape; `tolerance` is a share of the largest magnitude, `None` the type's own."""
    if found.dtype.kind in "OUSb":
        return bool(np.array_equal(found, expected))
    wide = np.complex128 if found.dtype.kind == "c" else np.float64
    found_wide, wanted = found.astype(wide), expected.astype(wide)
    finite = np.isfinite(wanted)
    if not np.array_equal(found_wide[~finite], wanted[~finite], equal_nan=True):
        return False
    if not finite.any():
        return True
    if tolerance is None:
        tolerance = _TOLERANCE.get(found.dtype.name, 1e-3)
    error = float(np.abs(found_wide[finite] - wanted[finite]).max())
    return error <= tolerance * max(float(np.abs(wanted[finite]).max()), 1e-6)
