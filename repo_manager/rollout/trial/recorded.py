"""Recorded requests, to be sent again: JSON lines, NPZ, or perf_analyzer's input data."""

from __future__ import annotations

import base64
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.utils import triton_to_np_dtype

from repo_manager.errors import InputError
from repo_manager.triton_config import ModelConfig
from repo_manager.triton_messages import model_config_pb2

__all__ = ["Request", "read_requests"]

Array = npt.NDArray[Any]
Request = Mapping[str, Array]
"""Input name -> array, batch axis included where the model has one."""

_DATA_TYPE = model_config_pb2.DataType.DESCRIPTOR


def read_requests(path: Path, config: ModelConfig) -> tuple[Request, ...]:
    """Read recorded requests for a model.

    - `.jsonl`: one request a line: `{"NAME": [[...]], ...}`, or Triton's own HTTP body `{"inputs": [{"name": ...,
      "shape": [...], "data": [...]}]}`, as an access log or a proxy has it.
    - `.npz`: one array an input, whose first axis counts the requests (`input:NAME` is read as `NAME`, so that a
      version's golden sample can be sent).
    - `.json`: perf_analyzer's `{"data": [{"NAME": [...] or {"content": [...], "shape": [...]} or {"b64": ...}}]}`.

    A request without batch axis gets one of size 1 where the model batches.

    Args:
        path: the file.
        config: what the server runs the model with: names, types and dims come from it.

    Raises:
        InputError: the file cannot be read, holds no request, or one does not fit the model; with its number.
    """
    inputs = {entry.name: _Input(entry, config.max_batch_size > 0) for entry in config.message().input}
    suffix = path.suffix.lower()
    try:
        if suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            rows = [_of_object(json.loads(line)) for line in lines if line.strip()]
        elif suffix == ".json":
            rows = _of_perf_analyzer(json.loads(path.read_text(encoding="utf-8")))
        elif suffix == ".npz":
            rows = _of_npz(path)
        else:
            raise InputError(f"{path}: {suffix or 'no suffix'} is none of .jsonl, .json and .npz")
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as exc:
        raise InputError(f"{path}: the recorded requests cannot be read: {exc}") from exc
    if not rows:
        raise InputError(f"{path} holds no request")
    return tuple(_fitted(row, inputs, f"{path}, request {number}") for number, row in enumerate(rows, start=1))


class _Input:
    """One input of the model."""

    def __init__(self, entry: Any, batched: bool) -> None:
        self.dims, self.batched, self.optional = list(entry.dims), batched, bool(entry.optional)
        kind = _DATA_TYPE.values_by_number[entry.data_type].name.removeprefix("TYPE_")
        self.kind = "BYTES" if kind == "STRING" else kind
        self.dtype = np.dtype(np.float32 if kind == "BF16" else triton_to_np_dtype(self.kind) or np.float32)

    def fitted(self, value: Any) -> Array:
        """Return the value with the input's type, shape and batch axis.

        Raises:
            ValueError: it has not the input's shape or type.
        """
        shape = None
        if isinstance(value, Mapping):
            shape, value = value.get("shape"), self._content(value)
        array: Array = np.asarray(value, dtype=object if self.kind == "BYTES" else None)
        if self.kind == "BYTES":
            flat = [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel().tolist()]
            encoded = np.empty(len(flat), dtype=object)
            encoded[:] = flat
            array = encoded.reshape(array.shape)
        elif array.dtype.kind not in "fiub":
            raise ValueError(f"{array.dtype} is no {self.kind}")
        else:
            array = array.astype(self.dtype)
        return self._shaped(array, shape)

    def _content(self, value: Mapping[str, Any]) -> Any:
        if "b64" not in value:
            return value["content"]
        raw = base64.b64decode(value["b64"], validate=True)
        return [raw] if self.kind == "BYTES" else np.frombuffer(raw, self.dtype)

    def _shaped(self, array: Array, shape: Any) -> Array:
        if shape is not None:
            array = array.reshape([int(size) for size in shape])
        wanted = [-1, *self.dims] if self.batched else self.dims
        if array.ndim == 1 and len(self.dims) != 1 and sum(size < 0 for size in self.dims) <= 1:
            array = array.reshape(self.dims)  # perf_analyzer's flat form
        if self.batched and array.ndim == len(self.dims):
            array = array[None]
        fits = array.ndim == len(wanted) and all(w in (-1, s) for w, s in zip(wanted, array.shape, strict=True))
        if not fits:
            raise ValueError(f"the shape is {list(array.shape)}, expected {wanted}")
        return array


def _fitted(row: Mapping[str, Any], inputs: Mapping[str, _Input], where: str) -> Request:
    unknown = sorted(row.keys() - inputs.keys())
    missing = sorted(name for name, entry in inputs.items() if name not in row and not entry.optional)
    if unknown or missing:
        wrong = f"has no input {', '.join(missing)}" if missing else f"names the input {', '.join(unknown)}"
        raise InputError(f"{where} {wrong}; the model's are {', '.join(inputs)}")
    request = {}
    for name, value in row.items():
        try:
            request[name] = inputs[name].fitted(value)
        except (ValueError, KeyError, TypeError) as exc:
            raise InputError(f"{where}, input {name}: {exc}") from exc
    return request


def _of_object(found: Any) -> Mapping[str, Any]:
    """Read one line: a plain object, or the body of Triton's HTTP inference call."""
    if not isinstance(found, Mapping):
        raise ValueError(f"a line holds {type(found).__name__}, expected an object")
    inputs = found.get("inputs")
    if isinstance(inputs, list):
        return {entry["name"]: {"content": entry["data"], "shape": entry["shape"]} for entry in inputs}
    return inputs if isinstance(inputs, Mapping) else found


def _of_perf_analyzer(document: Any) -> list[Mapping[str, Any]]:
    entries = document["data"]
    while entries and isinstance(entries[0], list):  # streams of steps: their steps, one after another
        entries = [step for stream in entries for step in stream]
    return list(entries)


def _of_npz(path: Path) -> list[Mapping[str, Any]]:
    with np.load(path, allow_pickle=False) as loaded:
        if not hasattr(loaded, "files"):
            raise ValueError("it is one array, not an .npz archive")
        names = [name for name in loaded.files if not name.startswith("output:")]
        arrays = {name.removeprefix("input:"): loaded[name] for name in names}
    lengths = {name: len(array) for name, array in arrays.items() if array.ndim}
    if len(set(lengths.values())) != 1 or len(lengths) != len(arrays):
        raise ValueError(f"the first axis counts the requests, and the arrays have different ones: {lengths}")
    count = next(iter(lengths.values()))
    return [{name: array[number] for name, array in arrays.items()} for number in range(count)]
