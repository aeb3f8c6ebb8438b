"""Answers of an API server: objects, refusals in words, and how much of either is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from repo_manager.errors import ServerRefusedError, ServerUnreachableError
from repo_manager.files import document

__all__ = [
    "REACH",
    "ConflictError",
    "Object",
    "limited",
    "may_pass",
    "refused",
    "seen",
]

Object = dict[str, Any]
"""A Kubernetes object as JSON."""

REACH = "kubectl cluster-info shows whether it can be reached from here."
_MOST_BYTES = 32 << 20


class ConflictError(ServerRefusedError):
    """Somebody has changed the object since it was read."""


class _Seen(Object):
    """An object as the API server told it. A missing field is the server's fault, and no KeyError."""

    def __missing__(self, name: str) -> Any:
        raise ServerRefusedError(
            f"An object of the Kubernetes API server has no field {name!r}; it has {', '.join(self) or 'none'}",
            hint=REACH,
        )


def seen(told: Any) -> Object:
    """Take over an object: null is the same as absent, and the fields common to all objects are of the right type.

    Raises:
        TypeError: a common field has the wrong type.
    """
    found: Object = _without_nulls(told)
    found.setdefault("metadata", _Seen())
    for owner, names in ((found, ("metadata", "spec", "status")), (found["metadata"], ("labels", "annotations"))):
        for name in names:
            if not isinstance(owner.get(name, {}), dict):
                raise TypeError(f"{name} is no object, but {type(owner[name]).__name__}")
    if not isinstance(found["metadata"].get("name", ""), str):
        raise TypeError("metadata.name is no text")
    return found


def _without_nulls(told: Any) -> Any:
    if isinstance(told, dict):
        return _Seen({name: _without_nulls(value) for name, value in told.items() if value is not None})
    if isinstance(told, list):
        return [_without_nulls(value) for value in told]
    return told


def limited(httpx: Any, stream: Any) -> Any:
    """Return a response's stream. It ends in an error when it brings too much."""

    class Limited(httpx.SyncByteStream):  # type: ignore[misc]  # the library is imported when it is used
        def __iter__(self) -> Iterator[bytes]:
            size = 0
            for piece in stream:
                size += len(piece)
                if size > _MOST_BYTES:
                    raise httpx.ReadError(f"more than {_MOST_BYTES >> 20} MiB")
                yield piece

        def close(self) -> None:
            stream.close()

    return Limited()


def may_pass(code: int | None, *, named: bool) -> bool:
    """Return whether this may be the answer of a freshly started API server, before it has read its rights and kinds.

    A 404 with the object's name is an answer: the object is gone.

    Args:
        code: HTTP status code. `None`: there was no answer.
        named: whether the answer names the object.
    """
    return code in (401, 403) or (code == 404 and not named)


def refused(
    what: str, code: int | None, reason: str, *, named: bool = True
) -> ServerRefusedError | ServerUnreachableError:
    """Return the error for a call the API server answered with this HTTP status code, and with a next step.

    Args:
        what: the call was to do.
        code: the status code; `None`: the answer had none.
        reason: in the API server's words.
        named: whether the answer names the object. Any other 404 is about the kind.
    """
    reason = " ".join(reason.split())
    if code is not None and (code >= 500 or code == 429):  # the next try may succeed
        return ServerUnreachableError(f"The Kubernetes API server could not {what}: {reason} ({code})")
    hints = {
        401: "The credentials in the kubeconfig are not valid (any more).",
        403: "Bind a Role for it: the chart's `deployer` values make one for its release, "
        f"{document('kubernetes.md')} names one for an InferenceService. Where a Role names its objects, a mistyped "
        "name is forbidden too.",
        404: "Check the namespace and the name; kubectl get lists the present ones."
        if named
        else "This cluster does not know the kind: install its CRDs (KServe, Gateway API), or check --context.",
        409: "Somebody else has changed it; run the command again.",
    }
    kind = ConflictError if code == 409 else ServerRefusedError
    return kind(f"The Kubernetes API server refused to {what}: {reason} ({code})", hint=hints.get(code or 0))
