"""A TLS socket with a plain non-blocking one's manners, for the wire clients."""

from __future__ import annotations

import functools
import socket
import ssl
from collections.abc import Sequence

from repo_manager.errors import ServerUnreachableError
from repo_manager.tls import TlsFiles, tls_context

__all__ = ["TlsSocket", "wrap"]

_JOINED_BYTES = 65_536
_context = functools.lru_cache(maxsize=8)(tls_context)  # shared by a worker's connections


def wrap(sock: socket.socket, host: str, files: TlsFiles, protocol: str) -> TlsSocket:
    """Shake hands on a connected, blocking socket.

    Raises:
        UsageError: as `tls_context`.
        ServerUnreachableError: the certificate is not trusted, the server wants one, or speaks no TLS.
    """
    context = _context(files, protocol)
    try:
        wrapped = context.wrap_socket(sock, server_hostname=files.server_name or host)
    except (ssl.SSLError, OSError) as exc:
        sock.close()
        raise ServerUnreachableError(
            f"{host} refused or failed the TLS handshake: {exc}",
            hint="Check the authorities (--tls-ca), the client's certificate, the name, and that the port speaks TLS.",
        ) from exc
    return TlsSocket(wrapped)


class TlsSocket:
    """A TLS socket that behaves as a plain non-blocking one: `BlockingIOError` when it would have to wait.

    What OpenSSL has already decrypted does not wake an `epoll`, so `recv` never leaves any of it behind.
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        sock.setblocking(False)

    def fileno(self) -> int:
        """Return the socket's file descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket without waiting for the peer's farewell."""
        self._sock.close()

    def recv(self, size_bytes: int) -> bytes:
        """Return what came, at least `size_bytes` if that much is there; empty at the end.

        Raises:
            BlockingIOError: nothing came.
            OSError: the peer is gone.
        """
        parts: list[bytes] = []
        got = 0
        while got < size_bytes or self._sock.pending():
            try:
                part = self._sock.recv(size_bytes)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if not parts:
                    raise BlockingIOError from None
                break
            except ssl.SSLError as exc:
                if parts:
                    break
                if isinstance(exc, ssl.SSLEOFError):
                    return b""
                raise
            if not part:
                break
            parts.append(part)
            got += len(part)
        return b"".join(parts)

    def send(self, data: bytes | memoryview) -> int:
        """Send from the start of `data`; returns how much went.

        Raises:
            BlockingIOError: the socket is full.
            OSError: the peer is gone.
        """
        try:
            return self._sock.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def sendmsg(self, buffers: Sequence[bytes | memoryview]) -> int:
        """Send from the start of the buffers; small ones share a record.

        Raises:
            BlockingIOError: the socket is full.
            OSError: the peer is gone.
        """
        if len(buffers[0]) >= _JOINED_BYTES:
            return self.send(buffers[0])
        joined: list[bytes | memoryview] = []
        size = 0
        for buffer in buffers:
            joined.append(buffer)
            size += len(buffer)
            if size >= _JOINED_BYTES:
                break
        return self.send(b"".join(joined))
