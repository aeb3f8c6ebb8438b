"""Faults of a model visible in names, sizes and small files: one of ours or anybody's."""

from __future__ import annotations

import math
from collections.abc import Iterator

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.repository.layout import (
    DATA_FOLDERS,
    INITIAL_STATE_FOLDER,
    MANIFEST_FILENAME,
    WARMUP_FOLDER,
    is_bytecode,
    triton_version,
    validate_model_name,
)
from repo_manager.repository.look import top_names
from repo_manager.repository.manifest import MANIFEST_SCHEMA_VERSION, Manifest
from repo_manager.repository.plan.configuration import missing_for_gpus, served_model_file
from repo_manager.repository.view import Entry, Link, ModelView, VersionView
from repo_manager.triton_config.compare import misfits
from repo_manager.triton_config.completion import backend_of_files
from repo_manager.triton_config.config import CONFIG_FILENAME, VARIANTS_FOLDER, ModelConfig, parse_config
from repo_manager.triton_config.problems import Problem, Severity
from repo_manager.triton_config.rules import check_rules
from repo_manager.triton_config.slips import meant_field
from repo_manager.triton_config.version_policy import served_versions, version_policy
from repo_manager.triton_messages import model_config_pb2

__all__ = ["model_problems", "readable_config", "version_problems", "work_problems"]

# Triton's own folders of a model (core, constants.h): its data folders, and the one for --model-config-name.
_KNOWN_FOLDERS = {*DATA_FOLDERS, VARIANTS_FOLDER}


_BYTES_OF = {
    "BOOL": 1, "INT8": 1, "UINT8": 1, "INT16": 2, "UINT16": 2, "FP16": 2, "BF16": 2, "INT32": 4, "UINT32": 4, "FP32": 4,
    "INT64": 8, "UINT64": 8, "FP64": 8,
}  # fmt: skip
_PYTHON_FILE = "model.py"  # as `runtime`, it selects a Python backend in the backend's own folder
_ENVIRONMENT, _MODEL_DIRECTORY = "EXECUTION_ENV_PATH", "$$TRITON_MODEL_DIRECTORY"
_GPU_FILES = "put the file here, or correct cc_model_filenames: such a GPU cannot load the model"
_WRITE_DOWN = "`repo-manager adopt --write-config` writes it down: a derived one can change with a version"


def readable_config(view: ModelView) -> ModelConfig | None:
    """Return a model's configuration, or `None` when there is none, or it is unreadable."""
    try:
        return view.parsed_config() if view.has_config else None
    except ConfigError:
        return None


def work_problems(view: ModelView) -> Iterator[Problem]:
    """List the problems of versions being published or removed."""
    config = readable_config(view)
    open_policy = config is None or isinstance(version_policy(config), str)
    for work in view.work:
        where = f"{view.name}/{work.version}"
        if str(work.version) in view.level.folders and open_policy and view.has_config:
            text = f"{work.sentence}, and the version policy lets Triton load what is there of it"
            yield Problem(
                where,
                text,
                hint="name the versions to serve in config.pbtxt, then run `repo-manager gc`",
                rule="unfinished-work",
            )
        elif work.abandoned:
            hint = "the same command goes on where it broke off; `repo-manager gc` removes the rest"
            yield Problem(where, work.sentence, Severity.WARNING, hint, rule="unfinished-work")


def model_problems(view: ModelView) -> Iterator[Problem]:
    """Check a model's folder and its configuration, but not its versions."""
    name = view.name
    try:
        validate_model_name(name)
    except RepositoryError as exc:
        yield Problem(name, exc.message, Severity.WARNING, rule="model-name")
    if view.link is not None:
        yield _link_problem(view.link, name)
    config = readable_config(view)
    yield from _config_problems(view)
    yield from _lookalikes(view)
    for entry in view.level.files:
        yield from _stray_file(entry, f"{name}/{entry.name}", config)
    for folder in view.folders:
        if folder not in _KNOWN_FOLDERS and not CONFIG_FILENAME.startswith(folder):
            yield from _folder_problems(folder, f"{name}/{folder}")
            if folder in view.level.links:
                yield _link_problem(view.level.links[folder], f"{name}/{folder}")
    if config is not None:
        yield from _data_files(view, config)
        yield from _environment(view, config)
        yield from _runtime(view, config)
        yield from _policy_problems(view, config)
    if not view.versions:
        empty = not view.level.files and not view.folders
        hint = "remove the folder" if empty else "add a version, or move the folder out of the repository"
        yield Problem(name, "has no version, and Triton takes the folder for a model", hint=hint, rule="no-version")


def _config_problems(view: ModelView) -> Iterator[Problem]:
    where = f"{view.name}/{CONFIG_FILENAME}"
    if not view.has_config:
        newest = max(view.contents, default=None)
        if newest is not None and not backend_of_files(top_names(view.contents[newest]), view.name):
            text = f"is missing, and the files of version {newest} do not tell Triton which backend runs them"
            yield Problem(where, text, hint="write one; it has to state the backend", rule="config-missing")
            return
        text = "is missing; Triton derives one where the backend can"
        yield Problem(where, text, Severity.WARNING, _WRITE_DOWN, rule="config-missing")
        return
    try:
        config = parse_config(view.config_text(), where=where)
    except ConfigError as exc:
        yield Problem(where, exc.message, hint=exc.hint or "", rule="config-syntax")
        return
    yield from check_rules(config, where=where)
    yield from _untold_backend(view, config, where)
    if config.name not in ("", view.name):
        yield Problem(
            where, f"names the model {config.name!r}; Triton wants the folder's {view.name!r}", rule="config-name"
        )
    slips = {field: meant for field in config.unknown_fields if (meant := meant_field(field))}
    for field, meant in slips.items():
        text = f"has a field {field!r}, unknown to Triton and refused"
        yield Problem(where, text, hint=f"did you mean {meant!r}?", rule="config-unknown-field")
    others = [field for field in config.unknown_fields if field not in slips]
    if others:
        text = f"has fields unknown to this repo-manager: {', '.join(others)}"
        yield Problem(
            where,
            text,
            Severity.WARNING,
            "a Triton without them refuses the model, too",
            rule="config-unknown-field",
        )
    for label_file in config.label_filenames:
        if label_file not in view.beside:
            yield Problem(
                f"{view.name}/{label_file}", f"is missing, and {CONFIG_FILENAME} names it", rule="labels-missing"
            )


def _untold_backend(view: ModelView, config: ModelConfig, where: str) -> Iterator[Problem]:
    """Find a configuration without a backend whose files do not tell it either."""
    message, newest = config.message(), max(view.contents, default=None)
    if message.backend or message.platform or message.HasField("ensemble_scheduling") or newest is None:
        return
    named = message.default_model_filename
    if not (backend_of_files([named]) if named else backend_of_files(top_names(view.contents[newest]), view.name)):
        files = f"default_model_filename {named!r} does" if named else f"the files of version {newest} do"
        yield Problem(
            where, f"states no backend, and {files} not tell Triton which", hint="write it down", rule="backend"
        )


def _data_files(view: ModelView, config: ModelConfig) -> Iterator[Problem]:
    """Check the files of warm-up samples and initial states: without one, or with too few bytes, no version loads."""
    message = config.message()
    wanted = [
        (f"{WARMUP_FOLDER}/{tensor.input_data_file}", tensor, f"warm-up sample {sample.name!r}, input {name!r}")
        for sample in message.model_warmup
        for name, tensor in sorted(sample.inputs.items())
        if tensor.input_data_file
    ]
    wanted += [
        (f"{INITIAL_STATE_FOLDER}/{initial.data_file}", initial, f"the initial state of {state.input_name!r}")
        for state in message.sequence_batching.state
        for initial in state.initial_state
        if initial.data_file
    ]
    for file, tensor, what in wanted:
        where, size = f"{view.name}/{file}", view.data.get(file)
        element = _BYTES_OF.get(model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_"))
        needed = None if element is None or -1 in tensor.dims else element * math.prod(tensor.dims)
        if size is None and ".." not in file.split("/"):
            yield Problem(where, f"is missing, and {what} reads it", rule="data-file")
        elif size is not None and needed is not None and size < needed:
            yield Problem(where, f"has {size} bytes, and {what} needs {needed}", rule="data-file")


def _environment(view: ModelView, config: ModelConfig) -> Iterator[Problem]:
    """Check that the environment of a Python model is in the model's folder, if that is where it should be."""
    message = config.message()
    path = message.parameters[_ENVIRONMENT].string_value if _ENVIRONMENT in message.parameters else ""
    start, folder, below = path.partition(f"{_MODEL_DIRECTORY}/")
    parts = [part for part in below.split("/") if part not in ("", ".")]
    there = {*(entry.name for entry in view.level.files), *view.level.folders, *view.level.links}
    if message.backend == "python" and folder and not start and parts and parts[0] not in {"..", *there}:
        text = f"is missing, and the parameter {_ENVIRONMENT} names it"
        yield Problem(f"{view.name}/{'/'.join(parts)}", text, rule="data-file")


def _runtime(view: ModelView, config: ModelConfig) -> Iterator[Problem]:
    """Name a backend's library that is neither the usual one nor in the model's folder: the server must have it."""
    message = config.message()
    usual = f"libtriton_{message.backend}.so"
    here = {entry.name for entry in view.level.files}.union(*map(top_names, view.contents.values()))
    if (
        message.runtime
        and message.runtime != usual
        and (message.runtime == _PYTHON_FILE or message.runtime not in here)
    ):
        text = f"runtime is {message.runtime!r}, which has to be in the server's folder of backend {message.backend!r}"
        where = f"{view.name}/{CONFIG_FILENAME}"
        yield Problem(where, text, Severity.WARNING, "a server without it refuses the model", rule="runtime")


def _lookalikes(view: ModelView) -> Iterator[Problem]:
    """Find entries Triton takes for a second config.pbtxt: it then sees no time of the model's files at all."""
    names = {*(entry.name for entry in view.level.files), *view.level.folders}
    if CONFIG_FILENAME in names:
        for name in sorted(name for name in names - {CONFIG_FILENAME} if CONFIG_FILENAME.startswith(name)):
            text = f"is taken for a second {CONFIG_FILENAME}: Triton sees no change of the model any more"
            yield Problem(f"{view.name}/{name}", text, hint="rename it, or move it elsewhere", rule="config-lookalike")


def _stray_file(entry: Entry, where: str, config: ModelConfig | None) -> Iterator[Problem]:
    if CONFIG_FILENAME.startswith(entry.name) and entry.name != CONFIG_FILENAME:
        return  # already reported
    if entry.name == CONFIG_FILENAME or (config is not None and entry.name in config.label_filenames):
        return
    if entry.link is not None and not entry.link.exists:
        yield Problem(where, "is a link to nothing", Severity.WARNING, rule="broken-link")
    elif config is not None:
        text = "is beside the versions: each change of it makes Triton reload every version"
        yield Problem(
            where,
            text,
            Severity.WARNING,
            "move it elsewhere, or into the version it belongs to",
            rule="stray-file",
        )


def _folder_problems(folder: str, where: str) -> Iterator[Problem]:
    """Describe Triton's reading of a folder in a model's folder."""
    number = triton_version(folder)
    if number is None:
        yield Problem(where, "is no version; Triton ignores it with a warning", Severity.WARNING, rule="version-folder")
    elif abs(number) >= 2**63:
        yield Problem(
            where, "is a number beyond 64 bits, at which Triton fails", hint="rename it", rule="version-folder"
        )
    elif str(number) != folder:
        text = f"Triton takes this folder for version {number} and then reads the folder {number}"
        yield Problem(where, text, hint="rename it to start without a digit, or remove it", rule="version-folder")
    elif number < 1:
        yield Problem(where, f"is version {number}; versions start at 1", Severity.WARNING, rule="version-folder")


def _policy_problems(view: ModelView, config: ModelConfig) -> Iterator[Problem]:
    policy = version_policy(config)
    where = f"{view.name}/{CONFIG_FILENAME}"
    if view.versions and not served_versions(config, view.versions):
        yield Problem(
            where,
            f"asks to serve {policy}, and the versions are {list(view.versions)}: nothing would load",
            rule="version-policy",
        )
    elif isinstance(policy, tuple):
        missing = sorted(set(policy) - set(view.versions))
        if missing:
            text = f"asks to serve {', '.join(map(str, missing))}, which do not exist; Triton skips them"
            yield Problem(where, text, Severity.WARNING, "deploy an existing version", rule="version-policy")


def _link_problem(link: Link, where: str) -> Problem:
    if link.outside:
        text = f"is a symbolic link out of the repository, to {link.target}"
        return Problem(where, text, hint="put the content itself here: files outside can change unseen", rule="link")
    return Problem(where, f"is a symbolic link to {link.target}", Severity.WARNING, rule="link")


def version_problems(version: VersionView, config: ModelConfig | None) -> Iterator[Problem]:
    """Check a version's files by name and size, and its manifest.

    Args:
        version: contents of the version's folder.
        config: the model's configuration. `None` when there is none, or it is unreadable.
    """
    where = f"{version.path.parent.name}/{version.number}"
    for entry in version.files:
        yield from _file_kind(entry, f"{where}/{entry.name}")
    if config is not None:
        yield from _served_file(version, config, where)
    if not version.has_manifest:
        text = f"has no {MANIFEST_FILENAME}: nothing says what it should hold"
        yield Problem(
            where,
            text,
            Severity.WARNING,
            "`repo-manager adopt` writes one of the present files",
            rule="manifest-missing",
        )
        return
    try:
        manifest = version.manifest()
    except RepositoryError as exc:
        yield Problem(f"{where}/{MANIFEST_FILENAME}", exc.message, hint=exc.hint or "", rule="manifest-damaged")
        return
    yield from _manifest_problems(version, manifest, config, f"{where}/{MANIFEST_FILENAME}")
    yield from _files_against_manifest(version, manifest, where)


def _file_kind(entry: Entry, where: str) -> Iterator[Problem]:
    if entry.link is not None:
        link = entry.link
        text = f"is a symbolic link {'out of the repository, ' if link.outside else ''}to {link.target}"
        severity = Severity.ERROR if link.outside or not link.exists else Severity.WARNING
        yield Problem(where, text, severity, "put the content itself here", rule="link")
    elif not entry.regular:
        yield Problem(where, "is not a regular file", hint="remove it", rule="not-a-file")


def _served_file(version: VersionView, config: ModelConfig, where: str) -> Iterator[Problem]:
    for file, said in missing_for_gpus(version, config).items():
        yield Problem(f"{where}/{file}", said, Severity.WARNING, _GPU_FILES, rule="model-file-missing")
    filename = served_model_file(config)
    if not filename:
        return
    if not version.holds(filename):
        yield Problem(f"{where}/{filename}", "is missing, and the configuration serves it", rule="model-file-missing")
    elif any(entry.name == filename and entry.size_bytes == 0 for entry in version.files):
        yield Problem(f"{where}/{filename}", "is empty", rule="model-file-missing")


def _manifest_problems(
    version: VersionView, manifest: Manifest, config: ModelConfig | None, where: str
) -> Iterator[Problem]:
    model = version.path.parent.name
    if (manifest.model, manifest.version) != (model, version.number):
        text = f"is of {manifest.model}:{manifest.version}, but is in {model}:{version.number}"
        yield Problem(
            where,
            text,
            hint="the version was copied or renamed by hand; publish it instead",
            rule="manifest-of-another",
        )
    if manifest.schema_version > MANIFEST_SCHEMA_VERSION:
        text = f"has schema_version {manifest.schema_version}; this repo-manager knows {MANIFEST_SCHEMA_VERSION}"
        yield Problem(where, text, Severity.WARNING, "update repo-manager to see all of it", rule="manifest-newer")
    if config is None or not manifest.config:
        return
    try:
        published = parse_config(manifest.config, where=f"{where}: config")
    except ConfigError as exc:
        yield Problem(where, exc.message, rule="model-file-missing")
        return
    for misfit in misfits(config, published):
        yield Problem(where, f"config.pbtxt does not fit this version: {misfit}", rule="config-signature")


def _files_against_manifest(version: VersionView, manifest: Manifest, where: str) -> Iterator[Problem]:
    present = {entry.name: entry for entry in version.files}
    for name, record in manifest.files.items():
        if name not in present:
            yield Problem(
                f"{where}/{name}",
                "is missing; the manifest lists it",
                hint="restore it from a copy",
                rule="file-missing",
            )
        elif present[name].size_bytes != record.size_bytes:
            text = f"has {present[name].size_bytes} bytes; the manifest says {record.size_bytes}"
            yield Problem(f"{where}/{name}", text, hint="restore it from a copy", rule="file-size")
    for name in sorted(present.keys() - manifest.files.keys()):
        if is_bytecode(name):
            continue
        yield Problem(
            f"{where}/{name}",
            "was added after publishing; the manifest does not list it",
            hint="remove it",
            rule="file-added",
        )
