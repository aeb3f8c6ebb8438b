"""Input data of a load test: random by type and shape, or from .npz, .npy and perf_analyzer's JSON."""

from __future__ import annotations

import base64
import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from repo_manager.errors import InputError, UsageError
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.target import InputFacts, TargetFacts

__all__ = ["NUMPY_OF_TRITON", "Sample", "elements_of", "make_samples", "raw_bytes", "resolve_shapes"]

Array = npt.NDArray[Any]
Sample = dict[str, Array]
"""The inputs of one request by name, batch axis included where the model has one."""

NUMPY_OF_TRITON: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(bool),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(object),
}
_MAX_TOTAL_BYTES = 256 << 20


def resolve_shapes(facts: TargetFacts, options: LoadTestOptions) -> dict[str, tuple[int, ...]]:
    """Return each input's full shape in a request, batch axis included where the model has one.

    Raises:
        UsageError: a dynamic dimension without a size, a shape that does not fit, an unknown input, a batch size that
            the model does not take.
    """
    known = {item.name: item for item in facts.inputs}
    for name in options.shapes:
        if name not in known:
            raise UsageError(f"the model {facts.model} has no input {name!r}; it has {', '.join(known)}")
    if options.batch_size > 1 and options.batch_size > facts.max_batch_size:
        found = f"max_batch_size {facts.max_batch_size}" if facts.max_batch_size else "no batch axis (max_batch_size 0)"
        raise UsageError(f"the batch size is {options.batch_size}, but the model {facts.model} has {found}")
    batch = (options.batch_size,) if facts.max_batch_size > 0 else ()
    return {item.name: batch + _shape_of(item, facts.model, options.shapes.get(item.name)) for item in facts.inputs}


def _shape_of(item: InputFacts, model: str, given: tuple[int, ...] | None) -> tuple[int, ...]:
    declared = ",".join(str(size) for size in item.shape)
    example = ",".join("16" if size < 0 else str(size) for size in item.shape)
    if given is None:
        if any(size < 0 for size in item.shape):
            raise UsageError(
                f"the input {item.name!r} of {model} has the dynamic shape [{declared}]; a size is needed for each -1",
                hint=f"Give one, for instance: --shape {item.name}:{example} (without the batch axis).",
            )
        return item.shape
    fits = len(given) == len(item.shape) and all(
        size > 0 and wanted in (-1, size) for size, wanted in zip(given, item.shape, strict=True)
    )
    if not fits:
        raise UsageError(
            f"the shape {list(given)} does not fit the input {item.name!r} of {model}: expected [{declared}], "
            "without the batch axis"
        )
    return given


def make_samples(facts: TargetFacts, options: LoadTestOptions) -> list[Sample]:
    """Return the inputs of each distinct request.

    Raises:
        UsageError: shapes are missing or do not fit.
        InputError: the data file is unreadable, does not fit, or is all zeros.
    """
    inputs = [item for item in facts.inputs if not item.optional or item.name in options.shapes]
    if options.data is not None:
        samples = _from_file(options.data, facts, options)
    else:
        shapes = resolve_shapes(facts, options)
        size = sum(_size_bytes(item, shapes[item.name]) for item in inputs)
        count = max(min(options.distinct, _MAX_TOTAL_BYTES // max(size, 1)), 1)
        rng = np.random.default_rng(options.seed)
        samples = [
            {i.name: _random(i.datatype, shapes[i.name], rng, options.int_range) for i in inputs} for _ in range(count)
        ]
    if not options.allow_zeros:
        _refuse_zeros(samples, options.data)
    return samples


def _size_bytes(item: InputFacts, shape: tuple[int, ...]) -> int:
    return elements_of(shape) * (12 if item.datatype == "BYTES" else NUMPY_OF_TRITON[item.datatype].itemsize)


def _random(datatype: str, shape: tuple[int, ...], rng: np.random.Generator, int_range: tuple[int, int]) -> Array:
    """Draw values: floats standard normal, integers in a small range that also suits indices, short words."""
    dtype = NUMPY_OF_TRITON[datatype]
    if datatype == "BYTES":
        numbers = rng.integers(0, 1 << 32, size=shape)
        words: Array = np.vectorize(lambda number: b"%08x" % number, otypes=[object])(numbers)
        return words
    if datatype == "BOOL":
        return rng.integers(0, 2, size=shape).astype(bool)
    if dtype.kind in "iu":
        return rng.integers(int_range[0], int_range[1], size=shape).astype(dtype)
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype)


def _refuse_zeros(samples: Sequence[Sample], path: Path | None) -> None:
    arrays = [array for sample in samples for array in sample.values() if array.dtype != object and array.size]
    if path is not None and arrays and not any(np.count_nonzero(array) for array in arrays):
        raise InputError(
            f"{path}: every input is all zeros, on which kernels, caches and branches do not behave as on data",
            hint="Give real data, leave --input-data out for random inputs, or allow zeros with --allow-zeros.",
        )


def _from_file(path: Path, facts: TargetFacts, options: LoadTestOptions) -> list[Sample]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            rows = _json_rows(json.loads(path.read_text(encoding="utf-8")), facts)
        elif suffix in (".npz", ".npy"):
            rows = _numpy_rows(path, facts)
        else:
            raise InputError(
                f"{path}: {suffix or 'no suffix'} is not a known kind of input data", hint="Give .npz, .npy or .json."
            )
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as exc:
        raise InputError(f"{path}: the input data cannot be read: {exc}") from exc
    if not rows:
        raise InputError(f"{path}: no sample found")
    return _batched(rows, path, facts, options)


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


def _batched(rows: list[Sample], path: Path, facts: TargetFacts, options: LoadTestOptions) -> list[Sample]:
    """Join samples into requests of `batch_size`, wrapping around at the end."""
    resolve_shapes_of = {item.name: item for item in facts.inputs}
    for name, array in rows[0].items():
        _shape_of(resolve_shapes_of[name], facts.model, tuple(array.shape))
    if options.batch_size > 1 and options.batch_size > facts.max_batch_size:
        resolve_shapes(facts, options)
    if facts.max_batch_size == 0:
        return rows
    size = options.batch_size
    requests = max(-(-len(rows) // size), 1)
    groups = [[rows[(first * size + place) % len(rows)] for place in range(size)] for first in range(requests)]
    try:
        return [{name: np.stack([row[name] for row in group]) for name in group[0]} for group in groups]
    except ValueError as exc:
        raise InputError(f"{path}: samples of different shapes cannot share a batch of {size}: {exc}") from exc


def raw_bytes(array: Array) -> bytes:
    """Return Triton's binary form: little-endian elements in C order; BYTES as 4-byte lengths and contents."""
    if array.dtype == object:
        return b"".join(struct.pack("<I", len(item)) + item for item in array.reshape(-1))
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def elements_of(shape: Sequence[int]) -> int:
    """Return how many elements a shape without dynamic dimensions has."""
    return int(np.prod(shape, dtype=np.int64)) if shape else 1
