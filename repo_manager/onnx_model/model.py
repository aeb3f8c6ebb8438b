"""Load an ONNX model: graph in memory, weights on disk until they are asked for."""

from __future__ import annotations

import functools
import hashlib
import mmap
import secrets
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # published without stubs
from numpy.typing import NDArray

from repo_manager.errors import ModelError
from repo_manager.files import sha256_file
from repo_manager.lfs import LFS_HINT, LFS_POINTER
from repo_manager.onnx_model.order import sort_nodes
from repo_manager.onnx_model.validate import (
    check_external_files,
    check_functions,
    check_names,
    check_opsets,
    check_spec,
    check_tensors,
)
from repo_manager.onnx_model.walk import tensors_of
from repo_manager.onnx_model.weights import WeightStore, element_count, set_bytes
from repo_manager.onnx_model.wire import cut_weights
from repo_manager.optional import deferred
from repo_manager.types import Digest, StrPath

if TYPE_CHECKING:
    import onnx
else:
    onnx = deferred("onnx")

__all__ = ["Model", "graph_as_stored", "load_graph", "load_model", "parameter_count"]

MAX_FILE_BYTES = (1 << 31) - 1
"""protobuf's limit for one message (protobuf.dev, "Proto Limits"), and so for one .onnx file without its data."""
_READ_WHOLE_BYTES = 32 << 20


@dataclass(frozen=True)
class Model:
    """A checked ONNX model on disk.

    Attributes:
        path: the .onnx file. Its external files are in the same folder or below.
        digest: of the file. With external files, of the list of all their digests and names.
        external_files: absolute paths, all inside the model's folder.
        size_bytes: the file and its external files together.
        graph_only: the model without its large weights, its nodes in topological order. Their bytes are read
            through `weights`.
        weights: gives the stored bytes and the values of any tensor of `graph_only`.
        reordered: whether the file has its nodes in another order, against ONNX's rule but taken by runtimes.
    """

    path: Path
    digest: Digest
    external_files: tuple[Path, ...]
    size_bytes: int
    graph_only: onnx.ModelProto = field(repr=False, compare=False, metadata={"json": False})
    weights: WeightStore = field(repr=False, compare=False, metadata={"json": False})
    reordered: bool = field(default=False, repr=False, compare=False, metadata={"json": False})

    @functools.cached_property
    def proto(self) -> onnx.ModelProto:
        """The whole model in memory, external data included. Read once. Do not change it.

        Raises:
            ModelError: the files have changed since.
        """
        return self.rebuild()

    def rebuild(
        self, replace: Callable[[int, onnx.TensorProto], bytes | memoryview | None] | None = None
    ) -> onnx.ModelProto:
        """Return a fresh copy of the whole model the caller owns, external data included.

        Memory: the model once, plus its largest tensor.

        Args:
            replace: called with each tensor and its place in the order of `walk.tensors_of`; its result is stored as
                the tensor's `raw_data`; `None` keeps the original bytes.

        Raises:
            ModelError: the files have changed since.
        """
        proto = onnx.ModelProto()
        proto.CopyFrom(self.graph_only)
        for index, tensor in enumerate(list(tensors_of(proto))):
            data = None if replace is None else replace(index, tensor)
            if data is None:
                if not self.weights.is_elsewhere(tensor):
                    continue
                data = self.weights.raw(tensor)
            set_bytes(tensor, data)
        return proto

    def array(self, tensor: onnx.TensorProto) -> NDArray[np.generic]:
        """Return the values of a tensor of `graph_only` (or of `proto`)."""
        return self.weights.array(tensor)


def load_model(path: StrPath, *, hashed: bool = True) -> Model:
    """Read and check an ONNX model.

    Args:
        path: the .onnx file, with its external data beside it.
        hashed: `False` leaves `Model.digest` empty: hashing takes most of the time of a large file.

    Raises:
        ModelError: missing, a directory, empty, truncated, not ONNX, rejected by the checker, external data missing,
            short or outside the model's folder. One message naming the file.
    """
    path = Path(path)
    size_bytes = _file_size(path)
    # Hash in parallel with the checks: hashing releases the interpreter's lock.
    with ThreadPoolExecutor(1) as executor:
        hashing = executor.submit(sha256_file, path) if hashed else None
        try:
            graph_only, weights = _read_graph(path)
            check_names(graph_only)
            check_opsets(graph_only)
            reordered = sort_nodes(graph_only)
            external_files = check_external_files(graph_only, path.parent)
            check_tensors(graph_only, weights)
            check_functions(graph_only)
            check_spec(graph_only, weights)
            digest = None if hashing is None else hashing.result()
        except ModelError as exc:
            raise ModelError(f"{path}: {exc.message}", hint=exc.hint) from exc
        except OSError as exc:
            raise ModelError(f"{path}: cannot be read: {exc.strerror}") from exc
    return Model(
        path=path,
        digest=Digest("") if digest is None else _joint_digest(digest, external_files, path.parent),
        external_files=tuple(file.absolute() for file in external_files),
        size_bytes=size_bytes + sum(file.stat().st_size for file in external_files),
        graph_only=graph_only,
        weights=weights,
        reordered=reordered,
    )


def graph_as_stored(model: Model) -> onnx.ModelProto:
    """Read the model's file once more, weights inside the file included, and sort it. External data stays outside.

    Returns:
        A copy owned by the caller, with external files named by their names.

    Raises:
        ModelError: the file has changed since.
    """
    try:
        proto: onnx.ModelProto = onnx.load_model(model.path, load_external_data=False)
    except (OSError, DecodeError) as exc:
        raise ModelError(f"{model.path}: cannot be read again; was it changed during the read?") from exc
    sort_nodes(proto)
    return proto


def load_graph(path: Path) -> Model:
    """Read a model's graph as `load_model` does, without its checks, its digest and its external files.

    Raises:
        ModelError: the file cannot be read as a model.
    """
    size_bytes = _file_size(path)
    try:
        graph_only, weights = _read_graph(path)
        check_names(graph_only)
        sort_nodes(graph_only)
    except ModelError as exc:
        raise ModelError(f"{path}: {exc.message}", hint=exc.hint) from exc
    except OSError as exc:
        raise ModelError(f"{path}: cannot be read: {exc.strerror}") from exc
    return Model(path, Digest(""), (), size_bytes, graph_only, weights)


def _file_size(path: Path) -> int:
    try:
        status = path.stat()
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "not a usable path"
        raise ModelError(f"{path}: cannot be read: {reason}", hint="Give the path of an .onnx file.") from exc
    if stat.S_ISDIR(status.st_mode):
        raise ModelError(f"{path}: is a directory, not an ONNX file", hint="Give the path of the .onnx file inside it.")
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{path}: is not a regular file")
    if status.st_size == 0:
        raise ModelError(f"{path}: the file is empty", hint="Export or download the model again.")
    if status.st_size > MAX_FILE_BYTES:
        raise ModelError(
            f"{path}: {status.st_size} bytes in one file; ONNX files end at {MAX_FILE_BYTES} bytes",
            hint="Save the model with external data.",
        )
    return status.st_size


# First bytes of files often mistaken for ONNX files.
_OTHERS = (
    (b"version https://git-lfs", LFS_POINTER, LFS_HINT),
    (b"PK\x03\x04", "a ZIP archive (PyTorch's .pt and Keras's .keras files are)", "Export the model to ONNX first."),
    (b"\x89HDF", "an HDF5 file (Keras's .h5)", "Export the model to ONNX first."),
    (b"\x80", "a pickle (an old PyTorch .pt)", "Export the model to ONNX first."),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first."),
    (b"\x7fELF", "a program or a library", None),
    (b"\x89PNG", "a PNG image", None),
    (b"\xff\xd8\xff", "a JPEG image", None),
    (b"%PDF", "a PDF document", None),
)
_TFLITE = b"TFL3"
_HEAD_BYTES = 512


def _other_file(path: Path) -> ModelError | None:
    """Return the kind of a file other than ONNX, by its beginning. `None` where unknown."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    for start, what, hint in _OTHERS:
        if head.startswith(start):
            return ModelError(f"not an ONNX file: it is {what}", hint=hint)
    if head[4:8] == _TFLITE:
        return ModelError("not an ONNX file: it is a TensorFlow Lite model", hint="Export the model to ONNX first.")
    text = head.decode("utf-8", errors="replace").replace("\ufffd", "\0", 1 if len(head) < _HEAD_BYTES else 0)
    if all(char.isprintable() or char in "\t\r\n\ufffd" for char in text) and text.count("\ufffd") <= 1:
        return ModelError("not an ONNX file: it is text", hint="Give the path of an .onnx file.")
    return None


def _read_graph(path: Path) -> tuple[onnx.ModelProto, WeightStore]:
    """Read the graph, and where its weights are.

    Raises:
        ModelError: it is no ONNX file. With its kind, where known.
    """
    try:
        return _decoded(path)
    except ModelError as exc:
        raise (_other_file(path) or exc) from exc


def _decoded(path: Path) -> tuple[onnx.ModelProto, WeightStore]:
    marker = b"repo-manager:cut:" + secrets.token_bytes(16)
    with path.open("rb") as file:
        if path.stat().st_size <= _READ_WHOLE_BYTES:  # a mapped file would end the process if it shrank during the read
            serialised, blobs = cut_weights(file.read(), marker)
        else:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                serialised, blobs = cut_weights(data, marker)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(serialised)
    except DecodeError as exc:
        raise ModelError("not an ONNX file: it cannot be decoded as one") from exc
    if not proto.HasField("graph"):
        raise ModelError("not an ONNX model: it holds no graph")
    return proto, WeightStore(path, blobs)


def _joint_digest(digest: Digest, external_files: tuple[Path, ...], folder: Path) -> Digest:
    if not external_files:
        return digest
    joint = hashlib.sha256(f"{digest}\n".encode())
    for file in external_files:
        joint.update(f"{sha256_file(file)}  {file.relative_to(folder)}\n".encode())
    return Digest("sha256:" + joint.hexdigest())


def parameter_count(model: Model) -> int:
    """Return how many numbers a model's weights hold: initializers and tensors in Constant nodes, at every depth.

    A ConstantOfShape stores one number and counts as one. Sparse tensors count their stored values.
    """
    return sum(element_count(tensor) for tensor in tensors_of(model.graph_only))
