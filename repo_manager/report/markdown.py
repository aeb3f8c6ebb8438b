"""GitHub-flavoured Markdown without an effect of others' texts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from repo_manager.report.plain import plain

__all__ = ["markdown_code", "markdown_table", "markdown_text"]


def markdown_code(text: str, language: str) -> list[str]:
    """Return the lines of a block of code, whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}{language}", plain(text.rstrip("\n")), fence]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table. Cells are escaped."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(markdown_text(cell) for cell in row) + " |" for row in rows),
    ]


def markdown_text(text: str) -> str:
    """Keep a text inside its cell, and let it say nothing to Markdown. Code of our own stays code."""
    code = re.fullmatch(r"`[^`\r\n]*`", text)
    text = " ".join(plain(text).splitlines()).replace("\t", " ")
    if code:
        return text.replace("|", "\\|")
    return re.sub(r"([\\`|*_\[\]<>#!~])", _escaped_sign, text)


def _escaped_sign(match: re.Match[str]) -> str:
    return {"<": "&lt;", ">": "&gt;"}.get(match[1], f"\\{match[1]}")
