"""Triton's data types in NumPy: the values they hold exactly, and their bytes on the wire."""

from __future__ import annotations

import base64
import dataclasses
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from repo_manager.request_data.archives import RECORDED_COUNTS, RECORDED_KEY

__all__ = [
    "NUMPY_OF_TRITON",
    "Array",
    "InputFacts",
    "Sample",
    "as_bytes",
    "decoded",
    "elements_in",
    "elements_of",
    "exact_array",
    "raw_bytes",
    "recorded_rows",
    "unpickled",
    "with_batch_axis",
]


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


@dataclasses.dataclass(frozen=True)
class InputFacts:
    """One input (or output) as the server describes it.

    Attributes:
        name: name on the server, and key of its array in a request.
        datatype: Triton's name of its type (`FP32`, `INT64`, `BYTES`, ...).
        shape: dimensions without the batch axis added by `max_batch_size`. `-1` is dynamic.
        optional: whether a request may leave it out.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


def with_batch_axis(sample: Sample, inputs: Sequence[InputFacts]) -> Sample:
    """Return a request with a batch axis: of size 1 where an array has none."""
    ranks = {item.name: len(item.shape) for item in inputs}
    return {name: array if array.ndim > ranks[name] else array[None] for name, array in sample.items()}


def raw_bytes(array: Array) -> bytes:
    """Return Triton's binary form: little-endian elements in C order. BYTES as 4-byte lengths and contents.

    Args:
        array: of objects for BYTES: bytes, or text, as in a golden sample.
    """
    if array.dtype == object:
        items = (
            item if isinstance(item, bytes) else str(item).encode("utf-8", "surrogateescape") for item in array.flat
        )
        return b"".join(struct.pack("<I", len(item)) + item for item in items)
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def elements_of(shape: Sequence[int]) -> int:
    """Return how many elements a shape without dynamic dimensions has."""
    return int(np.prod(shape, dtype=np.int64)) if shape else 1


# Convert values to Triton's types. A value changed by the conversion is an error.


def exact_array(value: Any, datatype: str) -> Array:
    """Return values with a Triton type. Floats are rounded to the type's precision. Everything else stays as it is.

    Args:
        value: nested lists or an array, of any shape.
        datatype: Triton type, such as `INT32` or `BYTES`.

    Raises:
        ValueError: nested lists of different lengths, no numbers, a fraction or a number out of the range of an
            integer type, a float turned infinite, or something other than 0 and 1 for `BOOL`. Names the first such
            value.
    """
    if not isinstance(value, np.ndarray):
        _require_even(value)
    if datatype == "BYTES":
        return _strings(value)
    dtype = NUMPY_OF_TRITON[datatype]
    array: Array = np.asarray(value)
    if array.dtype == dtype or not array.size:
        return array.astype(dtype)
    if array.dtype.kind not in "fiub":
        array = np.asarray(value, dtype=object)  # numbers beyond 64 bits, or values of other types
    if dtype.kind == "b":
        return _checked(array, [item in (0, 1) for item in _items(array)], "0, 1, true or false", datatype)
    if dtype.kind in "iu":
        return _integers(value, array, datatype)
    if array.dtype.kind == "O":
        _require_all(array, [isinstance(item, int | float) for item in _items(array)], "a number", datatype)
    try:
        wide = array.astype(np.float64)
    except (OverflowError, TypeError, ValueError) as exc:
        raise ValueError(f"not numbers that {datatype} can hold: {exc}") from exc
    with np.errstate(over="ignore"):
        overflows = np.isinf(wide.astype(dtype).astype(np.float64)) & np.isfinite(wide)
    return _checked(array, ~overflows.reshape(-1), "within the range", datatype)


def _require_even(value: Any) -> None:
    """Check whether all lists of one level have one length."""
    level = [value]
    while any(isinstance(item, list | tuple) for item in level):
        sizes = list(dict.fromkeys(len(item) if isinstance(item, list | tuple) else -1 for item in level))
        if -1 in sizes:
            place = next(place for place, item in enumerate(level) if isinstance(item, list | tuple))
            raise ValueError(f"element {place} is a list beside others")
        if len(sizes) > 1:
            raise ValueError(f"lists of {sizes[0]} and of {sizes[1]} at one level, expected one length")
        level = [item for nested in level for item in nested]


def _integers(value: Any, array: Array, datatype: str) -> Array:
    """Return integers of a type."""
    bounds = np.iinfo(NUMPY_OF_TRITON[datatype])
    low, high = int(bounds.min), int(bounds.max)
    if array.dtype.kind == "f" and not isinstance(value, np.ndarray):
        array = np.asarray(value, dtype=object)  # keeps all digits of integers among floats
    if array.dtype.kind == "f":
        fits = (np.floor(array) == array) & (array >= float(low)) & (array < float(high) + 1.0)
    elif array.dtype.kind == "O":
        fits = np.array([_is_whole(item) and low <= int(item) <= high for item in _items(array)])
    elif low <= int(array.min()) and int(array.max()) <= high:
        return array.astype(NUMPY_OF_TRITON[datatype])
    else:
        fits = np.array([low <= int(item) <= high for item in _items(array)])
    return _checked(array, fits.reshape(-1), f"a whole number from {low} to {high}", datatype)


def _is_whole(item: Any) -> bool:
    return isinstance(item, int) or (isinstance(item, float) and item.is_integer())


def _items(array: Array) -> list[Any]:
    items: list[Any] = array.reshape(-1).tolist()
    return items


def _checked(array: Array, fits: Sequence[bool] | Array, wanted: str, datatype: str) -> Array:
    """Return the array with the type. Refuse it with the first unfit value."""
    _require_all(array, fits, wanted, datatype)
    return array.astype(NUMPY_OF_TRITON[datatype])


def _require_all(array: Array, fits: Sequence[bool] | Array, wanted: str, datatype: str) -> None:
    wrong = np.flatnonzero(~np.asarray(fits, dtype=bool))
    if wrong.size:
        place = int(wrong[0])
        raise ValueError(f"element {place} is {_shown(_items(array)[place])}, expected {wanted}, as {datatype} needs")


def _shown(item: Any) -> str:
    text = repr(item.item() if isinstance(item, np.generic) else item)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _strings(value: Any) -> Array:
    """Return strings as bytes. Text in UTF-8, numbers as they are written."""
    array: Array = np.asarray(value, dtype=object)
    encoded = np.empty(array.size, dtype=object)
    for place, item in enumerate(array.reshape(-1).tolist()):
        if isinstance(item, bool) or not isinstance(item, bytes | str | int | float):
            raise ValueError(f"element {place} is {_shown(item)}, expected a string, as BYTES needs")
        encoded[place] = item if isinstance(item, bytes) else str(item).encode()
    return encoded.reshape(array.shape)


def decoded(text: Any, datatype: str, *, framed: bool = False) -> Array:
    """Return the flat values of perf_analyzer's `b64`.

    For `BYTES` it is Triton's binary form, each string after its length in 4 bytes.

    Args:
        text: base64 without line breaks. Anything but a string is refused.
        datatype: type of the elements without `TYPE_`: `FP32`, or `BYTES` for strings.
        framed: perf_analyzer's own files, which require the lengths. Else bytes whose first 4 are no length of a string
            in them are one string (an image, for instance), as in TensorFlow Serving's requests.

    Raises:
        ValueError: it is not base64, or not a whole number of elements.
    """
    if not isinstance(text, str):
        raise ValueError(f"b64 is {_shown(text)}, expected a string")
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as exc:
        raise ValueError(f"its b64 is not base64: {exc}") from exc
    return _strings(_split(raw, framed=framed)) if datatype == "BYTES" else elements_in(raw, datatype)


def elements_in(raw: bytes, datatype: str) -> Array:
    """Return the flat values of little-endian bytes, of any type but `BYTES`.

    Raises:
        ValueError: it is not a whole number of elements.
    """
    dtype = NUMPY_OF_TRITON[datatype].newbyteorder("<")
    if len(raw) % dtype.itemsize:
        raise ValueError(f"{len(raw)} bytes are no whole number of elements: one of {datatype} has {dtype.itemsize}")
    return np.frombuffer(raw, dtype=dtype)


def _split(raw: bytes, *, framed: bool) -> list[bytes]:
    """Return the strings of Triton's binary form. Unless `framed`, bytes not in this form are one string as a whole."""
    strings: list[bytes] = []
    place = 0
    while place < len(raw):
        size = int.from_bytes(raw[place : place + 4], "little")
        if place + 4 + size > len(raw) or place + 4 > len(raw):
            if strings or framed:
                raise ValueError(
                    f"its b64 ends within string {len(strings)}: expected the length in 4 bytes before each string"
                )
            return [raw]
        place += 4 + size
        strings.append(raw[place - size : place])
    return strings if strings or framed else [raw]


def recorded_rows(archive: Mapping[str, Array]) -> list[Sample] | None:
    """Return the requests of recorded exchanges, batch axes included, or `None` for any other archive.

    An archive of one request with one response cannot be told from arrays whose first axis counts.
    """
    matches = {key: match for key in archive if (match := RECORDED_KEY.fullmatch(key)) is not None}
    several = RECORDED_COUNTS in archive or any(match["request"] or match["response"] for match in matches.values())
    if not several or len(archive) - (RECORDED_COUNTS in archive) != len(matches):
        return None
    numbers = [int(match["request"] or 1) for match in matches.values()]
    count = len(archive[RECORDED_COUNTS]) if RECORDED_COUNTS in archive else max(numbers)
    rows: list[Sample] = [{} for _ in range(count)]
    for (key, match), number in zip(matches.items(), numbers, strict=True):
        if match["kind"] == "input":
            if not 1 <= number <= count:
                raise ValueError(f"{key} is of request {number}, and {count} were recorded")
            rows[number - 1][match["name"]] = as_bytes(archive[key])
    return rows


def unpickled(what: str, load: Callable[[], Any]) -> Any:
    """Load an array. One of Python objects is refused with the way out."""
    try:
        return load()
    except ValueError as exc:
        if "allow_pickle" not in str(exc):
            raise
        text = f"{what} holds Python objects, which are never loaded; save texts as np.array([...], dtype=bytes)"
        raise ValueError(text) from exc


def as_bytes(array: Array) -> Array:
    """Return recorded text as the bytes sent, perhaps not UTF-8."""
    if array.dtype.kind != "U":
        return array
    return np.array([item.encode("utf-8", "surrogateescape") for item in array.flat], object).reshape(array.shape)
