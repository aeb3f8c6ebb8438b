from __future__ import annotations

import re
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.json_documents import check_results

from repo_manager.cli.main import main


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ended]
# Packages a test file may import at its start -> the extra with them.
EXTRAS = {
    "PIL": "images",
    "cryptography": "sign",
    "kubernetes_validate": "dev",
    "lightkube": "k8s",
    "model_signing": "sign",
    "obstore": "cloud",
}


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip a file whose extra is not installed."""
    report = yield
    missing = re.search(r"No module named '(\w+)", str(report.longrepr)) if report.failed else None
    if missing is not None and missing[1] in EXTRAS:
        report.outcome = "skipped"
        report.longrepr = (report.nodeid, 0, f"Skipped: needs the extra [{EXTRAS[missing[1]]}]")
    return report


@pytest.fixture(autouse=True)
def _documents_follow_their_schemas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every document printed by a command in a test follows the published schema."""
    check_results(monkeypatch)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command in this process, with settings of its own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["repo-manager", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0 if code is None else 1, captured.out, captured.err)

    return run
