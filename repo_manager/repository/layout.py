"""Names and places in a model repository, and Triton's reading of them.

    ROOT/
      .repo-manager.json        numbers given out, deployments, tags (state.py)
      .repo-manager.lock        held while one of these is changed
      MODEL/
        config.pbtxt
        labels_0_OUTPUT.txt     only when the first version was published with labels
        1/ model.onnx manifest.json ...

Triton takes every folder in ROOT for a model and ignores files there. In MODEL it takes folders for versions, and
every other entry takes part in its decision to reload.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.files import fsync_directory

__all__ = [
    "COPIES",
    "DATA_FOLDERS",
    "INITIAL_STATE_FOLDER",
    "LOCK_FILENAME",
    "MANIFEST_FILENAME",
    "STAGING_IN_ROOT",
    "STATE_FILENAME",
    "WARMUP_FOLDER",
    "check_file_name",
    "is_bytecode",
    "is_component",
    "is_folder",
    "open_root",
    "triton_version",
    "validate_model_name",
    "version_number",
]

# Folders next to the versions. Core calls them kWarmupDataFolder and kInitialStateFolder.
WARMUP_FOLDER, INITIAL_STATE_FOLDER = DATA_FOLDERS = ("warmup", "initial_state")
STATE_FILENAME = ".repo-manager.json"
LOCK_FILENAME = ".repo-manager.lock"
MANIFEST_FILENAME = "manifest.json"
STAGING_IN_ROOT = ".repo-manager.staging"
# The models in the folder of a server's private copies.
COPIES = "models"

_MAX_NAME_LENGTH = 128
_MAX_VERSION = 2**63 - 1
_MODEL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_VERSION = re.compile(r"0|[1-9][0-9]*")
# std::stoll: leading white space, a sign, then digits. It ignores the rest.
_STOLL = re.compile(r"[ \t\n\v\f\r]*([+-]?[0-9]+)")


def validate_model_name(name: str) -> str:
    """Return `name` when it is safe as a folder, in a URL, in a shell and in Triton's own expressions.

    Raises:
        RepositoryError: it is not.
    """
    if not _MODEL_NAME.fullmatch(name) or len(name) > _MAX_NAME_LENGTH or name.endswith("."):
        raise RepositoryError(
            f"{name[:200]!r} cannot be a model's name: expected up to {_MAX_NAME_LENGTH} letters, digits, '_', '-' "
            "and '.', starting with a letter, a digit or '_'",
            hint="Choose another name.",
        )
    return name


def version_number(folder: str) -> int | None:
    """Return a version folder's number, or `None` when the name is not the number's own spelling."""
    if not _VERSION.fullmatch(folder) or len(folder) > 19:
        return None
    number = int(folder)
    return number if number <= _MAX_VERSION else None


def triton_version(folder: str) -> int | None:
    """Return the version Triton would take a folder of a model for, or `None` when it ignores it.

    As `VersionsToLoad` in triton-inference-server/core: two names are skipped, so is a leading 0, and the rest goes
    through std::stoll. It reads `3.tmp` as 3. A number above 64 bits is returned too: Triton fails on it.
    """
    if folder in DATA_FOLDERS or (len(folder) > 1 and folder[0] == "0"):
        return None
    match = _STOLL.match(folder)
    return None if match is None else int(match.group(1))


def open_root(repository: Path, *, create: bool = False) -> Path:
    """Return the repository's real path.

    Args:
        repository: the folder Triton is given. May be a link to it.
        create: make it when it does not exist.

    Raises:
        RepositoryError: it does not exist or is not a folder.
        OSError: it cannot be made.
    """
    root = Path(repository).expanduser().resolve()
    if create and not root.is_dir():
        with contextlib.suppress(FileExistsError):
            _make_durably(root)
    # Checked last: another process may create the folder at the same time.
    if root.is_dir():
        return root
    found = "is not a folder" if root.exists() else "does not exist"
    raise RepositoryError(f"{repository} {found}", hint="Give the folder of the models.")


def _make_durably(folder: Path) -> None:
    """Make a folder and its missing parents: a power cut must not take a whole new repository along."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync_directory(path.parent)


def is_component(name: str) -> bool:
    """Return whether a name is one path component: anything else could lead elsewhere.

    Others' models may have names `validate_model_name` refuses. They can be looked at all the same.
    """
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, or a link to one. A link in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_bytecode(name: str) -> bool:
    """Return whether a file in a version is the bytecode a server wrote when it ran the version's code."""
    return "__pycache__" in name.split("/")


def check_file_name(name: str) -> str:
    """Return the name of a file inside a version, checked: a relative path with `/`, nothing else.

    Raises:
        RepositoryError: absolute, empty, hidden, leaving the folder, or with control characters or backslashes.
    """
    parts = name.split("/")
    bad = any(part in ("", ".", "..") or len(os.fsencode(part)) > 255 for part in parts)
    if bad or not name.isprintable() or "\\" in name or name.startswith("."):
        raise RepositoryError(f"{name!r} cannot be a file's name in a version: expected a relative path")
    if name == MANIFEST_FILENAME:
        raise RepositoryError(f"{name} in a version is written by repo-manager itself")
    return name
