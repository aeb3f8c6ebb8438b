"""The size an .npz file announces, before anything of it is unpacked, and the names in one of recorded exchanges."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from repo_manager.lfs import refuse_lfs_pointer

__all__ = ["RECORDED_COUNTS", "RECORDED_KEY", "check_archive"]

RECORDED_KEY = re.compile(
    r"(?:request(?P<request>\d+)/)?(?:response(?P<response>\d+)/)?(?P<kind>input|output):(?P<name>.*)", re.DOTALL
)
"""The name of an array of recorded exchanges (`repository/golden.py`)."""
RECORDED_COUNTS = "responses"
"""The array with each request's number of responses."""

_MOST_UNPACKED_BYTES = 256 << 20
_MOST_RATIO = 50


def check_archive(path: Path) -> None:
    """Refuse an .npz file tiny when packed and huge when unpacked. Of any other file nothing is said.

    Raises:
        ValueError: it unpacks to more than 256 MiB and 50 times its size, unlike any recorded data.
        InputError: it is a Git LFS pointer.
        OSError: it cannot be read.
        zipfile.BadZipFile: it is a damaged archive.
    """
    refuse_lfs_pointer(path)
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    packed = path.stat().st_size
    if unpacked > _MOST_UNPACKED_BYTES and unpacked > _MOST_RATIO * packed:
        raise ValueError(
            f"it has {packed / 2**20:.4g} MiB and says that it unpacks to {unpacked / 2**20:.6g} MiB; "
            "numpy.savez writes what is meant to be so large without packing it"
        )
