"""The declared state against the real one, as rich renderables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.tables import make_table

if TYPE_CHECKING:
    from repo_manager.declared import ApplyResult, ModelPlan

__all__ = ["apply_view", "plan_view"]


def plan_view(plans: Sequence[ModelPlan]) -> list[RenderableType]:
    """Show what is to be done, one step a line."""
    rows = []
    for plan in plans:
        if plan.error is not None:
            rows.append([plan.name, Text("cannot", style="red"), plan.error])
        rows += [[plan.name if not index else "", step.action, step.what] for index, step in enumerate(plan.steps)]
    same = sum(not plan.steps and plan.error is None for plan in plans)
    note = Text(f"{same} model{'s' if same != 1 else ''} as declared already.")
    return [make_table("Plan", ["model", "step", "what"], rows), note] if rows else [note]


def apply_view(result: ApplyResult) -> list[RenderableType]:
    """Show what was done."""
    if not result.models:
        return [
            Text(f"Nothing to do: {_models(result.unchanged)} as declared ({result.seconds:.1f} s).", style="green")
        ]
    rows: list[list[Any]] = []
    for model in result.models:
        rows += [[model.name if not index else "", what] for index, what in enumerate(model.done)]
        if model.error is not None:
            rows.append(["" if model.done else model.name, Text(f"failed: {model.error}", style="red")])
    failed = len(result.failed)
    text = f"{_models(len(result.models) - failed)} brought to what is declared, {failed} failed, "
    style = "red" if failed else "green"
    summary = Text(f"{text}{result.unchanged} unchanged ({result.seconds:.1f} s).", style=style)
    return [make_table("Done", ["model", "what"], rows), summary]


def _models(count: int) -> str:
    return f"{count} model{'s' if count != 1 else ''}"
