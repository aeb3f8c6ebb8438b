from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repo_manager.cli.connection import ConnectionFlags, client_options
from repo_manager.errors import UsageError
from repo_manager.settings import load_settings
from repo_manager.types import as_json

Run = Callable[..., Any]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "headers").write_text("admin-key: hush\n")
    (tmp_path / "token").write_text("secret\n")
    return tmp_path


def test_options_win_over_the_environment_and_that_over_nothing(files: Path) -> None:
    plain = load_settings({})
    assert client_options(ConnectionFlags(), settings=plain).all_headers() == {}
    given = ConnectionFlags(
        tls_ca=Path("ca"),
        tls_cert=Path("cert"),
        tls_key=Path("key"),
        tls_server_name="name",
        header_file=files / "headers",
        token_file=files / "token",
    )
    options = client_options(given, ["grpcs://h:1"], settings=plain)
    assert (options.root_certificates, options.client_certificate) == (Path("ca"), Path("cert"))
    assert (options.client_key, options.server_name) == (Path("key"), "name")
    assert options.all_headers() == {"admin-key": "hush", "authorization": "Bearer secret"}
    environment = {
        "REPO_MANAGER_TLS_CA": "other",
        "REPO_MANAGER_TLS_SERVER_NAME": "other",
        "REPO_MANAGER_TOKEN": "other",
        "REPO_MANAGER_HEADER_FILE": str(files / "headers"),
    }
    settings = load_settings(environment)
    assert client_options(given, settings=settings) == options
    taken = client_options(ConnectionFlags(), settings=settings)
    assert (taken.root_certificates, taken.server_name, taken.token) == (Path("other"), "other", "other")
    assert taken.headers == {"admin-key": "hush"}
    by_file = load_settings({"REPO_MANAGER_TOKEN_FILE": str(files / "token")})
    assert client_options(ConnectionFlags(), settings=by_file).token == "secret"


def test_a_token_never_shows_in_settings() -> None:
    settings = load_settings({"REPO_MANAGER_TOKEN": "secret"})
    assert "secret" not in repr(settings) + str(as_json(settings))


def test_tls_options_for_a_server_without_tls_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--tls-ca: none of the servers is reached over TLS \(grpc://h:1\)"):
        client_options(ConnectionFlags(tls_ca=Path("ca")), ["grpc://h:1"], settings=load_settings({}))
    with pytest.raises(UsageError, match="without --tls-cert"):
        client_options(ConnectionFlags(tls_key=Path("key")), settings=load_settings({}))


@pytest.mark.parametrize("command", ["deploy", "rollback", "status"])
def test_every_command_that_reaches_a_server_reads_the_files(run: Run, files: Path, command: str) -> None:
    from repo_manager import samples

    repository = files / "repository"
    run("add", samples.sample_model(), "--name", "digits", "-r", repository)
    to = ("--to", "grpc://127.0.0.1:9", "-r", repository, "--json")
    for option in ("--token-file", "--header-file"):
        ended = run(command, "digits", *to, option, files / "none")
        assert ended.code == 2, ended.err
        assert "cannot be read" in json.loads(ended.out)["error"]["message"]
    ended = run(command, "digits", *to, "--tls-server-name", "x")
    assert (ended.code, "--tls-server-name" in ended.err) == (2, True)
