"""Fetches the embedded tritonserver by pip into the user's cache, for a Python that its wheel cannot be installed on.

The wheel nvidia-pytriton carries a stub for Python 3.13 but wants NumPy below 2, which has no builds for
3.13. The files are taken out of the wheel, and nothing is installed; our backends pass arrays to that stub in a
way that does not need NumPy below 2.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from repo_manager.errors import MissingDependencyError
from repo_manager.optional import download_wheel
from repo_manager.server.paths import cache_directory

__all__ = ["cached_site", "install_tritonserver"]

_VERSION = "0.7.0"
_PLATFORM = "manylinux_2_35_x86_64"
_WANTED = ("pytriton/tritonserver/", "nvidia_pytriton.libs/")
_HINT = "It exists for Linux on x86-64 with glibc 2.35 or newer; --to works with any running Triton."


def cached_site() -> Path | None:
    """Return the folder that `install_tritonserver` filled; it is laid out as site-packages. `None`: it did not."""
    folder = cache_directory() / f"tritonserver-{_VERSION}"
    return folder if folder.is_dir() else None


def install_tritonserver() -> Path:
    """Fetch the tritonserver of nvidia-pytriton; a second call does nothing. The folder appears by one rename.

    Returns:
        The folder, laid out as site-packages.

    Raises:
        MissingDependencyError: pip cannot fetch the wheel, or it is not what it should be.
        OSError: the cache cannot be written.
    """
    found = cached_site()
    if found is not None:
        return found
    root = cache_directory()
    with tempfile.TemporaryDirectory(prefix=".tritonserver-", dir=root) as temporary:
        wheel = download_wheel(f"nvidia-pytriton=={_VERSION}", Path(temporary), _PLATFORM, hint=_HINT)
        staging = Path(temporary) / "site"
        try:
            _unpack(wheel, staging)
        except (zipfile.BadZipFile, KeyError) as exc:
            raise MissingDependencyError(f"{wheel.name} cannot be unpacked: {exc}", hint=_HINT) from exc
        target = root / f"tritonserver-{_VERSION}"
        try:
            staging.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same content
                raise
    return target


def _unpack(wheel: Path, folder: Path) -> None:
    """Take what the server needs, with the wheel's permissions."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.filename.startswith(_WANTED) and not member.is_dir():
                mode = (member.external_attr >> 16) & 0o755 | 0o400
                Path(archive.extract(member, folder)).chmod(mode)
    if not (folder / "pytriton" / "tritonserver" / "bin" / "tritonserver").is_file():
        raise KeyError("pytriton/tritonserver/bin/tritonserver is not in it")
