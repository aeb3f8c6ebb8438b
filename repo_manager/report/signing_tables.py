"""Signatures as rich renderables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.tables import key_values, make_table

if TYPE_CHECKING:
    from repo_manager.repository import Signature, SignatureCheck

__all__ = ["checks_view", "signature_view"]


def signature_view(signature: Signature) -> list[RenderableType]:
    """Show what was signed."""
    state = "would be written (dry run)" if not signature.applied else "written"
    if signature.replaced:
        state += ", in place of an earlier one"
    facts = [
        ("version", f"{signature.name}:{signature.version}"),
        ("covers", ", ".join(signature.files)),
        ("signature", f"{signature.file} in the repository's root: {state}"),
    ]
    return [key_values(facts)]


def checks_view(checks: Sequence[SignatureCheck]) -> list[RenderableType]:
    """Show the signatures that hold."""
    if not checks:
        return []
    if len(checks) == 1:
        return [Text(f"{checks[0].name}:{checks[0].version} is signed by {checks[0].key}", style="green")]
    rows = [[f"{check.name}:{check.version}", check.key, len(check.files)] for check in checks]
    return [make_table("Signatures that hold", ["version", "signed by", "files"], rows, right="files")]
