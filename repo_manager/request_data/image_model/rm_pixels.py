"""How an image becomes a model's input: the one transformation of calibration, load tests, `infer` and serving.

It imports nothing of repo_manager: `add --preprocess` copies it beside the model of its use, into Triton's stub.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

__all__ = ["ImageRecipe", "UnreadableImage", "pixels_of", "typed"]

Array = npt.NDArray[Any]
_MODES = {"rgb": "RGB", "bgr": "RGB", "gray": "L"}
_NOT_SERVED = ("input", "folder")


class UnreadableImage(Exception):  # noqa: N818 - each caller converts it to an error of its own
    """The given bytes are no image for Pillow."""


@dataclasses.dataclass(frozen=True)
class ImageRecipe:
    """How an image becomes an input: resize, crop, colour order, x * scale, (x - mean) / std, layout.

    Attributes:
        size: height and width the model takes.
        resize: shorter side before a centre crop to `size`. `None` stretches straight to `size`.
        layout: `nchw` (`[C, H, W]` for each image) or `nhwc` (`[H, W, C]`).
        color: order of the channels: `rgb`, `bgr`, or `gray` (one channel).
        scale: factor of each 0..255 value, applied first.
        mean: subtracted, per channel, after `scale`.
        std: divisor of each channel, after `mean`. As many numbers as `mean`.
        input: the model's input. `None`: its only one.
        folder: of the calibration images, sub-folders included. Not part of `served`.
    """

    size: tuple[int, int]
    resize: int | None
    layout: str
    color: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input: str | None = None
    folder: Path = Path()

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image: `[C, H, W]` or `[H, W, C]`."""
        channels = len(self.mean)
        return (*self.size, channels) if self.layout == "nhwc" else (channels, *self.size)

    def served(self) -> dict[str, Any]:
        """Return the serving model's part of it, in JSON's types."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _NOT_SERVED}

    @classmethod
    def of(cls, served: Mapping[str, Any]) -> ImageRecipe:
        """Make one from a result of `served`."""
        lists = {name: tuple(served[name]) for name in ("size", "mean", "std")}
        return cls(**{**served, **lists})


def pixels_of(pillow: ModuleType, image: Path | BinaryIO, recipe: ImageRecipe) -> Array:
    """Return an image as the recipe wants it, float32 `[C, H, W]` or `[H, W, C]`.

    Args:
        pillow: the imported module `PIL.Image`. Its `MAX_IMAGE_PIXELS` limits the image.
        image: a file, or an open one.
        recipe: how an image becomes the input.

    Raises:
        UnreadableImage: it is no image, or one of more pixels than Pillow takes.
    """
    height, width = recipe.size
    _check_pixels("the recipe makes", (width, height), pillow.MAX_IMAGE_PIXELS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)  # rejected below, before decoding
            opened = pillow.open(image)
        with opened:
            _check_pixels("it has", opened.size, pillow.MAX_IMAGE_PIXELS)
            mode = _MODES[recipe.color]
            opened.load()
            found = opened.copy() if opened.mode == mode else opened.convert(mode)
    except pillow.UnidentifiedImageError as exc:  # its text names the open file object; the caller names the source
        raise UnreadableImage("cannot be read as an image: its format is not known") from exc
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as exc:
        raise UnreadableImage(f"cannot be read as an image: {exc}") from exc
    if recipe.resize is not None:
        wide, high = _resized(found.size, recipe.resize)
        wide, high = max(width, wide), max(height, high)
        _check_pixels("resized, it has", (wide, high), pillow.MAX_IMAGE_PIXELS)
        found = found.resize((wide, high), pillow.Resampling.BILINEAR)
        left, top = round((wide - width) / 2), round((high - height) / 2)  # half to even, like torchvision's CenterCrop
        found = found.crop((left, top, left + width, top + height))
    else:
        found = found.resize((width, height), pillow.Resampling.BILINEAR)
    pixels = np.asarray(found, np.float32)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if recipe.color == "bgr":
        pixels = pixels[:, :, ::-1]
    pixels = (pixels * np.float32(recipe.scale) - np.array(recipe.mean, np.float32)) / np.array(recipe.std, np.float32)
    if recipe.layout == "nchw":
        pixels = pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels)


def _resized(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Return width and height once the shorter side is `shorter`. The longer one is truncated, as torchvision does."""
    width, height = size
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def _check_pixels(what: str, size: tuple[int, int], most: int | None) -> None:
    """Refuse more pixels than Pillow warns of: a file of a few KB, or a strip resized, can be made of any."""
    if most is not None and size[0] * size[1] > most:
        raise UnreadableImage(f"{what} {size[0]} x {size[1]} pixels, and at most {most:,} are read")


def typed(pixels: Array, dtype: npt.DTypeLike) -> Array:
    """Return pixels in an input's type: rounded to integers and clipped where it is one."""
    wanted = np.dtype(dtype)
    if wanted.kind in "iu":
        limits = np.iinfo(wanted)
        clipped: Array = np.clip(np.rint(pixels), limits.min, limits.max).astype(wanted)
        return clipped
    converted: Array = pixels.astype(wanted)
    return converted
