"""What is wrong with one version: its files against its manifest, its manifest against its place."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from repo_manager.errors import ConfigError, ModelError, RepositoryError
from repo_manager.files import sha256_file
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.repository.manifest import MANIFEST_SCHEMA_VERSION, Manifest, read_manifest
from repo_manager.triton_config import (
    ModelConfig,
    Problem,
    Severity,
    check_config,
    parse_config,
    runtime_signature,
    same_signature,
)
from repo_manager.types import Backend

__all__ = ["list_files", "verify_version"]


def verify_version(
    root: Path, path: Path, number: int, config: ModelConfig | None, *, digests: bool, models: bool
) -> Iterator[Problem]:
    """Check one version.

    Args:
        root: the repository's real path.
        path: the version's folder.
        number: its number.
        config: the model's configuration; `None` when it has none that can be read.
        digests: compare each file's digest, not only its size.
        models: load ONNX models and compare them with the configuration.
    """
    where = f"{path.parent.name}/{path.name}"
    yield from _verify_entries(root, path, where)
    if config is not None:
        yield from _verify_model_file(path, config, where, models)
    if not (path / MANIFEST_FILENAME).exists():
        text = f"has no {MANIFEST_FILENAME}: nothing says what it should hold"
        yield Problem(where, text, Severity.WARNING, "`repo-manager adopt` writes one of what is there now")
        return
    try:
        manifest = read_manifest(path)
    except RepositoryError as exc:
        yield Problem(f"{where}/{MANIFEST_FILENAME}", exc.message, hint=exc.hint or "")
        return
    yield from _verify_manifest(path, number, manifest, config, f"{where}/{MANIFEST_FILENAME}")
    yield from _verify_files(path, manifest, where, digests)


def list_files(path: Path) -> tuple[str, ...]:
    """Return the path of each file and link below a version's folder, with `/`, sorted; the manifest left out."""
    found = [
        (Path(folder) / name).relative_to(path).as_posix()
        for folder, subfolders, names in os.walk(path)
        for name in (*names, *(sub for sub in subfolders if (Path(folder) / sub).is_symlink()))
    ]
    return tuple(sorted(name for name in found if name != MANIFEST_FILENAME))


def _verify_entries(root: Path, path: Path, where: str) -> Iterator[Problem]:
    for name in list_files(path):
        file = path / name
        mode = file.lstat().st_mode
        if stat.S_ISLNK(mode):
            target = file.resolve()
            outside = root not in target.parents
            text = f"is a symbolic link {'out of the repository, ' if outside else ''}to {target}"
            severity = Severity.ERROR if outside or not target.exists() else Severity.WARNING
            yield Problem(f"{where}/{name}", text, severity, "put the content itself here")
        elif not stat.S_ISREG(mode):
            yield Problem(f"{where}/{name}", "is not a regular file", hint="remove it")


def _verify_model_file(path: Path, config: ModelConfig, where: str, models: bool) -> Iterator[Problem]:
    filename = config.model_filename
    if not filename or config.message().cc_model_filenames:
        return
    file = path / filename
    if not file.exists():
        yield Problem(f"{where}/{filename}", "is missing, and the configuration serves it")
    elif file.is_file() and file.stat().st_size == 0:
        yield Problem(f"{where}/{filename}", "is empty")
    elif models and file.is_file() and config.backend == Backend.ONNXRUNTIME:
        yield from _verify_onnx(file, config, f"{where}/{filename}")


def _verify_onnx(file: Path, config: ModelConfig, where: str) -> Iterator[Problem]:
    if config.message().model_operations.op_library_filename:
        return  # Only the server has the libraries of its custom operators.
    try:
        yield from check_config(config, runtime_signature(file, config), where=where)
    except ModelError as exc:
        yield Problem(where, exc.message, hint=exc.hint or "")


def _verify_manifest(
    path: Path, number: int, manifest: Manifest, config: ModelConfig | None, where: str
) -> Iterator[Problem]:
    if manifest.version != number or manifest.model != path.parent.name:
        text = f"is of {manifest.model}:{manifest.version}, and lies in {path.parent.name}:{number}"
        yield Problem(where, text, hint="the version was copied or renamed by hand; publish it instead")
    if manifest.schema_version > MANIFEST_SCHEMA_VERSION:
        text = f"has schema_version {manifest.schema_version}; this repo-manager knows {MANIFEST_SCHEMA_VERSION}"
        yield Problem(where, text, Severity.WARNING, "update repo-manager to see all of it")
    if config is None or not manifest.config:
        return
    try:
        published = parse_config(manifest.config, where=f"{where}: config")
    except ConfigError as exc:
        yield Problem(where, exc.message)
        return
    for difference in same_signature(config, published):
        if not difference.startswith("max_batch_size"):  # A person may lower or raise it.
            yield Problem(where, f"config.pbtxt does not fit this version: {difference}")


def _verify_files(path: Path, manifest: Manifest, where: str, digests: bool) -> Iterator[Problem]:
    present = set(list_files(path))
    for name, record in manifest.files.items():
        if name not in present:
            yield Problem(f"{where}/{name}", "is missing; the manifest lists it", hint="restore it from a copy")
            continue
        file = path / name
        size_bytes = file.stat().st_size if file.is_file() else -1
        if size_bytes != record.size_bytes:
            text = f"has {size_bytes} bytes; the manifest says {record.size_bytes}"
            yield Problem(f"{where}/{name}", text, hint="restore it from a copy")
        elif digests and (found := sha256_file(file)) != record.sha256:
            text = f"was changed: its digest is {found}; the manifest says {record.sha256}"
            yield Problem(f"{where}/{name}", text, hint="restore it from a copy")
    for name in sorted(present - set(manifest.files)):
        yield Problem(f"{where}/{name}", "was added after publishing; the manifest does not list it", hint="remove it")
