"""The `repo-manager` command before its modules are there."""

from __future__ import annotations

import gc
import sys

import pytest

from repo_manager.__main__ import main


class Interrupting:
    """Ctrl-C in the middle of an import."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "repo_manager.cli.main":
            raise KeyboardInterrupt


def test_ctrl_c_while_python_imports_is_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "repo_manager.cli.main", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


def test_a_command_runs_with_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr("repo_manager.cli.repository.scan", lambda *_, **__: seen.append(gc.isenabled()) or ())
    monkeypatch.setattr(sys, "argv", ["repo-manager", "list", "--json"])
    with pytest.raises(SystemExit):
        main()
    assert seen == [True]
