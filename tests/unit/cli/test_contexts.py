"""Contexts: which repository a command works on, and the guards against changing the wrong one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from repo_manager import samples
from repo_manager.files import document
from repo_manager.repository.scan import find_model
from repo_manager.repository.tags import model_state
from repo_manager.repository.transfer import copy_version
from repo_manager.settings import use_context

Run = Callable[..., Any]


@pytest.fixture
def places(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """Two repositories with a model each, as the contexts `staging` (the default) and `prod` (protected)."""
    found = {name: tmp_path / name for name in ("staging", "prod")}
    assert run("add", samples.sample_model(), "-n", "digits", "-r", found["staging"], "-q").code == 0
    copy_version(found["staging"], "digits", 1, found["prod"])
    file = tmp_path / "contexts.yaml"
    file.write_text(
        f"context: staging\ncontexts:\n  staging: {{repository: {found['staging']}}}\n"
        f"  prod: {{repository: {found['prod']}, server: 'grpc://127.0.0.1:1', protected: true}}\n"
    )
    monkeypatch.setenv("REPO_MANAGER_SETTINGS", str(file))
    yield found
    use_context(None)


def test_a_context_chooses_the_repository_and_is_in_every_result(run: Run, places: dict[str, Path]) -> None:
    assert run("tag", "digits:1", "best").code == 0
    assert model_state(places["staging"], "digits").tags == {"best": 1}
    for context, tags in (("staging", ["best"]), ("prod", [])):
        shown = json.loads(run("show", "digits:1", "--context", context, "--json").out)
        assert (shown["context"], shown["tags"]) == (context, tags)
        for command in (("list",), ("history", "digits"), ("adopt", "--dry-run"), ("verify",)):
            shown = json.loads(run(*command, "--context", context, "--json").out)
            assert shown["context"] == context, command
    assert run("list", "--context", "prod").out.startswith("Context: prod (protected)\n")
    assert run("list", "--context", "none", "-r", places["staging"]).out.count("Context:") == 0


def test_an_unknown_context_is_named_with_those_there_are(run: Run, places: dict[str, Path]) -> None:
    ended = run("list", "--context", "prd")
    assert (ended.code, "there is staging, prod" in ended.err, "Did you mean 'prod'?" in ended.err) == (2, True, True)
    assert f"{document('contexts.md')} shows how" in run("list", "--context", "elsewhere").err


@pytest.mark.parametrize(
    "arguments",
    [
        ("tag", "digits:1", "x", "-r", "PROD", "--context", "none"),
        ("remove", "digits", "-r", "PROD", "--context", "none"),
        ("config", "digits", "--set", "instance_group.count=2", "-r", "PROD", "--context", "none"),
        ("deploy", "digits", "--to", "grpc://127.0.0.1:1"),
        ("undeploy", "digits", "--to", "grpc://127.0.0.1:1"),
        ("copy", "digits:1", "--into", "PROD"),
        ("tag", "digits:1", "x", "-r", "PROD"),
    ],
)
def test_a_protected_context_changes_only_where_it_is_named(
    run: Run, places: dict[str, Path], arguments: tuple[str, ...]
) -> None:
    before = (model_state(places["prod"], "digits"), (places["prod"] / "digits/config.pbtxt").read_bytes())
    ended = run(*(str(places["prod"]) if word == "PROD" else word for word in arguments))
    assert ended.code == 2
    assert "context" in ended.err
    assert before == (model_state(places["prod"], "digits"), (places["prod"] / "digits/config.pbtxt").read_bytes())


def test_a_protected_context_is_no_default(run: Run, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPO_MANAGER_CONTEXT", "prod")
    assert run("list").out.startswith("Context: prod")
    assert run("config", "digits").code == 0
    assert run("remove", "digits", "--dry-run").code == 0
    refused = run("remove", "digits")
    assert (refused.code, "--context prod" in refused.err) == (2, True)
    assert f"`remove` would change {places['prod']} of the protected context 'prod'" in refused.err
    monkeypatch.setenv("REPO_MANAGER_REPOSITORY", str(places["staging"]))
    assert str(places["prod"]) in run("list").out, "what is named wins over the rest of the environment"
    assert run("tag", "digits:1", "x", "--context", "prod").code == 0
    assert model_state(places["prod"], "digits").tags == {"x": 1}


def test_the_default_of_the_file_gives_way_as_a_whole(
    run: Run, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPO_MANAGER_REPOSITORY", str(places["prod"]))
    listed = run("list")
    assert str(places["prod"]) in listed.out
    assert "Context:" not in listed.out


def test_a_copy_names_the_context_that_it_goes_to(run: Run, places: dict[str, Path]) -> None:
    assert run("add", samples.sample_model(), "-n", "digits", "-p", "fp16", "-q").code == 0
    assert run("copy", "digits:2", "--into", "context:nowhere").code == 2
    assert run("copy", "digits:2", "--into", "context:prod").code == 0
    assert [each.version for each in find_model(places["prod"], "digits").versions] == [1, 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("contexts: [a]\n", "expected a mapping"),
        ("contexts: {a: 1}\n", "expected a mapping"),
        ("contexts: {a: {repo: x}}\n", "context a: there is no setting repo"),
        ("contexts: {a: {protected: 1}}\n", "protected is 1"),
        ("context: b\ncontexts: {a: {repository: x}}\n", "no context 'b'"),
    ],
)
def test_wrong_contexts_are_told(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    monkeypatch.setenv("REPO_MANAGER_SETTINGS", str(file))
    ended = run("list")
    assert ended.code == 2
    assert said in ended.err
