"""Calibration data from NumPy's own files. Pickled objects are refused, always.

How an array's axes are read, for an input of rank r: with r + 1 axes the first counts the samples. With r axes the
first is the batch axis: of a dynamic size, each row is a sample. Of a fixed size b, each b rows are. A recurrent
state, whose batch is another axis, is parted along this axis. A single state belongs to every sample. So is a single
number for a scalar.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from repo_manager.errors import CalibrationError
from repo_manager.lfs import refuse_lfs_pointer
from repo_manager.onnx_model.draft import Array
from repo_manager.onnx_model.signature import Signature
from repo_manager.precision.calibration.data import CalibrationData, check_names, numpy_name, validated
from repo_manager.request_data.archives import check_archive
from repo_manager.types import TensorSpec

__all__ = ["array_of_npz", "from_folder", "from_npz"]


def from_npz(path: Path, signature: Signature, *, with_others: bool = False) -> CalibrationData:
    """Read one array per input from an .npz file.

    Args:
        path: the .npz file, with one array per input.
        signature: the model's inputs and outputs.
        with_others: the file may hold other arrays, labels for instance. They are not read.

    Raises:
        CalibrationError: unreadable, pickled, or it does not fit the model.
    """
    with _opened(path) as archive:
        inputs = {spec.name for spec in signature.inputs}
        names = [name for name in archive.files if not with_others or name in inputs]
        check_names(dict.fromkeys(names), signature, str(path))
        arrays = {name: archive[name] for name in names}
    return _stacked(arrays, dict.fromkeys(arrays, path), signature, str(path))


def array_of_npz(path: Path, name: str) -> Array:
    """Read one array of an .npz file.

    Raises:
        CalibrationError: unreadable, pickled, or there is no such array.
    """
    with _opened(path) as archive:
        if name not in archive.files:
            listed = ", ".join(f"'{each}'" for each in archive.files) or "nothing"
            raise CalibrationError(f"{path}: there is no array '{name}'", hint=f"It holds {listed}.")
        array: Array = archive[name]
    return array


@contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """Open an archive of arrays. A fault while it is read is an error with its name.

    Raises:
        CalibrationError: unreadable or pickled.
    """
    try:
        check_archive(path)
        # Opened here because np.load leaves a broken file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise CalibrationError(f"{path}: not an .npz archive")
            yield archive
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error, NotImplementedError) as exc:
        raise _unreadable(path, exc) from exc


def from_folder(folder: Path, signature: Signature) -> CalibrationData:
    """Read a folder of .npy files.

    The folder holds `INPUT.npy` for each input (as in an .npz), or a folder `INPUT/` for each. The folder has one
    sample per file, in the order of the names. For a model with one input, files of any name hold one sample each.
    Characters other than letters, digits, `.`, `_` and `-` in an input's name are `_` in a file's name.

    Raises:
        CalibrationError: nothing fits, an unreadable or pickled file, or it does not fit the model.
    """
    by_file = {spec.name: folder / f"{_file_name(spec.name)}.npy" for spec in signature.inputs}
    by_folder = {spec.name: folder / _file_name(spec.name) for spec in signature.inputs}
    loose = sorted(folder.glob("*.npy"))
    if all(path.is_file() for path in by_file.values()) and len(loose) == len(by_file):
        return _stacked({name: _load(path) for name, path in by_file.items()}, by_file, signature, str(folder))
    if all(path.is_dir() for path in by_folder.values()):
        return _listed({name: sorted(path.glob("*.npy")) for name, path in by_folder.items()}, signature, folder)
    if len(signature.inputs) == 1 and loose:
        return _listed({signature.inputs[0].name: loose}, signature, folder)
    wanted = ", ".join(f"'{path.name}'" for path in by_file.values())
    found = ", ".join(f"'{path.name}'" for path in loose[:6]) or "no .npy file"
    raise CalibrationError(
        f"{folder}: found {found}, and the model needs {wanted}",
        hint="Save one .npy per input, samples along the first axis, or a folder per input with one .npy per sample.",
    )


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def _unreadable(path: Path, exc: BaseException) -> CalibrationError:
    if "pickle" in str(exc) or "Python objects" in str(exc):
        return CalibrationError(
            f"{path}: holds pickled Python objects, which are never loaded", hint="Save plain numeric arrays."
        )
    return CalibrationError(f"{path}: cannot be read: {exc}")


def _load(path: Path) -> Array:
    refuse_lfs_pointer(path)
    try:
        array: Array = np.lib.format.open_memmap(path, mode="r")  # type: ignore[no-untyped-call]  # NumPy has no type hints here
    except (OSError, ValueError, EOFError, MemoryError) as exc:
        raise _unreadable(path, exc) from exc
    return array  # never an object array: these cannot be mapped


def _stacked(
    arrays: Mapping[str, Array], paths: Mapping[str, Path], signature: Signature, source: str
) -> CalibrationData:
    batch = {spec.shape[0] for spec in signature.inputs if spec.shape and isinstance(spec.shape[0], str)}
    layouts = {spec.name: _layout(arrays[spec.name], spec, str(paths[spec.name]), batch) for spec in signature.inputs}
    counts = {name: layout.count for name, layout in layouts.items() if layout.count is not None}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"'{name}' {count}" for name, count in counts.items())
        raise CalibrationError(f"{source}: the inputs have different numbers of samples: {said}")

    def get(index: int) -> dict[str, Array]:
        return {name: np.array(layout.part(arrays[name], index), order="C") for name, layout in layouts.items()}

    count = next(iter(counts.values()), 1 if layouts else 0)
    return validated(source, signature, count, get, lambda index: f"{source}: sample {index + 1}")


@dataclass(frozen=True)
class _Layout:
    """Where the samples of an array are.

    Attributes:
        count: how many there are. `None`: it is the same for every sample.
        axis: the axis of the samples.
        step: how many rows make one. 0: the axis counts samples and goes.
    """

    count: int | None
    axis: int = 0
    step: int = 1

    def part(self, array: Array, index: int) -> Array:
        """Return one sample."""
        if self.count is None:
            return array
        at = index if self.step == 0 else slice(index * self.step, (index + 1) * self.step)
        part: Array = np.moveaxis(array, self.axis, 0)[at]
        return part if self.axis == 0 else np.moveaxis(part, 0, self.axis)


def _layout(array: Array, spec: TensorSpec, where: str, batch: Set[str]) -> _Layout:
    """Find the samples of an array.

    Args:
        array: values of one input for all samples.
        spec: name, type and shape of the input.
        where: path of the array's file. Error messages begin with it.
        batch: symbols of the first axis of some input.

    Raises:
        CalibrationError: it does not fit the input.
    """
    wanted = numpy_name(spec)
    if array.dtype != wanted and not (spec.dtype == "string" and array.dtype.kind == "U"):
        raise CalibrationError(
            f"{where}: '{spec.name}' is {array.dtype}, and the model takes {spec.dtype}",
            hint=f"Convert it with .astype({wanted.name!r}) before saving.",
        )
    if array.ndim == 0 and spec.shape == ():
        return _Layout(None)
    if array.ndim == 0:
        raise CalibrationError(f"{where}: '{spec.name}' is a single number, without an axis of samples")
    rank = array.ndim if spec.shape is None else len(spec.shape)
    if array.ndim == rank + 1:
        return _Layout(array.shape[0], step=0)
    if array.ndim != rank or spec.shape is None or not spec.shape:
        raise CalibrationError(f"{where}: '{spec.name}' has shape {list(array.shape)}, and the model takes {spec}")
    first = spec.shape[0]
    if not isinstance(first, int):
        return _Layout(array.shape[0])
    own = next((axis for axis, dim in enumerate(spec.shape) if axis and dim in batch), None)
    if own is not None and array.shape[0] == first:
        return _Layout(None if array.shape[own] == 1 else array.shape[own], axis=own)
    if first < 1 or array.shape[0] % first:
        raise CalibrationError(
            f"{where}: '{spec.name}' has {array.shape[0]} rows, and the model takes {first} at a time: {spec}"
        )
    return _Layout(array.shape[0] // first, step=first)


def _listed(files: Mapping[str, list[Path]], signature: Signature, folder: Path) -> CalibrationData:
    counts = {name: len(paths) for name, paths in files.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"'{name}' {count}" for name, count in counts.items())
        raise CalibrationError(f"{folder}: the inputs have different numbers of files: {said}")
    ranks = {spec.name: None if spec.shape is None else len(spec.shape) for spec in signature.inputs}

    def get(index: int) -> dict[str, Array]:
        sample = {}
        for name, paths in files.items():
            array = _load(paths[index])
            rank = ranks[name]
            # Samples are usually saved without a batch axis.
            sample[name] = np.array(array[None] if rank is not None and array.ndim == rank - 1 else array)
        return sample

    def where(index: int) -> str:
        return " and ".join(str(paths[index]) for paths in files.values())

    return validated(str(folder), signature, next(iter(counts.values()), 0), get, where)
