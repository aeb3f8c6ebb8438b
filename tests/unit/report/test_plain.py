from __future__ import annotations

import io

import pytest
from rich.console import Console

from repo_manager.report.layout import key_values, make_table
from repo_manager.report.plain import plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model", "model"),
        ("two\nlines\tand é 日本", "two\nlines\tand é 日本"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\rb", "a\\rb"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\udcff", "\\udcff"),
    ],
)
def test_what_a_terminal_would_act_on_is_written_out(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_tables_are_plain() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(make_table("\x1b[31mtitle", ["a"], [["\x1b[31mcell"]]), key_values([("\x1bkey", "\x1bvalue")]))
    assert "\x1b" not in console.file.getvalue()  # type: ignore[attr-defined]
    assert "\\x1b[31mcell" in console.file.getvalue()  # type: ignore[attr-defined]
