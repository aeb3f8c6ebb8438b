"""The class labels of a model's outputs: reading them, and changing them for all versions at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from repo_manager.errors import ConfigError
from repo_manager.files import read_regular, write_atomic
from repo_manager.repository.disk import disk_errors
from repo_manager.repository.layout import check_file_name, open_repository
from repo_manager.repository.policy import existing_model
from repo_manager.repository.scan import existing_versions
from repo_manager.repository.state import repository_lock
from repo_manager.repository.stores.staging import staged
from repo_manager.triton_config import CONFIG_FILENAME, parse_config, served_versions, set_fields
from repo_manager.triton_config.config import read_config_text
from repo_manager.triton_config.labels import check_labels, label_filename, labels_text
from repo_manager.types import TensorSpec

__all__ = ["LabelChange", "read_labels", "set_labels"]


@dataclasses.dataclass(frozen=True)
class LabelChange:
    """A change of an output's labels, done or planned.

    Attributes:
        name: the model.
        output: its output.
        file: the label file, beside the versions.
        before: the labels as they were; empty when there were none.
        after: the labels as they are to be.
        reloaded: the served versions that a running server loads anew at its next load: all, as the file lies beside
            them; none when nothing changes.
        applied: whether it was written.
    """

    name: str
    output: str
    file: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    reloaded: tuple[int, ...]
    applied: bool


def read_labels(repository: Path, name: str) -> dict[str, tuple[str, ...]]:
    """Return output name -> labels of a model.

    Raises:
        RepositoryError: no such model, or a label file cannot be read.
        ConfigError: config.pbtxt is broken.
    """
    with disk_errors(f"read the labels of {name}"):
        folder = existing_model(open_repository(repository), name)
        config = parse_config(read_config_text(folder / CONFIG_FILENAME), where=str(folder / CONFIG_FILENAME))
        return {
            output.name: _read(folder / check_file_name(output.label_filename))
            for output in config.message().output
            if output.label_filename
        }


def set_labels(
    repository: Path, name: str, output: str, labels: tuple[str, ...], *, dry_run: bool = False
) -> LabelChange:
    """Change an output's labels for all versions.

    Args:
        repository: the root.
        name: the model.
        output: one of its outputs.
        labels: one a class, in order.
        dry_run: only check and say what would change.

    Raises:
        ConfigError: no such output, or the labels do not fit it.
        RepositoryError: no such model, or the disk refuses.
    """
    with disk_errors(f"change the labels of {name}"):
        root = open_repository(repository)
        folder = existing_model(root, name)
        if dry_run:
            return _plan(folder, output, labels)[0]
        with staged(root) as staging, repository_lock(root):
            change, text = _plan(folder, output, labels)
            if change.before != change.after:
                # The labels first: a file that nothing names yet is harmless, a named one that is missing is not.
                write_atomic(folder / change.file, labels_text(labels).encode(), staging=staging)
            if text is not None:
                write_atomic(folder / CONFIG_FILENAME, text.encode(), staging=staging)
    return dataclasses.replace(change, applied=change.reloaded != () or change.before != change.after)


def _plan(folder: Path, output: str, labels: tuple[str, ...]) -> tuple[LabelChange, str | None]:
    """Return the change, and config.pbtxt's new text when it does not name the file yet."""
    path = folder / CONFIG_FILENAME
    text = read_config_text(path)
    config = parse_config(text, where=str(path))
    outputs = list(config.message().output)
    specs = tuple(TensorSpec(o.name, "", tuple(d if d > 0 else None for d in o.dims)) for o in outputs)
    check_labels({output: labels}, specs, batched=False)
    position = [spec.name for spec in specs].index(output)
    file = str(outputs[position].label_filename)
    new_text = None
    if not file:
        file = label_filename(output, position)
        new_text = set_fields(text, {f"output[{position}].label_filename": file}, where=str(path))
    try:
        before = _read(folder / check_file_name(file))
    except FileNotFoundError:
        before = ()
    served = served_versions(config, existing_versions(folder))
    reloaded = served if before != labels or new_text is not None else ()
    return LabelChange(folder.name, output, file, before, tuple(labels), reloaded, applied=False), new_text


def _read(path: Path) -> tuple[str, ...]:
    try:
        return tuple(read_regular(path).decode().splitlines())
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path} is not UTF-8 text: {exc}") from exc
