from __future__ import annotations

import shutil
import ssl
from pathlib import Path

import pytest
from support.certificates import make_certificates

from repo_manager.errors import ServerUnreachableError, UsageError
from repo_manager.tls import TlsFiles, tls_context

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with openssl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-made authority and, signed by it, a server's and a client's certificate."""
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder)
    return folder


@pytest.fixture
def server_side(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    context.load_verify_locations(folder / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


@pytest.fixture
def files(folder: Path) -> TlsFiles:
    return TlsFiles(folder / "ca.pem", folder / "client.pem", folder / "client.key", "triton.test")


@pytest.mark.parametrize("size", [5, 1_000_000])
def test_requests_of_any_size_over_https(http_server, load, server_side, files, size):
    server = http_server(lambda number: "split" if number % 3 == 0 else "ok", tls=server_side)
    whole = load("http", server.port, (b"a" * size, b"b" * size), tls=files).run(0.3, slots=3)
    assert whole.errors == 0
    assert whole.latencies.count > 4
    assert {bytes(body[:1]) for body in server.bodies} == {b"a", b"b"}
    assert {len(body) for body in server.bodies} == {size}


@pytest.mark.parametrize("size", [5, 1_000_000])
def test_requests_of_any_size_over_encrypted_grpc(grpc_server, load, server_side, files, size):
    server = grpc_server(lambda number: "ok", tls=server_side)
    whole = load("grpc", server.port, (b"a" * size,), tls=files).run(0.3, slots=4)
    assert whole.errors == 0
    assert whole.latencies.count > 4
    assert server.protocol_errors == []
    assert {len(body) for body in server.bodies} == {size}
    assert server.headers[0][":scheme"] == "https"


def test_a_server_that_is_not_trusted_is_not_loaded(http_server, load, server_side, files, folder):
    server = http_server(lambda number: "ok", tls=server_side)
    for wrong in (TlsFiles(), TlsFiles(files.root_certificates, server_name="other.test")):
        with pytest.raises(ServerUnreachableError, match="handshake"):
            load("http", server.port, tls=wrong).run(0.1)
    assert server.requests == 0


def test_a_server_that_wants_a_certificate_says_so(grpc_server, load, server_side, files, folder):
    server = grpc_server(lambda number: "ok", tls=server_side)
    bare = TlsFiles(files.root_certificates, server_name=files.server_name)
    with pytest.raises(ServerUnreachableError, match=r"(?i)certificate"):
        load("grpc", server.port, tls=bare).run(0.1)


def test_a_file_that_is_no_certificate(folder):
    with pytest.raises(UsageError, match="TLS files"):
        tls_context(TlsFiles(folder / "extensions"))
