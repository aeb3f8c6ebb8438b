"""How servers are reached by the settings: TLS, client certificates, headers and tokens."""

from __future__ import annotations

from repo_manager.errors import UsageError
from repo_manager.server.credentials import read_headers, read_token
from repo_manager.server.transport import ClientOptions
from repo_manager.settings import Settings

__all__ = ["connection_of"]


def connection_of(settings: Settings) -> ClientOptions:
    """Return how a client connects.

    Args:
        settings: a token in them comes before a file of one.

    Raises:
        UsageError: a file cannot be read or has the wrong content (its content is never quoted).
    """
    if settings.tls_key is not None and settings.tls_cert is None:
        raise UsageError("--tls-key was given without --tls-cert", hint="Mutual TLS needs both.")
    token = settings.token or None
    if token is None and settings.token_file is not None:
        token = read_token(settings.token_file)
    return ClientOptions(
        headers={} if settings.header_file is None else read_headers(settings.header_file),
        token=token,
        root_certificates=settings.tls_ca,
        client_certificate=settings.tls_cert,
        client_key=settings.tls_key,
        server_name=settings.tls_server_name,
    )
