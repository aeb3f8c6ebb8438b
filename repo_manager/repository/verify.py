"""What is wrong with a repository: ours or anybody's."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.repository.disk import disk_errors
from repo_manager.repository.layout import (
    find_folder,
    is_folder,
    open_repository,
    triton_version,
    validate_model_name,
)
from repo_manager.repository.signing_files import orphaned_signatures, signature_path
from repo_manager.repository.state import read_states
from repo_manager.repository.stores.staging import STAGING_IN_ROOT
from repo_manager.repository.verify_version import verify_version
from repo_manager.triton_config import (
    CONFIG_FILENAME,
    ModelConfig,
    Problem,
    Severity,
    check_rules,
    parse_config,
    served_versions,
    version_policy,
)
from repo_manager.triton_config.config import read_config_text

__all__ = ["verify"]

# Folders of a model that Triton knows: core's kWarmupDataFolder and kInitialStateFolder, --model-config-name's configs.
_MAX_LOOKS = 20
_KNOWN_FOLDERS = {"warmup", "initial_state", "configs"}


@dataclasses.dataclass(frozen=True)
class _Content:
    """What is read of the files: of one version or of all, their digests, their models."""

    version: int | None
    digests: bool
    models: bool


def verify(
    repository: Path,
    name: str | None = None,
    *,
    version: int | None = None,
    digests: bool = True,
    models: bool = True,
) -> tuple[Problem, ...]:
    """Check a repository: layout as Triton reads it, configurations, manifests, and each file's digest and size.

    Works on repositories that others wrote: a version without a manifest is a warning. Nothing is changed.

    Args:
        repository: the root.
        name: one model; `None`: all of them, and the root itself.
        version: read the content of this version only; of the others what their names and sizes tell.
        digests: read every file to compare its digest; without it only sizes are compared.
        models: load each ONNX model that the onnxruntime backend serves, and compare it with config.pbtxt.

    Returns:
        The findings in the order of their places; empty when all is well.

    Raises:
        RepositoryError: no such repository or model, or the disk refuses.
    """
    content = _Content(version, digests, models)
    with disk_errors(f"verify {repository}"):
        root = open_repository(repository)
        if name is not None:
            if find_folder(root, name) is None:
                raise RepositoryError(f"{root} has no model {name!r}", hint="`repo-manager list` shows the models.")
            return tuple(_verify_model(root, root / name, content))
        found = [*_verify_state(root), *_verify_signature_files(root)]
        for entry in sorted(os.scandir(root), key=lambda e: e.name):
            if is_folder(entry):
                found += _verify_root_folder(root, Path(entry.path), content)
            elif entry.is_symlink() and not Path(entry.path).exists():
                found.append(Problem(entry.name, "is a link to nothing", Severity.WARNING))
        return tuple(found)


def _verify_state(root: Path) -> Iterator[Problem]:
    try:
        read_states(root)
    except RepositoryError as exc:
        yield Problem(".repo-manager.json", exc.message, hint=exc.hint or "")


def _verify_signature_files(root: Path) -> Iterator[Problem]:
    for name, version in orphaned_signatures(root):
        text = f"is the signature of {name}:{version}, which does not exist"
        yield Problem(signature_path(root, name, version).name, text, Severity.WARNING, "`repo-manager gc` removes it")


def _verify_root_folder(root: Path, path: Path, content: _Content) -> Iterable[Problem]:
    if path.name == STAGING_IN_ROOT:
        text = "is repo-manager's own: a command runs now, or was killed; Triton in poll mode takes it for a model"
        return [Problem(path.name, text, Severity.WARNING, "the next command that writes removes it")]
    if path.name.startswith("."):
        return [Problem(path.name, "is a hidden folder, which Triton takes for a model", hint="move it elsewhere")]
    return _verify_model(root, path, content)


def _verify_model(root: Path, path: Path, content: _Content) -> list[Problem]:
    """Check one model. What was found while another command changed the model is not believed but looked at again."""
    found: list[Problem] = []
    for _ in range(_MAX_LOOKS):
        before = _stamp(path)
        if before is None:
            return []  # It was removed.
        try:
            found = list(_verify_model_once(root, path, content))
        except FileNotFoundError:
            if _stamp(path) == before:
                raise
            continue
        if not found or _stamp(path) == before:
            break
    return found


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when versions come or go, or config.pbtxt is replaced; `None` when the model is gone."""
    try:
        folder = path.stat()
        config = (path / CONFIG_FILENAME).stat() if (path / CONFIG_FILENAME).exists() else folder
    except FileNotFoundError:
        return None
    return folder.st_ino, folder.st_mtime_ns, config.st_ino, config.st_mtime_ns


def _verify_model_once(root: Path, path: Path, content: _Content) -> Iterator[Problem]:
    name = path.name
    try:
        validate_model_name(name)
    except RepositoryError as exc:
        yield Problem(name, exc.message, Severity.WARNING)
    if path.is_symlink():
        yield from _link_problem(root, path, name)
    config, problems = _read_config(path)
    yield from problems
    numbers: list[int] = []
    for entry in sorted(os.scandir(path), key=lambda e: e.name):
        where = f"{name}/{entry.name}"
        if not is_folder(entry):
            yield from _stray_file(entry, where, config)
            continue
        if entry.name in _KNOWN_FOLDERS:
            continue
        number, version_problems = _folder_version(entry.name, where)
        yield from version_problems
        if entry.is_symlink():
            yield from _link_problem(root, Path(entry.path), where)
        if number is not None and str(number) == entry.name:
            numbers.append(number)
            folder = Path(entry.path)
            wanted = content.version in (None, number)
            digests, models = wanted and content.digests, wanted and content.models
            yield from verify_version(root, folder, number, config, digests=digests, models=models)
    if config is not None:
        yield from _verify_policy(name, config, numbers)
    if not numbers:
        yield Problem(name, "has no version, and Triton takes the folder for a model", hint="remove the folder")


def _read_config(path: Path) -> tuple[ModelConfig | None, list[Problem]]:
    file = path / CONFIG_FILENAME
    where = f"{path.name}/{CONFIG_FILENAME}"
    if not file.exists():
        text = "is missing; Triton derives one where the backend can"
        return None, [Problem(where, text, Severity.WARNING, "write it down: a derived one can change with a version")]
    try:
        config = parse_config(read_config_text(file), where=where)
    except ConfigError as exc:
        return None, [Problem(where, exc.message, hint=exc.hint or "")]
    problems = check_rules(config, where=where)
    if config.name not in ("", path.name):
        problems.append(Problem(where, f"names the model {config.name!r}; Triton wants the folder's {path.name!r}"))
    if config.unknown_fields:
        text = f"has fields that this repo-manager does not know: {', '.join(config.unknown_fields)}"
        problems.append(Problem(where, text, Severity.WARNING))
    for label_file in config.label_filenames:
        if not (path / label_file).is_file():
            problems.append(Problem(f"{path.name}/{label_file}", f"is missing, and {CONFIG_FILENAME} names it"))
    return config, problems


def _stray_file(entry: os.DirEntry[str], where: str, config: ModelConfig | None) -> Iterator[Problem]:
    if entry.name == CONFIG_FILENAME or (config is not None and entry.name in config.label_filenames):
        return
    if entry.is_symlink() and not Path(entry.path).exists():
        yield Problem(where, "is a link to nothing", Severity.WARNING)
    elif config is not None:
        text = "lies beside the versions: each change of it makes Triton reload every version"
        yield Problem(where, text, Severity.WARNING, "move it elsewhere, or into the version that it belongs to")


def _folder_version(folder: str, where: str) -> tuple[int | None, list[Problem]]:
    """What Triton makes of a folder in a model's folder."""
    number = triton_version(folder)
    if number is None:
        return None, [Problem(where, "is no version; Triton ignores it with a warning", Severity.WARNING)]
    if abs(number) >= 2**63:
        return None, [Problem(where, "is a number beyond 64 bits, at which Triton fails", hint="rename it")]
    if str(number) != folder:
        text = f"Triton takes this folder for version {number} and then reads the folder {number}"
        return number, [Problem(where, text, hint="rename it so that it does not start with a digit, or remove it")]
    if number < 1:
        return number, [Problem(where, f"is version {number}; versions start at 1", Severity.WARNING)]
    return number, []


def _verify_policy(name: str, config: ModelConfig, numbers: list[int]) -> Iterator[Problem]:
    policy = version_policy(config)
    where = f"{name}/{CONFIG_FILENAME}"
    if numbers and not served_versions(config, numbers):
        yield Problem(where, f"asks to serve {policy}, and the versions are {sorted(numbers)}: nothing would load")
    elif isinstance(policy, tuple):
        missing = sorted(set(policy) - set(numbers))
        if missing:
            text = f"asks to serve {', '.join(map(str, missing))}, which do not exist; Triton skips them"
            yield Problem(where, text, Severity.WARNING, "deploy an existing version")


def _link_problem(root: Path, path: Path, where: str) -> Iterator[Problem]:
    target = path.resolve()
    if root not in target.parents:
        text = f"is a symbolic link out of the repository, to {target}"
        yield Problem(where, text, hint="put the content itself here: what lies outside can change unseen")
    else:
        yield Problem(where, f"is a symbolic link to {target}", Severity.WARNING)
