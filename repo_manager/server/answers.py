"""What Triton's two protocols share: arrays of requests, values of answers, refusals, and servers out of reach."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from repo_manager.errors import RepoManagerError, ServerRefusedError, ServerUnreachableError, UsageError, redacted
from repo_manager.optional import deferred
from repo_manager.server.transport import ServerUrl
from repo_manager.sockets import without_number
from repo_manager.tls import speaks_tls

if TYPE_CHECKING:
    import numpy as np
    import tritonclient.utils as triton_utils
else:
    np = deferred("numpy")
    triton_utils = deferred("tritonclient.utils")

__all__ = ["array_of", "out_of_reach", "reading", "refusal", "request_inputs", "several", "text_of", "version_of"]

_MOST_ENTRIES = 200_000
_QUOTED_CHARACTERS = 200
_GRPC_PREAMBLE = re.compile(
    r"^failed to connect to all addresses; last error: \w+: (?:(?:ipv[46]|unix):\S+: )?"
    r"(?:Failed to connect to remote host: |connect: )?"
)
_GRPC_NUMBER = re.compile(r" \(\d+\)$")  # grpcio 1.67 ends a reason with the number of the system's error
_NOBODY = re.compile(r"refused|timed out|no route|unreachable|resol|getaddrinfo|name or service", re.IGNORECASE)
"""In a connection's error: there is nobody whose protocol could be another one."""


def out_of_reach(endpoint: ServerUrl, what: str, reason: str) -> ServerUnreachableError:
    """Return the error for a call that reached no server.

    Args:
        endpoint: address, path, headers and messages of the requests.
        what: subject of the error message.
        reason: reason, as the error message quotes it.
    """
    hint = "Check that it runs, the address, and the port's protocol (Triton: 8001 gRPC, 8000 HTTP)."
    if endpoint.tls and any(
        word in reason for word in ("WRONG_VERSION_NUMBER", "EOF occurred in violation of protocol")
    ):
        hint = f"It does not answer in TLS. Without TLS: {endpoint.protocol}://{endpoint.address}"
    elif not endpoint.tls and not _NOBODY.search(reason) and _answers_in_tls(endpoint):
        hint = f"It answers in TLS. With TLS: {endpoint.protocol}s://{endpoint.address}"
    # gRPC puts the address and several prefixes before the reason. Our message already has the address.
    plain = _GRPC_NUMBER.sub("", without_number(_GRPC_PREAMBLE.sub("", reason)).strip()) or reason
    return ServerUnreachableError(f"{endpoint} cannot be reached: {what}: {plain}", hint=hint)


def _answers_in_tls(endpoint: ServerUrl) -> bool:
    parts = urlsplit(f"//{endpoint.address}")
    return bool(parts.hostname and parts.port) and speaks_tls(str(parts.hostname), parts.port or 0)


@contextlib.contextmanager
def reading(endpoint: ServerUrl, what: str) -> Iterator[None]:
    """Take an answer apart: any fault of it is the server's refusal, and no fault of ours.

    Raises:
        ServerRefusedError: the answer is not what Triton's is. With what was found.
    """
    try:
        yield
    except RepoManagerError:
        raise
    except Exception as exc:  # an unknown server's answer can fail in any way
        found = " ".join(str(exc).split())[:_QUOTED_CHARACTERS] or "it breaks off"
        raise ServerRefusedError(
            f"{endpoint} answers {what}, but not as a Triton server does: {type(exc).__name__}: {found}",
            hint="Check the address, and whether the port is Triton's (8001 gRPC, 8000 HTTP).",
        ) from exc


def text_of(value: object) -> str:
    """Return a text of an answer.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, str):
        raise TypeError(f"a text was expected, not {type(value).__name__}")
    return value


def version_of(value: object) -> int | None:
    """Return a version's number, or `None` for the empty text.

    Raises:
        ValueError: it is none.
    """
    number = int(value) if isinstance(value, str | int) and value != "" else None
    if number is None and value:
        raise ValueError(f"a version was expected, not {type(value).__name__}")
    if number is not None and not 0 <= number < 1 << 63:
        raise ValueError(f"a version was expected, not {number}")
    return number


def array_of(name: str, result: Any) -> np.ndarray[Any, Any]:
    """Return an output of a client library's `InferResult`.

    Raises:
        ValueError: it has no data.
    """
    array: np.ndarray[Any, Any] | None = result.as_numpy(name)
    if array is None:
        raise ValueError(f"output {name} has no data")
    return array


def several(value: object) -> Sequence[Any]:
    """Return a list of an answer. An absent one is empty.

    Raises:
        TypeError: it is none.
        ValueError: it is longer than anybody's.
    """
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"a list was expected, not {type(value).__name__}")
    if len(value) > _MOST_ENTRIES:
        raise ValueError(f"a list of {len(value)} entries")
    return value


def without_stack(reason: str) -> str:
    """Return Triton's reason without the stack its Python backend appends to a model's exception.

    pybind11 ends the text of an exception with `At:` and one line per frame (`error_string` in pybind11/pytypes.h).
    The frames are in the server's log.
    """
    return reason.partition("\n\nAt:\n")[0].strip()


def refusal(endpoint: ServerUrl, what: str, reason: str) -> ServerRefusedError:
    """Return the error for a call the server answered with an error, with Triton's own reason.

    Args:
        endpoint: address, path, headers and messages of the requests.
        what: subject of the error message.
        reason: reason, as the error message quotes it.
    """
    hint = "Give the header it expects: --header-file FILE." if "is restricted" in reason else None
    error = ServerRefusedError(f"{endpoint} refused: {what}: {without_stack(reason)}", hint=hint)
    error.reason = redacted(without_stack(reason))
    return error


def request_inputs(module: Any, inputs: Mapping[str, np.ndarray[Any, Any]]) -> list[Any]:
    """Return the `InferInput` list of a request.

    Args:
        module: `tritonclient.grpc` or `tritonclient.http`, as the request is sent. Its `InferInput` is used.
        inputs: name -> array of any shape; strings as `object`, `S` or `U` arrays; bfloat16 as ml_dtypes has it.

    Raises:
        UsageError: an element type Triton does not carry.
    """
    tensors = []
    for name, array in inputs.items():
        values = np.ascontiguousarray(array).reshape(np.shape(array))
        if values.dtype.name == "bfloat16":
            datatype, values = "BF16", values.astype(np.float32)  # the client library converts it back to BF16
        elif values.dtype.kind in "USO":
            datatype, values = "BYTES", _encoded(values)
        else:
            datatype = triton_utils.np_to_triton_dtype(values.dtype)
        if datatype is None:
            raise UsageError(f"Input {name}: Triton carries no {values.dtype} tensors")
        tensor = module.InferInput(name, list(values.shape), datatype)
        tensor.set_data_from_numpy(values)
        tensors.append(tensor)
    return tensors


def _encoded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the strings of an array as an object array of bytes."""
    flat = [
        item if isinstance(item, bytes) else str(item).encode("utf-8", "surrogateescape")
        for item in values.ravel().tolist()
    ]
    encoded = np.empty(len(flat), dtype=np.object_)
    encoded[:] = flat
    return encoded.reshape(values.shape)
