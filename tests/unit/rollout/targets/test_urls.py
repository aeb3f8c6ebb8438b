from __future__ import annotations

import socket
from pathlib import Path

import pytest

from repo_manager.errors import ServerUnreachableError, UsageError
from repo_manager.rollout.options import Amount
from repo_manager.rollout.targets.urls import ServerAddress, resolve_targets
from repo_manager.server.transport import ClientOptions


def pods(name: str, port: int) -> tuple[str, ...]:
    return {"pods": ("10.0.0.1", "10.0.0.2"), "six": ("fd00::1",)}[name]


def urls(*texts: str) -> list[str]:
    return [target.url for target in resolve_targets(texts, resolver=pods)]


def test_urls_files_and_names_are_joined_in_order_each_once(tmp_path: Path) -> None:
    path = tmp_path / "servers"
    path.write_text("# the fleet\nhttp://h:8000  # one\n\ndns+grpcs://pods:9001\n")
    expected = ["grpc://a:1", "http://h:8000", "grpcs://10.0.0.1:9001", "grpcs://10.0.0.2:9001"]
    assert urls("grpc://a:1", f"@{path}", "grpc://a:1") == expected
    assert urls("grpc://a:1", str(path)) == expected


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("dns://six:1", "grpc://[fd00::1]:1"),
        ("dns://six", "grpc://[fd00::1]:8001"),
        ("dns+http://six", "http://[fd00::1]:8000"),
        ("dns+https://six", "https://[fd00::1]:443"),
    ],
)
def test_a_name_stands_for_grpc_unless_it_says_otherwise(text: str, url: str) -> None:
    assert urls(text) == [url]


def test_the_systems_resolver_finds_every_address_of_a_real_name() -> None:
    expected = {str(each[4][0]) for each in socket.getaddrinfo("localhost", 1, type=socket.SOCK_STREAM)}
    found = {target.url for target in resolve_targets(["dns://localhost:1"])}
    assert found == {f"grpc://{f'[{address}]' if ':' in address else address}:1" for address in expected}
    with pytest.raises(ServerUnreachableError, match="name cannot be resolved"):
        resolve_targets(["dns://nowhere.invalid:1"])


def test_a_server_found_by_name_is_checked_by_name_where_there_is_tls() -> None:
    target = ServerAddress("grpcs://10.0.0.1:1", "pods")
    assert target.options(ClientOptions()).server_name == "pods"
    assert target.options(ClientOptions(server_name="given")).server_name == "given"
    assert ServerAddress("grpc://10.0.0.1:1", "pods").options(ClientOptions()).server_name is None


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "No server was named"),
        (["nonsense"], "neither a server's URL nor a file"),
        (["ftp://h"], "has an unknown form"),
        (["dns://"], "has an unknown form"),
        (["@missing"], "cannot be read"),
        (["grpc://a:1", "k8s://ns/release"], "cannot be mixed"),
    ],
)
def test_anything_else_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_targets(texts, resolver=pods)


def test_a_files_faults_are_named_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "servers"
    path.write_text("grpc://a:1\nnonsense\n")
    with pytest.raises(UsageError, match="servers, line 2"):
        resolve_targets([str(path)])
    path.write_text(f"@{path}\n")
    with pytest.raises(UsageError, match="cannot name another"):
        resolve_targets([str(path)])
    path.write_text("# nobody\n")
    with pytest.raises(UsageError, match="names no server"):
        resolve_targets([str(path)])


@pytest.mark.parametrize(
    ("text", "total", "count"),
    [("3", 16, 3), ("10%", 16, 1), ("13%", 16, 2), ("100%", 7, 7), ("0", 5, 0), ("7%", 100, 7)],
)
def test_amounts_are_numbers_or_shares_rounded_down(text: str, total: int, count: int) -> None:
    assert Amount.parse(text, "--batch").of(total) == count


@pytest.mark.parametrize("text", ["", "-1", "1.5", "101%", "ten", "10 percent"])
def test_other_amounts_are_refused_with_the_options_name(text: str) -> None:
    with pytest.raises(UsageError, match="--batch"):
        Amount.parse(text, "--batch")
