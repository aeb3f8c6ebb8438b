"""How a command reaches servers: TLS, client certificates, headers and tokens, the same for every command.

A secret comes from a file or from the environment. It is never an option's value, because any user of the machine can
read the process list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from repo_manager.cli.option_groups import option
from repo_manager.errors import UsageError
from repo_manager.pipeline.connection import connection_of
from repo_manager.server.transport import ClientOptions, ServerUrl
from repo_manager.settings import Settings, load_settings

__all__ = ["ConnectionFlags", "client_options", "urls_of"]


@dataclasses.dataclass(frozen=True)
class ConnectionFlags:
    """Connection options of the command line. `None`: the environment or the settings file decides."""

    PANEL: ClassVar[str] = "Connection"
    tls_ca: Path | None = option(
        "--tls-ca",
        metavar="FILE.pem",
        help="Authorities to trust for grpcs:// and https:// [default: the system's].",
    )
    tls_cert: Path | None = option("--tls-cert", metavar="FILE.pem", help="This client's certificate (mutual TLS).")
    tls_key: Path | None = option("--tls-key", metavar="FILE.pem", help="The key of --tls-cert.")
    tls_server_name: str | None = option(
        "--tls-server-name", metavar="NAME", help="Name in the server's certificate, if it differs from the URL's host."
    )
    header_file: Path | None = option(
        "--header-file",
        metavar="FILE",
        help="File of headers to send, one `Name: value` per line (Triton's restricted APIs).",
    )
    token_file: Path | None = option(
        "--token-file", metavar="FILE", help="File with a bearer token to send [default: $REPO_MANAGER_TOKEN]."
    )


def client_options(
    connection: ConnectionFlags, urls: Sequence[str] = (), *, settings: Settings | None = None
) -> ClientOptions:
    """Return how a client connects: the options, else the environment, else the settings file.

    Args:
        connection: the command line's options. A field of `None` is left to the environment and the settings.
        urls: the command's servers. With TLS options, at least one URL must be encrypted.
        settings: the validated settings. `None`: read them.

    Raises:
        UsageError: a file cannot be read or has the wrong content (never quoted), or there are TLS options but no
            encrypted URL.
    """
    settings = load_settings() if settings is None else settings
    tls = {name: getattr(connection, name) for name in ("tls_ca", "tls_cert", "tls_key", "tls_server_name")}
    given = [f"--{name.replace('_', '-')}" for name, value in tls.items() if value is not None]
    if given and urls and not any(ServerUrl.parse(url).tls for url in urls):
        raise UsageError(
            f"{', '.join(given)}: none of the servers is reached over TLS ({', '.join(urls)})",
            hint="Use grpcs:// or https://, or leave the option out.",
        )
    chosen = {name: value for name, value in dataclasses.asdict(connection).items() if value is not None}
    if connection.token_file is not None:
        chosen["token"] = None
    return connection_of(dataclasses.replace(settings, **chosen))


def urls_of(texts: Sequence[str]) -> list[str]:
    """Return the targets whose URL says whether it is encrypted. Files of servers are left out."""
    schemes = ("grpc://", "grpcs://", "http://", "https://")
    urls = [text.replace("dns://", "grpc://", 1).removeprefix("dns+") for text in texts]
    return urls if all(url.startswith(schemes) for url in urls) else []
