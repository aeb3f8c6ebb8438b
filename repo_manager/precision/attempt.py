"""One try at a conversion: build, write to a staging folder, prove."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from repo_manager.precision.candidate import Builder, Candidate
from repo_manager.precision.options import OutputDrift
from repo_manager.precision.proof import Proof, Prover
from repo_manager.precision.writer import WrittenModel, write_draft

__all__ = ["Attempt", "Attempts"]


@dataclass(frozen=True)
class Attempt:
    """A candidate that was written to the staging folder, and what was found out about it."""

    candidate: Candidate = field(repr=False)
    written: WrittenModel
    proof: Proof
    also_kept: tuple[str, ...]


class Attempts:
    """Makes attempts; each goes to a folder of its own and the one before it is removed by `forget`.

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
        """Build, write and prove a candidate with further nodes kept in FP32."""
        names = tuple(also_keep)
        candidate, written, rounded = self._write(names)
        beyond = any(item.relative_error == math.inf for item in rounded)
        if (
            beyond
            and self.prover.options.keep_overflowing
            and self.builder.lowers_to_fp16
            and self.builder.keep_overflowing(self.prover.reference.inputs)
        ):
            candidate, written, rounded = self._write(names)
        return Attempt(candidate, written, self.prover.prove(written, rounded), names)

    def _write(self, names: tuple[str, ...]) -> tuple[Candidate, WrittenModel, tuple[OutputDrift, ...]]:
        """Build and write a candidate, and measure its drift with each 16-bit value rounded (empty: none is)."""
        candidate = self.builder.build(names)
        self.count += 1
        place = self.folder / f"attempt-{self.count}"
        place.mkdir()
        written = write_draft(candidate.draft, place / self.name)
        return candidate, written, self.prover.rounded_drift(written, candidate.stand_in)
