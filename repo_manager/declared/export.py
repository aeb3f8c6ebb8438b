"""A repository as the repository.yaml of its present state."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from google.protobuf import text_format  # type: ignore[import-untyped]  # its stubs are a separate package

from repo_manager.declared.request import calibration_record, source_digest
from repo_manager.errors import ConfigError, InputError, RepositoryError
from repo_manager.repository.configuration import change_config
from repo_manager.repository.layout import validate_model_name
from repo_manager.repository.location import Location, LocationLike, as_location, local_folder
from repo_manager.repository.manifest import Manifest
from repo_manager.repository.relabel import read_labels
from repo_manager.repository.scan import ModelEntry, VersionEntry, find_model, scan
from repo_manager.repository.state import ModelState
from repo_manager.repository.tags import model_states
from repo_manager.triton_config.config import DEFAULT_FILENAMES, parse_config
from repo_manager.triton_messages import is_repeated
from repo_manager.types import StrPath

__all__ = ["document_text", "export_document"]

_HEADER = """\
# The declared state of a model repository: `repo-manager apply` brings it about.
# Paths are relative to this file. A version that was made from what `digest` says needs its source no more.
"""
_MOST_FILES = 10_000
_KINDS = {0: "auto", 1: "gpu", 2: "cpu"}
_FROM_THE_MODEL = {
    *("name", "platform", "backend", "runtime", "max_batch_size", "version_policy", "input", "output"),
    *("default_model_filename", "cc_model_filenames"),  # default_model_filename: unless it was changed
}
_OF_A_TENSOR = {"name", "data_type", "dims", "label_filename"}  # from the model, unless changed, or from `labels`
_BATCHING = ("max_queue_delay_microseconds", "preferred_batch_size")


def export_document(
    repository: LocationLike, *, base: StrPath | None = None, sources: Sequence[StrPath] = ()
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the content of the YAML file, as plain values, and the parts of the repository beyond it.

    A manifest has the name of a source, not its place. Where `base` is given, each source is looked for by its digest:
    in `base`, below `sources` and among the repository's own files. So `apply` can rebuild the models from the file.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        base: the folder of the YAML file, base of the relative paths in it. `None` looks for nothing.
        sources: folders with ONNX files and calibration data. They are searched with all their subfolders.

    Raises:
        RepositoryError: the repository cannot be read.
    """
    repository = as_location(repository)
    places = None if base is None else _Places(Path(base), tuple(map(Path, sources)))
    states = model_states(repository)
    models: dict[str, Any] = {}
    notes: list[str] = []
    for listed in scan(repository, deep=False):
        try:
            validate_model_name(listed.name)
            entry = find_model(repository, listed.name)
            if entry.versions:
                found = _model(repository, entry, states.get(entry.name, ModelState()))
                models[entry.name] = found
                if places is not None:
                    notes += places.fill_in(entry, found)
        except (RepositoryError, ConfigError) as exc:
            notes.append(f"{listed.name} is left out: {exc.message}")
    return {"schema_version": 1, "models": models}, tuple(notes)


def document_text(document: Mapping[str, Any]) -> str:
    """Return the YAML text of an exported document."""
    text = yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True, width=110, default_flow_style=False)
    return _HEADER + text


def _model(repository: Location, entry: ModelEntry, state: ModelState) -> dict[str, Any]:
    described = _described(entry)
    found = _source(described.manifest)
    config = _config(repository, entry.name, described.manifest if "source" in found else None)
    if config:
        found["config"] = config
    labels = {output: list(names) for output, names in read_labels(repository, entry.name).items() if names}
    if labels:
        found["labels"] = labels
    # Tag the newest version by source instead of number, so the file can also rebuild the repository.
    newest = described.version if "source" in found else None
    if state.tags:
        found["tags"] = {tag: "newest" if n == newest else n for tag, n in sorted(state.tags.items())}
    if isinstance(entry.policy, tuple) and entry.selected == entry.policy:
        found["serve"] = list(entry.policy)
        if len(entry.policy) == 1:
            found["serve"] = "newest" if entry.policy == (newest,) else entry.policy[0]
    found["versions"] = [version.version for version in entry.versions]
    return found


def _described(entry: ModelEntry) -> VersionEntry:
    """Return the version behind the file's source, `newest` there: the only one served, else the newest.

    Of versions made from the same source in the same way `apply` takes the newest.
    """
    newest = entry.versions[-1]
    if not (isinstance(entry.policy, tuple) and len(entry.policy) == 1 and entry.selected == entry.policy):
        return newest
    served = next(version for version in entry.versions if version.version == entry.policy[0])
    source = _source(served.manifest)
    alike = [version for version in entry.versions if source and _source(version.manifest) == source]
    return served if alike and alike[-1] is served else newest


def _not_built(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of a model's part with a version's number: `apply` does not build it again."""
    yield from (f"tag {tag} ({number})" for tag, number in found.get("tags", {}).items() if number != "newest")
    if found.get("serve", "newest") != "newest":
        yield f"serve ({', '.join(map(str, _listed(found['serve'])))})"


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _source(manifest: Manifest | None) -> dict[str, Any]:
    """Return a version's source. Nothing where the manifest does not say enough to recognise it."""
    if manifest is None:
        return {}
    source, request = manifest.source or {}, manifest.extra.get("request")
    if manifest.precision is None or not source.get("path") or not source.get("digest"):
        return {}
    found: dict[str, Any] = {"source": {"path": source["path"], "digest": source["digest"]}}
    found["precision"] = manifest.precision
    found["backend"] = manifest.backend
    if not isinstance(request, Mapping):
        return {} if manifest.precision.startswith("int8") else found
    calibration = request.get("calibration")
    if isinstance(calibration, Mapping):
        found["calibration"] = {key: value for key, value in calibration.items() if value is not None}
    accuracy = _accuracy(manifest)
    if accuracy:
        found["eval"] = accuracy
    if request.get("sparsity") not in (None, "report"):
        found["sparsity"] = request["sparsity"]
    engine = dict(request.get("engine", {}))
    shapes = engine.pop("shapes", None)
    if shapes:
        found["shapes"] = shapes
    for key, value in (("convert", request.get("convert")), ("engine", engine)):
        if value:
            found[key] = dict(value)
    return found


def _measured(manifest: Manifest | None) -> Mapping[str, Any]:
    """Return the record of a version's accuracy. Empty without."""
    found = ((manifest.conversion if manifest else None) or {}).get("accuracy")
    return found if isinstance(found, Mapping) else {}


def _accuracy(manifest: Manifest) -> dict[str, Any]:
    """Return the held-out data and the limits a version was made with; empty without."""
    measured = _measured(manifest)
    if not measured.get("data"):
        return {}
    limits = {"min_accuracy": measured.get("min_accuracy"), "max_accuracy_drop": measured.get("max_drop")}
    return {"data": measured["data"], **{key: value for key, value in limits.items() if value is not None}}


class _Places:
    """Where sources are, found by their digests.

    Args:
        base: base folder of relative paths.
        folders: folders to search, with their subfolders.
    """

    def __init__(self, base: Path, folders: Sequence[Path]) -> None:
        self._base, self._folders = base, folders
        self._digests: dict[tuple[Path, tuple[str, ...]], str] = {}

    def fill_in(self, entry: ModelEntry, found: dict[str, Any]) -> list[str]:
        """Write the places of a model's source and calibration data into its part. Return the sources not found."""
        if "source" not in found:
            versions = ", ".join(str(version.version) for version in entry.versions)
            return [
                f"{entry.name}: version {versions} cannot be built by apply, which builds from ONNX sources that the "
                f"manifest names; take the versions along: repo-manager copy {entry.name}:VERSION --into DIR"
            ]
        manifest = _described(entry).manifest
        external = tuple(map(str, ((manifest.source if manifest else None) or {}).get("external") or ()))
        notes = []
        if others := list(_not_built(found)):
            notes.append(
                f"{entry.name}: apply builds the version of the source only, so elsewhere these fail: "
                f"{', '.join(others)}; take the versions along: repo-manager copy {entry.name}:VERSION --into DIR"
            )
        for key, names in (("source", external), ("calibration", ())):
            record = found.get(key)
            if not isinstance(record, dict) or not record.get("digest"):
                continue
            own = [] if external or key != "source" else _own_files(entry, record["digest"])
            place = self._place_of(record["path"], record["digest"], names, own)
            if place is None:
                notes.append(
                    f"{entry.name}: its {key} {record['path']} ({record['digest'][:19]}) was not found; apply needs "
                    "it to rebuild the model: give its folder with --sources"
                )
            else:
                record["path"] = os.path.relpath(place, self._base)
        return [*notes, *self._fill_in_eval(entry, found)]

    def _fill_in_eval(self, entry: ModelEntry, found: dict[str, Any]) -> Iterator[str]:
        """Write the place of the held-out data; yield a note if it was not found."""
        digest = str(_measured(_described(entry).manifest).get("digest") or "")
        if "eval" not in found or not digest:
            return  # a function: its name is enough to find it
        name, _, labels = found["eval"]["data"].partition(".npz:")
        place = self._place_of(f"{name}.npz", digest, (), [])
        if place is None:
            yield (
                f"{entry.name}: the held-out data {name}.npz ({digest[:19]}) were not found; apply needs them to "
                "rebuild the model: give their folder with --sources"
            )
        else:
            found["eval"]["data"] = f"{os.path.relpath(place, self._base)}:{labels}"

    def _place_of(self, name: str, digest: str, external: tuple[str, ...], own: Sequence[Path]) -> Path | None:
        """Return a file or folder of this content. Of that name first."""
        name = Path(name).name
        below = (path for folder in self._folders for path in sorted(folder.rglob(glob.escape(name))))
        others = (path for folder in self._folders for path in sorted(folder.rglob("*.onnx")))
        for path in itertools.chain([self._base / name], below, itertools.islice(others, _MOST_FILES), own):
            if self._digest(path, external) == digest:
                return path
        return None

    def _digest(self, path: Path, external: tuple[str, ...]) -> str:
        """Return the digest of a model, or of calibration data. Empty when it cannot be read."""
        if (path, external) not in self._digests:
            try:
                data = path.is_dir() or path.suffix != ".onnx"
                found = calibration_record(path)["digest"] if data else source_digest(path, external)
            except (OSError, InputError):
                found = None
            self._digests[path, external] = str(found or "")
        return self._digests[path, external]


def _own_files(entry: ModelEntry, digest: str) -> list[Path]:
    """Return the repository's own files as a source: an unconverted file is the source."""
    folders = [(version, local_folder(version.path)) for version in entry.versions]
    return [
        folder / name
        for version, folder in folders
        if folder is not None and version.manifest is not None
        for name, file in version.manifest.files.items()
        if name.endswith(".onnx") and file.sha256 == digest
    ]


def _config(repository: Location, name: str, built: Manifest | None) -> dict[str, Any]:
    """Return the fields of config.pbtxt, so `apply` changes nothing in it.

    Args:
        repository: the repository whose config.pbtxt is read. Nothing in it is changed.
        name: the model whose config.pbtxt is read, also the file's name in errors.
        built: the version `apply` can build again: then every field beyond the model's own is needed. `None`: it can
            build none.
    """
    anew = built is not None
    text = change_config(repository, name, {}, dry_run=True).before
    message = parse_config(text, where=name).message()
    found: dict[str, Any] = {"max_batch_size": int(message.max_batch_size)}
    fields = {field.name: value for field, value in message.ListFields() if field.name not in _FROM_THE_MODEL}
    group = _plain(fields.get("instance_group", ()), "count", "kind")
    if group.get("count", 0) > 0 and group.get("kind", 0) in _KINDS:
        found["instance_group"] = {"count": group["count"], "kind": _KINDS[group.get("kind", 0)]}
        del fields["instance_group"]
    batching = _plain([fields.get("dynamic_batching", message.dynamic_batching)], *_BATCHING)
    if "dynamic_batching" in fields and (batching or not fields["dynamic_batching"].ByteSize()):
        found["dynamic_batching"] = {"max_queue_delay_us": batching.get(_BATCHING[0], 0)}
        if batching.get(_BATCHING[1]):
            found["dynamic_batching"]["preferred_batch_sizes"] = list(batching[_BATCHING[1]])
        del fields["dynamic_batching"]
    others: dict[str, str | None] = {}
    if built is not None:
        derived = parse_config(built.config, where=name).message()
        others = {**dict(_others(message, fields)), **dict(_changed(message, derived))}
    if anew and not message.instance_group:
        others["instance_group"] = None
    if anew and message.max_batch_size > 0 and not message.HasField("dynamic_batching"):
        found["dynamic_batching"] = False
    return {**found, "set": others} if others else found


def _plain(messages: Sequence[Any], *names: str) -> dict[str, Any]:
    """Return the fields of a message without any others. Of anything else nothing."""
    found = {field.name: value for each in messages for field, value in each.ListFields()}
    return found if len(messages) == 1 and not {*found} - {*names} else {}


def _others(message: Any, fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Return fields as `set` takes them: parameters and the extra fields of tensors one by one, all others whole."""
    for name in fields:
        if name == "parameters":
            yield from ((f"{name}.{key}", fields[name][key].string_value) for key in sorted(fields[name]))
        else:
            yield name, _text(message, name)
    for name in ("input", "output"):
        for number, tensor in enumerate(getattr(message, name)):
            for field, _ in tensor.ListFields():
                if field.name not in _OF_A_TENSOR:
                    yield f"{name}[{number}].{field.name}", _text(tensor, field.name)


def _changed(message: Any, derived: Any) -> Iterator[tuple[str, str]]:
    """Return a person's changes of the fields from the model, as `set` takes them."""
    named = message.default_model_filename
    if named not in ("", DEFAULT_FILENAMES.get(message.backend)) and not message.cc_model_filenames:
        yield "default_model_filename", named
    for name in ("input", "output"):
        tensors, before = getattr(message, name), getattr(derived, name)
        if [tensor.name for tensor in tensors] != [tensor.name for tensor in before]:
            yield name, _text(message, name)
            continue
        for number, (tensor, old) in enumerate(zip(tensors, before, strict=True)):
            for field in ("data_type", "dims"):
                if getattr(tensor, field) != getattr(old, field):
                    yield f"{name}[{number}].{field}", _text(tensor, field)


def _text(message: Any, name: str) -> str:
    """Return a field's value in protobuf's text format."""
    value, field = getattr(message, name), message.DESCRIPTOR.fields_by_name[name]
    if field.message_type is None:
        alone = type(message)(**{name: value})
        lines = text_format.MessageToString(alone, as_utf8=True, use_short_repeated_primitives=True)
        return str(lines).partition(":")[2].strip()
    if not is_repeated(field):
        return _braced(value)
    if field.message_type.GetOptions().map_entry:
        value = [field.message_type._concrete_class(key=key, value=value[key]) for key in sorted(value)]
    return f"[{', '.join(map(_braced, value))}]"


def _braced(message: Any) -> str:
    return f"{{ {text_format.MessageToString(message, as_one_line=True, as_utf8=True)} }}"
