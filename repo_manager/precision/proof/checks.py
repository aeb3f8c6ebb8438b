"""The post-conditions of a conversion, each one a function of the written file."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from repo_manager.errors import ModelError
from repo_manager.onnx_model.draft import Array
from repo_manager.onnx_model.signature import Signature
from repo_manager.precision.calibration.data import MIN_TO_SPLIT
from repo_manager.precision.options import Check, ConvertOptions
from repo_manager.sparsity.report import SparsityReport
from repo_manager.stats.drift import OutputDrift
from repo_manager.types import Precision, TensorSpec

__all__ = [
    "check_drift",
    "check_file",
    "check_model_signature",
    "check_sparsity",
    "drift_limit",
    "nothing_shown",
    "probability_values",
    "same_answers",
    "served_text",
]

NEGLIGIBLE_PROBABILITY = 1e-3
"""A probability of 1e-6 may well become 1.1e-6: relative error says nothing about numbers in the sense of "no"."""

SILENT = 1e-5
"""A model whose answers are all smaller says "no" to everything: no drift can be seen on such samples."""

_MOVES = {"Cast", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}


def check_file(path: Path, source: Path) -> Check:
    """Run ONNX's full checker, shape and type inference included, on the file.

    Where this rejects the source itself (some operators' own definitions do not infer), its plain form decides.
    """
    found = _complaint(path, full=True)
    if found is None:
        return Check("checker", True, f"onnx {onnx.__version__}, full")
    at_source, plain = _complaint(source, full=True), _complaint(path, full=False)
    # The plain checker requires a shape of each output. The standard and the runtimes do not.
    if at_source is None or (plain is not None and plain != _complaint(source, full=False)):
        return Check("checker", False, found)
    return Check(
        "checker", True, f"onnx {onnx.__version__}, without inference: that rejects the source, too: {at_source}"
    )


def _complaint(path: Path, *, full: bool) -> str | None:
    try:
        onnx.checker.check_model(str(path), full_check=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError, ValueError) as exc:
        return str(exc).strip().replace("\n", " ")[:500]
    return None


def check_model_signature(source: Signature, found: Signature, precision: Precision, *, keep_io_types: bool) -> Check:
    """Compare names, order, types and shapes of inputs and outputs.

    Args:
        source: inputs and outputs of the source.
        found: inputs and outputs of the converted model.
        precision: precision of the candidate. Its 16-bit type is expected where types are not kept.
        keep_io_types: whether inputs and outputs stay float32.
    """
    low = precision.facts.low

    def wanted(spec: TensorSpec) -> TensorSpec:
        if keep_io_types or low is None or spec.dtype != "float32":
            return spec
        return TensorSpec(spec.name, low, spec.shape)

    for role in ("inputs", "outputs"):
        expected = tuple(wanted(spec) for spec in getattr(source, role))
        if expected != getattr(found, role):
            said = "; ".join(str(spec) for spec in getattr(found, role))
            return Check("signature", False, f"{role}: {said} instead of {'; '.join(map(str, expected))}")
    kept = "types kept" if keep_io_types or low is None else f"float32 became {low}"
    return Check("signature", True, f"{len(found.inputs)} in, {len(found.outputs)} out, {kept}")


def check_sparsity(source: SparsityReport, found: SparsityReport) -> Check:
    """Check each use of a weight with the 2:4 pattern before: its stored values must still have it."""
    before = [layer for layer in source.layers if _is_valid(layer)]
    after: dict[str, bool] = {}
    for layer in found.layers:
        after[layer.node] = after.get(layer.node, True) and _is_valid(layer)
    lost = [layer.node for layer in before if not after.get(layer.node, False)]
    count = sum(1 for layer in found.layers if _is_valid(layer))
    if lost and count < len(before):  # otherwise nodes without names only got other names
        return Check("2:4 kept", False, f"{len(lost)} of {len(before)} layers lost it: {', '.join(lost[:8])}")
    if not before:
        return Check("2:4 kept", True, "no layer of the source is 2:4, so none could lose it", is_empty=True)
    return Check("2:4 kept", True, f"{len(before)} layers had it, {count} have it in the stored values")


def _is_valid(layer: object) -> bool:
    groups = getattr(layer, "groups", 0)
    return bool(groups and groups == getattr(layer, "valid_groups", -1))


def probability_values(graph: onnx.GraphProto, names: Iterable[str]) -> frozenset[str]:
    """Return those of the values with a Sigmoid or Softmax as source, behind operators for moving values only."""
    producer = {name: node for node in graph.node for name in node.output}
    found = set()
    for name in names:
        node = producer.get(name)
        while node is not None and node.op_type in _MOVES and node.input:
            node = producer.get(node.input[0])
        if node is not None and node.op_type in ("HardSigmoid", "Sigmoid", "Softmax"):
            found.add(name)
    return frozenset(found)


def drift_limit(precision: Precision, options: ConvertOptions) -> float:
    """Return the largest passing relative error."""
    return precision.facts.max_drift if options.max_drift is None else options.max_drift


def check_drift(
    drift: Sequence[OutputDrift],
    precision: Precision,
    options: ConvertOptions,
    inputs: str,
    probabilities: Collection[str] = (),
) -> Check:
    """Hold every output to the limits.

    Args:
        drift: measured drift of each output.
        precision: sets the limits left open by `options`.
        options: with the limits asked for.
        inputs: `held-out`, `calibration` or `natural`. With `natural`, top classes are not judged.
        probabilities: outputs whose numbers are probabilities. A difference of at most 0.001 passes, unless
            `options.max_drift` asks for a limit of the outputs.
    """
    limit = drift_limit(precision, options)
    top1 = precision.facts.min_top1 if options.min_top1 is None else options.min_top1
    failed, excused = [], []
    for item in drift:
        if item.judged_by:
            continue
        worst = item.worst
        if worst <= limit:
            pass
        elif item.output in probabilities and _is_negligible(item, options):
            excused.append(item)
        else:
            failed.append(f"'{item.output}' relative error {worst:.3g} > {limit:g}")
        if options.min_cosine is not None and item.cosine is not None and item.cosine < options.min_cosine:
            failed.append(f"'{item.output}' cosine {item.cosine:.6f} < {options.min_cosine:g}")
        if inputs != "natural" and item.top1_agreement is not None:
            allowed = max((1 - top1) * item.rows, 1.0 if top1 < 1 else 0.0)
            if item.top1_lost > allowed + 1e-9:
                failed.append(
                    f"'{item.output}' top class lost in {item.top1_lost} of {item.rows}, {allowed:.3g} allowed"
                )
    where = f"{drift[0].samples if drift else 0} {inputs} samples{_on_others(drift, precision, inputs)}"
    if failed:
        return Check("drift", False, f"{'; '.join(failed)} ({where})")
    judged = [item.worst for item in drift if not item.judged_by and item not in excused]
    rules = [f"largest relative error {max(judged, default=0.0):.3g} <= {limit:g}"] if judged or not excused else []
    if excused:
        names = ", ".join(f"'{item.output}'" for item in excused)
        moved = max(item.max_abs_error for item in excused)
        rules.append(
            f"probabilities {names} differ by at most {moved:.3g} <= {NEGLIGIBLE_PROBABILITY:g}, which decides for "
            f"them (relative error {max(item.worst for item in excused):.3g})"
        )
    return Check("drift", True, f"{'; '.join(rules)} ({where})")


def _is_negligible(item: OutputDrift, options: ConvertOptions) -> bool:
    """Return whether a probability may differ. A limit asked for is one of outputs."""
    return item.max_abs_error <= NEGLIGIBLE_PROBABILITY and not (item.is_output and options.max_drift is not None)


def nothing_shown(answers: Sequence[Mapping[str, Array]]) -> str:
    """Say why the source's answers cannot show a drift. Empty where they can.

    Args:
        answers: of the source, one mapping a sample.
    """
    floats = [[array for array in answer.values() if array.dtype.kind == "f" and array.size] for answer in answers]
    if not any(floats) or any(len(found) != len(answer) for found, answer in zip(floats, answers, strict=True)):
        return ""
    largest = max(float(np.nanmax(np.abs(array))) for found in floats for array in found)
    if largest <= SILENT:
        return f"the source answers at most {largest:.1g} everywhere on these samples"
    return same_answers(answers)


def same_answers(answers: Sequence[Mapping[str, Array]]) -> str:
    """Note a source with the same answer to every sample. Empty where answers differ, or there is one sample."""
    first, *others = answers
    if others and all(np.array_equal(first[name], answer[name], equal_nan=True) for answer in others for name in first):
        return "the source answers the same to every one of these samples"
    return ""


def _on_others(drift: Sequence[OutputDrift], precision: Precision, inputs: str) -> str:
    """Describe the drift on INT8's other samples, those it was calibrated with."""
    errors = [
        item.calibration_relative_error
        for item in drift
        if item.calibration_relative_error is not None and not item.judged_by
    ]
    if errors:
        return f"; {max(errors):.3g} on those that it was calibrated with"
    if precision.facts.quantizes and inputs == "calibration":
        return f", which it was calibrated with: fewer than {MIN_TO_SPLIT}, so none was held out"
    return ""


def served_text(drift: Sequence[OutputDrift], limit: float) -> str:
    """Say how INT8 answers as ONNX Runtime serves it on this CPU. Empty when not measured.

    It is no check: a CPU without VNNI must not refuse a model another one accepts.
    """
    errors = [
        item.served_relative_error for item in drift if item.served_relative_error is not None and not item.judged_by
    ]
    if not errors:
        return ""
    worst, exact = max(errors), max(item.relative_error for item in drift if not item.judged_by)
    text = f"; largest relative error {worst:.3g} as ONNX Runtime serves it on {cpu_name()}"
    if worst > max(limit, 2 * exact):
        text += f", above {limit:g}: serve it on a CPU whose INT8 kernels are exact (VNNI), or build a TensorRT engine"
    return text


def cpu_name() -> str:
    """Return the CPU's name and whether it has VNNI (x86) or the dot product (Arm), needed for exact INT8 sums."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    flags = set(fields.get("flags", fields.get("features", "")).split())
    exact = flags & {"avx512_vnni", "avx_vnni", "asimddp"}
    name = fields.get("model name") or platform.machine()
    return f"{name} ({'with' if exact else 'without'} INT8 dot product)"


def failure(exc: ModelError) -> Check:
    """Turn a candidate rejected by ONNX Runtime into a failed check."""
    return Check("runs", False, exc.message)
