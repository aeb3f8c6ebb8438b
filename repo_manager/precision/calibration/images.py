"""Calibration data from a folder of images and a small YAML file with the model's recipe for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from repo_manager.errors import CalibrationError
from repo_manager.files import reason_of
from repo_manager.lfs import refuse_lfs_pointer
from repo_manager.onnx_model.draft import Array
from repo_manager.onnx_model.signature import Signature
from repo_manager.optional import require
from repo_manager.precision.calibration.data import CalibrationData, numpy_name, validated
from repo_manager.request_data.image_model.rm_pixels import ImageRecipe, UnreadableImage, pixels_of, typed
from repo_manager.types import TensorSpec

__all__ = ["IMAGE_SUFFIXES", "YAML_NAMES", "from_yaml", "images_in", "input_of", "read_image", "read_recipe"]

YAML_NAMES = ("calibration.yaml", "calibration.yml")
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".webp"}
_KEYS = {"color", "crop", "folder", "input", "layout", "mean", "resize", "scale", "size", "std"}
_COLORS = ("rgb", "bgr", "gray")


def from_yaml(path: Path, signature: Signature) -> CalibrationData:
    """Read the images a YAML file describes.

    Raises:
        CalibrationError: the YAML is wrong, an image cannot be read, or it does not fit the model.
        MissingDependencyError: Pillow is not installed.
    """
    recipe = read_recipe(path)
    spec = input_of(recipe, signature, path)
    files = images_in(recipe.folder)
    pillow = require("PIL.Image")
    dtype = numpy_name(spec)

    def get(index: int) -> dict[str, Array]:
        return {spec.name: typed(read_image(pillow, files[index], recipe), dtype)}

    return validated(str(path), signature, len(files), get, lambda index: str(files[index]))


def images_in(folder: Path) -> list[Path]:
    """Return the images of a folder and its sub-folders, in order of name."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)


def read_recipe(path: Path) -> ImageRecipe:
    """Read and check the YAML file.

    Raises:
        CalibrationError: not YAML, an unknown key, or a value of the wrong kind.
    """
    refuse_lfs_pointer(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as exc:
        raise CalibrationError(f"{path}: cannot be read as YAML: {reason_of(exc)}") from exc
    if not isinstance(raw, dict):
        raise CalibrationError(f"{path}: holds {type(raw).__name__}, and a mapping is needed", hint=_EXAMPLE)
    if unknown := sorted(str(key) for key in raw if key not in _KEYS):
        raise CalibrationError(f"{path}: unknown key {unknown[0]!r}", hint=f"Known: {', '.join(sorted(_KEYS))}.")
    color = _choice(raw, "color", _COLORS, "rgb", path)
    channels = 1 if color == "gray" else 3
    size = _numbers(raw, "size", 2, None, path)
    crop = raw.get("crop", "center")
    if crop not in ("center", "none"):
        raise CalibrationError(f"{path}: crop is {crop!r}, and has to be center or none")
    resize = raw.get("resize")
    if resize is not None and (not isinstance(resize, int) or resize < max(size)):
        raise CalibrationError(
            f"{path}: resize is {resize!r}, and has to be a number of pixels of at least {max(size):g}"
        )
    std = _numbers(raw, "std", channels, 1.0, path)
    if any(value == 0 for value in std):
        raise CalibrationError(f"{path}: std holds 0, by which nothing can be divided")
    return ImageRecipe(
        size=(int(size[0]), int(size[1])),
        resize=resize if crop == "center" else None,
        layout=_choice(raw, "layout", ("nchw", "nhwc"), "nchw", path),
        color=color,
        scale=_numbers(raw, "scale", 1, 1 / 255, path)[0],
        mean=_numbers(raw, "mean", channels, 0.0, path),
        std=std,
        input=None if raw.get("input") is None else str(raw["input"]),
        folder=path.parent / str(raw.get("folder", ".")),
    )


_EXAMPLE = "For instance: {size: [224, 224], resize: 256, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}"


def _choice(raw: dict[str, Any], key: str, known: Sequence[str], default: str, path: Path) -> str:
    value = str(raw.get(key, default)).lower()
    if value not in known:
        raise CalibrationError(f"{path}: {key} is {raw[key]!r}, and has to be one of {', '.join(known)}")
    return value


def _numbers(raw: dict[str, Any], key: str, count: int, default: float | None, path: Path) -> tuple[float, ...]:
    value = raw.get(key, default)
    if value is None:
        raise CalibrationError(f"{path}: {key} is missing", hint=_EXAMPLE)
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise CalibrationError(f"{path}: {key} is {value!r}, and has to be {count} number{'s' if count > 1 else ''}")
    return tuple(float(v) for v in values)


def input_of(recipe: ImageRecipe, signature: Signature, path: Path) -> TensorSpec:
    """Return the input the images fill.

    Args:
        recipe: how an image becomes the input.
        signature: the model's inputs and outputs.
        path: the YAML file, for messages.

    Raises:
        CalibrationError: the model has no such input, or several.
    """
    by_name = {spec.name: spec for spec in signature.inputs}
    if recipe.input is not None and recipe.input not in by_name:
        raise CalibrationError(f"{path}: the model has no input '{recipe.input}'; it has {', '.join(by_name)}")
    if len(by_name) != 1:
        raise CalibrationError(f"{path}: images fill one input, and the model has {len(by_name)}: {', '.join(by_name)}")
    return next(iter(by_name.values()))


def read_image(pillow: ModuleType, file: Path, recipe: ImageRecipe) -> Array:
    """Return an image as the recipe wants it, float32 `[1, C, H, W]` or `[1, H, W, C]`.

    Args:
        pillow: the imported module `PIL.Image`, not `PIL` itself.
        file: path of the image, named in the error.
        recipe: how an image becomes the input.

    Raises:
        CalibrationError: it cannot be read.
    """
    try:
        return pixels_of(pillow, file, recipe)[None]
    except UnreadableImage as exc:
        raise CalibrationError(f"{file}: {exc}") from exc
