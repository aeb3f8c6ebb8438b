"""Small frozen types every stage shares."""

from __future__ import annotations

import dataclasses
import enum
import math
import os
from collections.abc import Mapping
from typing import Any, Literal, NewType, Protocol, TypeVar, runtime_checkable

__all__ = ["Backend", "Digest", "Dim", "Precision", "PrecisionFacts", "StrPath", "TensorSpec", "as_json", "extended"]

Digest = NewType("Digest", str)
"""`sha256:` and 64 lower-case hexadecimal digits."""

StrPath = str | os.PathLike[str]
"""A path for public functions."""

Dim = int | str | None
"""One dimension: a fixed size, a named dynamic one, or an unnamed dynamic one (`None`)."""


@runtime_checkable
class _Scalar(Protocol):
    """A NumPy scalar, known by its method: the command line starts without importing NumPy."""

    def item(self) -> Any: ...


@runtime_checkable
class _Place(Protocol):
    """A place other than a path, a repository in object storage: its text represents it."""

    def location_text(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class PrecisionFacts:
    """The consequences of a precision. docs/precision.md gives the reasons for the numbers.

    Attributes:
        max_drift: largest relative error of an output against the source, where none is asked for.
        min_top1: smallest share of samples with the same top class, on calibration data. One sample may always differ.
        tolerance: how far a served output may be from ONNX Runtime's, relative to its largest magnitude. The same
            kernels give the same numbers. Other hardware, another batch and another engine round differently, by about
            the precision's own step times the depth of a network.
        low: the 16-bit type of stored and computed values. `None`: float32 stays.
        quantizes: whether INT8 is part of it.
    """

    max_drift: float
    min_top1: float
    tolerance: float
    low: Literal["float16", "bfloat16"] | None = None
    quantizes: bool = False


class Precision(str, enum.Enum):
    """The precision a model's weights and activations are stored and computed in: a row each."""

    facts: PrecisionFacts

    FP32 = "fp32", PrecisionFacts(max_drift=1e-5, min_top1=1.0, tolerance=1e-3)
    FP16 = "fp16", PrecisionFacts(max_drift=0.02, min_top1=0.99, tolerance=1e-2, low="float16")
    BF16 = "bf16", PrecisionFacts(max_drift=0.1, min_top1=0.97, tolerance=3e-2, low="bfloat16")
    INT8 = "int8", PrecisionFacts(max_drift=0.2, min_top1=0.97, tolerance=5e-2, quantizes=True)
    INT8_FP16 = (
        "int8+fp16",
        PrecisionFacts(max_drift=0.2, min_top1=0.97, tolerance=5e-2, low="float16", quantizes=True),
    )

    def __new__(cls, value: str, facts: PrecisionFacts = ...) -> Precision:  # type: ignore[assignment]
        """Make a member of its row: the value, and its consequences. A look-up is by the value alone."""
        member = str.__new__(cls, value)
        member._value_, member.facts = value, facts
        return member

    def __str__(self) -> str:
        return str.__str__(self)


class Backend(str, enum.Enum):
    """The Triton backend of a version."""

    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt_rtx"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of a model's input or output.

    Attributes:
        name: the tensor's name in the graph.
        dtype: NumPy's name of the element type (`float32`, `int64`, `bool`, ...), plus `bfloat16`
            and `string`.
        shape: one `Dim` per axis, batch axis included. `None` when the graph does not state the rank.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...] | None

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.name}: {self.dtype}[unknown rank]"
        dims = ", ".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name}: {self.dtype}[{dims}]"


_PLAIN = frozenset((type(None), bool, str, int))


_FIELDS: dict[type, tuple[str, ...] | None] = {}


def _json_fields(kind: type) -> tuple[str, ...] | None:
    """Names of a dataclass's fields its JSON form has. `None` for another type. A listing asks 100,000 times."""
    if kind not in _FIELDS:
        special = issubclass(kind, (enum.Enum, os.PathLike, _Place, _Scalar))
        plain = dataclasses.is_dataclass(kind) and not special
        fields = dataclasses.fields(kind) if plain else ()
        _FIELDS[kind] = tuple(field.name for field in fields if field.metadata.get("json", True)) if plain else None
    return _FIELDS[kind]


def as_json(value: Any) -> Any:
    """Turn a stage's result into plain JSON types.

    Frozen dataclasses become objects, enums their values, paths strings, tuples and sets arrays, NumPy scalars Python
    numbers. A float unfit for JSON (NaN, infinity) becomes `null`. A dataclass field with `metadata={"json": False}`
    is left out.

    Raises:
        TypeError: for a type no stage's result may hold.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is tuple or kind is list:
        return [as_json(item) for item in value]
    names = _json_fields(kind)
    if names is not None:
        return {name: as_json(getattr(value, name)) for name in names}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, _Scalar):
        return as_json(value.item())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, _Place):
        return value.location_text()
    if isinstance(value, Mapping):
        return {str(as_json(key)): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(as_json(item) for item in value)
    raise TypeError(f"{type(value).__name__} is not a type that a result may hold")


_Extended = TypeVar("_Extended")


def extended(kind: type[_Extended], result: Any, **more: Any) -> _Extended:
    """Return a result as a class extending its own.

    Args:
        kind: a dataclass with fields added to the class of `result`.
        result: an instance of a dataclass.
        more: fields to add to the object.
    """
    return kind(**{field.name: getattr(result, field.name) for field in dataclasses.fields(result)}, **more)
