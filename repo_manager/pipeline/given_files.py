"""A model's files as given to `add`: their names, their apparent backend, and the names it expects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from repo_manager.errors import InputError
from repo_manager.lfs import refuse_lfs_pointer
from repo_manager.repository.golden import GOLDEN_FILE_NAME
from repo_manager.repository.layout import MANIFEST_FILENAME, version_number
from repo_manager.triton_config.config import CONFIG_FILENAME, ModelConfig
from repo_manager.types import Backend

__all__ = ["GivenFiles", "is_converted"]

# Suffix of a file, or a file in a folder -> its backend.
_BACKENDS = {
    ".onnx": "onnxruntime",
    ".plan": "tensorrt",
    ".engine": "tensorrt_rtx",
    ".pt": "pytorch",
    ".pth": "pytorch",
    ".xml": "openvino",
    ".graphdef": "tensorflow",
    ".dali": "dali",
    ".py": "python",
}
_MARKS = {"model.py": "python", "saved_model.pb": "tensorflow", "model.dali": "dali"}
# triton-inference-server/core, src/constants.h, and the backends' own defaults.
_DEFAULT_NAMES = {
    "onnxruntime": "model.onnx",
    "tensorrt": "model.plan",
    "tensorrt_rtx": "model.engine",
    "pytorch": "model.pt",
    "openvino": "model.xml",
    "python": "model.py",
    "dali": "model.dali",
}
_SAVED_MODEL = "model.savedmodel"
_SKIPPED = ("__pycache__",)


def is_converted(path: Path, backend: str | None) -> bool:
    """Return whether `add` converts the given files for this backend. Anything else is published as it is.

    Args:
        path: path of the given file or folder.
        backend: backend asked for. `None`: chosen by the kind of file.
    """
    other = backend not in (None, "auto", *(known.value for known in Backend))
    return not other and not path.is_dir() and path.suffix.lower() not in _BACKENDS.keys() - {".onnx"}


@dataclasses.dataclass(frozen=True)
class GivenFiles:
    """The files given.

    Attributes:
        path: path of the file or folder, as given.
        files: path in the version's folder -> file.
        backend: the apparent backend. Empty when they look like nothing known.
        config: a config.pbtxt among them. `None` without.
    """

    path: Path
    files: Mapping[str, Path]
    backend: str
    config: Path | None

    @classmethod
    def find(cls, path: Path) -> GivenFiles:
        """Look at the given path.

        Raises:
            InputError: it does not exist, holds no file, or one is a Git LFS pointer.
        """
        found = cls._find(path)
        for file in filter(None, (*found.files.values(), found.config)):
            refuse_lfs_pointer(file)
        return found

    @classmethod
    def _find(cls, path: Path) -> GivenFiles:
        if path.is_file():
            files = {path.name: path}
            weights = path.with_suffix(".bin")
            if path.suffix.lower() == ".xml" and weights.is_file():
                files[weights.name] = weights
            return cls(path, files, _BACKENDS.get(path.suffix.lower(), ""), None)
        if not path.is_dir():
            raise InputError(f"{path} does not exist", hint="Give a file, or a folder with a model's files.")
        config = path / CONFIG_FILENAME
        folder = path
        numbers = [number for entry in path.iterdir() if entry.is_dir() and (number := version_number(entry.name))]
        if numbers:
            folder = path / str(max(numbers))
        files = {
            str(file.relative_to(folder)): file
            for file in sorted(folder.rglob("*"))
            if file.is_file() and not _is_skipped(file.relative_to(folder))
        }
        marked = [backend for mark, backend in _MARKS.items() if mark in files or f"{_SAVED_MODEL}/{mark}" in files]
        models = [Path(file).suffix for file in files if Path(file).stem == "model"]
        by_name = [_BACKENDS[suffix] for suffix in models if suffix in _BACKENDS]
        return cls(path, files, (marked or by_name or [""])[0], config if config.is_file() else None)

    def files_for(self, config: ModelConfig) -> dict[str, Path]:
        """Return the files under the names the backend expects."""
        files = dict(self.files)
        wanted = str(config.message().default_model_filename) or _DEFAULT_NAMES.get(config.backend, "")
        if self.path.is_file() and wanted and wanted not in files:
            stem = Path(wanted).stem
            files = {wanted if place == self.path.name else stem + Path(place).suffix: f for place, f in files.items()}
        if config.backend == "tensorflow" and "saved_model.pb" in files:
            files = {f"{_SAVED_MODEL}/{place}": file for place, file in files.items()}
        return files


def _is_skipped(place: Path) -> bool:
    own = place.as_posix() in (CONFIG_FILENAME, MANIFEST_FILENAME, GOLDEN_FILE_NAME)
    return own or any(part in _SKIPPED or part.startswith(".") for part in place.parts)
