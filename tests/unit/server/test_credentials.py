from __future__ import annotations

from pathlib import Path

import pytest

from repo_manager.errors import UsageError
from repo_manager.server.credentials import read_headers, read_token
from repo_manager.server.transport import ClientOptions, ServerUrl


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "file"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_headers_are_read_with_comments_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "# ours\n\nadmin-key: hush: hush\r\nX-Empty:\n")
    assert read_headers(path) == {"admin-key": "hush: hush", "X-Empty": ""}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hush", "line 1: expected `Name: value`"),
        ("a: b\nhush hush: x", "line 2: expected"),
        ("key-bin: hush", "ends in -bin"),
        ("key: hush\x07", "printable ASCII"),
        ("key: hüsh", "printable ASCII"),
        ("Key: hush\nkey: hush", "line 2: header key comes twice"),
        (b"\xff\xfe", "not text"),
    ],
)
def test_a_wrong_headers_file_is_named_and_never_quoted(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_headers(write(tmp_path, content))
    assert "hush" not in str(caught.value)
    assert "hüsh" not in str(caught.value)


def test_a_token_is_one_line(tmp_path: Path) -> None:
    assert read_token(write(tmp_path, "  secret\n\n")) == "secret"
    for content, message in (("", "found 0"), ("secret\nother", "found 2"), ("sec\x01ret", "printable")):
        with pytest.raises(UsageError, match=message) as caught:
            read_token(write(tmp_path, content))
        assert "secret" not in str(caught.value)
    with pytest.raises(UsageError, match="No such file"):
        read_token(tmp_path / "none")


def test_one_set_of_headers_opens_restricted_apis_over_both_protocols() -> None:
    for name in ("Admin-Key", "triton-grpc-protocol-admin-key"):
        options = ClientOptions(headers={name: "hush"}, token="secret")
        assert options.all_headers("grpc")["triton-grpc-protocol-admin-key"] == "hush"
        assert options.all_headers("http")["admin-key"] == "hush"
        assert options.all_headers("http")["authorization"] == "Bearer secret"
        assert "triton-grpc-protocol-authorization" not in options.all_headers("grpc")


def test_what_cannot_be_sent_is_refused_unquoted() -> None:
    for options in ({"headers": {"key": "hush\n"}}, {"token": "hush\n"}):
        with pytest.raises(UsageError, match="printable ASCII") as caught:
            ClientOptions(**options)
        assert "hush" not in str(caught.value)


def test_a_password_in_a_url_is_not_repeated() -> None:
    with pytest.raises(UsageError, match="--token-file") as caught:
        ServerUrl.parse("http://user:hush@host:1")
    assert "hush" not in str(caught.value)
