"""The class labels of a model's outputs: reading them, and changing them for all versions at once."""

from __future__ import annotations

import dataclasses

from repo_manager.errors import ConcurrentChangeError, ConfigError, RepositoryError
from repo_manager.repository.file_system import disk_errors
from repo_manager.repository.layout import check_file_name
from repo_manager.repository.location import LocationLike
from repo_manager.repository.look import changeable_model, with_beside
from repo_manager.repository.stores import open_store
from repo_manager.repository.stores.base import ChangedMeanwhileError
from repo_manager.repository.view import ModelView
from repo_manager.triton_config.config import CONFIG_FILENAME
from repo_manager.triton_config.fields import set_fields
from repo_manager.triton_config.labels import check_labels, label_filename, labels_text
from repo_manager.triton_config.version_policy import served_versions
from repo_manager.types import TensorSpec

__all__ = ["LabelChange", "read_labels", "set_labels"]


@dataclasses.dataclass(frozen=True)
class LabelChange:
    """A change of an output's labels, done or planned.

    Attributes:
        name: model of the labelled output.
        output: name of the labelled output.
        file: the label file, beside the versions.
        before: the labels as they were. Empty when there were none.
        after: the labels as they will be.
        reloaded: the served versions a running server reloads at its next load: all, as the file is beside them. None
            when nothing changes.
        applied: whether it was written. False for a dry run, and where nothing changes.
    """

    name: str
    output: str
    file: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    reloaded: tuple[int, ...]
    applied: bool


def read_labels(repository: LocationLike, name: str) -> dict[str, tuple[str, ...]]:
    """Return output name -> labels of a model.

    Raises:
        RepositoryError: no such model, or a label file cannot be read.
        ConfigError: config.pbtxt is broken.
    """
    with disk_errors(f"read the labels of {name}"):
        store = open_store(repository)
        view = with_beside(store, changeable_model(store, name))
        labels: dict[str, tuple[str, ...]] = {}
        for output in view.parsed_config().message().output:
            if output.label_filename:
                found = _labels(view, output.label_filename)
                if found is None:
                    raise RepositoryError(
                        f"{view.place / output.label_filename} does not exist, and {CONFIG_FILENAME} names it",
                        hint=f"Write the labels: repo-manager labels {name} --file FILE --output {output.name}",
                    )
                labels[output.name] = found
        return labels


def set_labels(
    repository: LocationLike, name: str, output: str, labels: tuple[str, ...], *, dry_run: bool = False
) -> LabelChange:
    """Change an output's labels for all versions.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: model with the output. It must have a config.pbtxt.
        output: an output in config.pbtxt, by name. Without a label file it gets one.
        labels: one a class, in order.
        dry_run: only check and list the changes.

    Raises:
        ConfigError: no such output, or the labels do not fit it.
        RepositoryError: no such model, another process changed it at this moment, or the store refuses.
    """
    with disk_errors(f"change the labels of {name}"):
        store = open_store(repository)
        if dry_run:
            return _plan(with_beside(store, changeable_model(store, name)), output, labels)[0]
        with store.exclusive(name):
            view = with_beside(store, changeable_model(store, name))
            change, contents = _plan(view, output, labels)
            try:
                if contents:
                    store.replace_if(view, contents)
            except ChangedMeanwhileError as exc:
                raise ConcurrentChangeError(
                    f"{name} was changed at the same time", hint="Run the command again."
                ) from exc
        return dataclasses.replace(change, applied=bool(contents))


def _plan(view: ModelView, output: str, labels: tuple[str, ...]) -> tuple[LabelChange, dict[str, bytes | None]]:
    """Return the change, and the files to write: config.pbtxt too when it does not name the label file yet."""
    config = view.parsed_config()
    outputs = list(config.message().output)
    specs = tuple(TensorSpec(o.name, "", tuple(d if d > 0 else None for d in o.dims)) for o in outputs)
    check_labels({output: labels}, specs, batched=False)
    position = [spec.name for spec in specs].index(output)
    file = str(outputs[position].label_filename)
    new_text = None
    if not file:
        file = label_filename(output, position)
        new_text = set_fields(view.config_text(), {f"output[{position}].label_filename": file}, where=view.config_place)
    before = _labels(view, file)
    contents: dict[str, bytes | None] = {}
    # Write the labels first: an unused file is harmless, a missing one is not.
    if before != labels:
        contents[check_file_name(file)] = labels_text(labels).encode()
    if new_text is not None:
        contents[CONFIG_FILENAME] = new_text.encode()
    reloaded = served_versions(config, view.versions) if contents else ()
    return LabelChange(view.name, output, file, before or (), tuple(labels), reloaded, applied=False), contents


def _labels(view: ModelView, file: str) -> tuple[str, ...] | None:
    data = view.beside.get(check_file_name(file))
    try:
        return None if data is None else tuple(data.decode().splitlines())
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{view.place / file} is not UTF-8 text: {exc}") from exc
