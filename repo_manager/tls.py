"""TLS for every client: files of trust and identity, and the contexts made of them.

It is below the packages because every load worker reads it and must stay small: it imports no gRPC.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from repo_manager.errors import UsageError
from repo_manager.optional import deferred
from repo_manager.sockets import Timer, connect

if TYPE_CHECKING:
    import ssl
else:
    ssl = deferred("ssl")

__all__ = ["TlsFiles", "grpc_pem", "speaks_tls", "tls_context"]

_HINT = "Give PEM files: --tls-ca with the authorities, --tls-cert and --tls-key with the client's certificate and key."
_ALPN = {"grpc": "h2", "http": "http/1.1"}


@dataclasses.dataclass(frozen=True)
class TlsFiles:
    """Trust and identity of an encrypted connection. Files, not a context, so it can be sent to a worker.

    Attributes:
        root_certificates: PEM file with the authorities to trust. `None` takes the system's.
        client_certificate: PEM file, for mutual TLS.
        client_key: PEM file, for mutual TLS.
        server_name: the name the server's certificate must have when it is not the URL's host.
    """

    root_certificates: Path | None = None
    client_certificate: Path | None = None
    client_key: Path | None = None
    server_name: str | None = None


def tls_context(files: TlsFiles, protocol: str | None = None) -> ssl.SSLContext:
    """Return a context to verify the server, offering the protocol by ALPN.

    Args:
        files: what to trust and show.
        protocol: `grpc` or `http`. `None` offers none.

    Raises:
        UsageError: a file cannot be read or is no certificate or key.
    """
    try:
        context = ssl.create_default_context(cafile=files.root_certificates)
        if files.client_certificate is not None:
            context.load_cert_chain(files.client_certificate, files.client_key)
    except OSError as exc:  # includes ssl.SSLError
        raise UsageError(f"The TLS files cannot be used: a certificate cannot be read: {exc}", hint=_HINT) from exc
    if protocol is not None:
        context.set_alpn_protocols([_ALPN[protocol]])
    return context


def grpc_pem(files: TlsFiles) -> dict[str, bytes | None]:
    """Return the arguments of `grpc.ssl_channel_credentials`.

    Raises:
        UsageError: a file cannot be read.
    """
    paths = {
        "root_certificates": files.root_certificates,
        "private_key": files.client_key,
        "certificate_chain": files.client_certificate,
    }
    try:
        return {name: None if path is None else path.read_bytes() for name, path in paths.items()}
    except OSError as exc:
        raise UsageError(f"The TLS files cannot be used: a certificate cannot be read: {exc}", hint=_HINT) from exc


def speaks_tls(host: str, port: int, *, timeout_s: float = 1.0) -> bool:
    """Ask a port, on a connection of its own, whether it answers in TLS. Its certificate does not matter.

    Args:
        host: name or address of the server.
        port: TCP port, 1 to 65535.
        timeout_s: a later answer is none.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    timer = Timer(timeout_s)
    try:
        with connect(host, port, timer) as sock:
            sock.settimeout(timer.left_s())
            with context.wrap_socket(sock, server_hostname=host):
                return True
    except ssl.SSLError as exc:
        return "ALERT" in (exc.reason or "")  # it requires a client certificate or another server name
    except (OSError, ValueError):
        return False
