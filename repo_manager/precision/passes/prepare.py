"""The passes before any change of precision, and the proof they changed nothing.

Before and after them the model must be the same in FP32. Otherwise the gate of a conversion, whose limit is made for
rounding to 16 or 8 bits, hides a wrong pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from repo_manager.errors import ModelError
from repo_manager.onnx_model.draft import Array, Draft, opset_of
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.source import named, without_unused
from repo_manager.onnx_model.write import write_draft
from repo_manager.precision.passes.fold_batchnorm import fold_batchnorm
from repo_manager.precision.passes.fold_constants import fold_constants
from repo_manager.precision.passes.raise_opset import raise_opset
from repo_manager.precision.proof.selection import Selection, selection_of
from repo_manager.precision.samples import Reference
from repo_manager.stats.drift import DriftMeter

__all__ = ["PreparedDraft", "SourceCheck", "prepare", "prepare_checked"]

SAME = 1e-5
"""Largest relative error of a pass without a change of numbers: the effect of another order of float32 sums."""

_MOST = 1e-3  # upper bound, whatever the source's own rounding
_MARGIN = 4.0  # factor on the source's own rounding
_SAMPLES = 4


@dataclass(frozen=True)
class PreparedDraft:
    """A draft ready for a change of precision.

    Attributes:
        draft: the same model as the source up to rounding, sorted, with names on all nodes.
        error: largest relative error against the source. `None`: not measured, or no pass changed anything.
        dropped: passes left out because they changed the numbers, each with its error.
    """

    draft: Draft = field(repr=False)
    error: float | None = None
    dropped: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = [] if self.error is None else [f"{self.error:.1e} of it before any change of precision"]
        return "; ".join([*said, *(f"left out: {each}" for each in self.dropped)])


@dataclass(frozen=True)
class _Pass:
    name: str
    change: Callable[[Draft], Draft]
    is_needed: bool = False


def prepare(draft: Draft, *, opset: int) -> Draft:
    """Raise the opset to at least `opset`, and fold constants and BatchNormalization.

    Ensures: same results up to rounding, topological order, names on all nodes.

    Raises:
        ModelError: the opset cannot be raised.
    """
    for each in _passes(draft, opset):
        draft = each.change(draft)
    return draft


def prepare_checked(draft: Draft, *, opset: int, check: SourceCheck) -> PreparedDraft:
    """Do the same, and compare the result with the source. Only if they differ, compare each pass on its own.

    Args:
        draft: the model as a float32 draft.
        opset: smallest opset of the result.
        check: compares the result with the source.

    Raises:
        ModelError: the opset cannot be raised, or the raised model is another one.
    """
    result = prepare(draft, opset=opset)
    if _is_same(draft, result):
        return PreparedDraft(result)
    error = check.error(result)
    return PreparedDraft(result, error) if error <= SAME else _one_by_one(draft, _passes(draft, opset), check)


def _passes(draft: Draft, opset: int) -> tuple[_Pass, ...]:
    raising = f"raising the opset from {opset_of(draft.proto)} to {opset}"
    return (
        _Pass(raising, lambda before: named(raise_opset(before, opset)), is_needed=True),
        _Pass("folding of constants", lambda before: without_unused(fold_constants(before))),
        _Pass("folding of BatchNormalization", lambda before: without_unused(fold_batchnorm(before))),
    )


def _is_same(before: Draft, after: Draft) -> bool:
    return before.weights == after.weights and before.proto == after.proto


def _one_by_one(draft: Draft, passes: tuple[_Pass, ...], check: SourceCheck) -> PreparedDraft:
    """Apply each pass on its own, and leave out optional ones with an effect on the numbers."""
    limit = check.limit
    error = check.error(draft)
    if not error <= limit:
        raise ModelError(
            f"{check.where}: the model with its local functions inlined and its nodes sorted gives other numbers than "
            f"the file (relative error {error:.3g})",
            hint="This is a fault of repo-manager or of onnx's inliner. Export the model without local functions.",
        )
    dropped = []
    for each in passes:
        changed = each.change(draft)
        if _is_same(draft, changed):
            continue
        found = check.error(changed)
        if found <= limit:
            draft, error = changed, found
        elif each.is_needed:
            reason = f"relative error {found:.3g}" if check.failure is None else check.failure
            raise ModelError(
                f"{check.where}: {each.name} changes the model ({reason}), and this precision needs it",
                hint="Export the model again with a later opset, or publish it with --precision fp16 or fp32.",
            )
        else:
            dropped.append(f"{each.name} (relative error {found:.3g})")
    return PreparedDraft(draft, error, tuple(dropped))


class SourceCheck:
    """Compares float32 drafts with the source's answers.

    Args:
        model: the ONNX model. It is not changed.
        draft: of it, before any pass.
        reference: its answers. A few of the samples are taken, spread evenly.
        folder: for temporary models, removed again.
    """

    def __init__(self, model: Model, draft: Draft, reference: Reference, folder: Path) -> None:
        self.where = str(model.path)
        self.failure: str | None = None
        self._model = model
        self._draft = draft
        self._folder = folder
        self._optimize = reference.optimized
        step = max(1, -(-len(reference.inputs) // _SAMPLES))
        self._inputs, self._outputs = reference.inputs[::step], reference.outputs[::step]

    @property
    def limit(self) -> float:
        """Largest error that counts as the same: 1e-5, or more where the source rounds by more as ONNX Runtime
        optimises it."""
        try:
            errors = self._errors(Session(self._model, optimize=not self._optimize))
        except ModelError:
            return SAME
        return min(max(SAME, _MARGIN * max(errors.values(), default=0.0)), _MOST)

    def error(self, draft: Draft) -> float:
        """Return the largest relative error of any output. Infinite when the draft does not run (see `failure`).

        A selection that differs is compared by the values it is chosen from.
        """
        written = write_draft(draft, self._folder / "prepared.onnx")
        try:
            errors = self._errors(Session(written.files[0], optimize=self._optimize))
            if not max(errors.values(), default=0.0) <= SAME and (selected := self._selection()) is not None:
                selection, chosen_from = selected
                errors = {name: error for name, error in errors.items() if name not in selection.judges}
                meter = DriftMeter(selection.values)
                session = selection.session(draft, written)
                for inputs, answers in zip(self._inputs, chosen_from, strict=True):
                    meter.add(session.run(inputs), answers)
                errors |= {item.output: item.relative_error for item in meter.result()}
        except ModelError as exc:
            self.failure = exc.message
            return float("inf")
        finally:
            for file in written.files:
                file.unlink()
        self.failure = None
        return max(errors.values(), default=0.0)

    def _selection(self) -> tuple[Selection, tuple[Mapping[str, Array], ...]] | None:
        """Return the values behind selected outputs, and the source's, or `None` without a selection."""
        try:
            selection = selection_of(self._draft, self._folder)
            return None if selection is None else (selection, selection.answers(self._inputs))
        except ModelError:  # without a selection, compare the outputs themselves
            return None

    def _errors(self, session: Session) -> dict[str, float]:
        meter = DriftMeter(session.output_names)
        for inputs, outputs in zip(self._inputs, self._outputs, strict=True):
            meter.add(session.run(inputs), outputs)
        return {item.output: item.relative_error for item in meter.result()}
