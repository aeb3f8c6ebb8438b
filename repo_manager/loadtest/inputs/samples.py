"""Input data of a load test: random by type and shape, or from files, shaped into requests."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from repo_manager.errors import InputError, UsageError
from repo_manager.loadtest.inputs.images import is_images, read_images
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.request_data.read import holds_tensors, read_rows, read_streams
from repo_manager.request_data.tensors import NUMPY_OF_TRITON, Array, InputFacts, Sample, elements_of

__all__ = ["drawn_note", "make_samples", "make_sequences", "resolve_shapes"]

_MAX_TOTAL_BYTES = 256 << 20


def resolve_shapes(facts: ServedModelFacts, options: LoadTestOptions) -> dict[str, tuple[int, ...]]:
    """Return each input's full shape in a request, batch axis included where the model has one.

    Raises:
        UsageError: a dynamic dimension without a size, an unfit shape, an unknown input, a batch size the model does
            not take.
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


def make_samples(facts: ServedModelFacts, options: LoadTestOptions) -> list[Sample]:
    """Return the inputs of each distinct request.

    Raises:
        UsageError: shapes are missing or do not fit.
        InputError: the data file is unreadable, does not fit, or is all zeros.
    """
    inputs = [item for item in facts.inputs if not item.optional or item.name in options.shapes]
    if options.data is not None:
        samples = _batched(_rows(options.data, facts, options), str(options.data), facts, options)
    elif options.recorded:
        rows = [sample for row in options.recorded for sample in _without_batch_axis(row, facts)]
        samples = _batched(rows, "the golden sample", facts, options)
    elif options.image:
        raise UsageError("--image says how images become inputs, and there are none", hint="Give --input-data FOLDER.")
    else:
        shapes = resolve_shapes(facts, options)
        size = sum(_size_bytes(item, shapes[item.name]) for item in inputs)
        if size > _MAX_TOTAL_BYTES // 2 and not options.shapes:
            raise InputError(
                f"a request to {facts.model} would have {size / 2**20:.4g} MiB by the server's shapes",
                hint="Give the shapes with --shape if that is meant, or the data with --input-data.",
            )
        count = max(min(options.distinct, _MAX_TOTAL_BYTES // max(size, 1)), 1)
        rng = np.random.default_rng(options.seed)
        samples = [
            {i.name: _random(i.datatype, shapes[i.name], rng, _range_of(i.name, options)) for i in inputs}
            for _ in range(count)
        ]
    if not options.allow_zeros:
        _refuse_zeros(samples, options.data)
    return samples


def make_sequences(
    facts: ServedModelFacts, options: LoadTestOptions
) -> tuple[list[Sample], tuple[tuple[int, ...], ...]]:
    """Return the inputs of each distinct request, and the recorded sequences as numbers of these requests.

    Each stream of the data is a sequence. There are none for random inputs, whose lengths are drawn, and for a model
    without sequences.

    Raises: as `make_samples`.
    """
    data = options.data
    if not facts.sequence or (data is None and not options.recorded) or (data is not None and is_images(data)):
        return make_samples(facts, options), ()
    if data is not None:
        found = read_streams(data, facts.inputs, flat=options.shapes, ignore_others=True)
    else:
        found = [list(options.recorded)]
    streams = [[sample for row in rows for sample in _without_batch_axis(row, facts)] for rows in found]
    name = "the golden sample" if data is None else str(data)
    # One row at a time keeps the order of steps with and without an optional input.
    samples = [request for rows in streams for row in rows for request in _batched([row], name, facts, options)]
    if not options.allow_zeros:
        _refuse_zeros(samples, data)
    ends = list(itertools.accumulate(len(rows) for rows in streams))
    return samples, tuple(tuple(range(end - len(rows), end)) for end, rows in zip(ends, streams, strict=True))


def drawn_note(facts: ServedModelFacts, options: LoadTestOptions) -> str | None:
    """Name the integer inputs with ranges of their own. `None` when none is."""
    integers = [item.name for item in facts.inputs if NUMPY_OF_TRITON[item.datatype].kind in "iu"]
    ranges = {name: options.int_ranges[name] for name in integers if name in options.int_ranges}
    if options.data is not None or options.recorded or not ranges:
        return None
    texts = [f"{name} from {low} to {high - 1}" for name, (low, high) in ranges.items()]
    return f"Random integers as the version's record allows: {', '.join(texts)}. Real ones: --input-data."


def _range_of(name: str, options: LoadTestOptions) -> tuple[int, int]:
    return options.int_ranges.get(name, options.int_range)


def _rows(path: Path, facts: ServedModelFacts, options: LoadTestOptions) -> list[Sample]:
    """Read a file's samples, or a folder's images."""
    if holds_tensors(path, facts.inputs) or not is_images(path):
        if options.image:
            raise UsageError(f"--image says how images become inputs, and {path} is no image and no folder")
        rows = read_rows(path, facts.inputs, flat=options.shapes, ignore_others=True)
        return [sample for row in rows for sample in _without_batch_axis(row, facts)]
    item = facts.inputs[0]
    shape = options.shapes.get(item.name, item.shape)
    return read_images(path, facts, shape, options.image, _MAX_TOTAL_BYTES // options.batch_size)


def _without_batch_axis(row: Sample, facts: ServedModelFacts) -> list[Sample]:
    """Return the samples of a request with a batch axis. Any other request is one sample."""
    ranks = {item.name: len(item.shape) for item in facts.inputs}
    sizes = {len(array) if array.ndim == ranks[name] + 1 else 0 for name, array in row.items()}
    if len(sizes) != 1 or 0 in sizes or (facts.max_batch_size == 0 and sizes != {1}):
        return [row]
    return [{name: array[number] for name, array in row.items()} for number in range(sizes.pop())]


def _size_bytes(item: InputFacts, shape: tuple[int, ...]) -> int:
    return elements_of(shape) * (12 if item.datatype == "BYTES" else NUMPY_OF_TRITON[item.datatype].itemsize)


def _random(datatype: str, shape: tuple[int, ...], rng: np.random.Generator, int_range: tuple[int, int]) -> Array:
    """Draw values: floats standard normal, integers in a small range, fit for indices as well, short words."""
    dtype = NUMPY_OF_TRITON[datatype]
    if datatype == "BYTES":
        numbers = rng.integers(0, 1 << 32, size=shape)
        words: Array = np.vectorize(lambda number: b"%08x" % number, otypes=[object])(numbers)
        return words
    if datatype == "BOOL":
        return rng.integers(0, 2, size=shape).astype(bool)
    if dtype.kind in "iu":
        bounds = np.iinfo(dtype)
        low, high = max(int_range[0], int(bounds.min)), min(int_range[1], int(bounds.max) + 1)
        return rng.integers(low, high, size=shape, dtype=dtype)
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype)


def _refuse_zeros(samples: Sequence[Sample], path: Path | None) -> None:
    arrays = [array for sample in samples for array in sample.values() if array.dtype != object and array.size]
    if path is not None and arrays and not any(np.count_nonzero(array) for array in arrays):
        raise InputError(
            f"{path}: every input is all zeros, on which kernels, caches and branches do not behave as on data",
            hint="Give real data, leave --input-data out for random inputs, or allow zeros with --allow-zeros.",
        )


def _batched(rows: list[Sample], path: str, facts: ServedModelFacts, options: LoadTestOptions) -> list[Sample]:
    """Join samples into requests of `batch_size`, wrapping around at the end."""
    known = {item.name: item for item in facts.inputs}
    for number, row in enumerate(rows, start=1):
        for name, array in row.items():
            try:
                _shape_of(known[name], facts.model, tuple(array.shape))
            except UsageError as exc:
                raise UsageError(f"{path}, sample {number}: {exc.message}") from exc
    if options.batch_size > 1 and options.batch_size > facts.max_batch_size:
        resolve_shapes(facts, options)
    if facts.max_batch_size == 0:
        return rows
    alike: dict[frozenset[str], list[Sample]] = {}  # rows with the same inputs: only these can share a batch
    for row in rows:
        alike.setdefault(frozenset(row), []).append(row)
    size = options.batch_size
    try:
        return [
            {name: np.stack([sample[name] for sample in group]) for name in group[0]}
            for samples in alike.values()
            for group in _groups(samples, size)
        ]
    except ValueError as exc:
        raise InputError(f"{path}: samples of different shapes cannot share a batch of {size}: {exc}") from exc


def _groups(samples: list[Sample], size: int) -> list[list[Sample]]:
    """Return groups of `size`, wrapping around at the end."""
    count = -(-len(samples) // size)
    return [[samples[(first * size + place) % len(samples)] for place in range(size)] for first in range(count)]
