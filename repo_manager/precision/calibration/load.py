"""Calibration data: real inputs, from wherever they are, checked against the model before use."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from repo_manager.errors import CalibrationError
from repo_manager.files import document
from repo_manager.onnx_model.signature import Signature
from repo_manager.precision.calibration import arrays as calibration_arrays
from repo_manager.precision.calibration import images as calibration_images
from repo_manager.precision.calibration.data import CalibrationData, data_of_samples
from repo_manager.types import StrPath

__all__ = ["MIN_SAMPLES", "CalibrationData", "import_installed", "load_calibration", "load_function"]

MIN_SAMPLES = 4
"""Fewer say nothing about the range of activations."""


def _how() -> str:
    return (
        "Give an .npz (one array per input, samples along the first axis), a folder of .npy, a folder of images with a "
        f"calibration.yaml, or module:function that yields dictionaries. Examples: {document('precision.md')}"
    )


def load_calibration(source: StrPath, signature: Signature, *, min_samples: int = MIN_SAMPLES) -> CalibrationData:
    """Find, read and check calibration data. Pickled objects are never loaded.

    Args:
        source: an `.npz` file; a folder of `.npy` files; a folder of images with `calibration.yaml`, or the path of
            such a file; or `module:function`, imported from the current folder or the environment.
        signature: of the model the data is for.
        min_samples: fewer samples than this is an error.

    Returns:
        The data, arrays read lazily where the format allows it.

    Raises:
        CalibrationError: names, types or shapes unfit for the model, NaN or infinite values, too few samples, an
            unreadable file. The message names the file.
        MissingDependencyError: images without Pillow.
    """
    text = os.fspath(source)
    path = Path(text)
    if path.is_file():
        if path.suffix == ".npz":
            data = calibration_arrays.from_npz(path, signature)
        elif path.suffix in (".yaml", ".yml"):
            data = calibration_images.from_yaml(path, signature)
        else:
            raise CalibrationError(f"{path}: not a format of calibration data", hint=_how())
    elif path.is_dir():
        _require_yaml(path)
        yaml = next((path / name for name in calibration_images.YAML_NAMES if (path / name).is_file()), None)
        data = (
            calibration_arrays.from_folder(path, signature)
            if yaml is None
            else calibration_images.from_yaml(yaml, signature)
        )
    elif ":" in text and all(part.isidentifier() for part in text.replace(":", ".").split(".")):
        data = _from_function(text, signature)
    else:
        raise CalibrationError(f"{path}: there is no such calibration data", hint=_how())
    if data.count < min_samples:
        raise CalibrationError(
            f"{text}: {data.count} sample{'s' if data.count != 1 else ''}, and at least {min_samples} are needed",
            hint="100 to 500 typical inputs are usual for INT8.",
        )
    return data


def _require_yaml(folder: Path) -> None:
    """Check a folder of images for the recipe from image to input.

    Raises:
        CalibrationError: the folder has no `calibration.yaml`.
    """
    if any((folder / name).is_file() for name in calibration_images.YAML_NAMES):
        return
    suffixes = {file.suffix.lower() for file in folder.iterdir()}
    if suffixes & calibration_images.IMAGE_SUFFIXES and ".npy" not in suffixes:
        name = calibration_images.YAML_NAMES[0]
        raise CalibrationError(
            f"{folder} holds images and no {name}, which says how they become the model's input",
            hint=f"Write {folder / name}, for instance: 'input: image', 'resize: 224', 'mean: [0.485, 0.456, 0.406]', "
            "'std: [0.229, 0.224, 0.225]', one a line.",
        )


def _from_function(text: str, signature: Signature) -> CalibrationData:
    """Call `module:function` and take its samples. This runs the user's code, as asked."""
    with _from_here():
        try:
            samples = list(_named(text)())
        except Exception as exc:
            hint = "It has to yield dictionaries."
            raise CalibrationError(f"{text}: {type(exc).__name__}: {exc}", hint=hint) from exc
    return data_of_samples(samples, signature, text)


def load_function(text: str) -> Callable[..., Any]:
    """Import the user's `module:function`, from the current folder or the environment. This runs the module.

    Raises:
        CalibrationError: there is no such function, or its module fails.
    """
    with _from_here():
        try:
            return _named(text)
        except Exception as exc:
            hint = "Write module:function, with the module's name as Python imports it."
            raise CalibrationError(f"{text}: {type(exc).__name__}: {exc}", hint=hint) from exc


def import_installed(module: str) -> None:
    """Import a module from the environment, so one of its name in the current folder is not taken for it later.

    Raises:
        CalibrationError: there is none, or it fails.
    """
    before, here = list(sys.path), Path.cwd()
    sys.path[:] = [folder for folder in before if folder and Path(folder).absolute() != here]
    try:
        importlib.import_module(module)
    except Exception as exc:
        hint = "It has to be installed: the current folder is not looked at."
        raise CalibrationError(f"{module}: {type(exc).__name__}: {exc}", hint=hint) from exc
    finally:
        sys.path[:] = before


def _named(text: str) -> Callable[..., Any]:
    module_name, _, function_name = text.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module_name), function_name)
    return found


@contextlib.contextmanager
def _from_here() -> Iterator[None]:
    """Let modules of the current folder be imported."""
    folder = str(Path.cwd())
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        if added:
            sys.path.remove(folder)
