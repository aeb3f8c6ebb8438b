"""Prove a written candidate: run every post-condition in order and stop where the next one has no ground."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from repo_manager.errors import ModelError
from repo_manager.onnx_model.draft import Array, Draft
from repo_manager.onnx_model.model import Model, load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import Signature, signature_of
from repo_manager.onnx_model.write import WrittenModel, write_view
from repo_manager.precision.options import Check, ConvertOptions
from repo_manager.precision.proof.checks import (
    check_drift,
    check_file,
    check_model_signature,
    check_sparsity,
    drift_limit,
    failure,
    nothing_shown,
    probability_values,
    served_text,
)
from repo_manager.precision.proof.selection import Selection
from repo_manager.precision.samples import Reference
from repo_manager.sparsity.report import SparsityReport, sparsity_report
from repo_manager.stats.drift import DriftMeter, OutputDrift
from repo_manager.types import Precision

__all__ = ["Proof", "Prover"]


@dataclass(frozen=True)
class Proof:
    """The findings about a candidate.

    Attributes:
        checks: in order. Those after a failed one may be missing.
        drift: one per output. Empty when it did not run.
        found: the candidate, loaded. The source when it could not be.
        sparsity: 2:4 report of `found`. The source's when an early check failed.
    """

    checks: tuple[Check, ...]
    drift: tuple[OutputDrift, ...]
    found: Model = field(repr=False)
    sparsity: SparsityReport = field(repr=False)

    @property
    def passed(self) -> bool:
        """Return whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def first_failed(self) -> Check | None:
        """The first failed check."""
        return next((check for check in self.checks if not check.passed), None)

    def failed_only(self, name: str) -> bool:
        """Return whether one check, and no other, failed."""
        return [check.name for check in self.checks if not check.passed] == [name]


class Prover:
    """Judges candidates of one conversion against one source.

    Args:
        model: the ONNX model. It is not changed.
        precision: the precision asked for. It sets the limits left open by `options`.
        options: limits of the drift, and whether inputs and outputs keep their types.
        reference: the source's answers, the measure of the proof.
        calibrated: answers of the source on the samples of INT8's scales, whose error is reported. `None`: `reference`
            holds these samples itself.
    """

    def __init__(
        self,
        model: Model,
        precision: Precision,
        options: ConvertOptions,
        reference: Reference,
        calibrated: Reference | None = None,
    ) -> None:
        self.model = model
        self.precision = precision
        self.options = options
        self.reference = reference
        self.calibrated = calibrated
        self.selection: Selection | None = None
        self.preparation = ""  # distance from the source before the precision changed
        self._selected: dict[str, tuple[Mapping[str, Array], ...]] = {}
        self.quantizes = precision.facts.quantizes
        self.signature = signature_of(model)
        self.stand_in_failure: ModelError | None = None
        self.optimisations = ""
        self.sparsity = sparsity_report(model)
        graph = model.graph_only.graph
        self.probabilities = probability_values(graph, [value.name for value in graph.output])

    def prove(self, written: WrittenModel, rounded: tuple[OutputDrift, ...] = (), stage: Draft | None = None) -> Proof:
        """Check a written candidate.

        Args:
            written: files of the candidate. The first is the .onnx file to load and run.
            rounded: the drift with each 16-bit value rounded (`rounded_drift`).
            stage: the candidate with float32 values, for outputs made by selection. `None` judges them directly.
        """
        path = written.files[0]
        checks = [check_file(path, self.model.path)]
        if not checks[0].passed:
            return Proof(tuple(checks), (), self.model, self.sparsity)
        try:
            found = load_model(path)
            drift = self._drift(path, rounded, signature_of(found))
            if stage is not None:
                drift = self._with_selections(drift, stage, written)
        except ModelError as exc:
            return Proof((*checks, failure(exc)), (), self.model, self.sparsity)
        sparsity = sparsity_report(found)
        limit = drift_limit(self.precision, self.options)
        checks += [
            Check("runs", True, self._how(is_rounded=bool(rounded)) + served_text(drift, limit)),
            check_model_signature(
                self.signature,
                signature_of(found),
                self.precision,
                keep_io_types=self.options.keep_io_types,
            ),
            check_sparsity(self.sparsity, sparsity),
            self._check_drift(drift),
        ]
        return Proof(tuple(checks), drift, found, sparsity)

    def _check_drift(self, drift: tuple[OutputDrift, ...]) -> Check:
        check = check_drift(drift, self.precision, self.options, self.reference.kind, self._probabilities())
        if self.preparation:
            check = replace(check, detail=f"{check.detail}; {self.preparation}")
        silence = "" if self.precision is Precision.FP32 else nothing_shown(self.reference.outputs)
        if silence and check.passed:
            other = "Give others" if self.reference.kind != "natural" else "Give real inputs"
            detail = f"nothing was shown: {silence}. {other} with --calibration. {check.detail}"
            check = replace(check, detail=detail, is_empty=True)
        return check

    def rounded_drift(self, written: WrittenModel, stand_in: Draft | None) -> tuple[OutputDrift, ...]:
        """Run the stand-in with each 16-bit value rounded. Return the drift, empty when there is none to run.

        A stand-in rejected by ONNX Runtime is left to `prove`: the candidate will fail there, too.

        Args:
            written: files of the candidate. The stand-in refers to their weights, in the same folder.
            stand_in: the stand-in. `None`: there is none.
        """
        if stand_in is None:
            return ()
        view = written.files[0].with_name("stand-in.onnx")
        write_view(stand_in, written, view)
        try:
            return self._run(Session(view, optimize=False), set(), self.reference)
        except ModelError as exc:
            self.stand_in_failure = exc
            return ()
        finally:
            view.unlink()

    def _drift(self, path: Path, rounded: tuple[OutputDrift, ...], signature: Signature) -> tuple[OutputDrift, ...]:
        """Run the candidate on the reference's inputs.

        Raises:
            ModelError: ONNX Runtime does not take it, or a run failed.
        """
        if self.precision.facts.low == "bfloat16":  # ONNX Runtime's CPU lacks BF16 kernels (its OperatorKernels.md)
            if not rounded and self.stand_in_failure is not None:
                raise self.stand_in_failure
            return tuple(replace(item, rounded_relative_error=item.relative_error) for item in rounded)
        low = {spec.name for spec in signature.inputs if spec.dtype == "float16"}
        low -= {spec.name for spec in self.signature.inputs if spec.dtype == "float16"}
        # ONNX Runtime's fused INT8 kernels differ between CPUs (onnxruntime#6004). The unoptimised graph does not.
        session = Session(path, optimize=not self.quantizes)
        self.optimisations = session.optimisations
        stored = self._run(session, low, self.reference)
        if self.quantizes:
            stored = self._with_other_errors(stored, path, session, low)
        if not rounded:
            return stored
        return tuple(
            replace(
                item,
                rounded_relative_error=twin.relative_error,
                max_abs_error=max(item.max_abs_error, twin.max_abs_error),
            )
            for item, twin in zip(stored, rounded, strict=True)
        )

    def _how(self, *, is_rounded: bool) -> str:
        """Say how the candidate was run."""
        if self.precision.facts.low == "bfloat16":
            return "ONNX Runtime on the CPU has no BF16 operators: run in FP32 with each BF16 value rounded"
        how = f"ONNX Runtime on the CPU, {self.optimisations}"
        return f"{how}; and without any, each 16-bit value rounded as a GPU does" if is_rounded else how

    def _with_other_errors(
        self, drift: tuple[OutputDrift, ...], path: Path, session: Session, low: set[str]
    ) -> tuple[OutputDrift, ...]:
        """Add INT8's reported facts, without a vote on the outcome."""
        if self.calibrated is not None:
            on_those = self._run(session, low, self.calibrated)
            drift = tuple(
                replace(item, calibration_relative_error=other.relative_error)
                for item, other in zip(drift, on_those, strict=True)
            )
        if self.options.judge_served:
            try:
                served = self._run(Session(path, exact_int8=True), low, self.reference)
            except ModelError:  # `add` loads the model too and reports the reason
                return drift
            drift = tuple(
                replace(item, served_relative_error=other.relative_error)
                for item, other in zip(drift, served, strict=True)
            )
        return drift

    def _with_selections(
        self, drift: tuple[OutputDrift, ...], stage: Draft, written: WrittenModel
    ) -> tuple[OutputDrift, ...]:
        """Judge differing selections by the values they are chosen from."""
        limit = drift_limit(self.precision, self.options)
        selection = self.selection
        if selection is None:
            return drift
        judged = {item.output for item in drift if item.output in selection.judges and not item.worst <= limit}
        if not judged:
            return drift
        try:
            session = selection.session(stage, written)
            values = self._chosen_from(selection, session, self.reference)
            if self.calibrated is not None:
                on_those = self._chosen_from(selection, session, self.calibrated)
                values = tuple(
                    replace(item, calibration_relative_error=other.relative_error)
                    for item, other in zip(values, on_those, strict=True)
                )
        except ModelError:  # without a selection, judge the outputs themselves
            return drift
        wanted = {value for output in judged for value in selection.judges[output]}
        return (
            *(
                replace(item, judged_by=selection.judges[item.output]) if item.output in judged else item
                for item in drift
            ),
            *(replace(item, is_output=False) for item in values if item.output in wanted),
        )

    def _chosen_from(self, selection: Selection, session: Session, reference: Reference) -> tuple[OutputDrift, ...]:
        """Return the drift of the values behind selections.

        Raises:
            ModelError: the source or the candidate does not run with these values as its outputs.
        """
        if reference.kind not in self._selected:
            self._selected[reference.kind] = selection.answers(reference.inputs)
        meter = DriftMeter(selection.values, drift_limit(self.precision, self.options))
        for inputs, answers in zip(reference.inputs, self._selected[reference.kind], strict=True):
            meter.add(session.run(inputs), answers)
        return meter.result()

    def _probabilities(self) -> frozenset[str]:
        return self.probabilities if self.selection is None else self.probabilities | self.selection.probabilities

    def _run(self, session: Session, low: set[str], reference: Reference) -> tuple[OutputDrift, ...]:
        meter = DriftMeter(session.output_names, drift_limit(self.precision, self.options))
        for inputs, outputs in zip(reference.inputs, reference.outputs, strict=True):
            feed = {name: array.astype(np.float16) if name in low else array for name, array in inputs.items()}
            meter.add(session.run(feed), outputs)
        return meter.result()
