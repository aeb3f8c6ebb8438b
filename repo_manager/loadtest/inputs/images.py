"""Images as inputs: read, resized and normalised as the options say, or as a `calibration.yaml` beside them does.

A model for encoded images gets the files as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repo_manager.errors import CalibrationError, InputError, UsageError
from repo_manager.files import reason_of
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.optional import require
from repo_manager.request_data.image_model.rm_pixels import ImageRecipe, typed
from repo_manager.request_data.read import DATA_SUFFIXES
from repo_manager.request_data.tensors import NUMPY_OF_TRITON, Array, InputFacts, Sample

__all__ = ["IMAGE_KEYS", "image_files", "image_samples", "is_images", "read_images", "recipe_of"]

IMAGE_KEYS = ("resize", "color", "scale", "mean", "std", "layout")
_COLORS = ("rgb", "bgr", "gray")
_LAYOUTS = ("nchw", "nhwc")
_READER = "repo_manager.precision.calibration.images"  # imports ONNX Runtime: loaded for images only


def is_images(path: Path) -> bool:
    """Return whether input data is an image or a folder of images."""
    suffix = path.suffix.lower()
    return path.is_dir() or (suffix not in DATA_SUFFIXES and suffix in require(_READER).IMAGE_SUFFIXES)


def read_images(
    path: Path, facts: ServedModelFacts, shape: Sequence[int], given: Mapping[str, str], limit_bytes: int
) -> list[Sample]:
    """Return a sample for each image, in order of name, without batch axes.

    Args:
        path: an image, or a folder (its sub-folders too).
        facts: the model. It has one input.
        shape: the input's shape without the batch axis added by `max_batch_size`. `-1` where it is dynamic.
        given: the options, before the fields of a `calibration.yaml` in the folder.
        limit_bytes: images beyond this many bytes of input are left out.

    Raises:
        UsageError: an option is unknown or wrong, or sizes are missing.
        InputError: no image, an unreadable one, or a model without an input for them.
    """
    if len(facts.inputs) != 1:
        names = ", ".join(item.name for item in facts.inputs)
        raise InputError(f"images fill one input, and the model {facts.model} has {len(facts.inputs)}: {names}")
    item = dataclasses.replace(facts.inputs[0], shape=tuple(shape))
    if not _takes_files(item):
        return image_samples(image_files(path), item, recipe_of(path, item, given), limit_bytes)
    if given:
        raise UsageError(f"--image: the model {facts.model} takes images as their files hold them, and prepares them")
    return image_samples(image_files(path), item, None, limit_bytes)


def image_files(path: Path) -> list[Path]:
    """Return an image, or those of a folder and its sub-folders, in order of name.

    Raises:
        InputError: the folder has no image.
    """
    reader = require(_READER)
    files: list[Path] = reader.images_in(path) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: no image found", hint=f"Known endings: {', '.join(sorted(reader.IMAGE_SUFFIXES))}.")
    return files


def image_samples(
    files: Sequence[Path], item: InputFacts, recipe: ImageRecipe | None, limit_bytes: int
) -> list[Sample]:
    """Return a sample for each image, as the recipe has it, up to a limit in bytes.

    Args:
        files: images, as `image_files` finds them. Read in this order, at least one in any case.
        item: the input they fill. Gives each sample's key, and the type and rank of the arrays.
        recipe: `None` for an input of whole files.
        limit_bytes: images beyond this many bytes of input are left out.

    Raises:
        InputError: an image cannot be read.
    """
    samples: list[Sample] = []
    size = 0
    for file in files:
        array = _content(file, item) if recipe is None else _pixels(file, item, recipe)
        size += file.stat().st_size if recipe is None else array.nbytes
        if samples and size > limit_bytes:
            break
        samples.append({item.name: array})
    return samples


def _pixels(file: Path, item: InputFacts, recipe: ImageRecipe) -> Array:
    try:
        pixels = require(_READER).read_image(require("PIL.Image"), file, recipe)
    except CalibrationError as exc:
        raise InputError(exc.message, hint=exc.hint) from exc
    return typed(pixels if len(item.shape) == 4 else pixels[0], NUMPY_OF_TRITON[item.datatype])


def _takes_files(item: InputFacts) -> bool:
    """Return whether an input takes an image as its file holds it: a string, or bytes of any number."""
    return (item.datatype, item.shape) in (("BYTES", (1,)), ("BYTES", (-1,)), ("UINT8", (-1,)))


def _content(file: Path, item: InputFacts) -> Array:
    try:
        content = file.read_bytes()
    except OSError as exc:
        raise InputError(f"{file}: cannot be read: {reason_of(exc)}") from exc
    return np.array([content], object) if item.datatype == "BYTES" else np.frombuffer(content, np.uint8)


def recipe_of(path: Path, item: InputFacts, given: Mapping[str, str]) -> ImageRecipe:
    """Return how an image becomes the input: the options, else `calibration.yaml`, else the shape.

    The shape gives the size, the number of channels and the layout. Values are scaled to 0..1, those of integer
    inputs stay 0..255.

    Args:
        path: the image, or the folder of images.
        item: the input for the image.
        given: options of the user: resize, color, scale, mean, std, layout.

    Raises:
        UsageError: an option is unknown or wrong, the shape is none of an image, or its size is open.
        InputError: the YAML file is wrong.
    """
    unknown = [name for name in given if name not in IMAGE_KEYS]
    if unknown:
        raise UsageError(f"--image {unknown[0]}: unknown; expected one of {', '.join(IMAGE_KEYS)}")
    recipe = _stated(path, item) or _guessed(item, given.get("layout"))
    chosen = dataclasses.replace(recipe, **_changes(recipe, given))
    if 0 in chosen.std or (chosen.resize is not None and chosen.resize < max(chosen.size)):
        raise UsageError(
            f"--image std={chosen.std} resize={chosen.resize}: std must not hold 0, and resize has to be at least "
            f"{max(chosen.size)} pixels"
        )
    if any(wanted not in (-1, size) for wanted, size in zip(item.shape[-3:], chosen.shape, strict=True)):
        raise UsageError(
            f"images come out as {list(chosen.shape)} ({chosen.layout}, {chosen.color}), and the input {item.name!r} "
            f"takes {list(item.shape)}",
            hint="Change --image color=... or layout=..., or the calibration.yaml.",
        )
    return chosen


def _changes(recipe: ImageRecipe, given: Mapping[str, str]) -> dict[str, Any]:
    """Return the recipe's fields the options change, read and checked one by one."""
    channels = 1 if given.get("color", recipe.color) == "gray" else 3
    changes: dict[str, Any] = {}
    for name, text in given.items():
        known = {"color": _COLORS, "layout": _LAYOUTS}.get(name)
        if known is None:
            values = _numbers(name, text, channels if name in ("mean", "std") else 1)
            changes[name] = {"scale": values[0], "resize": round(values[0])}.get(name, values)
        elif text not in known:
            raise UsageError(f"--image {name}={text}: expected one of {', '.join(known)}")
        else:
            changes[name] = text
    for name, usual in (("mean", 0.0), ("std", 1.0)):
        if name not in changes and len(getattr(recipe, name)) != channels:
            changes[name] = (usual,) * channels
    return changes


def _stated(path: Path, item: InputFacts) -> ImageRecipe | None:
    """Return the fields of a `calibration.yaml` in the folder. `None` without one."""
    reader = require(_READER)
    for name in reader.YAML_NAMES:
        file = path / name
        if file.is_file():
            try:
                recipe: ImageRecipe = reader.read_recipe(file)
            except CalibrationError as exc:
                raise InputError(exc.message, hint=exc.hint) from exc
            if recipe.input not in (None, item.name):
                raise InputError(f"{file}: names the input {recipe.input!r}, and the model has {item.name!r}")
            return recipe
    return None


def _guessed(item: InputFacts, layout: str | None) -> ImageRecipe:
    """Return the layout of the images by the input's shape."""
    shape = item.shape
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[0] not in (1, -1)):
        raise UsageError(
            f"the input {item.name!r} has the shape {list(shape)}, which is no image's: expected [C, H, W] or [H, W, C]"
        )
    shape = shape[-3:]
    if layout not in _LAYOUTS:
        layout = "nhwc" if shape[2] in (1, 3) and shape[0] not in (1, 3) else "nchw"
    channels, size = (shape[2], shape[:2]) if layout == "nhwc" else (shape[0], shape[1:])
    if any(each < 1 for each in size) or channels not in (-1, 1, 3):
        raise UsageError(
            f"the input {item.name!r} has the shape {list(item.shape)} ({layout}): a size in pixels and 1 or 3 "
            "channels are needed",
            hint=f"Give the sizes: --shape {item.name}:3,224,224 (without the batch axis).",
        )
    count = 1 if channels == 1 else 3
    is_integer = NUMPY_OF_TRITON[item.datatype].kind in "iu"
    return ImageRecipe(
        size=(size[0], size[1]),
        resize=None,
        layout=layout,
        color="gray" if count == 1 else "rgb",
        scale=1.0 if is_integer else 1 / 255,
        mean=(0.0,) * count,
        std=(1.0,) * count,
        input=item.name,
    )


def _numbers(name: str, text: str, count: int) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) == 1:
        values *= count
    if len(values) != count or not np.isfinite(values).all():
        raise UsageError(f"--image {name}={text}: expected {count} number{'s, by commas' if count > 1 else ''}")
    return values
