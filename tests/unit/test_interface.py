"""The deprecation policy (docs/deprecation.md): nothing of the interface is lost without notice.

After a change that the policy allows: `python tools/interface.py`.
"""

from __future__ import annotations

import json

import pytest
from support.json_documents import tool

from repo_manager import __version__
from repo_manager.cli.main import RENAMED, Renamed, current_words


def parsed(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_no_option_and_no_name_is_lost() -> None:
    before, now = json.loads(tool("interface").RECORD.read_text()), tool("interface").interface()
    renamed = {(each.command, each.old) for each in RENAMED}
    lost = [
        (command, name)
        for command, names in before["options"].items()
        for name in names
        if name not in now["options"].get(command, ()) and (command, name) not in renamed
    ]
    assert lost == []
    assert set(before["names"]) <= set(now["names"])


def test_no_key_is_lost_and_no_type_changes_within_a_version_of_the_documents() -> None:
    before, now = json.loads(tool("interface").RECORD.read_text()), tool("interface").interface()
    assert before["json_version"] == now["json_version"]
    for command, paths in before["json"].items():
        assert {path: now["json"][command].get(path) for path in paths} == paths, command


@pytest.mark.parametrize("renamed", RENAMED, ids=lambda each: each.old)
def test_an_old_option_works_for_two_minor_releases_and_no_longer(renamed: Renamed) -> None:
    since, removed = parsed(renamed.since), parsed(renamed.removed_in)
    assert removed[0] > since[0] or removed[1] >= since[1] + 2
    assert parsed(__version__) < removed, f"{renamed.old}: take it out of RENAMED and rewrite the record"


def test_an_old_option_is_replaced_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["loadtest", "digits", "--until-saturation", "--json"]
    assert current_words(words) == ["loadtest", "digits", "--until", "saturation", "--json"]
    warning = capsys.readouterr().err
    assert "--until-saturation is deprecated since 0.1.0" in warning
    assert "Use --until saturation" in warning
    for other in (["compare", "a", "b", "--until-saturation"], ["loadtest", "digits", "--", "--until-saturation"]):
        assert current_words(other) == other
    assert capsys.readouterr().err == ""


def test_the_command_line_takes_an_old_option(run) -> None:
    ended = run("loadtest", "digits", "--until-saturation", "--duration", "0.01")
    assert ended.code == 2
    assert "--until-saturation is deprecated" in ended.err
    assert "--duration" in ended.err
    assert "No such option" not in ended.err
