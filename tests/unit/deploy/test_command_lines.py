"""No asset and no document shows a command the tool lacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command_lines import ClickException, Exit, MissingParameter, command_lines, files_of, parse

from repo_manager.settings import use_context

ROOT = Path(__file__).parents[3]
FILES = [
    *files_of(ROOT / "deploy"),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("*.md")),
    ROOT / "model_repository" / "README.md",
]


@pytest.fixture(autouse=True)
def contexts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The contexts named in documents. An option with a context is read together with the command line."""
    settings = tmp_path / "settings.yaml"
    settings.write_text("contexts: {prod: {repository: prod}, staging: {repository: staging}}\n", encoding="utf-8")
    monkeypatch.setenv("REPO_MANAGER_SETTINGS", str(settings))
    yield
    use_context(None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_line_is_one_that_the_tool_takes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for found in command_lines(text, prose=path.suffix == ".md"):
        try:
            parse(found.words)
        except Exit:  # --help and --version
            continue
        except MissingParameter:
            assert found.mention, f"an argument is missing: repo-manager {' '.join(found.words)}"
        except ClickException as exc:
            pytest.fail(f"repo-manager {' '.join(found.words)}: {exc.message}")


def test_assets_hold_commands_at_all() -> None:
    found = [each for path in files_of(ROOT / "deploy") for each in command_lines(path.read_text(encoding="utf-8"))]
    assert len(found) > 15


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("repo-manager deploy a:1 --to x | tee log", [["deploy", "a:1", "--to", "x"]]),
        ('repo-manager add "$F" \\\n  --name "${N:-a}" --json >"$r/x"', [["add", "1", "--name", "a", "--json"]]),
        ('repo-manager loadtest "$1" ${gates[@]+"${gates[@]}"} -q', [["loadtest", "1", "-q"]]),
        ("the repo-manager developers", []),
        ("x=(repo-manager status) # repo-manager list", [["status"], ["list"]]),
    ],
)
def test_how_they_are_found(text: str, words: list[list[str]]) -> None:
    assert [found.words for found in command_lines(text)] == words


@pytest.mark.parametrize("line", ["deploy a --nope", "add", "loadtest a --concurrency", "serve --http-port x"])
def test_a_wrong_one_fails(line: str) -> None:
    with pytest.raises(ClickException):
        parse(line.split())
