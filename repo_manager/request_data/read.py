"""Requests from .jsonl, .json, .npz and .npy, one reader for load tests and trials."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repo_manager.errors import InputError
from repo_manager.request_data.archives import check_archive
from repo_manager.request_data.tensors import Array, InputFacts, Sample, decoded, exact_array

__all__ = ["DATA_SUFFIXES", "read_rows", "write_rows"]

DATA_SUFFIXES = (".json", ".jsonl", ".npy", ".npz")
_KINDS = "none of .jsonl, .json and .npz (or .npy for a single input)"
_ZIP = (zipfile.BadZipFile, zlib.error)


def read_rows(path: Path, inputs: Sequence[InputFacts], *, ignore_others: bool = False) -> list[Sample]:
    """Return a file's requests, with the model's types and the shapes that they have in the file.

    - `.jsonl`: one request a line: `{"NAME": [[...]], ...}`, or Triton's own HTTP body `{"inputs": [{"name": ...,
      "shape": [...], "data": [...]}]}`, as an access log or a proxy has it.
    - `.json`: perf_analyzer's `{"data": [{"NAME": [...] or {"content": [...], "shape": [...]} or {"b64": ...}}]}`;
      streams of steps are read one after another.
    - `.npz`, `.npy`: one array an input, whose first axis counts the requests (`input:NAME` is read as `NAME` and
      `output:NAME` is left out, so that a version's golden sample can be sent).

    A flat list takes the input's shape, of which one dimension may be dynamic. Optional inputs may be left out, in some
    requests or in all.

    Args:
        path: the file.
        inputs: of the model, without a batch axis.
        ignore_others: arrays of an .npz file that are no input of the model are left out, not refused.

    Raises:
        InputError: it cannot be read, holds no request, or one does not fit the model; with its number and input.
    """
    suffix = path.suffix.lower()
    if suffix not in DATA_SUFFIXES:
        raise InputError(
            f"{path}: {suffix or 'no suffix'} is not a known kind of input data, {_KINDS}",
            hint="A load test also takes an image or a folder of images.",
        )
    try:
        if suffix in (".npz", ".npy"):
            rows = _numpy_rows(path, inputs, ignore_others=ignore_others)
        else:
            text = path.read_text(encoding="utf-8-sig")
            rows = _json_lines(text) if suffix == ".jsonl" else _perf_analyzer_rows(json.loads(text))
        found = [_typed(row, inputs, number) for number, row in enumerate(rows, start=1)]
    except (OSError, ValueError, TypeError, EOFError, RecursionError, MemoryError, NotImplementedError, *_ZIP) as exc:
        raise InputError(f"{path}: the input data cannot be read: {exc}") from exc
    if not found:
        raise InputError(f"{path} holds no request: no sample was found")
    return found


def _typed(row: Any, inputs: Sequence[InputFacts], number: int) -> Sample:
    """Return one request's arrays."""
    where = f"request {number}"
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is of type {type(row).__name__}, expected an object with the inputs by name")
    known = {item.name: item for item in inputs}
    unknown = sorted(str(name) for name in row.keys() - known.keys())
    missing = sorted(name for name, item in known.items() if name not in row and not item.optional)
    if unknown or missing:
        wrong = f"has no input {', '.join(missing)}" if missing else f"names the input {', '.join(unknown)}"
        raise ValueError(f"{where} {wrong}; the model's are {', '.join(known)}")
    sample = {}
    for name, value in row.items():
        try:
            sample[name] = _array_of(value, known[name])
        except ValueError as exc:
            raise ValueError(f"{where}, input {name}: {exc}") from exc
    return sample


def _array_of(value: Any, item: InputFacts) -> Array:
    shape: Any = None
    if isinstance(value, Mapping):
        shape, value = value.get("shape"), value.get("content", value)
    if isinstance(value, Mapping):
        if "b64" not in value:
            raise ValueError(f'it has the keys {", ".join(map(str, value)) or "(none)"}, expected "content" or "b64"')
        array = decoded(value["b64"], item.datatype)
    else:
        array = exact_array(value, item.datatype)
    if shape is not None:
        if not isinstance(shape, list | tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"the shape is {shape!r}, expected a list of sizes")
        return array.reshape(shape)
    return _unflattened(array, item)


def _unflattened(array: Array, item: InputFacts) -> Array:
    """Give perf_analyzer's flat list the input's shape."""
    if array.ndim != 1 or len(item.shape) == 1:
        return array
    dims = ", ".join(map(str, item.shape))
    if sum(size < 0 for size in item.shape) > 1:
        raise ValueError(
            f'a flat list of {array.size} for [{dims}]: give its "shape" in the file, or --shape to a load test'
        )
    try:
        return array.reshape(item.shape)
    except ValueError:
        raise ValueError(f"{array.size} values do not fill the shape [{dims}]") from None


def _json_lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_of_object(json.loads(line)))
        except ValueError as exc:
            raise ValueError(f"line {number}: {exc}") from exc
    return rows


def _of_object(found: Any) -> Any:
    """Read one line: a plain object, or the body of Triton's HTTP inference call."""
    if not isinstance(found, Mapping):
        raise ValueError(f"it holds a {type(found).__name__}, expected an object")
    inputs = found.get("inputs")
    if not isinstance(inputs, list):
        return inputs if isinstance(inputs, Mapping) else found
    row: dict[str, Any] = {}
    for place, entry in enumerate(inputs, start=1):
        lacking = [key for key in ("name", "shape", "data") if not isinstance(entry, Mapping) or key not in entry]
        if lacking:
            raise ValueError(f"entry {place} of its inputs has no {', '.join(lacking)}")
        row[entry["name"]] = {"content": entry["data"], "shape": entry["shape"]}
    return row


def _perf_analyzer_rows(document: Any) -> list[Any]:
    entries = document.get("data") if isinstance(document, Mapping) else None
    if not isinstance(entries, list):
        found = f"the keys {', '.join(document)}" if isinstance(document, Mapping) else f"a {type(document).__name__}"
        raise ValueError(f'found {found}, expected {{"data": [...]}}')
    rows: list[Any] = []
    for entry in entries:  # streams of steps: their steps, one after another
        rows += entry if isinstance(entry, list) else [entry]
    return rows


def _numpy_rows(path: Path, inputs: Sequence[InputFacts], *, ignore_others: bool) -> list[Sample]:
    """Read arrays whose first axis counts the requests."""
    check_archive(path)
    with path.open("rb") as file:  # np.load leaves a file open when its content is broken
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            if len(inputs) != 1:
                raise ValueError(f"an .npy file holds one input, the model has {len(inputs)}")
            arrays = {inputs[0].name: loaded}
        else:
            with loaded:
                names = [name for name in loaded.files if not name.startswith("output:")]
                arrays = {name.removeprefix("input:"): loaded[name] for name in names}
    ranks = {item.name: len(item.shape) for item in inputs}
    if ignore_others:
        arrays = {name: array for name, array in arrays.items() if name in ranks}
    arrays = {name: array[None] if array.ndim <= ranks.get(name, 0) else array for name, array in arrays.items()}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the first axis counts the requests, and the arrays have different ones: {lengths}")
    count = next(iter(lengths.values()), 1)
    return [{name: array[number] for name, array in arrays.items()} for number in range(count)]


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
