"""How results look where Python shows them: one line in a terminal, a small table in a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

__all__ = ["Summarized"]

_CELL = "text-align:left;padding:2px 12px 2px 0"


class Summarized:
    """A result with a summary in place of all its fields.

    A frozen dataclass derives from it with `repr=False`, and returns its facts from `_summary`.
    """

    def _summary(self) -> Mapping[str, Any]:
        """Return name -> fact, the most important first. `None` is left out."""
        raise NotImplementedError

    def _facts(self) -> list[tuple[str, str]]:
        return [(name, str(fact)) for name, fact in self._summary().items() if fact is not None]

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}: {fact}" for name, fact in self._facts())
        return f"<{type(self).__name__} {facts}>"

    def _repr_html_(self) -> str:
        """Return a table for notebooks (IPython calls this)."""
        rows = "".join(
            f'<tr><th style="{_CELL}">{html.escape(name)}</th><td style="{_CELL}">{html.escape(fact)}</td></tr>'
            for name, fact in self._facts()
        )
        title = html.escape(type(self).__name__)
        return f'<table><caption style="text-align:left"><b>{title}</b></caption><tbody>{rows}</tbody></table>'
