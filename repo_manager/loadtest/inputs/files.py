"""Input data from .npz, .npy and perf_analyzer's JSON."""

from __future__ import annotations

import base64
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repo_manager.errors import InputError
from repo_manager.loadtest.inputs.tensors import NUMPY_OF_TRITON, Array, Sample
from repo_manager.loadtest.target import InputFacts, TargetFacts

__all__ = ["DATA_SUFFIXES", "read_rows", "write_rows"]

DATA_SUFFIXES = (".json", ".npy", ".npz")


def read_rows(path: Path, facts: TargetFacts) -> list[Sample]:
    """Return a file's samples, without the batch axis that `max_batch_size` adds.

    Raises:
        InputError: it cannot be read, or does not fit the model.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            rows = _json_rows(json.loads(path.read_text(encoding="utf-8")), facts)
        elif suffix in (".npz", ".npy"):
            rows = _numpy_rows(path, facts)
        else:
            raise InputError(
                f"{path}: {suffix or 'no suffix'} is not a known kind of input data",
                hint="Give .npz, .npy, .json, an image, or a folder of images.",
            )
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as exc:
        raise InputError(f"{path}: the input data cannot be read: {exc}") from exc
    if not rows:
        raise InputError(f"{path}: no sample found")
    return rows


def write_rows(path: Path, rows: Sequence[Sample]) -> None:
    """Write samples, without the batch axis, as perf_analyzer's JSON."""
    data = [
        {name: {"content": _json_content(array), "shape": list(array.shape)} for name, array in row.items()}
        for row in rows
    ]
    path.write_text(json.dumps({"data": data}), encoding="utf-8")


def _json_content(array: Array) -> list[Any]:
    if array.dtype == object:
        return [item.decode() for item in array.reshape(-1)]
    return list(array.astype(np.float64 if array.dtype.kind not in "iub" else array.dtype).reshape(-1).tolist())


def _numpy_rows(path: Path, facts: TargetFacts) -> list[Sample]:
    """Read arrays whose first axis counts the samples."""
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        if len(facts.inputs) != 1:
            raise ValueError(f"an .npy file holds one input, the model has {len(facts.inputs)}")
        arrays = {facts.inputs[0].name: loaded}
    else:
        with loaded:
            arrays = {
                name.removeprefix("input:"): loaded[name] for name in loaded.files if not name.startswith("output:")
            }
    wanted = [item for item in facts.inputs if not item.optional or item.name in arrays]
    missing = [item.name for item in wanted if item.name not in arrays]
    if missing:
        raise ValueError(f"no array for the input {', '.join(missing)}; it has {', '.join(arrays)}")
    pieces = {item.name: _as_samples(item, arrays[item.name]) for item in wanted}
    lengths = {name: len(array) for name, array in pieces.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"the inputs have different numbers of samples: {lengths}")
    return [{name: array[number] for name, array in pieces.items()} for number in range(next(iter(lengths.values())))]


def _as_samples(item: InputFacts, array: Array) -> Array:
    if array.ndim == len(item.shape):
        array = array[None]
    if array.ndim != len(item.shape) + 1:
        raise ValueError(f"the input {item.name} has the shape {array.shape}, expected [samples, {item.shape}]")
    return _typed(item, array)


def _typed(item: InputFacts, array: Array) -> Array:
    if item.datatype == "BYTES":
        encode = np.vectorize(lambda value: value if isinstance(value, bytes) else str(value).encode(), otypes=[object])
        return encode(array) if array.size else array.astype(object)
    return array.astype(NUMPY_OF_TRITON[item.datatype])


def _json_rows(document: Any, facts: TargetFacts) -> list[Sample]:
    """Read perf_analyzer's `{"data": [{input: [...] | {"content": [...], "shape": [...]} | {"b64": ...}}]}`."""
    rows: list[Sample] = []
    entries = document["data"]
    while entries and isinstance(entries[0], list):  # streams of steps: their steps, one after another
        entries = [step for stream in entries for step in stream]
    for entry in entries:
        row: Sample = {}
        for item in facts.inputs:
            if item.name not in entry and item.optional:
                continue
            row[item.name] = _json_value(entry[item.name], item)
        rows.append(row)
    return rows


def _json_value(value: Any, item: InputFacts) -> Array:
    shape: Sequence[int] | None = None
    if isinstance(value, dict):
        shape = value.get("shape")
        value = value.get("content", value)
    if isinstance(value, dict):
        raw = base64.b64decode(value["b64"])
        if item.datatype == "BYTES":
            array: Array = np.asarray([raw], dtype=object)
        else:
            array = np.frombuffer(raw, dtype=NUMPY_OF_TRITON[item.datatype])
    else:
        array = _typed(item, np.asarray(value, dtype=object if item.datatype == "BYTES" else None))
    if shape is None:
        sizes = [abs(size) for size in item.shape]
        fixed = int(np.prod([size for size in item.shape if size > 0], dtype=np.int64))
        if sum(size < 0 for size in item.shape) == 1:
            sizes = [size if size > 0 else array.size // max(fixed, 1) for size in item.shape]
        shape = array.shape if array.ndim == len(item.shape) else sizes
    return array.reshape(tuple(shape))
