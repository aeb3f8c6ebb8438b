"""Names and places in a model repository, and what Triton makes of them.

    ROOT/
      .repo-manager.json        numbers given out, deployments, tags (state.py)
      .repo-manager.lock        held while one of these is changed
      MODEL/
        config.pbtxt
        labels_0_OUTPUT.txt     only when the first version was published with labels
        1/ model.onnx manifest.json ...

Triton takes every folder in ROOT for a model and ignores files there; in MODEL it takes folders for versions, and
every entry that is no version takes part in its decision to reload.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.files import fsync_directory

__all__ = [
    "LOCK_FILENAME",
    "MANIFEST_FILENAME",
    "STATE_FILENAME",
    "check_file_name",
    "check_no_link",
    "find_folder",
    "is_folder",
    "model_path",
    "open_repository",
    "triton_version",
    "validate_model_name",
    "version_number",
]

STATE_FILENAME = ".repo-manager.json"
LOCK_FILENAME = ".repo-manager.lock"
MANIFEST_FILENAME = "manifest.json"

_MAX_NAME_LENGTH = 128
_MAX_VERSION = 2**63 - 1
_MODEL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_VERSION = re.compile(r"0|[1-9][0-9]*")
# std::stoll: leading white space, a sign, then digits; the rest is ignored.
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
    """Return a version folder's number; `None` when the name is not the number's own spelling."""
    if not _VERSION.fullmatch(folder) or len(folder) > 19:
        return None
    number = int(folder)
    return number if number <= _MAX_VERSION else None


def triton_version(folder: str) -> int | None:
    """Return the version that Triton would take a folder of a model for; `None` when it ignores it.

    As `VersionsToLoad` in triton-inference-server/core: two names are skipped, so is a leading 0, and the rest goes
    through std::stoll, which reads `3.tmp` as 3. A number above 64 bits is returned too: Triton fails on it.
    """
    if folder in ("warmup", "initial_state") or (len(folder) > 1 and folder[0] == "0"):
        return None
    match = _STOLL.match(folder)
    return None if match is None else int(match.group(1))


def open_repository(repository: Path, *, create: bool = False) -> Path:
    """Return the repository's real path.

    Args:
        repository: the folder that Triton is given; may be a link to it.
        create: make it when it does not exist.

    Raises:
        RepositoryError: it does not exist or is not a folder.
        OSError: it cannot be made.
    """
    root = Path(repository).expanduser().resolve()
    if create and not root.is_dir():
        with contextlib.suppress(FileExistsError):
            _make_durably(root)
    # Only now is it looked at: another process may make it at this moment, too.
    if root.is_dir():
        return root
    found = "is not a folder" if root.exists() else "does not exist"
    raise RepositoryError(f"{repository} {found}", hint="Give the folder that holds the models.")


def _make_durably(folder: Path) -> None:
    """Make a folder and those above it that are missing: a power cut must not take a whole new repository along."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync_directory(path.parent)


def model_path(root: Path, name: str) -> Path:
    """Return a model's folder, which may not exist yet.

    Raises:
        RepositoryError: the name is not valid, or something other than a real folder stands there.
    """
    path = root / validate_model_name(name)
    check_no_link(path)
    if path.exists() and not path.is_dir():
        raise RepositoryError(f"{path} is a file, and a model needs a folder of that name", hint="Remove the file.")
    return path


def check_no_link(path: Path) -> None:
    """Refuse to change anything through a symbolic link.

    Raises:
        RepositoryError: `path` is one.
    """
    if path.is_symlink():
        raise RepositoryError(
            f"{path} is a symbolic link to {path.readlink()}",
            hint="Replace the link by the folder itself; what lies outside the repository can change unseen.",
        )


def find_folder(root: Path, name: str) -> Path | None:
    """Return the folder of a model that is there, whatever Triton lets it be called; `None` when there is none.

    Others' models may have names that `validate_model_name` refuses, or be links. They can be looked at all the same.

    Args:
        root: the repository's real path.
        name: one path component; anything that could lead elsewhere finds nothing.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        return None
    path = root / name
    return path if path.is_dir() else None


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Say whether an entry is a folder, or a link to one; a link that leads in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


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
