"""Tries at a conversion: one try, the search for the few layers to keep, and the message of a refused one."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from repo_manager.errors import ModelError
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.write import WrittenModel, write_draft
from repo_manager.precision.candidate import Builder, Candidate
from repo_manager.precision.options import Check
from repo_manager.precision.passes.lowering_rules import FP16_MAX
from repo_manager.precision.proof.checks import drift_limit
from repo_manager.precision.proof.prove import Proof, Prover
from repo_manager.precision.proof.trace import BlockDrift, first_drift, trace_drift
from repo_manager.stats.drift import OutputDrift, table
from repo_manager.types import Precision

__all__ = ["Attempt", "Attempts", "auto_keep", "refusal", "where_it_began"]


_MOST_REPAIRS = 16
# "node name: X)" (onnx's checker), "Name:'X'" and "node with name 'X'" (ONNX Runtime)
_NODE_NAME = re.compile(r"node name: ([^)]+)\)|[Nn]ame:? ?'([^']+)'")


@dataclass(frozen=True)
class Attempt:
    """A candidate written to the staging folder, and the findings about it."""

    candidate: Candidate = field(repr=False)
    written: WrittenModel
    proof: Proof
    also_kept: tuple[str, ...]


class Attempts:
    """Makes attempts. Each goes to a folder of its own, removed by `forget`.

    Args:
        builder: makes the candidates of the conversion.
        prover: judges the candidates by their drift.
        folder: parent of one folder per attempt.
        name: file name of each candidate, inside its attempt's folder.
    """

    def __init__(self, builder: Builder, prover: Prover, folder: Path, name: str) -> None:
        self.builder = builder
        self.prover = prover
        self.folder = folder
        self.name = name
        self.count = 0

    def make(self, also_keep: Iterable[str] = ()) -> Attempt:
        """Build, write and prove a candidate with further nodes kept in FP32.

        Operators sure to break every candidate are kept from then on, with the reason. Their values exceed FP16's
        range, or the checker or ONNX Runtime says they do not work in 16 bits.
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
        # A mask of -3.4e38 became FP16's lowest number. Added to it, scores keep different digits in FP16 and FP32.
        if proof.failed_only("drift") and self._keep_overflowing():
            shutil.rmtree(written.files[0].parent)
            candidate, written, rounded = self._write(names)
            proof = self._prove(candidate, written, rounded)
        return Attempt(candidate, written, proof, names)

    def _prove(self, candidate: Candidate, written: WrittenModel, rounded: tuple[OutputDrift, ...]) -> Proof:
        return self.prover.prove(written, rounded, candidate.stages[-1][1])

    def _keep_overflowing(self) -> bool:
        """Keep the nodes beyond FP16's range. Return whether there are more than before."""
        return (
            self.prover.options.keep_overflowing
            and self.builder.lowers_to_fp16
            and self.builder.keep_overflowing(self.prover.reference.inputs)
        )

    def _keep_named(self, message: str) -> bool:
        """Keep the node a vendor's message names. Return whether it names one not kept before."""
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


# Find the few layers to keep in FP32 so that the drift passes.

_TRACED_SAMPLES = 2
_MOST_DROPS = 8  # attempts to remove a layer from the list


def auto_keep(attempts: Attempts, first: Attempt, most: int, folder: Path) -> Attempt:
    """Keep more and more of the layers where drift begins, until the gate passes. Then only the needed ones.

    Args:
        attempts: makes and proves each candidate, and removes the files of those given up.
        first: an attempt whose only failed check is drift.
        most: largest number of nodes to keep.
        folder: scratch folder for the attempts.

    Returns:
        The attempt with the fewest kept nodes among the passing ones. `first`, without its files, when none does.
    """
    kept: list[str] = []
    attempt, step = first, 1
    while attempt.proof.failed_only("drift") and len(kept) < most:
        new = _next_nodes(attempts, attempt, kept, folder)[: min(step, most - len(kept))]
        if not new:
            break
        kept += new
        step *= 2
        attempts.forget(attempt)
        attempt = attempts.make(kept)
    return _fewest(attempts, attempt, kept) if attempt.proof.passed else first


def _next_nodes(attempts: Attempts, attempt: Attempt, kept: Sequence[str], folder: Path) -> list[str]:
    """Return the nodes to keep next, the most harmful first."""
    source = attempts.builder.draft
    samples = attempts.prover.reference.inputs[:_TRACED_SAMPLES]
    quantizes = attempts.builder.quantizes
    blocks = trace_drift(source, attempt.candidate.stages[-1][1], samples, folder, every_node=not quantizes)
    names = [block.node for block in sorted(blocks, key=lambda block: -block.added) if block.added > 0]
    if quantizes:
        names = [name for name in names if attempts.builder.can_keep(name)]
    return [name for name in dict.fromkeys(names) if name not in kept]


def _fewest(attempts: Attempts, attempt: Attempt, kept: list[str]) -> Attempt:
    """Take nodes back out, latest found first, as long as it still passes."""
    for name in list(reversed(kept))[:_MOST_DROPS]:
        if len(kept) == 1:
            break
        fewer = [other for other in kept if other != name]
        tried = attempts.make(fewer)
        if tried.proof.passed:
            attempts.forget(attempt)
            attempt, kept = tried, fewer
        else:
            attempts.forget(tried)
    return attempt


# Error message of a refused conversion: the checks, each output's drift, and where it began.

_SHOWN_BLOCKS = 10
_SMALL = 400  # nodes; in larger models only weighted operators are compared


def _word(check: Check) -> str:
    return "FAILED" if not check.passed else "no evidence" if check.is_empty else "passed"


def refusal(model: Model, precision: Precision, proof: Proof, began: str = "") -> str:
    """Return the message of a failed gate.

    Args:
        model: the ONNX model. It is not changed.
        precision: precision asked for, named in the first line.
        proof: failed checks of the candidate.
        began: table of the error after each block. Empty: there is none.
    """
    failed = ", ".join(check.name for check in proof.checks if not check.passed)
    lines = [f"{model.path} as {precision}: the gate failed ({failed})"]
    lines += [f"  {_word(check)}  {check.name}: {check.detail}" for check in proof.checks]
    if proof.drift:
        lines.append(table(proof.drift))
    return "\n".join([*lines, began] if began else lines)


def where_it_began(attempts: Attempts, attempt: Attempt, folder: Path) -> str:
    """Return the error after each block as a table, one column a stage (int8, fp16). Empty when it was not drift.

    Args:
        attempts: builds candidates of the conversion.
        attempt: the failed attempt. The draft of each of its stages is compared with the source.
        folder: scratch folder for temporary models.
    """
    if not attempt.proof.failed_only("drift"):
        return ""
    samples = attempts.prover.reference.inputs[:1]
    limit = drift_limit(attempts.prover.precision, attempts.prover.options)
    source = attempts.builder.draft
    traces: dict[str, tuple[BlockDrift, ...]] = {}
    for name, draft in attempt.candidate.stages:
        try:
            traces[name] = trace_drift(source, draft, samples, folder, every_node=len(source.graph.node) <= _SMALL)
        except ModelError:  # ONNX Runtime runs only the whole graph: the drift is known, but not where it began
            return ""
    last = list(traces.values())[-1]
    first = first_drift(last, limit)
    lines = [f"relative error after each block ({', then '.join(traces)}):"]
    for block in _picked(last, first):
        columns = "  ".join(f"{_error(trace, block.value):>9.3g}" for trace in traces.values())
        mark = f"  <- above {limit:g} from here on" if block is first else ""
        if block.largest > FP16_MAX and "fp16" in traces:
            mark += f"  reaches {block.largest:.3g}, FP16 ends at {FP16_MAX:.0f}"
        lines.append(f"  {columns}  {block.op_type} '{block.node}'{mark}")
    return "\n".join(lines)


def _error(trace: Sequence[BlockDrift], value: str) -> float:
    return next((block.relative_error for block in trace if block.value == value), 0.0)


def _picked(blocks: Sequence[BlockDrift], first: BlockDrift | None) -> list[BlockDrift]:
    """Return a few blocks spread over the network, with those around where it began."""
    if len(blocks) <= _SHOWN_BLOCKS:
        return list(blocks)
    step = (len(blocks) - 1) / (_SHOWN_BLOCKS - 3)
    places = {round(number * step) for number in range(_SHOWN_BLOCKS - 2)}
    if first is not None:
        begin = blocks.index(first)
        places |= {max(0, begin - 1), begin}
    return [blocks[place] for place in sorted(places)]
