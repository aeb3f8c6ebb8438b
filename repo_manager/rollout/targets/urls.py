"""The servers named by `--to`: URLs, files of URLs, and every address behind a DNS name."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from repo_manager.errors import ServerUnreachableError, UsageError
from repo_manager.files import reason_of
from repo_manager.server.client import TritonClient
from repo_manager.server.transport import ClientOptions, ServerUrl

__all__ = ["CLUSTERS", "ServerAddress", "To", "connect", "is_cluster", "resolve_targets"]

_DNS = re.compile(r"dns(?:\+(?P<protocol>grpcs?|https?))?://(?P<name>[^/:\[\]]+)(?::(?P<port>\d{1,5}))?/?")
_DEFAULT_PORTS = {"grpc": 8001, "grpcs": 8001, "http": 8000, "https": 443}
CLUSTERS = ("k8s://", "kserve://")
_HINT = (
    "Write grpc://HOST:PORT, http://HOST:PORT (grpcs, https with TLS), dns://NAME:PORT for every address behind a "
    "name (dns+grpcs://, dns+http://, dns+https:// for the others), or @FILE with one of these a line."
)

Resolver = Callable[[str, int], Sequence[str]]
To = str | TritonClient | Sequence[str | TritonClient]
"""Servers: connected clients, or texts in the form of `--to`."""


@dataclasses.dataclass(frozen=True)
class ServerAddress:
    """One server.

    Attributes:
        url: URL with protocol, host and port, for instance `grpc://10.0.0.7:8001`.
        server_name: the name in its certificate when it was found by name but is reached by address. `None`: the URL's
            host.
    """

    url: str
    server_name: str | None = None

    def options(self, base: ClientOptions) -> ClientOptions:
        """Return how to connect to it. A given server name wins."""
        if self.server_name is None or base.server_name is not None or not ServerUrl.parse(self.url).tls:
            return base
        return dataclasses.replace(base, server_name=self.server_name)


def addresses_of(name: str, port: int) -> tuple[str, ...]:
    """Ask the system's resolver for every A and AAAA address of a name, sorted.

    Raises:
        ServerUnreachableError: it has none.
    """
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except OSError as exc:
        raise ServerUnreachableError(
            f"dns://{name}:{port}: the name cannot be resolved: {exc.strerror or exc}",
            hint="A headless service has addresses only while pods of it are ready: kubectl get endpoints.",
        ) from exc
    return tuple(sorted({str(each[4][0]) for each in found}))


def resolve_targets(texts: Sequence[str], *, resolver: Resolver = addresses_of) -> tuple[ServerAddress, ...]:
    """Return the servers named by texts, in that order, each once.

    Args:
        texts: URLs, `@FILE` or the path of an existing file (one of these texts a line; blank lines and lines with `#`
            do not count), `dns://NAME:PORT`.
        resolver: name and port -> addresses.

    Raises:
        UsageError: a text is none of these, a file cannot be read or names no server, or no text was given.
        ServerUnreachableError: a name has no address.
    """
    found = dict.fromkeys(target for text in texts for target in _of_text(text.strip(), resolver, None))
    if not found:
        raise UsageError("No server was named", hint=_HINT)
    return tuple(found)


def is_cluster(target: object) -> bool:
    """Return whether a target is in a cluster."""
    return isinstance(target, str) and target.startswith(CLUSTERS)


def connect(
    servers: Sequence[str | TritonClient], connection: ClientOptions, stack: contextlib.ExitStack
) -> list[TritonClient]:
    """Return a client of each server: those given, and one for each a text names, closed with the stack.

    Args:
        servers: connected clients, or texts as for `--to`: URLs, `dns://`, `@FILE`. Clients come first in the result.
        connection: TLS, headers and deadlines of clients.
        stack: closes the new clients at its end.

    Raises:
        UsageError: a text is not understood.
        ServerUnreachableError: a name has no address.
    """
    clients = [each for each in servers if isinstance(each, TritonClient)]
    texts = [each for each in servers if isinstance(each, str)]
    for found in resolve_targets(texts) if texts else ():
        clients.append(stack.enter_context(TritonClient.connect(found.url, found.options(connection))))
    return clients


def _of_text(text: str, resolver: Resolver, source: str | None) -> Iterator[ServerAddress]:
    where = "" if source is None else f"{source}: "
    if text.startswith(CLUSTERS):
        raise UsageError(
            f"{where}{text} is a whole deployment and cannot be mixed with servers",
            hint="Give it as the only --to.",
        )
    if text.startswith("@"):
        yield from _of_file(Path(text[1:]), resolver, source)
    elif match := _DNS.fullmatch(text):
        protocol = match["protocol"] or "grpc"
        port = int(match["port"] or _DEFAULT_PORTS[protocol])
        for address in resolver(match["name"], port):
            host = f"[{address}]" if ":" in address else address
            yield ServerAddress(str(ServerUrl.parse(f"{protocol}://{host}:{port}")), match["name"])
    elif "://" not in text and Path(text).is_file():
        yield from _of_file(Path(text), resolver, source)
    elif "://" not in text:
        raise UsageError(f"{where}{text!r} is neither a server's URL nor a file", hint=_HINT)
    else:
        yield ServerAddress(str(ServerUrl.parse(text)))


def _of_file(path: Path, resolver: Resolver, source: str | None) -> Iterator[ServerAddress]:
    if source is not None:
        raise UsageError(f"{source}: a file of servers cannot name another one ({path})")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path}: the file of servers cannot be read: {reason_of(exc)}") from exc
    entries = [
        (number, line.partition("#")[0].strip())
        for number, line in enumerate(lines, 1)
        if line.partition("#")[0].strip()
    ]
    if not entries:
        raise UsageError(f"{path}: the file names no server", hint=_HINT)
    for number, entry in entries:
        yield from _of_text(entry, resolver, f"{path}, line {number}")
