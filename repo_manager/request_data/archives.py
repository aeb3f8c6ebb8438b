"""What an .npz file says of its size, before anything of it is unpacked."""

from __future__ import annotations

import zipfile
from pathlib import Path

__all__ = ["check_archive"]

_MOST_UNPACKED_BYTES = 256 << 20
_MOST_RATIO = 50


def check_archive(path: Path) -> None:
    """See that an .npz file is not tiny and huge when it is unpacked; of any other file nothing is said.

    Raises:
        ValueError: it unpacks to more than 256 MiB and 50 times its size, which no recorded data does.
        OSError: it cannot be read.
        zipfile.BadZipFile: it is a damaged archive.
    """
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
