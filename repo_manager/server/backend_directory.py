"""The backend directory the embedded server runs with, assembled once in the user's cache."""

from __future__ import annotations

import compileall
import dataclasses
import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path

from repo_manager.errors import MissingDependencyError
from repo_manager.files import copy_folder, work_folder
from repo_manager.server.installation import TritonInstallation, find_triton
from repo_manager.server.paths import cache_directory
from repo_manager.triton_config import backend_io

__all__ = ["BackendDirectory", "assemble", "backend_directory"]

OUR_BACKENDS = Path(__file__).parent / "backends"
WITHHELD = "REPO_MANAGER_WITHHELD"
"""Variable with the names of those the server has and the processes of models do not get."""
_STUB = "triton_python_backend_stub"
# Triton starts every model process by this file in the backend's folder (python_backend, stub_launcher.cc).
_STUB_STARTER = f"""#!/bin/sh
# Takes from the environment what only the server itself needs: a store's credentials. Models' code can read it.
unset ${WITHHELD} {WITHHELD}
exec "${{0%/*}}/stub/{_STUB}" "$@"
"""
# A line of a .pth file, run by the interpreter (documentation of `site`). Bytecode in a version's folder would make
# Triton reload the version (docs/triton-reload.md), and it is not signed. The isolated interpreter ignores
# PYTHONDONTWRITEBYTECODE.
_NO_BYTECODE = "import sys; sys.dont_write_bytecode = True"
# Code shared by the onnxruntime backend and the configuration checks. It imports nothing of ours.
SHARED = (Path(backend_io.__file__),)


@dataclasses.dataclass(frozen=True)
class BackendDirectory:
    """An assembled backend directory.

    Attributes:
        path: folder for tritonserver's `--backend-directory`: a folder for each backend.
        python_bin: a folder whose `python3` makes the stub see this environment's packages when it comes first in
            PATH. `None` for a tritonserver with native backends, used as it is.
    """

    path: Path
    python_bin: Path | None


def backend_directory() -> Path:
    """Return the backend directory for the running Python, assembled when it is not there yet.

    Raises:
        MissingDependencyError: there is no tritonserver or no python backend to build on.
    """
    return assemble(find_triton()).path


def assemble(triton: TritonInstallation) -> BackendDirectory:
    """Assemble the python backend, its stub and our Python-based backends. One rename makes it visible.

    The folder's name is a digest of everything in it. So an upgrade of this package, of the wheel or of Python gets
    another folder, and a running server keeps its files.

    Raises:
        MissingDependencyError: the installation has no python backend.
        OSError: the cache cannot be written.
    """
    if (triton.backends / "onnxruntime" / "libtriton_onnxruntime.so").is_file():
        return BackendDirectory(path=triton.backends, python_bin=None)
    python_backend = triton.backends / "python"
    if not (python_backend / "libtriton_python.so").is_file():
        raise MissingDependencyError(
            f"{triton.binary} has neither a native onnxruntime backend nor a python backend in {triton.backends}",
            hint="Use the tritonserver of nvidia-pytriton (unset REPO_MANAGER_TRITONSERVER) or of NVIDIA's image.",
        )
    search_path = stub_search_path()
    target = cache_directory() / "backends" / _key(triton, search_path)
    found = BackendDirectory(path=target / "backends", python_bin=target / "python" / "bin")
    if target.is_dir():
        return found
    target.parent.mkdir(exist_ok=True, mode=0o700)
    with work_folder(".staging-", target.parent) as staging:
        _fill(staging, triton, search_path)
        try:
            staging.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process wrote the same content first
                raise
    return found


def stub_search_path() -> tuple[Path, ...]:
    """Return the folders the stub needs to import this environment's NumPy and ONNX Runtime."""
    folders: list[Path] = []
    for module in ("numpy", "onnxruntime"):
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise MissingDependencyError(f"{module}, which the embedded server's backend needs, is not installed")
        folders.append(Path(spec.origin).resolve().parent.parent)
    folders += [Path(entry) for entry in sys.path if Path(entry).name in {"site-packages", "dist-packages"}]
    return tuple(dict.fromkeys(folder for folder in folders if folder.is_dir()))


def _key(triton: TritonInstallation, search_path: tuple[Path, ...]) -> str:
    parts = [sys.version, sys.base_prefix, sys.executable, *map(str, search_path)]
    for file in (triton.binary, triton.stub, triton.backends / "python" / "libtriton_python.so"):
        if file is not None:
            state = file.stat()
            parts.append(f"{file} {state.st_size} {state.st_mtime_ns}")
    digest = hashlib.sha256("\n".join([*parts, _STUB_STARTER, _NO_BYTECODE]).encode())
    for file in (*sorted(OUR_BACKENDS.rglob("*.py")), *SHARED):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _fill(folder: Path, triton: TritonInstallation, search_path: tuple[Path, ...]) -> None:
    backends = folder / "backends"
    # Copy instead of link: the wheel may be upgraded under a running server.
    copy_folder(triton.backends / "python", backends / "python")
    stub = backends / "python" / "stub" / _STUB
    stub.parent.mkdir()
    if triton.stub is not None:
        shutil.copy2(triton.stub, stub)
    else:
        (backends / "python" / _STUB).rename(stub)
    (backends / "python" / _STUB).write_text(_STUB_STARTER, encoding="utf-8")
    (backends / "python" / _STUB).chmod(0o755)
    for ours in sorted(OUR_BACKENDS.iterdir()):
        if (ours / "model.py").is_file():
            (backends / ours.name).mkdir()
            for file in (*sorted(ours.glob("*.py")), *SHARED):
                shutil.copyfile(file, backends / ours.name / file.name)
    compileall.compile_dir(backends, quiet=2, workers=1)  # stubs write no bytecode
    _write_python_home(folder / "python", search_path)


def _write_python_home(folder: Path, search_path: tuple[Path, ...]) -> None:
    """Write a virtual environment without packages of its own.

    The stub starts an isolated interpreter (PYTHONPATH and PYTHONHOME are ignored) with its paths from the `python3`
    found first in PATH. This one's `.pth` file leads to the packages of repo-manager's interpreter.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    base = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python3").symlink_to(base)
    (folder / "pyvenv.cfg").write_text(
        f"home = {base.parent}\ninclude-system-site-packages = false\nversion = {version}\n", encoding="utf-8"
    )
    packages = folder / "lib" / f"python{version}" / "site-packages"
    packages.mkdir(parents=True)
    lines = "".join(f"{entry}\n" for entry in (_NO_BYTECODE, *search_path))
    (packages / "repo_manager.pth").write_text(lines, encoding="utf-8")
