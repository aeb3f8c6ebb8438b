from __future__ import annotations

import pytest

from repo_manager.errors import UsageError
from repo_manager.server.transport import ClientOptions, ServerUrl


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("grpc://h:1", ServerUrl("grpc", "h:1", tls=False)),
        ("grpcs://h", ServerUrl("grpc", "h:8001", tls=True)),
        ("http://h", ServerUrl("http", "h:8000", tls=False)),
        ("https://h/triton/", ServerUrl("http", "h:443/triton", tls=True)),
        ("grpc://[::1]:8001", ServerUrl("grpc", "[::1]:8001", tls=False)),
    ],
)
def test_urls_are_read(url: str, expected: ServerUrl) -> None:
    assert ServerUrl.parse(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://h:1",
        "grpc://",
        "http://h:port",
        "http://user:pw@h",
        "grpc://h:1/path",
        "grpc://h:99999",
    ],
)
def test_other_urls_are_refused_with_the_right_form(url: str) -> None:
    with pytest.raises(UsageError, match="grpc://HOST:PORT") as caught:
        ServerUrl.parse(url)
    assert "pw" not in str(caught.value) or "pw" in url


def test_secrets_are_sent_and_never_shown() -> None:
    options = ClientOptions(headers={"Triton-Grpc-Protocol-Key": "hush"}, token="secret")
    assert options.all_headers() == {"triton-grpc-protocol-key": "hush", "authorization": "Bearer secret"}
    assert "hush" not in repr(options)
    assert "secret" not in repr(options)
