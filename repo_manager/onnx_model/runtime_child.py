"""The process for foreign models: ONNX Runtime, and nothing of ours.

Run as `python runtime_child.py SOCKET MEMORY_BYTES`. Standard input is a pipe only the owner can write to: its end is
the owner's death, however it died, and the kernel then ends this process, even in a computation.

A message is a length (8 bytes), JSON, and the content of the arrays the JSON describes, one after another. The owner
takes no pickle from here: a model in control of this process must not reach the owner.
"""

from __future__ import annotations

import os
import sys

if sys.path and os.path.realpath(sys.path[0]) == os.path.realpath(os.path.join(__file__, os.pardir)):  # noqa: PTH118
    del sys.path[0]  # its modules would replace others of the same name

import fcntl
import json
import resource
import signal
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

_LENGTH = struct.Struct("<Q")
_FATAL = 4  # ORT_LOGGING_LEVEL_FATAL: errors arrive as exceptions


def main() -> None:
    """Serve the owner until it goes."""
    peer = socket.socket(fileno=int(sys.argv[1]))
    end_with_owner()
    limit_memory(int(sys.argv[2]))
    onnxruntime.set_default_logger_severity(_FATAL)
    send(peer, {"version": onnxruntime.__version__}, [])
    sessions: dict[int, Any] = {}
    while (message := receive(peer)) is not None:
        header, arrays = message
        try:
            answer, results = answer_to(header, arrays, sessions)
        except Exception as exc:  # noqa: BLE001  # ONNX Runtime's errors have no common base; the model causes them
            answer, results = {"error": " ".join(str(exc).split()) or type(exc).__name__}, []
        if header["do"] != "close":
            send(peer, answer, results)


def end_with_owner() -> None:
    """Have the kernel send SIGIO, which ends the process, when the pipe's other end is closed."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    os.set_blocking(0, False)
    try:
        is_gone = os.read(0, 1) == b""
    except BlockingIOError:
        is_gone = False
    if is_gone:
        os._exit(1)


def limit_memory(size_bytes: int) -> None:
    """Let this process have so much more memory than it has now. An allocation beyond it fails."""
    used = 0
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmData:"):
            used = int(line.split()[1]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (used + size_bytes, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def answer_to(
    header: dict[str, Any], arrays: list[Any], sessions: dict[int, Any]
) -> tuple[dict[str, Any], list[np.ndarray[Any, Any]]]:
    """Carry out a message's order.

    Args:
        header: the message: the verb and its arguments.
        arrays: inputs in the order of `header["names"]`, or the bytes of a model to open (taken out).
        sessions: number of the model -> its session. Changed by loads.
    """
    number = header["session"]
    if header["do"] == "close":
        sessions.pop(number, None)
        return {}, []
    if header["do"] == "open":
        source = header["path"] if header["path"] is not None else arrays.pop().tobytes()
        sessions[number] = session = opened(source, header)
        described = {
            "inputs": [described_value(value) for value in session.get_inputs()],
            "outputs": [described_value(value) for value in session.get_outputs()],
            "initializers": [described_value(value) for value in session.get_overridable_initializers()],
        }
        return described, []
    options = onnxruntime.RunOptions()
    options.log_severity_level = _FATAL
    values = sessions[number].run(None, dict(zip(header["names"], arrays, strict=True)), options)
    kinds = [None if isinstance(value, np.ndarray) else type(value).__name__ for value in values]
    return {"kinds": kinds}, [value for value in values if isinstance(value, np.ndarray)]


def opened(source: bytes | str, header: dict[str, Any]) -> Any:
    """Make a session. Of several sets of entries the first it loads with counts."""
    for attempt, entries in enumerate(header["entries"], 1):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL
        options.enable_cpu_mem_arena = header["arena"]
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, header["level"])
        if header["threads"] is not None:
            options.intra_op_num_threads = header["threads"]
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        try:
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception:
            if attempt == len(header["entries"]):
                raise
    raise AssertionError("no set of entries")


def described_value(value: Any) -> dict[str, Any]:
    """Describe an input or output."""
    return {"name": value.name, "type": value.type, "shape": list(value.shape)}


def send(peer: socket.socket, header: dict[str, Any], arrays: list[np.ndarray[Any, Any]]) -> None:
    """Send a message.

    Args:
        peer: socket to the other process.
        header: the message, as JSON values.
        arrays: arrays that follow the message.
    """
    contents: list[Any] = []
    described = []
    for array in arrays:
        if array.dtype == object:
            texts = [text if isinstance(text, str) else str(text) for text in array.ravel()]
            content: Any = json.dumps(texts).encode("utf-8", "surrogatepass")
            described.append(["str", array.shape, len(content)])
        else:
            whole = np.ascontiguousarray(array)
            described.append([array.dtype.str, array.shape, whole.nbytes])
            content = whole.reshape(-1).view(np.uint8).data if whole.size else b""
        contents.append(content)
    text = json.dumps({**header, "arrays": described}).encode()
    peer.sendall(_LENGTH.pack(len(text)) + text)
    for content in contents:
        peer.sendall(content)


def receive(peer: socket.socket) -> tuple[dict[str, Any], list[Any]] | None:
    """Return the next message, or `None` when there is none any more."""
    length = read(peer, _LENGTH.size)
    if length is None:
        return None
    header = json.loads(bytes(read(peer, _LENGTH.unpack(length)[0]) or b"null"))
    return header, [array_of(read(peer, size), kind, shape) for kind, shape, size in header["arrays"]]


def array_of(content: bytearray | None, kind: str, shape: list[int]) -> Any:
    """Return the array sent.

    Args:
        content: bytes of the array. `None`: it is empty.
        kind: NumPy type, or `str` for texts.
        shape: dims of the array. `content` has to fill them.
    """
    if kind == "str":
        return np.array(json.loads(bytes(content or b"[]")), dtype=object).reshape(shape)
    return np.frombuffer(content or b"", dtype=np.dtype(kind)).reshape(shape)


def read(peer: socket.socket, size: int) -> bytearray | None:
    """Read so many bytes. `None` when the other side is gone."""
    content = bytearray(size)
    view = memoryview(content)
    while len(view):
        count = peer.recv_into(view)
        if not count:
            return None
        view = view[count:]
    return content


if __name__ == "__main__":
    main()
