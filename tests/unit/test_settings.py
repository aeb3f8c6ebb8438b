from __future__ import annotations

from pathlib import Path

import pytest

from repo_manager.errors import UsageError
from repo_manager.settings import load_settings


def environment(tmp_path: Path, text: str | None = None, **more: str) -> dict[str, str]:
    if text is not None:
        path = tmp_path / "repo-manager" / "settings.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return {"XDG_CONFIG_HOME": str(tmp_path), **more}


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    settings = load_settings(environment(tmp_path))
    assert settings.repository == "model_repository"
    assert settings.server is None


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    text = "repository: /from/file\nserver: grpc://a:1\n"
    settings = load_settings(environment(tmp_path, text, REPO_MANAGER_SERVER="grpc://b:2"))
    assert settings.repository == "/from/file"
    assert settings.server == "grpc://b:2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("repositry: /x\n", "repositry from .*settings.yaml"),
        ("- a\n", "expected a mapping"),
        ("a: [\n", "not valid YAML"),
        ("repository: [1]\n", "repository from"),
    ],
)
def test_a_wrong_file_is_told_where_and_what(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_settings(environment(tmp_path, text))


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such settings file"):
        load_settings({"REPO_MANAGER_SETTINGS": str(tmp_path / "none.yaml")})


def test_the_keys_of_the_policy_lie_relative_to_the_file(tmp_path: Path) -> None:
    settings = load_settings(environment(tmp_path, "signed_by: [keys/a.pub, /srv/b.pub]\n"))
    assert settings.signed_by == (tmp_path / "repo-manager/keys/a.pub", Path("/srv/b.pub"))


def test_the_keys_of_the_policy_come_from_the_environment_as_a_list(tmp_path: Path) -> None:
    text = "signed_by: [keys/a.pub]\n"
    settings = load_settings(environment(tmp_path, text, REPO_MANAGER_SIGNED_BY="b.pub:/srv/c.pub"))
    assert settings.signed_by == (Path("b.pub"), Path("/srv/c.pub"))


@pytest.mark.parametrize("text", ["signed_by: 3", "signed_by: [1]", "signed_by: ", "signed_bye: [a.pub]"])
def test_a_policy_that_cannot_be_read_is_an_error_and_no_policy(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="signed_by"):
        load_settings(environment(tmp_path, text + "\n"))


def test_allowed_modules_are_texts_from_the_file_and_the_environment(tmp_path: Path) -> None:
    text = "code_modules: [company.inputs, more]\nsigned_by: [a.pub]\n"
    found = environment(tmp_path / "a", text)
    assert load_settings(found).code_modules == ("company.inputs", "more")
    given = {**found, "REPO_MANAGER_CODE_MODULES": "one:two"}
    assert load_settings(given).code_modules == ("one", "two")
    with pytest.raises(UsageError, match="code_modules"):
        load_settings(environment(tmp_path / "b", "code_modules: 3"))
