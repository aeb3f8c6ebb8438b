"""A version's golden sample: requests, and the responses a right server gives to them.

Mostly that is one request with one response: `golden.npz` then holds one array `input:NAME` per input and one
`output:NAME` per reproducible output, batch axis included. Strings are stored as NumPy unicode, never as pickled
objects. A sequence of requests, or a request with several responses, adds `request2/input:NAME`,
`request2/response3/output:NAME`, and so on, counted from 1, where the first one has no prefix. `responses` then counts
each request's responses.
"""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from repo_manager.errors import RepositoryError
from repo_manager.files import reason_of
from repo_manager.request_data.archives import RECORDED_COUNTS, RECORDED_KEY, check_archive

__all__ = ["GOLDEN_FILE_NAME", "Exchange", "Golden", "read_golden", "write_golden"]

GOLDEN_FILE_NAME = "golden.npz"
_ZIP = (zipfile.BadZipFile, zlib.error)

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One request and its responses.

    Attributes:
        inputs: input name -> array, batch axis included. Strings as objects, as clients send them.
        responses: of each, output name -> the reference. One for a plain model, any number for a decoupled.
    """

    inputs: Mapping[str, Array]
    responses: tuple[Mapping[str, Array], ...]


@dataclasses.dataclass(frozen=True)
class Golden:
    """One sample.

    Attributes:
        inputs: of the first request. See `Exchange`.
        outputs: output name -> reference array, of the first response to the first request.
        exchanges: all requests of a sequence, in order, and all responses of a decoupled model. `None` makes one
            exchange of `inputs` and `outputs`.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    exchanges: tuple[Exchange, ...] = ()

    def __post_init__(self) -> None:
        if not self.exchanges:
            object.__setattr__(self, "exchanges", (Exchange(self.inputs, (self.outputs,)),))

    @classmethod
    def of(cls, exchanges: Iterable[Exchange]) -> Golden:
        """Return the sample of a sequence, or of a request with several responses. There is at least one request."""
        found = tuple(exchanges)
        first = found[0].responses
        return cls(found[0].inputs, first[0] if first else {}, found)


def write_golden(path: Path, golden: Golden) -> None:
    """Write a golden sample.

    Raises:
        OSError: the file cannot be written.
    """
    arrays: dict[str, Array] = {}
    for number, exchange in enumerate(golden.exchanges, start=1):
        prefix = "" if number == 1 else f"request{number}/"
        arrays |= {f"{prefix}input:{name}": _storable(array) for name, array in exchange.inputs.items()}
        for place, outputs in enumerate(exchange.responses, start=1):
            place_prefix = prefix if place == 1 else f"{prefix}response{place}/"
            arrays |= {f"{place_prefix}output:{name}": _storable(array) for name, array in outputs.items()}
    counts = [len(exchange.responses) for exchange in golden.exchanges]
    if counts != [1]:
        arrays[RECORDED_COUNTS] = np.array(counts)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_golden(path: Path) -> Golden:
    """Read a golden sample.

    Raises:
        RepositoryError: the file is missing or damaged.
    """
    requests: dict[int, dict[str, Array]] = {}
    responses: dict[tuple[int, int], dict[str, Array]] = {}
    try:
        check_archive(path)
        # Opened here because np.load leaves a broken file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            counts = archive[RECORDED_COUNTS].tolist() if RECORDED_COUNTS in archive.files else [1]
            for key in archive.files:
                match = RECORDED_KEY.fullmatch(key)
                if match is None:
                    continue
                request, response = int(match["request"] or 1), int(match["response"] or 1)
                place = requests.setdefault(request, {})
                if match["kind"] == "output":
                    place = responses.setdefault((request, response), {})
                place[match["name"]] = _usable(archive[key])
    except (OSError, ValueError, TypeError, KeyError, EOFError, NotImplementedError, MemoryError, *_ZIP) as exc:
        raise RepositoryError(
            f"{path}: the golden sample cannot be read: {reason_of(exc)}",
            hint="Run repo-manager verify, or add the model again.",
        ) from exc
    return Golden.of(
        Exchange(
            requests.get(number, {}), tuple(responses.get((number, place), {}) for place in range(1, int(count) + 1))
        )
        for number, count in enumerate(counts, start=1)
    )


def _storable(array: Array) -> Array:
    """Give an array a type NumPy stores without pickle (bfloat16 by its bits)."""
    if array.dtype.kind == "O":
        texts = [
            item.decode("utf-8", "surrogateescape") if isinstance(item, bytes) else str(item) for item in array.flat
        ]
        return np.array(texts, dtype=np.str_).reshape(array.shape)
    if array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    return array


def _usable(array: Array) -> Array:
    return array.astype(np.object_) if array.dtype.kind == "U" else array
