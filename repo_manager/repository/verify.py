"""The faults of a repository: ours or anybody's."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from repo_manager.errors import ConfigError, ModelError, RepositoryError
from repo_manager.files import sha256_file
from repo_manager.lfs import LFS_HINT, LFS_MOST_BYTES, LFS_POINTER, is_lfs_pointer
from repo_manager.onnx_model.runtime import RuntimeLateError
from repo_manager.repository.configuration import is_as_derived
from repo_manager.repository.ensembles import ensembles_problems
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.layout import MANIFEST_FILENAME, STAGING_IN_ROOT
from repo_manager.repository.location import LocationLike
from repo_manager.repository.look import existing_model, top_names, with_beside, with_versions
from repo_manager.repository.plan.configuration import served_model_file
from repo_manager.repository.plan.problems import model_problems, readable_config, version_problems, work_problems
from repo_manager.repository.stores import open_store
from repo_manager.repository.stores.base import Store, model_names
from repo_manager.repository.view import Entry, FolderContent, ModelView, VersionView
from repo_manager.triton_config.compare import check_config
from repo_manager.triton_config.completion import backend_of_files, completed_config, described
from repo_manager.triton_config.config import CONFIG_FILENAME, DEFAULT_FILENAMES, ModelConfig, parse_config
from repo_manager.triton_config.joined_requests import dependence_in_batch
from repo_manager.triton_config.problems import Problem, Severity
from repo_manager.triton_config.served_signature import runtime_signature
from repo_manager.types import Backend

__all__ = ["verify"]

_MAX_LOOKS = 20
_NO_REPOSITORY = "not-a-repository"
_SYSTEM_FOLDERS = {
    "lost+found": "the file system's own",
    "@eaDir": "the storage device's own",
    "#recycle": "the storage device's own",
    "System Volume Information": "the file system's own",
}


@dataclasses.dataclass(frozen=True)
class _Content:
    """The depth of the check of files: of one version or of all, their digests, their models."""

    version: int | None
    digests: bool
    models: bool


def verify(
    repository: LocationLike,
    name: str | None = None,
    *,
    version: int | None = None,
    digests: bool = True,
    models: bool = True,
) -> tuple[Problem, ...]:
    """Check a repository: layout as Triton reads it, configurations, manifests, and each file's digest and size.

    Works on repositories written by others: a version without a manifest is a warning. Nothing is changed. From object
    storage files are fetched one version at a time. Without `digests` nothing but small files is.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: one model. `None`: all of them, and the root itself.
        version: version of the model. `None`: the newest, or the server's choice.
        digests: read every file to compare its digest. Without it only sizes are compared.
        models: load each ONNX model the onnxruntime backend serves, and compare it with config.pbtxt.

    Returns:
        The findings in the order of their places, those between ensembles and their models last. Empty when all is
        well.

    Raises:
        RepositoryError: no such repository or model, or the store refuses.
    """
    with disk_errors(f"verify {repository}"):
        store = open_store(repository)
        content = _Content(version, digests, models and (digests or not store.traits.remote))
        if name is not None:
            found = _named_model(store, name, content)
            return tuple(found if version is not None else [*found, *ensembles_problems(store, [name])])
        found = [*_root_problems(store), *(step.problem for step in store.mend(()) if step.problem is not None)]
        for model in model_names(store):
            found += [] if model in _SYSTEM_FOLDERS else _model(store, model, content)
        return (*found, *ensembles_problems(store))


def _root_problems(store: Store) -> Iterator[Problem]:
    """Check the root itself, as Triton reads it."""
    level = store.list_level()
    yield from _repository_above(store, level)
    for folder in level.folders:
        if folder == STAGING_IN_ROOT:
            text = "is repo-manager's own: a command runs now, or was killed; Triton in poll mode takes it for a model"
            yield Problem(folder, text, Severity.WARNING, "the next writing command removes it", rule="leftovers")
        elif folder in _SYSTEM_FOLDERS:
            text = f"is {_SYSTEM_FOLDERS[folder]}, and Triton takes every folder here for a model"
            yield Problem(
                folder, text, hint="leave it, and make a folder beside it the repository", rule="foreign-folder"
            )
        elif folder.startswith("."):
            kind = "prefix" if store.traits.remote else "folder"
            yield Problem(
                folder,
                f"is a hidden {kind}, which Triton takes for a model",
                hint="move it elsewhere",
                rule="foreign-folder",
            )
    for entry in level.files:
        if entry.link is not None and not entry.link.exists:
            yield Problem(entry.name, "is a link to nothing", Severity.WARNING, rule="broken-link")


def _repository_above(store: Store, level: FolderContent) -> Iterator[Problem]:
    """Find the folder of a model, or of a version, in the place of a repository."""
    place = store.location.resolve()
    files = [entry.name for entry in level.files]
    versions = [folder for folder in level.folders if folder.isdecimal()]
    if CONFIG_FILENAME in files:
        text = "is in the root: Triton takes the folders beside it for models, and this looks like the folder of one"
        yield Problem(CONFIG_FILENAME, text, hint=f"name the repository above: -r {place.parent}", rule=_NO_REPOSITORY)
    elif place.name.isdecimal() and (MANIFEST_FILENAME in files or backend_of_files(files)):
        hint = f"name the repository above: -r {place.parent.parent}"
        yield Problem(".", "looks like the folder of a version, not a repository", hint=hint, rule=_NO_REPOSITORY)
    elif versions:
        inside = [entry.name for entry in store.list_level(versions[0]).files]
        if MANIFEST_FILENAME in inside or backend_of_files(inside):
            hint = f"name the repository above: -r {place.parent}"
            yield Problem(".", "looks like the folder of a model, not a repository", hint=hint, rule=_NO_REPOSITORY)


def _named_model(store: Store, name: str, content: _Content) -> list[Problem]:
    try:
        there = bool(store.look(name).work)
    except RepositoryError:
        there = True  # a damaged record, reported as a finding
    if not there:
        existing_model(store, name)
    return _model(store, name, content)


def _model(store: Store, name: str, content: _Content) -> list[Problem]:
    """Check one model. Findings made while another command changed the model are checked again."""
    found: list[Problem] = []
    for _ in range(_MAX_LOOKS):
        try:
            view = store.look(name, record=True)
        except RepositoryError as exc:
            return [Problem(store.traits.record.format(name=name), exc.message, hint=exc.hint or "", rule="state-file")]
        try:
            found = list(_model_once(store, view, content))
        except (FileNotFoundError, RepositoryError):  # an entry was removed or replaced while it was read
            if store.look(name, record=True) == view:
                raise
            continue
        if not found or store.look(name, record=True) == view:
            break
    return found


def _model_once(store: Store, view: ModelView, content: _Content) -> Iterator[Problem]:
    yield from work_problems(view)
    if not view.exists or (view.work and not view.versions):
        return  # not yet a model, or no longer one
    view = with_versions(store, with_beside(store, view))
    yield from model_problems(view)
    yield from _on_trial(view)
    config = readable_config(view)
    by_model = content.models and config is not None and config.backend == Backend.ONNXRUNTIME
    for number, version in view.contents.items():
        found = version_problems(version, config)
        # The model check below says more than the configuration derived from the model.
        yield from (each for each in found if not (by_model and each.rule == "config-signature"))
        if content.version in (None, number) and (content.digests or content.models):
            with store.fetch(view.name, number, compare=False) as folder:
                yield from _content_problems(folder, version, config, content, has_config=view.has_config)


def _on_trial(view: ModelView) -> Iterator[Problem]:
    """Name the version served and not proven: it must not be taken for the deployed one."""
    left = view.state.unproven
    if left is not None:
        text = f"is on trial since {left.at}: its roll-out runs now, or was killed before the proof"
        hint = "if none runs, deploy finishes it and rollback undoes it"
        yield Problem(f"{view.name}/{left.version}", text, Severity.WARNING, hint, rule="on-trial")


def _content_problems(
    folder: Path, version: VersionView, config: ModelConfig | None, content: _Content, *, has_config: bool
) -> Iterator[Problem]:
    """Check the contents of a version's files. Faults visible in names and sizes are not repeated."""
    where = f"{version.path.parent.name}/{version.number}"
    pointers = [entry.name for entry in version.files if _is_pointer(folder, entry)]
    for name in pointers:
        yield Problem(f"{where}/{name}", f"is {LFS_POINTER}", hint=LFS_HINT, rule="lfs-pointer")
    if pointers:
        return  # without its files, nothing more is known about the version
    if content.models and config is not None:
        yield from _model_file(folder, version, config, where)
    elif content.models and not has_config and backend_of_files(top_names(version)) == Backend.ONNXRUNTIME:
        yield from _derived(folder / DEFAULT_FILENAMES[Backend.ONNXRUNTIME], version, where)
    if content.digests and version.has_manifest:
        yield from _digests(folder, version, where)


def _is_pointer(folder: Path, entry: Entry) -> bool:
    if entry.size_bytes > LFS_MOST_BYTES or not (folder / entry.name).is_file():
        return False
    return is_lfs_pointer((folder / entry.name).read_bytes())


def _derived(file: Path, version: VersionView, where: str) -> Iterator[Problem]:
    """Describe how Triton serves a version of a model without config.pbtxt."""
    try:
        config = completed_config(parse_config(""), runtime_signature(file))
    except (ConfigError, ModelError, RuntimeLateError) as exc:
        text = exc.message.replace(str(file.parent), str(version.path))
        yield Problem(f"{where}/{file.name}", text, hint=exc.hint or "", rule="config-derived")
        return
    text = f"is served with what Triton derives from it: {described(config)}"
    yield Problem(f"{where}/{file.name}", text, Severity.WARNING, rule="config-derived")


def _model_file(folder: Path, version: VersionView, config: ModelConfig, where: str) -> Iterator[Problem]:
    filename = served_model_file(config)
    file = folder / filename
    if not filename or config.backend != Backend.ONNXRUNTIME or not file.is_file() or not file.stat().st_size:
        return
    if config.message().model_operations.op_library_filename:
        return  # only the server has the libraries of custom operators
    yield from _joined_requests(version, config, file, f"{where}/{filename}")
    if is_as_derived(version, config, file):
        return
    try:
        yield from check_config(config, runtime_signature(file, config), where=f"{where}/{filename}")
    except (ModelError, RuntimeLateError) as exc:
        yield Problem(
            f"{where}/{filename}",
            exc.message.replace(str(folder), str(version.path)),
            hint=exc.hint or "",
            rule="model-unreadable",
        )


def _joined_requests(version: VersionView, config: ModelConfig, file: Path, where: str) -> Iterator[Problem]:
    """Find a model whose answers hold other clients' data when Triton joins requests to a batch."""
    if config.max_batch_size < 1 or config.is_ragged:
        return
    recorded = _recorded_axis(version)
    if recorded.get("kind") == "batched" and not recorded.get("forced"):
        return  # `add` proved this, and the digest shows that the file is unchanged
    asked_for = bool(recorded.get("forced"))
    try:
        reason = dependence_in_batch(file) or (recorded.get("reason") if asked_for else None)
    except ModelError:
        return  # the load reports this error
    if reason is None:
        return
    text = f"samples of a batch depend on each other, and max_batch_size is {config.max_batch_size}: {reason}"
    if asked_for:
        yield Problem(where, f"{text}; --max-batch-size was given", Severity.WARNING, rule="samples-depend")
        return
    hint = "answers can hold other clients' data: add it again under another name, which gets max_batch_size 0"
    yield Problem(where, text, hint=hint, rule="samples-depend")


def _recorded_axis(version: VersionView) -> Mapping[str, Any]:
    """Return the manifest's word on the batch axis. Empty for versions of others, and of earlier releases."""
    if version.has_manifest:
        with contextlib.suppress(RepositoryError):
            found = version.manifest().extra.get("batch_axis")
            return found if isinstance(found, dict) else {}
    return {}


def _digests(folder: Path, version: VersionView, where: str) -> Iterator[Problem]:
    sizes = {entry.name: entry.size_bytes for entry in version.files}
    with contextlib.suppress(RepositoryError):
        for name, record in version.manifest().files.items():
            file = folder / name
            if sizes.get(name) != record.size_bytes or not file.is_file():
                continue  # already reported
            found = sha256_file(file)
            if found != record.sha256:
                text = f"was changed: its digest is {found}; the manifest says {record.sha256}"
                yield Problem(f"{where}/{name}", text, hint="restore it from a copy", rule="file-digest")
