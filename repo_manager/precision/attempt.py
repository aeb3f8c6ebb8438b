"""One try at a conversion: build, write to a staging folder, prove."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from repo_manager.onnx_model.write import WrittenModel, write_draft
from repo_manager.precision.candidate import Builder, Candidate
from repo_manager.precision.proof.prove import Proof, Prover
from repo_manager.stats.drift import OutputDrift

__all__ = ["Attempt", "Attempts"]

_MOST_REPAIRS = 16
# "node name: X)" (onnx's checker), "Name:'X'" and "node with name 'X'" (ONNX Runtime)
_NODE_NAME = re.compile(r"node name: ([^)]+)\)|[Nn]ame:? ?'([^']+)'")


@dataclass(frozen=True)
class Attempt:
    """A candidate that was written to the staging folder, and what was found out about it."""

    candidate: Candidate = field(repr=False)
    written: WrittenModel
    proof: Proof
    also_kept: tuple[str, ...]


class Attempts:
    """Makes attempts; each goes to a folder of its own, which `forget` removes.

    Args:
        builder: of candidates.
        prover: of them.
        folder: the staging folder.
        name: of the model's file.
    """

    def __init__(self, builder: Builder, prover: Prover, folder: Path, name: str) -> None:
        self.builder = builder
        self.prover = prover
        self.folder = folder
        self.name = name
        self.count = 0

    def make(self, also_keep: Iterable[str] = ()) -> Attempt:
        """Build, write and prove a candidate with further nodes kept in FP32.

        Operators that stand in the way of any candidate are kept, too, with the reason, from then on: those whose
        values exceed FP16's range, and those that the checker or ONNX Runtime names as not working in 16 bits.
        """
        names = tuple(also_keep)
        for _ in range(_MOST_REPAIRS):
            attempt = self._make(names)
            failed = attempt.proof.first_failed
            if failed is None or failed.name not in ("checker", "runs") or not self._keep_named(failed.detail):
                break
            self.forget(attempt)
        return attempt

    def forget(self, attempt: Attempt) -> None:
        """Remove an attempt's files."""
        shutil.rmtree(attempt.written.files[0].parent)

    def _make(self, names: tuple[str, ...]) -> Attempt:
        candidate, written, rounded = self._write(names)
        if any(item.relative_error == math.inf for item in rounded) and self._keep_overflowing():
            shutil.rmtree(written.files[0].parent)
            candidate, written, rounded = self._write(names)
        proof = self._prove(candidate, written, rounded)
        # A mask of -3.4e38 became FP16's lowest number: beside it, FP16 and FP32 keep different digits of the scores.
        if proof.failed_only("drift") and self._keep_overflowing():
            shutil.rmtree(written.files[0].parent)
            candidate, written, rounded = self._write(names)
            proof = self._prove(candidate, written, rounded)
        return Attempt(candidate, written, proof, names)

    def _prove(self, candidate: Candidate, written: WrittenModel, rounded: tuple[OutputDrift, ...]) -> Proof:
        return self.prover.prove(written, rounded, candidate.stages[-1][1])

    def _keep_overflowing(self) -> bool:
        """Keep what exceeds FP16's range; say whether that is more than before."""
        return (
            self.prover.options.keep_overflowing
            and self.builder.lowers_to_fp16
            and self.builder.keep_overflowing(self.prover.reference.inputs)
        )

    def _keep_named(self, message: str) -> bool:
        """Keep the node that a vendor's message names; say whether it names one that was not kept before."""
        for name in _NODE_NAME.findall(message):
            found = next(part for part in name if part)
            if self.builder.keep_node(found, f"does not work in {self.builder.precision}: {message[:160]}"):
                return True
        return False

    def _write(self, names: tuple[str, ...]) -> tuple[Candidate, WrittenModel, tuple[OutputDrift, ...]]:
        """Build and write a candidate, and measure its drift with each 16-bit value rounded (empty: none is)."""
        candidate = self.builder.build(names)
        self.count += 1
        place = self.folder / f"attempt-{self.count}"
        place.mkdir()
        written = write_draft(candidate.draft, place / self.name)
        return candidate, written, self.prover.rounded_drift(written, candidate.stand_in)
