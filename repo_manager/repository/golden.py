"""A version's golden sample: inputs, and the outputs that a right server gives for them.

`golden.npz` holds one array `input:NAME` per input and one `output:NAME` per output that is
reproducible, batch axis included. Strings are stored as NumPy unicode, never as pickled objects.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from repo_manager.errors import RepositoryError

__all__ = ["GOLDEN_FILE_NAME", "Golden", "read_golden", "write_golden"]

GOLDEN_FILE_NAME = "golden.npz"
_INPUT, _OUTPUT = "input:", "output:"

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Golden:
    """One sample.

    Attributes:
        inputs: input name -> array, batch axis included; strings as objects, as clients send them.
        outputs: output name -> the reference, likewise.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


def write_golden(path: Path, golden: Golden) -> None:
    """Write a golden sample.

    Raises:
        OSError: the file cannot be written.
    """
    arrays = {_INPUT + name: _storable(array) for name, array in golden.inputs.items()}
    arrays |= {_OUTPUT + name: _storable(array) for name, array in golden.outputs.items()}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_golden(path: Path) -> Golden:
    """Read a golden sample.

    Raises:
        RepositoryError: the file is missing or damaged.
    """
    inputs: dict[str, Array] = {}
    outputs: dict[str, Array] = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in archive.files:
                if key.startswith(_INPUT):
                    inputs[key.removeprefix(_INPUT)] = _usable(archive[key])
                elif key.startswith(_OUTPUT):
                    outputs[key.removeprefix(_OUTPUT)] = _usable(archive[key])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as exc:
        raise RepositoryError(
            f"{path}: the golden sample cannot be read: {exc}", hint="Run repo-manager verify, or add the model again."
        ) from exc
    return Golden(inputs, outputs)


def _storable(array: Array) -> Array:
    """Give an array a type that NumPy stores without pickle (bfloat16 by its bits)."""
    if array.dtype.kind == "O":
        return array.astype(np.str_)
    if array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    return array


def _usable(array: Array) -> Array:
    return array.astype(np.object_) if array.dtype.kind == "U" else array
