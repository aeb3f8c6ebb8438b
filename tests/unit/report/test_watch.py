"""`status --watch`: in place on a terminal, elsewhere only the changes."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.text import Text

from repo_manager.report.terminal import Terminal

FRAMES = [({"ready": number}, [Text(f"ready {number}")]) for number in (1, 1, 2)]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_each_change_once(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().watch(FRAMES)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("ready")] == ["ready 1", "ready 2"]


def test_json_is_one_line_a_change_with_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(as_json=True, context="prod (protected)").watch(FRAMES)
    documents = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert documents == [{"context": "prod", "ready": 1}, {"context": "prod", "ready": 2}]


def test_a_terminal_is_redrawn_in_place_and_never_scrolls(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("LINES", "5")
    monkeypatch.setenv("COLUMNS", "40")
    Terminal().watch(
        [(number, [Text("\n".join(f"line {line} of {number}" for line in range(9)))]) for number in range(2)]
    )
    _, *frames = screen.getvalue().split("\x1b[H")[-3:]
    assert len(frames) == 2
    assert all(frame.count("\n") == 4 for frame in frames), "one line fewer than the terminal has"
    assert "line 0 of 1" in frames[1]
    assert "line 8 of 1" not in frames[1]
