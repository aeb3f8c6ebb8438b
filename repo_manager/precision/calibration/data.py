"""Calibration data, and the checks on every sample, whatever its source."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

from repo_manager.errors import CalibrationError
from repo_manager.onnx_model.draft import Array
from repo_manager.onnx_model.signature import Signature
from repo_manager.types import Digest, TensorSpec

__all__ = [
    "MIN_TO_SPLIT",
    "TYPICAL_INPUTS",
    "CalibrationData",
    "check_names",
    "check_sample",
    "data_of_samples",
    "numpy_name",
    "validated",
]

TYPICAL_INPUTS = "Give 100 or more typical inputs, prepared as the model's application prepares them."
MIN_TO_SPLIT = 16
"""With fewer samples none is held out: fewer than four would judge."""
_HELD_OUT_EVERY = 4


@dataclass(frozen=True)
class CalibrationData:
    """Checked inputs for a model.

    Attributes:
        source: where they came from, in words. Error messages begin with it.
        names: names of the model's inputs, in its order. Every sample has them all.
        count: number of samples. `_get` takes 0 to `count` - 1.
        digest: of all values, types and shapes, in order. A part keeps the digest of the whole.
        degenerate: why no range of values can be learnt from it. Empty when one can.

    Besides, `_get` reads a sample and `_own` holds a digest of each.
    """

    source: str
    names: tuple[str, ...]
    count: int
    digest: Digest
    _get: Callable[[int], Mapping[str, Array]] = field(repr=False, compare=False, metadata={"json": False})
    _own: tuple[bytes, ...] = field(repr=False, compare=False, metadata={"json": False})
    degenerate: str = ""

    def require_variety(self) -> None:
        """Check whether a range of values can be learnt from the samples.

        Raises:
            CalibrationError: they are all the same, or one value throughout.
        """
        if self.degenerate:
            raise CalibrationError(
                f"{self.source}: {self.degenerate}. That shows neither ranges of values nor drift", hint=TYPICAL_INPUTS
            )

    def split(self) -> tuple[CalibrationData, CalibrationData] | None:
        """Part the data: samples for calibration, and a quarter, held out to judge the result.

        Returns:
            Both parts. `None` with fewer than `MIN_TO_SPLIT` different samples.
        """
        if len(set(self._own)) < MIN_TO_SPLIT:
            return None
        return self.without_one_in(_HELD_OUT_EVERY)

    def without_one_in(self, number: int) -> tuple[CalibrationData, CalibrationData]:
        """Part the data: all but one of each `number` samples, and those.

        The one is drawn at random, always the same one: data may repeat a pattern, such as one sample of each class in
        turn. Equal samples stay together, so that no sample of one part is in the other. Of those in the second part
        one remains.
        """
        places: dict[bytes, list[int]] = {}
        for index, own in enumerate(self._own):
            places.setdefault(own, []).append(index)
        groups = list(places.values())
        random = np.random.default_rng(number)
        drawn = {start + int(random.integers(number)) for start in range(0, len(groups) - number + 1, number)}
        apart = [group[0] for place, group in enumerate(groups) if place in drawn]
        rest = [index for place, group in enumerate(groups) if place not in drawn for index in group]
        return self._part(sorted(rest)), self._part(apart)

    def _part(self, indices: Sequence[int]) -> CalibrationData:
        get, own = self._get, tuple(self._own[index] for index in indices)
        return replace(self, count=len(indices), _get=lambda index: get(indices[index]), _own=own)

    def batches(self) -> Iterator[dict[str, Array]]:
        """Yield each sample as one set of model inputs, batch axis included."""
        for index in range(self.count):
            yield dict(self._get(index))


def validated(
    source: str,
    signature: Signature,
    count: int,
    get: Callable[[int], Mapping[str, Array]],
    where: Callable[[int], str],
) -> CalibrationData:
    """Read every sample once, check it, and take the digest.

    Args:
        source: origin of the data, for messages.
        signature: the model's inputs and outputs.
        count: number of samples in the data.
        get: returns a sample by its number, from 0.
        where: returns the place of a sample, for messages.

    Raises:
        CalibrationError: a sample does not fit the model. `where` names its file.
    """
    digest = hashlib.sha256()
    varieties = {spec.name: _Variety() for spec in signature.inputs}
    each_own: list[bytes] = []
    for index in range(count):
        sample = get(index)
        own = hashlib.sha256()
        check_names(sample, signature, where(index))
        is_empty = bool(signature.inputs)
        for spec in signature.inputs:
            array = sample[spec.name]
            check_sample(array, spec, where(index))
            is_empty = is_empty and array.size == 0
            content = _bytes(array)
            for each in (digest, own):
                each.update(f"{spec.name} {array.dtype} {array.shape}\n".encode())
                each.update(content)
            varieties[spec.name].add(array)
        if is_empty:
            raise CalibrationError(f"{where(index)}: every input is empty")
        each_own.append(own.digest())
    names = tuple(spec.name for spec in signature.inputs)
    degenerate = ""
    found = varieties.values()
    if any(each.elements > 1 for each in found) and not any(each.varies for each in found):
        degenerate = "every input is one and the same value throughout"
    elif count > 1 and names and len(set(each_own)) == 1:
        degenerate = f"all {count} samples are the same"
    whole = Digest("sha256:" + digest.hexdigest())
    return CalibrationData(source, names, count, whole, get, tuple(each_own), degenerate)


@dataclass
class _Variety:
    """Whether an input takes more than one value over all samples."""

    value: bytes | None = None
    varies: bool = False
    elements: int = 0

    def add(self, array: Array) -> None:
        if self.varies or not array.size:
            return
        first = array.reshape(-1)[:1]
        self.elements += array.size
        self.varies = not bool((array == first[0]).all()) or self.value not in (None, _bytes(first))
        self.value = _bytes(first)


def _bytes(array: Array) -> bytes:
    if array.dtype == object:
        return repr(array.tolist()).encode()
    return np.ascontiguousarray(array).tobytes()


def data_of_samples(samples: Sequence[Any], signature: Signature, source: str) -> CalibrationData:
    """Make calibration data of dictionaries in memory: input name -> array, batch axis included.

    Args:
        samples: input samples: input name -> array, batch axis included.
        signature: the model's inputs and outputs.
        source: origin of the data, for messages.

    Raises:
        CalibrationError: one is no such dictionary, or does not fit the model.
    """
    clean: list[dict[str, Array]] = []
    for index, sample in enumerate(samples):
        if not isinstance(sample, Mapping):
            raise CalibrationError(f"{source}: sample {index + 1} is {type(sample).__name__}, not a dictionary")
        clean.append({str(name): np.asarray(value) for name, value in sample.items()})
    return validated(source, signature, len(clean), clean.__getitem__, lambda i: f"{source}: sample {i + 1}")


def check_names(found: Mapping[str, Any], signature: Signature, where: str) -> None:
    """Compare the names with the model's inputs. They must be the same.

    Args:
        found: name -> array of the sample.
        signature: the model's inputs and outputs.
        where: place of the value, as the error message names it.

    Raises:
        CalibrationError: a name is missing or unknown.
    """
    wanted = {spec.name for spec in signature.inputs}
    missing, unknown = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
    if missing or unknown:
        said = [f"no data for {_list(missing)}"] * bool(missing) + [f"no such input: {_list(unknown)}"] * bool(unknown)
        raise CalibrationError(f"{where}: {'; '.join(said)}", hint=f"The model's inputs are {_list(sorted(wanted))}.")


def _list(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def numpy_name(spec: TensorSpec) -> np.dtype[Any]:
    """Return the NumPy type an input must have."""
    if spec.dtype == "string":
        return np.dtype(object)
    return np.dtype(getattr(ml_dtypes, spec.dtype, spec.dtype) if not hasattr(np, spec.dtype) else spec.dtype)


def _is_free(spec: TensorSpec, axis: int) -> bool:
    return spec.shape is None or not isinstance(spec.shape[axis], int)


def check_sample(array: Array, spec: TensorSpec, where: str) -> None:
    """Check one input of one sample for the model's type and shape, and for finite numbers.

    Args:
        array: one input of one sample.
        spec: type and shape of the input.
        where: place of the value, as the error message names it.

    Raises:
        CalibrationError: it does not. `where` opens the message.
    """
    wanted = numpy_name(spec)
    if array.dtype != wanted and not (spec.dtype == "string" and array.dtype.kind in "UO"):
        raise CalibrationError(
            f"{where}: '{spec.name}' is {array.dtype}, and the model takes {spec.dtype}",
            hint=f"Convert it with .astype({wanted.name!r}) before saving.",
        )
    if spec.shape is not None and (
        array.ndim != len(spec.shape)
        or any(isinstance(dim, int) and dim != size for dim, size in zip(spec.shape, array.shape, strict=True))
    ):
        raise CalibrationError(
            f"{where}: '{spec.name}' has shape {list(array.shape)} per sample, and the model takes {spec}"
        )
    fixed = [axis for axis, size in enumerate(array.shape) if size == 0 and (axis == 0 or not _is_free(spec, axis))]
    if fixed:
        raise CalibrationError(
            f"{where}: '{spec.name}' is empty, of shape {list(array.shape)}",
            hint="Only an axis of a dynamic size, other than the batch, may have size 0: an empty cache, for instance.",
        )
    if array.dtype.kind in "fc" and not np.isfinite(array).all():
        raise CalibrationError(f"{where}: '{spec.name}' holds NaN or infinite values")
