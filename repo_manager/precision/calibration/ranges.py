"""Run a model on calibration samples and record how large each value gets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from repo_manager.errors import CalibrationError, ModelError
from repo_manager.onnx_model.draft import Array, Draft, exposing, unique_name, weight_of_array
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.write import write_draft
from repo_manager.precision.passes.lowering_rules import FP16_MAX
from repo_manager.precision.passes.value_types import infer_types, type_table

__all__ = ["float_values", "largest_values", "overflowing_nodes", "percentile_values"]


_BINS = 1 << 16  # bins: fine enough if an outlier is a thousand times larger than the rest
_VALUES_A_RUN = 32  # activations fetched per run: bounds the memory

Sample = Mapping[str, Array]


def float_values(draft: Draft, values: Iterable[str]) -> tuple[str, ...]:
    """Return the float32 tensors among `values`."""
    types = type_table(infer_types(draft).graph)
    return tuple(value for value in values if value in types and types[value].data_type == TensorProto.FLOAT)


def largest_values(
    draft: Draft,
    values: Sequence[str],
    samples: Iterable[Sample],
    folder: Path,
    *,
    optimize: bool = True,
    finite: bool = True,
) -> dict[str, float]:
    """Return the largest absolute value each tensor takes over all samples.

    The maxima are computed inside ONNX Runtime, so no activation leaves it.

    Args:
        draft: the model as a float32 draft.
        values: float32 values of its main graph.
        samples: input samples: input name -> array, batch axis included.
        folder: for the temporary model. Emptied by the caller.
        optimize: let ONNX Runtime fuse operators: faster, at up to three times the memory.
        finite: refuse infinities and NaN. `False` counts them as infinite.

    Raises:
        CalibrationError: a value became NaN or infinite, and `finite` asks for none.
        ModelError: ONNX Runtime does not run the model on a sample.
    """
    if not values:
        return {}
    largest = dict.fromkeys(values, 0.0)
    sessions: dict[bool, tuple[Session, dict[str, tuple[str, str]]]] = {}
    for number, sample in enumerate(samples):
        has_empty = any(array.size == 0 for array in sample.values())
        if has_empty not in sessions:
            probe, outputs = _with_extremes(draft, values, may_be_empty=has_empty)
            written = write_draft(probe, folder / f"ranges-{len(sessions)}.onnx")
            sessions[has_empty] = (Session(written.files[0], optimize=optimize), outputs)
        session, outputs = sessions[has_empty]
        result = session.run(sample)
        for value, (high, low) in outputs.items():
            extremes = np.array([result[high], result[low]], np.float64)
            if not np.isfinite(extremes).all():
                if not finite:
                    largest[value] = math.inf
                    continue
                raise CalibrationError(
                    f"value '{value}' is not finite on sample {number + 1} of the calibration data",
                    hint="Look at that sample: the float32 model itself overflows on it.",
                )
            largest[value] = max(largest[value], float(np.abs(extremes).max()))
    return largest


def _with_extremes(
    draft: Draft, values: Sequence[str], *, may_be_empty: bool
) -> tuple[Draft, dict[str, tuple[str, str]]]:
    """Return the draft with each value's largest and smallest number as its outputs, and their names.

    ONNX has no maximum of nothing. Where a value may be empty (when it is made of an empty cache), a 0 goes before its
    numbers. The largest absolute value stays the same.
    """
    probe = draft.copy()
    names = probe.names()
    del probe.graph.output[:]
    if may_be_empty:
        zero, flat = unique_name("extremes_zero", names), unique_name("extremes_flat", names)
        probe.weights[zero] = weight_of_array(np.zeros(1, np.float32))
        probe.weights[flat] = weight_of_array(np.array([-1], np.int64))
    outputs: dict[str, tuple[str, str]] = {}
    for value in values:
        source = value
        if may_be_empty:
            numbers, source = unique_name(f"numbers:{value}", names), unique_name(f"with zero:{value}", names)
            probe.graph.node.append(onnx.helper.make_node("Reshape", [value, flat], [numbers], name=numbers))
            probe.graph.node.append(onnx.helper.make_node("Concat", [zero, numbers], [source], name=source, axis=0))
        pair = []
        for op_type in ("ReduceMax", "ReduceMin"):
            name = unique_name(f"{op_type}:{value}", names)
            probe.graph.node.append(onnx.helper.make_node(op_type, [source], [name], name=name, keepdims=0))
            probe.graph.output.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
            pair.append(name)
        outputs[value] = (pair[0], pair[1])
    return probe, outputs


def percentile_values(
    draft: Draft, largest: Mapping[str, float], samples: Iterable[Sample], folder: Path, percentile: float
) -> dict[str, float]:
    """Return, for each value, the absolute size not exceeded by `percentile` percent of its numbers.

    A histogram of 65536 bins per value, up to its largest size, summed over the samples. No activation is kept.

    Args:
        draft: the model as a float32 draft.
        largest: value -> its largest absolute size on the same samples.
        samples: input name -> array, for each sample. Iterated once for each group of values.
        folder: scratch folder for a temporary model.
        percentile: in percent, above 0 and up to 100.

    Raises:
        ModelError: ONNX Runtime does not run the model on a sample.
    """
    values = list(largest)
    result: dict[str, float] = {}
    for start in range(0, len(values), _VALUES_A_RUN):
        part = values[start : start + _VALUES_A_RUN]
        session = Session(write_draft(exposing(draft, part), folder / "percentile.onnx").files[0])
        counts = {value: np.zeros(_BINS, np.int64) for value in part}
        for sample in samples:
            for value, found in session.run(sample).items():
                end = largest[value] or 1.0
                counts[value] += np.histogram(np.abs(found), _BINS, (0.0, end))[0]
        for value, histogram in counts.items():
            share = np.cumsum(histogram) / max(1, histogram.sum())
            bin_index = int(np.searchsorted(share, percentile / 100.0))
            result[value] = largest[value] * min(bin_index + 1, _BINS) / _BINS
    return result


# Find the values too large for FP16, from the float32 model's values on samples.

_HEADROOM = 2.0  # factor: other inputs may have larger values than the samples


def overflowing_nodes(draft: Draft, samples: Iterable[Mapping[str, Array]], folder: Path) -> dict[str, str]:
    """Return the makers and readers of values beyond FP16's range, each with the reason.

    A reader counts, too: left in FP16 it would read the value rounded to infinity.

    Args:
        draft: the model as a float32 draft.
        samples: input samples: input name -> array, batch axis included.
        folder: scratch folder for temporary models. They stay in it.

    Returns:
        Node name -> reason.
    """
    values = float_values(draft, [name for node in draft.graph.node for name in node.output if name])
    try:
        largest = largest_values(draft, values, samples, folder, optimize=False, finite=False)
    except ModelError:
        return {}
    beyond = {value: size for value, size in largest.items() if size * _HEADROOM > FP16_MAX}
    reasons: dict[str, str] = {}
    for node in draft.graph.node:
        sizes = [beyond[name] for name in (*node.output, *node.input) if name in beyond]
        if sizes:
            reasons[node.name] = f"its values reach {max(sizes):.3g}, and FP16 ends at {FP16_MAX:.0f}"
    return reasons
