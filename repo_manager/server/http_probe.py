"""The few HTTP calls that starting a server needs, without a client library."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from repo_manager.errors import ServerRefusedError, ServerUnreachableError
from repo_manager.server.transport import without_stack

__all__ = ["HttpProbe"]


class HttpProbe:
    """Asks one Triton over HTTP; a connection a call.

    Args:
        host: where it listens.
        port: its HTTP port.
        headers: sent with every request, that of a restricted API for instance.
    """

    def __init__(self, host: str, port: int, headers: Mapping[str, str] | None = None) -> None:
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._host = host
        self._port = port

    def status(self, path: str, timeout_s: float) -> int | None:
        """Return the status of a GET, or `None` when nobody answers."""
        try:
            return self._request("GET", path, None, timeout_s)[0]
        except (OSError, http.client.HTTPException):
            return None

    def server_id(self, timeout_s: float) -> str | None:
        """Return the name that the server was started with, or `None` when nobody answers as a Triton does."""
        try:
            status, body = self._request("GET", "/v2", None, timeout_s)
            return str(json.loads(body)["name"]) if status == 200 else None
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
            return None

    def index(self, timeout_s: float) -> list[dict[str, Any]]:
        """Return the repository index as Triton gives it."""
        answer = json.loads(self._call("/v2/repository/index", timeout_s))
        return [dict(entry) for entry in answer]

    def load(self, model: str, timeout_s: float) -> None:
        """Load a model.

        Raises:
            ServerRefusedError: it failed; with Triton's reason.
            ServerUnreachableError: no answer within `timeout_s`.
        """
        self._call(f"/v2/repository/models/{quote(model, safe='')}/load", timeout_s)

    def _call(self, path: str, timeout_s: float) -> bytes:
        try:
            status, body = self._request("POST", path, b"{}", timeout_s)
        except (OSError, http.client.HTTPException) as exc:
            raise ServerUnreachableError(
                f"http://{self._host}:{self._port}{path}: {exc or type(exc).__name__}"
            ) from exc
        if status != 200:
            raise ServerRefusedError(_reason(body, status))
        return body

    def _request(self, method: str, path: str, body: bytes | None, timeout_s: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        try:
            connection.request(method, path, body=body, headers=self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def _reason(body: bytes, status: int) -> str:
    try:
        return without_stack(str(json.loads(body)["error"]))
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {status}"
