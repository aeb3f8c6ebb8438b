"""Find a tritonserver: the one given by environment, else the one inside the nvidia-pytriton wheel."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from repo_manager.errors import MissingDependencyError, UsageError
from repo_manager.files import work_folder
from repo_manager.optional import download_wheel, install_command
from repo_manager.server.paths import cache_directory

__all__ = ["TritonInstallation", "cached_site", "find_triton", "install_tritonserver", "libpython_directory"]


# Download the embedded tritonserver by pip into the user's cache, if its wheel does not support this Python.
#
# The wheel nvidia-pytriton contains a stub for Python 3.13 but requires NumPy below 2, and NumPy 1 has no builds for
# 3.13. The files are extracted from the wheel without installing it. Our backends pass arrays to this stub without
# needing NumPy below 2.

_VERSION = "0.7.0"
_PLATFORM = "manylinux_2_35_x86_64"
_WANTED = ("pytriton/tritonserver/", "nvidia_pytriton.libs/")
_HINT = "It exists for Linux on x86-64 with glibc 2.35 or newer; --to works with any running Triton."


def cached_site() -> Path | None:
    """Return the folder filled by `install_tritonserver`. It is laid out as site-packages. `None`: it did not."""
    folder = cache_directory() / f"tritonserver-{_VERSION}"
    return folder if folder.is_dir() else None


def install_tritonserver() -> Path:
    """Fetch the tritonserver of nvidia-pytriton. A second call does nothing. The folder appears by one rename.

    Returns:
        The folder, laid out as site-packages.

    Raises:
        MissingDependencyError: pip cannot fetch the wheel, or its digest is a wrong one.
        OSError: the cache cannot be written.
    """
    found = cached_site()
    if found is not None:
        return found
    root = cache_directory()
    with work_folder(".tritonserver-", root) as temporary:
        wheel = download_wheel(f"nvidia-pytriton=={_VERSION}", temporary, _PLATFORM, hint=_HINT)
        staging = temporary / "site"
        try:
            _unpack(wheel, staging)
        except (zipfile.BadZipFile, KeyError) as exc:
            raise MissingDependencyError(f"{wheel.name} cannot be unpacked: {exc}", hint=_HINT) from exc
        target = root / f"tritonserver-{_VERSION}"
        try:
            staging.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process wrote the same content first
                raise
    return target


def _unpack(wheel: Path, folder: Path) -> None:
    """Take the server's files, with the wheel's permissions."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.filename.startswith(_WANTED) and not member.is_dir():
                mode = (member.external_attr >> 16) & 0o755 | 0o400
                Path(archive.extract(member, folder)).chmod(mode)
    if not (folder / "pytriton" / "tritonserver" / "bin" / "tritonserver").is_file():
        raise KeyError("pytriton/tritonserver/bin/tritonserver is not in it")


ENVIRONMENT_VARIABLE = "REPO_MANAGER_TRITONSERVER"


@dataclasses.dataclass(frozen=True)
class TritonInstallation:
    """A tritonserver on this machine.

    Attributes:
        binary: the tritonserver executable: REPO_MANAGER_TRITONSERVER with links resolved, or the wheel's.
        libraries: folders put before the environment's own in LD_LIBRARY_PATH. May be empty.
        backends: the folder with its backends (`python/` and perhaps native ones).
        stub: the python backend's stub for the running Python, where it is kept apart from the backend (as in the
            wheel). `None`: the backend's folder has its own.
        caches: the folder with the response caches. `None` leaves tritonserver's default.
    """

    binary: Path
    libraries: tuple[Path, ...]
    backends: Path
    stub: Path | None
    caches: Path | None


def _way() -> str:
    """Say how a tritonserver comes to this Python."""
    pip = f"Install it with: {install_command('server')}"
    return pip if sys.version_info < (3, 13) else "Fetch it with: repo-manager doctor --install-tritonserver"


def find_triton() -> TritonInstallation:
    """Return the tritonserver the embedded server runs.

    Raises:
        UsageError: REPO_MANAGER_TRITONSERVER names no executable file.
        MissingDependencyError: there is no tritonserver, or none for the running Python.
    """
    configured = os.environ.get(ENVIRONMENT_VARIABLE)
    if configured:
        return _from_binary(Path(configured))
    # Located without an import: importing pytriton starts threads and changes logging.
    package = _package()
    root = package / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    binary = root / "bin" / "tritonserver"
    if not binary.is_file() or not stub.is_file():
        raise MissingDependencyError(
            f"nvidia-pytriton at {package} has no tritonserver for Python {version}",
            hint="Use Python 3.10 to 3.13 on x86-64 Linux with glibc 2.35 or newer, and nvidia-pytriton 0.7.0.",
        )
    return TritonInstallation(
        binary=binary,
        libraries=(package.parent / "nvidia_pytriton.libs",),
        backends=root / "backends",
        stub=stub,
        caches=root / "caches",
    )


def _package() -> Path:
    """Return the pytriton folder: the installed package's, else the one in the user's cache.

    Raises:
        MissingDependencyError: there is neither.
    """
    spec = importlib.util.find_spec("pytriton")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    site = cached_site()
    if site is not None:
        return site / "pytriton"
    raise MissingDependencyError(
        "There is no Triton server here: the package nvidia-pytriton, which carries one, is not installed",
        hint=f"{_way()}, point {ENVIRONMENT_VARIABLE} at a tritonserver, or use --to with a running server.",
    )


def _from_binary(binary: Path) -> TritonInstallation:
    """Describe a given tritonserver. Its backends lie as in NVIDIA's images (`../backends`)."""
    if not binary.is_file() or not os.access(binary, os.X_OK):
        raise UsageError(
            f"{ENVIRONMENT_VARIABLE}={binary} is not an executable file",
            hint="Point it at a tritonserver, for instance /opt/tritonserver/bin/tritonserver.",
        )
    root = binary.resolve().parent.parent
    libraries = tuple(
        folder for folder in (root / "lib", root.parent.parent / "nvidia_pytriton.libs") if folder.is_dir()
    )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    caches = root / "caches"
    return TritonInstallation(
        binary=binary.resolve(),
        libraries=libraries,
        backends=root / "backends",
        stub=stub if stub.is_file() else None,
        caches=caches if caches.is_dir() else None,
    )


@functools.cache
def libpython_directory() -> Path | None:
    """Return the folder of the running Python's shared library, linked by the stub.

    `None` means the loader finds it on its own.

    Raises:
        MissingDependencyError: it is not on this machine (Debian keeps it in a package of its own).
    """
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    library = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    multiarch = sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"
    for folder in (library, Path(sys.base_prefix) / "lib", library / multiarch):
        if (folder / name).is_file():
            return folder
    try:
        listed = subprocess.run(
            ["/sbin/ldconfig", "-p"], capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except OSError:
        listed = ""
    if name in listed:
        return None
    raise MissingDependencyError(
        f"{name}, which Triton's Python backend links to, is not here: {sys.executable} was built without it",
        hint=f"Install it (Debian, Ubuntu: apt-get install libpython{sys.version_info.major}.{sys.version_info.minor}) "
        "or use a Python with it, for instance one installed by uv or conda.",
    )
