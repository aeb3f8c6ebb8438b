"""Prove a written candidate: run every post-condition in order and stop where the next one has no ground."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from repo_manager.errors import ModelError
from repo_manager.onnx_model import Model, Session, load_model, signature_of
from repo_manager.precision.checks import check_drift, check_file, check_signature, check_sparsity, failure
from repo_manager.precision.drift import DriftMeter
from repo_manager.precision.options import Check, ConvertOptions, OutputDrift
from repo_manager.precision.samples import Reference
from repo_manager.sparsity.report import SparsityReport, sparsity_report
from repo_manager.types import Precision

__all__ = ["Proof", "Prover"]


@dataclass(frozen=True)
class Proof:
    """What was found out about a candidate.

    Attributes:
        checks: in order; those after one that failed may be missing.
        drift: one per output; empty when it did not run.
        found: the candidate, loaded; the source when it could not be.
        sparsity: of `found`.
    """

    checks: tuple[Check, ...]
    drift: tuple[OutputDrift, ...]
    found: Model = field(repr=False)
    sparsity: SparsityReport = field(repr=False)

    @property
    def passed(self) -> bool:
        """Say whether every check passed."""
        return all(check.passed for check in self.checks)


class Prover:
    """Judges candidates of one conversion against one source.

    Args:
        model: the source.
        precision: that was asked for.
        options: with the limits.
        reference: the source's answers.
    """

    def __init__(self, model: Model, precision: Precision, options: ConvertOptions, reference: Reference) -> None:
        self.model = model
        self.precision = precision
        self.options = options
        self.reference = reference
        self.sparsity = sparsity_report(model)

    def prove(self, path: Path) -> Proof:
        """Check the candidate at `path`."""
        checks = [check_file(path)]
        if not checks[0].passed:
            return Proof(tuple(checks), (), self.model, self.sparsity)
        try:
            found = load_model(path)
            drift = self.run(path)
        except ModelError as exc:
            return Proof((*checks, failure(exc)), (), self.model, self.sparsity)
        sparsity = sparsity_report(found)
        checks += [
            Check("runs", True, "ONNX Runtime on the CPU, all optimisations"),
            check_signature(
                signature_of(self.model),
                signature_of(found),
                self.precision,
                keep_io_types=self.options.keep_io_types,
            ),
            check_sparsity(self.sparsity, sparsity),
            check_drift(drift, self.precision, self.options, inputs=self.reference.kind),
        ]
        return Proof(tuple(checks), drift, found, sparsity)

    def run(self, path: Path) -> tuple[OutputDrift, ...]:
        """Run the candidate on the reference's inputs and measure the drift.

        Raises:
            ModelError: ONNX Runtime does not take it, or a run failed.
        """
        session = Session(path)
        meter = DriftMeter(session.output_names)
        for inputs, outputs in zip(self.reference.inputs, self.reference.outputs, strict=True):
            meter.add(session.run(inputs), outputs)
        return meter.result()
