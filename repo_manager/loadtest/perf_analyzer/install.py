"""Fetches perf_analyzer by pip alone, into the user's cache.

The package `perf-analyzer` is an empty stub where glibc is older than 2.38. The wheel tritonclient 2.50.0 (manylinux1)
carries the binary. It needs libb64 (0d) and the CUDA 12 runtime, both from the wheels nvidia-pytriton (when installed)
and nvidia-cuda-runtime-cu12. No wheel is installed: only files are taken out of them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
import subprocess
import sysconfig
import zipfile
from pathlib import Path

from repo_manager.errors import MissingDependencyError
from repo_manager.files import work_folder
from repo_manager.optional import download_wheel
from repo_manager.server.paths import cache_directory

__all__ = ["PerfAnalyzer", "cached_perf_analyzer", "install_perf_analyzer"]

_VERSION = "2.50.0"
_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
_HINT = "perf_analyzer exists for Linux on x86-64 only; --client native works everywhere."


@dataclasses.dataclass(frozen=True)
class PerfAnalyzer:
    """A perf_analyzer binary and the folder of its libraries (`None`: the system's are enough)."""

    binary: Path
    libraries: Path | None

    def environment(self) -> dict[str, str]:
        """Return the environment to run it in."""
        values = dict(os.environ)
        if self.libraries is not None:
            before = values.get("LD_LIBRARY_PATH")
            values["LD_LIBRARY_PATH"] = f"{self.libraries}:{before}" if before else str(self.libraries)
        return values

    def lacks(self) -> str:
        """Start it. Return the loader's list of missing libraries, empty when it starts."""
        done = subprocess.run(
            [str(self.binary), "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            env=self.environment(),
            timeout=60,
            check=False,
        )
        return done.stderr.strip() if "error while loading shared libraries" in done.stderr else ""


def cached_perf_analyzer(cache: Path | None = None) -> PerfAnalyzer | None:
    """Return the perf_analyzer from `install_perf_analyzer` in the cache, `None` without one."""
    folder = (cache or cache_directory()) / f"perf_analyzer-{_VERSION}"
    binary = folder / "perf_analyzer"
    return PerfAnalyzer(binary, folder / "lib") if os.access(binary, os.X_OK) else None


def install_perf_analyzer(cache: Path | None = None) -> PerfAnalyzer:
    """Fetch and unpack perf_analyzer. A second call does nothing. The folder appears by one rename.

    Args:
        cache: the folder to unpack below. `None` takes the user's cache.

    Raises:
        MissingDependencyError: pip cannot fetch the wheel, or a library is not to be had by pip.
    """
    found = cached_perf_analyzer(cache)
    if found is not None:
        return found
    root = cache or cache_directory()
    root.mkdir(parents=True, exist_ok=True)
    with work_folder(".perf_analyzer-", root) as temporary:
        staging = temporary / "unpacked"
        (staging / "lib").mkdir(parents=True)
        wheel = download_wheel(f"tritonclient=={_VERSION}", temporary, "manylinux1_x86_64", hint=_HINT)
        _take(wheel, "/bin/perf_analyzer", staging / "perf_analyzer")
        (staging / "perf_analyzer").chmod(0o755)
        for name in _LIBRARIES:
            _provide(name, staging / "lib", temporary)
        if lacks := PerfAnalyzer(staging / "perf_analyzer", staging / "lib").lacks():
            raise MissingDependencyError(f"the fetched perf_analyzer does not start: {lacks}")
        target = root / f"perf_analyzer-{_VERSION}"
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    return PerfAnalyzer(target / "perf_analyzer", target / "lib")


def _take(wheel: Path, ending: str, target: Path) -> None:
    """Copy the one file whose path ends so out of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(ending)]
        if not names:
            raise MissingDependencyError(f"{wheel.name} has no {ending.rpartition('/')[2]}")
        with archive.open(names[0]) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file)


def _provide(name: str, folder: Path, temporary: Path) -> None:
    """Put a library into `folder`, unless the system has it: from nvidia-pytriton's libraries, else by pip."""
    if _system_has(name):
        return
    bundled = sorted(Path(sysconfig.get_path("platlib")).glob(f"nvidia_pytriton.libs/{_LIBRARIES[name]}"))
    if bundled:
        shutil.copy2(bundled[0], folder / name)
        return
    if name.startswith("libcudart"):
        wheel = download_wheel("nvidia-cuda-runtime-cu12", temporary, "manylinux2014_x86_64", hint=_HINT)
        _take(wheel, f"/lib/{name}", folder / name)
        return
    raise MissingDependencyError(
        f"perf_analyzer needs {name}, which is on no path here and in no wheel of its own",
        hint="Install the [server] extra, whose wheel carries it, or the system's package (Debian: libb64-0d).",
    )


def _system_has(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
