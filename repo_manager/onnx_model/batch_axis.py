"""Find out, from the graph or by a run, whether a model treats its first axis as a batch of independent samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from repo_manager.errors import ModelError
from repo_manager.onnx_model.batch_graph import judge_graph
from repo_manager.onnx_model.batch_probe import BatchProbe, neighbours_of, probe_together
from repo_manager.onnx_model.inputs import find_sizes, index_limits, natural_inputs, usual_shapes
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.shape_inference import infer_at, largest_value_bytes
from repo_manager.onnx_model.signature import Signature
from repo_manager.types import TensorSpec

__all__ = ["BatchAxis", "find_batch_axis", "try_batch_axis"]

_Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class BatchAxis:
    """Whether Triton may stack requests along the first axis, and why (not).

    Attributes:
        kind: the verdict, or the user's choice against it.
        reason: the evidence, or the cause of a dependence between samples.
        stackable: an unbatched model's shapes would let requests be stacked, and `max_batch_size` can be forced.
        forced: batched because somebody asked for it, although `reason` speaks against it.
    """

    kind: Literal["batched", "unbatched"]
    reason: str
    stackable: bool = False
    forced: bool = False

    @property
    def batched(self) -> bool:
        """Whether the first axis is a batch axis."""
        return self.kind == "batched"

    def asked_for(self, max_batch_size: int | None) -> BatchAxis:
        """Return the verdict after the user has asked for batches, their decision where shapes allow it.

        Args:
            max_batch_size: largest batch asked for. `None`: nothing was asked.
        """
        if self.batched or not self.stackable or not max_batch_size:
            return self
        return replace(self, kind="batched", forced=True)


def find_batch_axis(model: Model, signature: Signature, samples: Mapping[str, NDArray[Any]] | None = None) -> BatchAxis:
    """Decide whether a model's first axis is a batch axis.

    It is when every input and output has a dynamic first dimension and no sample depends on another. The graph
    decides. Where it does not tell, two samples run alone and beside neighbours of very different sizes.

    Args:
        model: the model. ONNX Runtime runs it only when its graph does not tell.
        signature: inputs and outputs of the model.
        samples: real inputs with the batch axis first. Rows 0 and 1 are used. `None`, or fewer than two rows, takes
            made inputs.

    Raises:
        ModelError: ONNX Runtime does not take the model at all.
    """
    reason = _static_reason(signature)
    if reason is not None:
        return BatchAxis("unbatched", reason)
    shapes = None if samples is None else {name: array.shape for name, array in samples.items()}
    verdict = judge_graph(model, shapes)
    if verdict.kind == "independent":
        return BatchAxis("batched", verdict.reason)
    if verdict.kind == "dependent":
        return BatchAxis("unbatched", verdict.reason, stackable=True)
    return try_batch_axis(model, signature, samples)


def try_batch_axis(model: Model, signature: Signature, samples: _Arrays | None = None) -> BatchAxis:
    """Decide by running. The graph is asked again with sizes the model runs with. See `find_batch_axis`.

    Args:
        model: the ONNX model. It is not changed.
        signature: the model's inputs and outputs.
        samples: input samples: input name -> array, batch axis included. `None`: made-up samples.
    """
    reason = _size_reason(model)
    if reason is not None:
        return BatchAxis("unbatched", reason, stackable=True)
    session, limits = Session(model, threads=1), index_limits(model)
    try:
        first, second = _two_samples(session, signature, samples, limits)
    except ModelError as exc:
        return BatchAxis("unbatched", f"it could not be tried out on made inputs: {exc.message}", stackable=True)
    verdict = judge_graph(model, {name: array.shape for name, array in first.items()})
    if verdict.kind == "dependent":
        return BatchAxis("unbatched", verdict.reason, stackable=True)
    neighbours = neighbours_of(first, [], limits)
    finding = probe_together(BatchProbe(session, first, second, neighbours))
    if finding is not None:
        return BatchAxis("unbatched", finding.reason, stackable=finding.stackable)
    return BatchAxis("batched", "a sample's outputs are the same alone and beside samples of very different sizes")


def _static_reason(signature: Signature) -> str | None:
    """Return why the declared shapes rule a batch axis out, or `None`."""
    if not signature.inputs:
        return "it has no inputs"
    if not signature.outputs:
        return "it has no outputs"
    symbols: dict[str, str] = {}
    for role, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for spec in specs:
            # The run decides about an output of unknown rank. An input of unknown rank cannot be generated.
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
    """Return how much memory this machine has free, without swapping. 8 GiB where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 8 << 30
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields.get("MemAvailable", "8388608 kB").split()[0]) * 1024


def _first_axis_reason(spec: TensorSpec) -> str | None:
    if spec.shape is None:
        return None  # not declared: the run decides
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
