"""Texts of others in our output: no secret comes back, nothing speaks to a terminal, to XML or to Markdown."""

from __future__ import annotations

import dataclasses
import io
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from repo_manager import errors
from repo_manager.errors import RepositoryError, ServerRefusedError
from repo_manager.report.layout import key_values, make_table
from repo_manager.report.load_files import load_junit, load_markdown, report_text
from repo_manager.report.terminal import Terminal
from repo_manager.server.answers import refusal
from repo_manager.server.backend_directory import WITHHELD, BackendDirectory
from repo_manager.server.command import environment_of
from repo_manager.server.installation import TritonInstallation
from repo_manager.server.transport import ClientOptions, ServerUrl

SECRETS = ("bearer-hush-value", "header-hush-value")
NASTY = "a\x00b\x1b[2Jc\x07d\ufffee\uffff\x9f\ud800 | `x` <b> *y* [z](http://evil) \r\n# head"


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_SECRETS", set())
    ClientOptions(token=SECRETS[0], headers={"admin-key": SECRETS[1]})


def nasty(report, text: str):
    """The report with a level that failed for a server's reason."""
    (first, *rest) = report.points
    return dataclasses.replace(report, points=(dataclasses.replace(first, outcome="failed", reason=text), *rest))


@pytest.mark.usefixtures("secrets")
def test_a_server_that_echoes_what_it_was_sent_gives_away_nothing(report, verdict, capsys) -> None:
    echo = f"you sent authorization: Bearer {SECRETS[0]} and {SECRETS[1]}"
    refused = refusal(ServerUrl.parse("grpc://h:1"), "load m", echo)
    texts = [str(refused), refused.reason or "", repr(refused), str(RepositoryError(echo, hint=echo))]
    report = dataclasses.replace(nasty(report, echo), notes=(echo,))
    for ending in (".html", ".json", ".md", ".xml", ".prom"):
        texts.append(report_text(Path(f"r{ending}"), report, verdict))
    for as_json in (False, True):
        terminal = Terminal(as_json=as_json)
        terminal.result({"reason": echo}, make_table("t", ["reason"], [[echo], [Text(echo)]]), echo, Text(echo))
        terminal.note(echo)
        terminal.warn(echo)
        terminal.error(ServerRefusedError(echo))
    texts += capsys.readouterr()
    for text in texts:
        assert not [secret for secret in SECRETS if secret in text]


def test_junit_is_xml_whatever_a_server_says(report, verdict) -> None:
    root = ElementTree.fromstring(load_junit(nasty(report, NASTY), verdict))
    assert any("\\x1b[2J" in failure.attrib["message"] for failure in root.iter("failure"))


def test_markdown_keeps_its_table_whatever_a_server_says(report, verdict) -> None:
    odd = dataclasses.replace(report, target=dataclasses.replace(report.target, model=NASTY), notes=(NASTY,))
    text = load_markdown(odd, verdict)
    assert not set(text) & {"\x00", "\x1b", "\r", "\x07"}
    assert "<b>" not in text
    assert "\n# head" not in text
    assert "[z](" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [len(line.replace("\\|", "").split("|")) for line in rows]
    assert len(set(cells)) <= 2  # one table of levels, one of gates


def test_a_page_holds_no_control_characters_whatever_a_server_says(report, verdict) -> None:
    page = report_text(Path("r.html"), dataclasses.replace(nasty(report, NASTY), notes=(NASTY, "a\u202eb")), verdict)
    assert not set(page) & {"\x00", "\x1b", "\x07", "\u202e"}
    assert "\\x1b" in page


def test_nothing_speaks_to_the_terminal(capsys) -> None:
    terminal = Terminal()
    table = make_table(NASTY, ["what"], [[NASTY], [Text(NASTY, style="red")]])
    terminal.result({}, table, key_values([(NASTY, NASTY), ("k", Text(NASTY))]), NASTY, Text(NASTY))
    terminal.show(Text(NASTY), NASTY)
    terminal.note(NASTY)
    terminal.error(RepositoryError(NASTY, hint=NASTY))
    shown = "".join(capsys.readouterr())
    assert not set(shown) & {"\x00", "\x1b", "\x07", "\x9f", "\ud800"}
    assert "\\x1b[2J" in shown


def test_a_styled_text_that_is_safe_keeps_its_style() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(make_table(None, ["what"], [[Text("bad", style="red")]]))
    assert "\x1b[31mbad" in console.file.getvalue()


def test_models_code_gets_what_it_needs_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)
    needed = {"HOME": "/h", "LC_ALL": "C", "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "0", "TRITON_X": "1"}
    hidden = {
        "REPO_MANAGER_TOKEN": "t", "REPO_MANAGER_KEY_PASSWORD": "p", "GITHUB_TOKEN": "t", "DATABASE_URL": "u:p@h",
        "NVIDIA_API_KEY": "k", "TRITON_SECRET": "s", "TORCH_PASSWORD": "p", "MY_OWN": "x", "PYTHONPATH": "/x",
    }  # fmt: skip
    cloud = {"AWS_SECRET_ACCESS_KEY": "s", "AWS_SESSION_TOKEN": "t", "GOOGLE_APPLICATION_CREDENTIALS": "f"}
    for name, value in {**needed, **hidden, **cloud, "PATH": "/bin"}.items():
        monkeypatch.setenv(name, value)
    triton = TritonInstallation(tmp_path, (), tmp_path, None, None)
    backends = BackendDirectory(tmp_path, None)
    found = environment_of({"ASKED_FOR": "x"}, triton, backends)
    own = {"PATH", "ASKED_FOR", "LD_LIBRARY_PATH", WITHHELD}
    assert set(found) == {*needed, *own}
    # Triton itself needs the credentials of an object store. Its models' processes do not get them.
    remote = environment_of({"ASKED_FOR": "x"}, triton, backends, remote=True)
    assert set(remote) == {*needed, *own, *cloud}
    assert set(remote[WITHHELD].split()) >= set(cloud)
