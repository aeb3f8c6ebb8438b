from __future__ import annotations

import pytest

from repo_manager.report import progress as module
from repo_manager.report.progress import build_bar
from repo_manager.report.terminal import Terminal


def steps() -> list[tuple[str, int, int]]:
    return [("Building", 0, 2), ("Inner", 0, 1), ("Inner", 1, 1), ("Building", 1, 2), ("Building", 2, 2)]


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "_LINE_EVERY_S", 0.0)
    with build_bar(Terminal()) as tell:
        for step in steps():
            tell(*step)
    lines = capsys.readouterr().err.splitlines()
    assert "Building: 1 of 2" in lines
    assert "Inner: 1 of 1" in lines


def test_a_short_build_says_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with build_bar(Terminal()) as tell:
        for step in steps():
            tell(*step)
    assert capsys.readouterr().err == ""


def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "_LINE_EVERY_S", 0.0)
    with build_bar(Terminal(quiet=True)) as tell:
        for step in steps():
            tell(*step)
    assert capsys.readouterr().err == ""
