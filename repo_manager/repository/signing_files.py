"""The places of signatures, and their fate when their versions go."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from repo_manager.files import fsync_directory
from repo_manager.repository.layout import version_number

__all__ = [
    "beside_signature_name",
    "beside_signatures",
    "drop_signatures",
    "orphaned_signatures",
    "signature_name",
]

_PREFIX, _SUFFIX = ".repo-manager.", ".sig.json"
_BESIDE = ".beside"
_SIGNATURE = re.compile(r"\.repo-manager\.(.+)\.([0-9]+)(?:\.beside)?\.sig\.json")


def signature_name(name: str, version: int) -> str:
    """Return the path of a version's signature: a file in the root, ignored by Triton."""
    return f"{_PREFIX}{name}.{version}{_SUFFIX}"


def beside_signature_name(name: str, version: int) -> str:
    """Return where the signature is made with a version's, of the files beside the model's versions."""
    return f"{_PREFIX}{name}.{version}{_BESIDE}{_SUFFIX}"


def beside_signatures(files: Iterable[str], name: str) -> tuple[str, ...]:
    """Return the signatures of the files beside a model's versions, among the names of the root's files."""
    found = ((file, _SIGNATURE.fullmatch(file)) for file in files)
    return tuple(file for file, match in found if match and match[1] == name and file.endswith(_BESIDE + _SUFFIX))


def orphaned_signatures(root: Path) -> tuple[tuple[str, int], ...]:
    """Return model and version of each signature in the root whose version does not exist, sorted.

    Raises:
        OSError: the root cannot be read.
    """
    found = set()
    with os.scandir(root) as entries:
        for entry in entries:
            match = _SIGNATURE.fullmatch(entry.name)
            version = version_number(match[2]) if match is not None else None
            if match is not None and version is not None and not (root / match[1] / str(version)).is_dir():
                found.add((match[1], version))
    return tuple(sorted(found))


def drop_signatures(root: Path, versions: Iterable[tuple[str, int]]) -> None:
    """Remove the signatures of vanished versions.

    Raises:
        OSError: one cannot be removed.
    """
    both = (signature_name, beside_signature_name)
    paths = [root / name_of(name, version) for name, version in versions for name_of in both]
    present = [path for path in paths if os.path.lexists(path)]
    for path in present:
        path.unlink(missing_ok=True)
    if present:
        fsync_directory(root)
