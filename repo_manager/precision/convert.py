"""Convert a model to another precision, and prove the result right before anything is written."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx

from repo_manager.errors import CalibrationError, GateError, ModelError
from repo_manager.files import work_folder
from repo_manager.onnx_model.draft import Array
from repo_manager.onnx_model.inputs import given_sizes
from repo_manager.onnx_model.model import Model, graph_as_stored
from repo_manager.onnx_model.runtime import runtime_process
from repo_manager.onnx_model.signature import signature_of
from repo_manager.onnx_model.source import draft_of
from repo_manager.onnx_model.write import WrittenModel, write_view
from repo_manager.precision.attempt import Attempt, Attempts, auto_keep, refusal, where_it_began
from repo_manager.precision.calibration.data import TYPICAL_INPUTS
from repo_manager.precision.calibration.load import CalibrationData
from repo_manager.precision.candidate import Builder
from repo_manager.precision.options import Check, Conversion, ConvertOptions, KeptNode
from repo_manager.precision.passes.prepare import SourceCheck
from repo_manager.precision.proof.checks import drift_limit, same_answers
from repo_manager.precision.proof.prove import Proof, Prover
from repo_manager.precision.proof.selection import after_selection, selection_of
from repo_manager.precision.samples import Reference, reference_of
from repo_manager.stats.accuracy import Accuracy
from repo_manager.types import Precision, StrPath
from repo_manager.validation import choice

__all__ = ["convert"]

Judge = Callable[[Path, bool], Accuracy]
"""Scores a file on held-out data. The second argument lets ONNX Runtime optimise it."""
_UNCHANGED_HINT = (
    "Nothing was written. Another --precision fits this model; --allow-unchanged writes it as INT8 all the same."
)


def convert(
    model: Model,
    precision: Precision | str,
    output: StrPath,
    *,
    calibration: CalibrationData | None = None,
    options: ConvertOptions | None = None,
    judge: Judge | None = None,
) -> Conversion:
    """Convert `model` and write `output`, and external data beside it above 2 GB, if every check passes.

    The checks, in this order: ONNX's full checker; ONNX Runtime loads and runs it; same inputs and outputs; 2:4 where
    it was 2:4, on the stored values; drift against the source within the limits. FP32 copies the files as they are and
    makes the same checks. INT8 is judged by the arithmetic of its graph, so the verdict is the same on every machine,
    and on a quarter of the calibration samples, left out of the scales.

    Args:
        model: the source. Its files are not changed.
        precision: of the result: a `Precision`, or its value such as `fp16`.
        output: the file to write, replaced when there. Its folder must exist.
        calibration: real inputs. Needed for INT8, and drift is measured on them where given. `None`: seeded random
            inputs.
        options: precision, drift limit, calibration and kept nodes. `None` takes the defaults.
        judge: scores the file to be written on held-out data, after every other check has passed. One more check holds
            it to its limits (`AccuracyGate.judge`). `None`: not scored. BF16 is scored in FP32 with each BF16 value
            rounded.

    Raises:
        CalibrationError: INT8 without calibration data, or with samples without evidence.
        GateError: a check failed. Nothing was written. The message has the table.
        ModelError: the source does not run, or cannot take this precision.
        UsageError: a `keep_fp32` pattern names nothing, or there is no such precision.
        OSError: the disk is full, read-only, ...
    """
    output, precision = Path(output), choice(Precision, precision, "the precision")
    started = time.monotonic()
    options = ConvertOptions() if options is None else options
    _check_given(model, precision, output, calibration)
    prover, fitted = _prover(model, precision, options, calibration)
    kept: tuple[KeptNode, ...] = ()
    with work_folder(f".{output.name}.", output.parent) as folder:
        if precision is Precision.FP32:
            written, proof = _proven_copy(prover, Path(folder, output.name), output)
            accuracy = None if judge is None else judge(written.files[0], True)
        else:
            attempt = _attempt(prover, fitted, Path(folder), output.name)
            written, kept, proof = attempt.written, attempt.candidate.kept, attempt.proof
            accuracy = None if judge is None else _scored(judge, attempt, precision)
        if accuracy is not None:
            proof = _accepted(prover, proof, accuracy)
        final = _moved(written, output.parent)
    return _conversion(prover, proof, kept, final, accuracy, started)


def _conversion(
    prover: Prover,
    proof: Proof,
    kept: tuple[KeptNode, ...],
    files: tuple[Path, ...],
    accuracy: Accuracy | None,
    started: float,
) -> Conversion:
    """Describe the written files and their proof. `started` is the moment of the monotonic clock."""
    return Conversion(
        source=prover.model.digest,
        digest=proof.found.digest,
        precision=prover.precision,
        files=files,
        checks=proof.checks,
        drift=proof.drift,
        sparsity=proof.sparsity,
        accuracy=accuracy,
        kept=kept,
        kept_macs_share=_macs_share(proof, kept),
        samples=len(prover.reference.inputs),
        inputs=prover.reference.kind,
        tools=_tools(),
        seconds=round(time.monotonic() - started, 3),
    )


def _check_given(model: Model, precision: Precision, output: Path, calibration: CalibrationData | None) -> None:
    """Refuse hopeless options before anything is run."""
    if precision.facts.quantizes and calibration is None:
        raise CalibrationError(
            f"{model.path}: {precision} needs calibration data, and none was given",
            hint="Give 100 or more typical inputs with --calibration DATA.npz (one array per input, samples along the "
            "first axis); a folder of .npy or images, or module:function, works, too.",
        )
    if calibration is not None and precision is not Precision.FP32:
        calibration.require_variety()
    if not output.parent.is_dir():
        raise ModelError(f"{output}: its folder does not exist", hint=f"Create it: mkdir -p {output.parent}")


def _prover(
    model: Model, precision: Precision, options: ConvertOptions, calibration: CalibrationData | None
) -> tuple[Prover, CalibrationData | None]:
    """Return the judge of the result, with the source's answers, and the data for INT8's scales."""
    parts = calibration.split() if calibration is not None and precision.facts.quantizes else None
    fitted, held_out = (calibration, calibration) if parts is None else parts
    kind = "calibration" if parts is None else "held-out"
    signature = signature_of(model)
    given = given_sizes(signature, options.shapes)
    answers = functools.partial(reference_of, model, signature, samples=options.drift_samples, given=given)
    reference = answers(held_out, seed=options.seed, kind=kind)
    if calibration is not None and precision.facts.quantizes and (silence := same_answers(reference.outputs)):
        raise CalibrationError(f"{calibration.source}: {silence}, so they show no drift", hint=TYPICAL_INPUTS)
    calibrated = None if parts is None else answers(fitted, seed=options.seed)
    return Prover(model, precision, options, reference, calibrated), fitted


def _proven_copy(prover: Prover, path: Path, output: Path) -> tuple[WrittenModel, Proof]:
    """Copy the source as it is, and prove the copy.

    Raises:
        GateError: a check failed. Nothing is written to `output`.
    """
    written = _copied(prover.model, path)
    proof = prover.prove(written)
    if not proof.passed:
        raise GateError(refusal(prover.model, prover.precision, proof), hint=f"Nothing was written to {output}.")
    return written, proof


def _scored(judge: Judge, attempt: Attempt, precision: Precision) -> Accuracy:
    """Score a candidate as its drift was measured: INT8 by the arithmetic of its graph, BF16 by its stand-in."""
    path, stand_in = attempt.written.files[0], attempt.candidate.stand_in
    if precision.facts.low != "bfloat16" or stand_in is None:
        return judge(path, not precision.facts.quantizes)
    view = path.with_name("stand-in.onnx")
    write_view(stand_in, attempt.written, view)
    try:
        return judge(view, False)
    finally:
        view.unlink()


def _accepted(prover: Prover, proof: Proof, accuracy: Accuracy) -> Proof:
    """Add the accuracy to the checks.

    Raises:
        GateError: it is below its limits. Nothing is written.
    """
    check = Check("accuracy", accuracy.passed, accuracy.detail)
    proof = dataclasses.replace(proof, checks=(*proof.checks, check))
    if not accuracy.passed:
        raise GateError(
            refusal(prover.model, prover.precision, proof),
            hint="Nothing was written. --auto-keep N and --keep-fp32 PATTERN leave sensitive layers in FP32, and INT8 "
            "gains from more calibration data.",
        )
    return proof


def _attempt(prover: Prover, calibration: CalibrationData | None, folder: Path, name: str) -> Attempt:
    """Make a passing candidate, searching for layers to keep when asked to.

    Raises:
        GateError: none passes.
    """
    model, precision, options = prover.model, prover.precision, prover.options
    draft = draft_of(model)
    check = SourceCheck(model, draft, prover.reference, folder)
    builder = Builder(draft, precision, options, _Samples(calibration, prover.reference), folder, check)
    prover.preparation = str(builder.prepared)
    prover.selection = selection_of(builder.draft, folder)
    attempts = Attempts(builder, prover, folder, name)
    attempt = first = attempts.make()
    if builder.quantizes and not builder.quantized and not options.allow_unchanged:
        raise GateError(_nothing_became_int8(model, precision, first), hint=_UNCHANGED_HINT)
    if options.auto_keep and first.proof.failed_only("drift"):
        attempt = auto_keep(attempts, first, options.auto_keep, folder)
    if attempt.proof.passed:
        return attempt
    hint = "Nothing was written. --keep-fp32 PATTERN keeps sensitive layers in FP32, --auto-keep N searches for them."
    late = [item for item in first.proof.drift if item.output in after_selection(builder.draft) and not item.judged_by]
    if worst := next((item.output for item in late if item.worst > drift_limit(precision, options)), None):
        hint += (
            f" Weights follow a selection (boxes kept, top candidates) on the way to '{worst}', so that another "
            "choice changes it. Convert the part up to the selection, with its boxes and scores as outputs, and select "
            "outside the model; or give --max-drift inf and measure the accuracy yourself."
        )
    elif any(item.rounded_relative_error == math.inf for item in first.proof.drift):
        hint += " Values beyond FP16's range fit in --precision bf16, which has FP32's."
    if options.auto_keep:
        hint = (
            f"Nothing was written. Keeping up to {options.auto_keep} layers in FP32 did not bring it within the limit."
        )
    raise GateError(refusal(model, precision, first.proof, where_it_began(attempts, first, folder)), hint=hint)


class _Samples:
    """Calibration inputs, again for each pass over them."""

    def __init__(self, calibration: CalibrationData | None, reference: Reference) -> None:
        self.calibration = calibration
        self.reference = reference

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        return iter(self.reference.inputs) if self.calibration is None else self.calibration.batches()


def _nothing_became_int8(model: Model, precision: Precision, attempt: Attempt) -> str:
    reasons = collections.Counter(f"{node.op_type}: {node.reason}" for node in attempt.candidate.kept)
    lines = [f"  {count} x {reason}" for reason, count in reasons.most_common(8)]
    found = "\n".join(lines) or "  it has no Conv, ConvTranspose, Gemm or MatMul"
    return f"{model.path} as {precision}: no operator can become INT8\n{found}"


def _macs_share(proof: Proof, kept: tuple[KeptNode, ...]) -> float | None:
    """Return the kept nodes' share of the multiply-accumulates, or `None` when none are counted.

    Both sides name nodes as the written model does, where every node, at every depth, has a name of its own. The
    sparsity report puts the bodies around a node before its name.
    """
    layers = proof.sparsity.layers
    total = sum(layer.macs or 0 for layer in layers)
    if not total:
        return None
    names = {node.node for node in kept}
    top = {node.name for node in proof.found.graph_only.graph.node}

    def is_kept(label: str) -> bool:
        if label in top:
            return label in names
        return any(label.endswith(f"/{name}") for name in names - top)

    return sum(layer.macs or 0 for layer in layers if is_kept(layer.node)) / total


def _copied(model: Model, path: Path) -> WrittenModel:
    """Copy the model's files, its nodes sorted. External ones keep their names, as the model's file refers to them."""
    files = [path]
    if model.reordered:
        path.write_bytes(graph_as_stored(model).SerializeToString())
    else:
        shutil.copyfile(model.path, path)
    folder = model.path.parent.absolute()
    for external in model.external_files:
        target = path.parent / external.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(external, target)
        files.append(target)
    return WrittenModel(tuple(files), {})


def _moved(written: WrittenModel, folder: Path) -> tuple[Path, ...]:
    """Move the written files into a folder, the model's own file last, and return their new paths."""
    staged, final = written.files[0].parent, []
    for file in reversed(written.files):
        target = folder / file.relative_to(staged)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
        final.append(target)
    return tuple(reversed(final))


def _tools() -> dict[str, str]:
    return {
        "numpy": np.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": runtime_process().version,
        "python": platform.python_version(),
    }
