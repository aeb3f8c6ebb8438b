"""Requests from .jsonl, .json, .npz, .npy and folders of tensors, one reader for every command."""

from __future__ import annotations

import base64
import dataclasses
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from repo_manager.errors import InputError
from repo_manager.files import reason_of
from repo_manager.lfs import refuse_lfs_pointer
from repo_manager.request_data.archives import check_archive
from repo_manager.request_data.tensors import (
    Array,
    InputFacts,
    Sample,
    as_bytes,
    decoded,
    elements_in,
    elements_of,
    exact_array,
    raw_bytes,
    recorded_rows,
    unpickled,
)

__all__ = ["DATA_SUFFIXES", "holds_tensors", "read_rows", "read_streams", "write_rows"]

DATA_SUFFIXES = (".json", ".jsonl", ".npy", ".npz")
_KINDS = "none of .jsonl, .json and .npz (or .npy for a single input)"
_ZIP = (zipfile.BadZipFile, zlib.error)
_NOT_INPUTS = {"model"}  # keys that perf_analyzer allows next to the inputs
_KIND_OF_JSON = {
    type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list",
    dict: "an object",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Row:
    """One request of a file, as the file has it.

    Attributes:
        values: input name -> value, for a request in order.
        place: where in the file, for messages. Empty where its number says it.
        stream: the number of its stream.
        finite: whether the file spells no infinity, so one is a number beyond 64-bit floats.
        framed: whether base64 of strings must hold their lengths, as perf_analyzer's does.
    """

    values: Any
    place: str = ""
    stream: int = 0
    finite: bool = False
    framed: bool = False


class _Twice:
    """Marks a key an object has twice. No input can hold it."""

    def __repr__(self) -> str:
        return "there twice"


def read_rows(
    path: Path,
    inputs: Sequence[InputFacts],
    *,
    flat: Mapping[str, Sequence[int]] | None = None,
    ignore_others: bool = False,
) -> list[Sample]:
    """Return a file's requests, with the model's types and the shapes they have in the file.

    - `.jsonl`: one request a line: `{"NAME": [[...]], ...}`, or Triton's own HTTP body `{"inputs": [{"name": ...,
      "shape": [...], "data": [...]}]}`, as an access log or a proxy has it.
    - `.json`: perf_analyzer's `{"data": [{"NAME": [...] or {"content": [...], "shape": [...]} or {"b64": ...}}]}`.
      Streams of steps are read one after another, `validation_data` is left out. Or the content of a line of `.jsonl`,
      alone or in a list.
    - `.npz`, `.npy`: one array an input, whose first axis counts the requests (`input:NAME` is read as `NAME` and
      `output:NAME` is left out, so a version's golden sample can be sent). A golden sample of several requests gives
      each as it was recorded, with its batch axis.
    - a folder, as perf_analyzer reads it: a file a tensor, of its name, with its little-endian bytes. Of `BYTES`, a
      string a line.

    A flat list takes the input's shape, with at most one dynamic dimension. Optional inputs may be left out, in some
    requests or in all.

    Args:
        path: the file, or the folder.
        inputs: of the model, without a batch axis.
        flat: input name -> shape of its flat lists, for two or more dynamic dimensions. `None`: no list is flat.
        ignore_others: arrays of an .npz file other than inputs of the model are left out, not refused.

    Raises:
        InputError: it cannot be read, holds no request, or one does not fit the model. With its number and input.
    """
    streams = read_streams(path, inputs, flat=flat, ignore_others=ignore_others)
    return [row for stream in streams for row in stream]


def read_streams(
    path: Path,
    inputs: Sequence[InputFacts],
    *,
    flat: Mapping[str, Sequence[int]] | None = None,
    ignore_others: bool = False,
) -> list[list[Sample]]:
    """Return a file's requests by stream: the requests of one sequence, in order.

    perf_analyzer's JSON may hold several streams (a list of lists). Every other file is one.

    Args: as `read_rows`.

    Args:
        path: .npz, .npy, .json or .jsonl file of requests.
        inputs: inputs of the model. Each request must have all but the optional ones.
        flat: input name -> shape of its flat lists. `None`: no list is flat.
        ignore_others: skip names other than inputs, else refuse them.

    Raises:
        InputError: as `read_rows`.
    """
    if path.is_file():
        refuse_lfs_pointer(path)
    suffix = path.suffix.lower()
    if suffix not in DATA_SUFFIXES and not holds_tensors(path, inputs):
        raise InputError(
            f"{path}: {suffix or 'no suffix'} is not a known kind of input data, {_KINDS}",
            hint="A load test also takes an image, a folder of images, or one with a file of bytes for each input.",
        )
    streams: dict[int, list[Sample]] = {}
    try:
        for number, row in enumerate(_rows_of(path, inputs, ignore_others=ignore_others), start=1):
            where = f"request {number}" + (f" ({row.place})" if row.place and row.place != f"line {number}" else "")
            streams.setdefault(row.stream, []).append(_typed(row, inputs, flat or {}, where))
    except (OSError, ValueError, TypeError, EOFError, RecursionError, MemoryError, NotImplementedError, *_ZIP) as exc:
        raise InputError(f"{path}: the input data cannot be read: {reason_of(exc)}") from exc
    if not streams:
        raise InputError(f"{path} holds no request: no sample was found")
    return list(streams.values())


def _rows_of(path: Path, inputs: Sequence[InputFacts], *, ignore_others: bool) -> Iterator[_Row]:
    suffix = path.suffix.lower()
    if path.is_dir():
        yield _Row(_folder(path, inputs))
    elif suffix in (".npz", ".npy"):
        yield from (_Row(row) for row in _numpy_rows(path, inputs, ignore_others=ignore_others))
    else:
        text = path.read_text(encoding="utf-8-sig")
        finite = "Infinity" not in text
        names = {item.name for item in inputs}
        for row in _json_lines(text) if suffix == ".jsonl" else _json_rows(_loaded(text), names):
            yield dataclasses.replace(row, finite=finite)


def holds_tensors(path: Path, inputs: Sequence[InputFacts]) -> bool:
    """Return whether a folder has a file for every input a request needs."""
    needed = [item.name for item in inputs if not item.optional]
    return bool(needed) and path.is_dir() and all((path / name).is_file() for name in needed)


def _folder(path: Path, inputs: Sequence[InputFacts]) -> Mapping[str, Any]:
    """Read a folder's tensors."""
    row = {}
    for item in inputs:
        file = path / item.name
        if file.is_file() and item.datatype == "BYTES":
            row[item.name] = exact_array(file.read_bytes().removesuffix(b"\n").split(b"\n"), "BYTES")
        elif file.is_file():
            row[item.name] = elements_in(file.read_bytes(), item.datatype)
    return row


def _typed(row: _Row, inputs: Sequence[InputFacts], flat: Mapping[str, Sequence[int]], where: str) -> Sample:
    """Return one request's arrays."""
    values = row.values
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {_kind(values)}, expected an object with the inputs by name")
    known = {item.name: item for item in inputs}
    values = _with_nested(values, known, where)
    unknown = sorted(str(name) for name in values.keys() - known.keys() - _NOT_INPUTS)
    missing = sorted(name for name, item in known.items() if name not in values and not item.optional)
    if unknown or missing:
        wrong = [f"has no input {', '.join(missing)}"] if missing else []
        wrong += [f"names the input {', '.join(unknown)}"] if unknown else []
        advice = "" if missing else " (--parameter sends parameters of the request)"
        raise ValueError(f"{where} {' and '.join(wrong)}; the model's are {', '.join(known)}{advice}")
    sample = {}
    for name in (name for name in values if name in known):
        try:
            sample[name] = _array_of(values[name], known[name], flat.get(name), row)
        except ValueError as exc:
            raise ValueError(f"{where}, input {name}: {exc}") from exc
    return sample


def _with_nested(values: Mapping[Any, Any], known: Mapping[str, InputFacts], where: str) -> Mapping[Any, Any]:
    """Return a `generate` body with its `parameters` beside the rest, as Triton does (server, `MappingSchema`)."""
    nested = values.get("parameters")
    if "parameters" in known or not isinstance(nested, Mapping):
        return values
    rest = {name: value for name, value in values.items() if name != "parameters"}
    if twice := sorted(map(str, nested.keys() & rest.keys())):
        raise ValueError(f"{where} has {', '.join(twice)} twice, once in its parameters")
    return {**rest, **nested}


def _kind(value: Any) -> str:
    return _KIND_OF_JSON.get(type(value), repr(value))


def _require_finite(array: Array) -> None:
    (places,) = np.nonzero(np.isinf(array.reshape(-1)))
    if places.size:
        raise ValueError(f"element {places[0]} is beyond the range of a 64-bit float; an infinity is written Infinity")


def _array_of(value: Any, item: InputFacts, flat: Sequence[int] | None, row: _Row) -> Array:
    shape: Any = None
    if isinstance(value, Mapping):
        shape, value = value.get("shape"), value.get("content", value)
    if isinstance(value, Mapping):
        if "b64" not in value:
            raise ValueError(f'it has the keys {", ".join(map(str, value)) or "(none)"}, expected "content" or "b64"')
        array = decoded(value["b64"], item.datatype, framed=row.framed)
    elif isinstance(value, _Twice):
        raise ValueError(f"it is {value!r}")
    else:
        array = exact_array(value, item.datatype)
        if row.finite and array.dtype.kind in "fV":
            _require_finite(array)
    if shape is None:
        return _fitting(_unflattened(array, item.shape, flat), item)
    if not isinstance(shape, list | tuple) or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        raise ValueError(f"the shape is {shape!r}, expected a list of sizes")
    if array.size != elements_of(shape):
        raise ValueError(f"{array.size} values do not fill the shape {list(shape)} given in the file")
    return _fitting(array.reshape(shape), item)


def _fitting(array: Array, item: InputFacts) -> Array:
    """Return an array whose shape is the input's, with or without a batch axis."""
    found = array.shape[max(array.ndim - len(item.shape), 0) :]
    wanted = zip(found, item.shape, strict=False)
    if 0 <= array.ndim - len(item.shape) <= 1 and all(dim in (-1, size) for size, dim in wanted):
        return array
    raise ValueError(
        f"the shape is {list(array.shape)}, expected {list(item.shape)}, with or without a batch axis before it"
    )


def _unflattened(array: Array, shape: Sequence[int], flat: Sequence[int] | None) -> Array:
    """Give perf_analyzer's flat list, or a lone value, the input's shape, or the one of flat lists."""
    if array.ndim > 1 or (array.ndim == 1 and len(shape) == 1):
        return array
    if sum(size < 0 for size in shape) > 1:
        if flat is None:
            raise ValueError(
                f'a flat list of {array.size} for {list(shape)}: give its "shape" in the file, or a load test --shape'
            )
        shape = flat
    try:
        return array.reshape(shape)
    except ValueError:
        raise ValueError(f"{array.size} values do not fill the shape {list(shape)}") from None


def _loaded(text: str) -> Any:
    """Read JSON. A key an object has twice stays, with a value no input can hold."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        found |= {name: _Twice() for name in names if names.count(name) > 1}
    return found


def _json_lines(text: str) -> Iterator[_Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield _Row(_of_object(_loaded(line)), f"line {number}")
        except ValueError as exc:
            raise ValueError(f"line {number}: {exc}") from exc


def _of_object(found: Any) -> Any:
    """Read a plain object, or the body of Triton's HTTP inference call."""
    if not isinstance(found, Mapping):
        raise ValueError(f"it holds {_kind(found)}, expected an object")
    inputs = found.get("inputs")
    if not isinstance(inputs, list):
        return inputs if isinstance(inputs, Mapping) else found
    row: dict[str, Any] = {}
    for place, entry in enumerate(inputs, start=1):
        lacking = [key for key in ("name", "shape", "data") if not isinstance(entry, Mapping) or key not in entry]
        if lacking:
            raise ValueError(f"entry {place} of its inputs has no {', '.join(lacking)}")
        name = str(entry["name"])
        row[name] = _Twice() if name in row else {"content": entry["data"], "shape": entry["shape"]}
    return row


def _json_rows(document: Any, names: set[str]) -> Iterator[_Row]:
    """Read a whole document: perf_analyzer's form, or the content of a line, alone or in a list."""
    entries = document.get("data") if isinstance(document, Mapping) else None
    if isinstance(entries, list) and not (names == {"data"} and not any(isinstance(e, list | dict) for e in entries)):
        yield from _perf_analyzer_rows(entries)
        return
    if isinstance(document, Mapping) and ("inputs" in document or names & document.keys()):
        yield _Row(_of_object(document))
        return
    if isinstance(document, Mapping) and isinstance(document.get("instances"), list):
        for entry in document["instances"]:  # TensorFlow Serving, and KServe's first protocol
            alone = len(names) == 1 and not isinstance(entry, Mapping)
            yield _Row(dict.fromkeys(names, entry) if alone else entry)
        return
    if isinstance(document, list) and document:
        yield from (_Row(_of_object(entry) if isinstance(entry, Mapping) else entry) for entry in document)
        return
    found = f"the keys {', '.join(document) or '(none)'}" if isinstance(document, Mapping) else _kind(document)
    if isinstance(document, Mapping) and "data" in document:
        found = f'"data" as {_kind(entries)}'
    raise ValueError(f'found {found}, expected {{"data": [...]}}')


def _perf_analyzer_rows(entries: Sequence[Any]) -> Iterator[_Row]:
    """Read steps, or streams of steps."""
    for stream, entry in enumerate(entries, start=1):
        if not isinstance(entry, list):
            yield _Row(entry, framed=True)
            continue
        for step, values in enumerate(entry, start=1):
            yield _Row(values, f"stream {stream}, step {step}", stream, framed=True)


def _numpy_rows(path: Path, inputs: Sequence[InputFacts], *, ignore_others: bool) -> list[Sample]:
    """Read arrays whose first axis counts the requests."""
    check_archive(path)
    with path.open("rb") as file:  # np.load leaves a broken file open
        loaded = unpickled(path.name, partial(np.load, file, allow_pickle=False))
        if isinstance(loaded, np.ndarray):
            if len(inputs) != 1:
                raise ValueError(f"an .npy file holds one input, the model has {len(inputs)}")
            arrays = {inputs[0].name: loaded}
        else:
            with loaded:
                if (recorded := recorded_rows(loaded)) is not None:
                    known = {item.name for item in inputs}
                    return [
                        {name: array for name, array in row.items() if name in known or not ignore_others}
                        for row in recorded
                    ]
                names = [name for name in loaded.files if not name.startswith("output:")]
                arrays = {
                    name.removeprefix("input:"): as_bytes(unpickled(name, partial(loaded.__getitem__, name)))
                    for name in names
                }
    ranks = {item.name: len(item.shape) for item in inputs}
    if ignore_others:
        arrays = {name: array for name, array in arrays.items() if name in ranks}
    arrays = {name: array[None] if array.ndim <= ranks.get(name, 0) else array for name, array in arrays.items()}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the first axis counts the requests, and the arrays have different ones: {lengths}")
    count = next(iter(lengths.values()), 1)
    return [{name: array[number] for name, array in arrays.items()} for number in range(count)]


def write_rows(path: Path, rows: Sequence[Sample], *, as_stream: bool = False) -> None:
    """Write samples, without the batch axis, as perf_analyzer's JSON: every byte as it is.

    Args:
        path: file to write, replaced if it exists.
        rows: samples without the batch axis.
        as_stream: they are the steps of one sequence.
    """
    data = [
        {
            name: {"content": {"b64": base64.b64encode(raw_bytes(array)).decode()}, "shape": list(array.shape)}
            for name, array in row.items()
        }
        for row in rows
    ]
    path.write_text(json.dumps({"data": [data] if as_stream else data}), encoding="utf-8")
