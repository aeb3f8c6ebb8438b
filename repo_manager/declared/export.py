"""A repository as the repository.yaml that would change nothing in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.repository import (
    Location,
    LocationLike,
    Manifest,
    ModelEntry,
    ModelState,
    as_location,
    change_config,
    find_model,
    model_states,
    read_labels,
    scan,
    validate_model_name,
)
from repo_manager.triton_config import parse_config

__all__ = ["document_text", "export_document"]

_HEADER = """\
# The declared state of a model repository: `repo-manager apply` brings it about.
# Paths are relative to this file. A version that was made from what `digest` says needs its source no more.
"""
_KINDS = {0: "auto", 1: "gpu", 2: "cpu"}


def export_document(repository: LocationLike) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what the YAML file says, as plain values, and what of the repository it cannot say.

    Raises:
        RepositoryError: the repository cannot be read.
    """
    repository = as_location(repository)
    states = model_states(repository)
    models: dict[str, Any] = {}
    notes: list[str] = []
    for listed in scan(repository, deep=False):
        try:
            validate_model_name(listed.name)
            entry = find_model(repository, listed.name)
            if entry.versions:
                models[entry.name] = _model(repository, entry, states.get(entry.name, ModelState()))
        except (RepositoryError, ConfigError) as exc:
            notes.append(f"{listed.name} is left out: {exc.message}")
    return {"schema_version": 1, "models": models}, tuple(notes)


def document_text(document: Mapping[str, Any]) -> str:
    """Return the YAML text of an exported document."""
    text = yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True, width=110, default_flow_style=False)
    return _HEADER + text


def _model(repository: Location, entry: ModelEntry, state: ModelState) -> dict[str, Any]:
    manifest = entry.versions[-1].manifest
    found: dict[str, Any] = {} if manifest is None else _source(manifest)
    config = _config(repository, entry.name)
    if config:
        found["config"] = config
    labels = {output: list(names) for output, names in read_labels(repository, entry.name).items() if names}
    if labels:
        found["labels"] = labels
    # By its source, not by its number, so that the file also builds the repository anew.
    newest = entry.versions[-1].version if "source" in found else None
    if state.tags:
        found["tags"] = {tag: "newest" if n == newest else n for tag, n in sorted(state.tags.items())}
    if isinstance(entry.policy, tuple) and entry.selected == entry.policy:
        found["serve"] = list(entry.policy)
        if len(entry.policy) == 1:
            found["serve"] = "newest" if entry.policy == (newest,) else entry.policy[0]
    found["versions"] = [version.version for version in entry.versions]
    return found


def _source(manifest: Manifest) -> dict[str, Any]:
    """Return what a version was made from; nothing where the manifest does not say enough to recognise it."""
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


def _config(repository: Location, name: str) -> dict[str, Any]:
    text = change_config(repository, name, {}, dry_run=True).before
    message = parse_config(text, where=name).message()
    found: dict[str, Any] = {"max_batch_size": int(message.max_batch_size)}
    if message.instance_group and message.instance_group[0].kind in _KINDS:
        group = message.instance_group[0]
        found["instance_group"] = {"count": int(group.count) or 1, "kind": _KINDS[group.kind]}
    if message.HasField("dynamic_batching"):
        batching = message.dynamic_batching
        found["dynamic_batching"] = {"max_queue_delay_us": int(batching.max_queue_delay_microseconds)}
        if batching.preferred_batch_size:
            found["dynamic_batching"]["preferred_batch_sizes"] = [int(size) for size in batching.preferred_batch_size]
    return found
