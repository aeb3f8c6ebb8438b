"""`calibrate make`: from images or recorded requests to a file for calibration, load tests and samples."""

from __future__ import annotations

import dataclasses
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from repo_manager.errors import CalibrationError, InputError, UsageError
from repo_manager.files import sha256_file, work_folder, write_atomic
from repo_manager.loadtest.inputs.images import image_files, image_samples, is_images, recipe_of
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.signature import Signature, signature_of
from repo_manager.precision import load_calibration
from repo_manager.request_data.read import holds_tensors, read_rows
from repo_manager.request_data.tensors import InputFacts
from repo_manager.summary import Summarized
from repo_manager.triton_config.served_signature import triton_dtype
from repo_manager.types import Digest, StrPath
from repo_manager.validation import check_fields, check_range

__all__ = ["CalibrationOptions", "MadeCalibration", "make_calibration"]

Array = NDArray[Any]
Sample = Mapping[str, Array]
_LIMIT_BYTES = 4 << 30
_YAML = (".yaml", ".yml")


@dataclasses.dataclass(frozen=True)
class CalibrationOptions:
    """The choice of samples, and the way from images to inputs.

    Attributes:
        samples: largest number, drawn at random. The order stays.
        seed: start of the random draw.
        image: `resize`, `mean`, `std`, `scale`, `color`, `layout` -> value, as in a load test.
        shapes: input -> its shape without the batch axis, where the model leaves sizes of images open.
    """

    samples: int = 256
    seed: int = 0
    image: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        check_range("samples", self.samples, least=1)
        check_range("seed", self.seed)


@dataclasses.dataclass(frozen=True)
class InputRange:
    """The range of one input over all samples: its smallest and largest number, and the mean. `None` for texts."""

    name: str
    dtype: str
    shape: tuple[int, ...] | None
    low: float | None
    high: float | None
    mean: float | None


@dataclasses.dataclass(frozen=True, repr=False)
class MadeCalibration(Summarized):
    """Calibration data written.

    Attributes:
        path: the file, or the folder.
        source: the images or requests it was made from.
        available: number of samples in the source.
        samples: number of samples taken: `available`, or fewer by `CalibrationOptions.samples`.
        inputs: the range of each input. Its shape is of one sample, `None` where they differ.
        digest: of the file, as the manifest of a version made with it records it. Of the content for a folder.
    """

    path: Path
    source: str
    available: int
    samples: int
    inputs: tuple[InputRange, ...]
    digest: Digest

    def _summary(self) -> Mapping[str, Any]:
        return {"path": self.path, "samples": f"{self.samples} of {self.available}", "digest": self.digest}


def make_calibration(
    model: StrPath, source: StrPath, output: StrPath, options: CalibrationOptions | None = None
) -> MadeCalibration:
    """Read images or requests as the model takes them, draw samples, and write them.

    Args:
        model: the ONNX file the data are for.
        source: a folder of images or one image, or requests: .jsonl, .json (perf_analyzer's, too), .npz, .npy.
        output: an .npz file; a `calibration.yaml` in the folder of the images, with the recipe from image to input; or
            a folder for samples of different shapes, with one .npy file for each.
        options: the number of samples, the steps for images, and open shapes. `None`: at most 256 samples.

    Raises:
        InputError: the source cannot be read, or does not fit the model.
        CalibrationError: no range of values can be learnt from it, or shapes differ and `output` is one file.
        UsageError: an image option is wrong, or `output` is an existing folder.
    """
    options = CalibrationOptions() if options is None else options
    source, output = Path(source), Path(output)
    signature = signature_of(load_model(model))
    facts = _facts(signature, options.shapes)
    if not source.exists():
        raise InputError(f"{source}: there is no such file or folder", hint="Give images, or a file of requests.")
    if output.suffix in _YAML:
        return _described(source, output, signature, facts, options)
    available, drawn = _drawn_of(source, facts, options)
    samples = [_with_rows(sample, facts, rows=_has_rows(signature)) for sample in drawn]
    with work_folder(f".{output.name}.", _existing(output.parent)) as folder:
        staged = Path(folder, output.name)
        _write(samples, staged, signature)
        data = load_calibration(staged, signature, min_samples=1)
        dataclasses.replace(data, source=str(source)).require_variety()
        _move(staged, output)
    digest = sha256_file(output) if output.is_file() else data.digest
    return MadeCalibration(output, str(source), available, len(samples), _ranges(samples, signature), digest)


def _has_rows(signature: Signature) -> bool:
    """Return whether the first axis of every input counts samples: it is dynamic, or 1."""
    firsts = [spec.shape[0] if spec.shape else 0 for spec in signature.inputs]
    return bool(firsts) and all(not isinstance(first, int) or first == 1 for first in firsts)


def _facts(signature: Signature, shapes: Mapping[str, tuple[int, ...]]) -> tuple[InputFacts, ...]:
    """Return the inputs as requests have them: without the axis of samples.

    Raises:
        UsageError: a shape is of no input.
    """
    names = [spec.name for spec in signature.inputs]
    if unknown := sorted(shapes.keys() - set(names)):
        raise UsageError(f"--shape {unknown[0]}: the model has no such input", hint=f"Its inputs: {', '.join(names)}.")
    first = 1 if _has_rows(signature) else 0
    return tuple(
        InputFacts(
            spec.name,
            triton_dtype(spec.dtype),
            shapes.get(spec.name, tuple(dim if isinstance(dim, int) else -1 for dim in (spec.shape or ())[first:])),
        )
        for spec in signature.inputs
    )


def _drawn_of(source: Path, facts: Sequence[InputFacts], options: CalibrationOptions) -> tuple[int, Sequence[Sample]]:
    """Return how many samples there are, and those drawn."""
    if not is_images(source) or holds_tensors(source, facts):
        if options.image:
            raise UsageError(f"--image: {source} holds requests, no images")
        rows = read_rows(source, facts)
        return len(rows), [rows[index] for index in _drawn(len(rows), options)]
    item = _image_input(source, facts)
    recipe, files = recipe_of(source, item, options.image), image_files(source)
    return len(files), image_samples([files[i] for i in _drawn(len(files), options)], item, recipe, _LIMIT_BYTES)


def _image_input(source: Path, facts: Sequence[InputFacts]) -> InputFacts:
    if len(facts) != 1:
        names = ", ".join(item.name for item in facts)
        raise InputError(f"{source} holds images, which fill one input, and the model has {len(facts)}: {names}")
    return facts[0]


def _drawn(count: int, options: CalibrationOptions) -> list[int]:
    if count <= options.samples:
        return list(range(count))
    return sorted(np.random.default_rng(options.seed).choice(count, options.samples, replace=False).tolist())


def _with_rows(sample: Sample, facts: Sequence[InputFacts], *, rows: bool) -> dict[str, Array]:
    """Return a sample with a batch axis where the model has one."""
    ranks = {item.name: len(item.shape) for item in facts}
    return {name: array[None] if rows and array.ndim == ranks[name] else array for name, array in sample.items()}


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder", hint=f"Create it: mkdir -p {folder}")
    return folder


def _write(samples: Sequence[Sample], place: Path, signature: Signature) -> None:
    """Write an .npz file, or a folder with a folder for each input.

    Raises:
        CalibrationError: samples of different shapes for one file.
    """
    rows = _has_rows(signature)
    if place.suffix != ".npz":
        for spec in signature.inputs:
            folder = place / re.sub(r"[^A-Za-z0-9._-]", "_", spec.name)
            folder.mkdir(parents=True)
            for number, sample in enumerate(samples):
                np.save(folder / f"{number:06}.npy", _storable(sample[spec.name]), allow_pickle=False)
        return
    arrays = {}
    for spec in signature.inputs:
        parts = [_storable(sample[spec.name]) for sample in samples]
        shapes = {part.shape[1:] if rows else part.shape for part in parts}
        if len(shapes) > 1:
            some = " and ".join(str(list(shape)) for shape in sorted(shapes)[:2])
            raise CalibrationError(
                f"'{spec.name}' has samples of {len(shapes)} shapes, {some} among them: one array cannot hold them",
                hint="Write a folder instead: -o FOLDER, without the ending .npz.",
            )
        arrays[spec.name] = np.concatenate(parts) if rows else np.stack(parts)
    with zipfile.ZipFile(place, "w", zipfile.ZIP_STORED) as archive:  # `savez` does not accept an array named `file`
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)  # type: ignore[no-untyped-call]  # NumPy has no type hints here


def _storable(array: Array) -> Array:
    if array.dtype.kind != "O":
        return array
    texts = [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in array.reshape(-1)]
    return np.array(texts, dtype=np.str_).reshape(array.shape)


def _move(staged: Path, output: Path) -> None:
    if output.is_dir():
        raise UsageError(f"{output} is an existing folder", hint="Name another one.")
    staged.replace(output)


def _ranges(samples: Sequence[Sample], signature: Signature) -> tuple[InputRange, ...]:
    found = []
    for spec in signature.inputs:
        arrays = [sample[spec.name] for sample in samples]
        shapes = {array.shape for array in arrays}
        shape = next(iter(shapes)) if len(shapes) == 1 else None
        filled = [array for array in arrays if array.size]
        if spec.dtype == "string" or not filled:
            found.append(InputRange(spec.name, spec.dtype, shape, None, None, None))
            continue
        low, high = min(float(array.min()) for array in filled), max(float(array.max()) for array in filled)
        mean = sum(float(array.sum(dtype=np.float64)) for array in filled) / sum(array.size for array in filled)
        found.append(InputRange(spec.name, spec.dtype, shape, low, high, mean))
    return tuple(found)


def _described(
    source: Path, output: Path, signature: Signature, facts: Sequence[InputFacts], options: CalibrationOptions
) -> MadeCalibration:
    """Write how images become inputs, beside them."""
    if not is_images(source) or not source.is_dir():
        raise UsageError(f"{output} says how images become inputs, and {source} is no folder of images")
    item = _image_input(source, facts)
    recipe = recipe_of(source, item, options.image)
    folder = os.path.relpath(source.resolve(), _existing(output.parent).resolve())
    document = {
        "input": item.name,
        "folder": folder,
        "size": list(recipe.size),
        **({} if recipe.resize is None else {"resize": recipe.resize}),
        "layout": recipe.layout,
        "color": recipe.color,
        "scale": recipe.scale,
        "mean": list(recipe.mean),
        "std": list(recipe.std),
    }
    write_atomic(output, yaml.safe_dump(document, sort_keys=False).encode())
    data = load_calibration(output, signature, min_samples=1)
    ranges = _ranges(list(data.batches()), signature)
    return MadeCalibration(output, str(source), data.count, data.count, ranges, sha256_file(output))
