"""What has to hold before a version is published: of its files, and of the model that it joins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.repository.disk import check_source
from repo_manager.repository.layout import check_file_name
from repo_manager.triton_config import CONFIG_FILENAME, VARIANTS_FOLDER, ModelConfig, read_config, same_signature

__all__ = ["check_arguments", "check_early", "check_model"]


def check_arguments(name: str, files: Mapping[str, Path], config: ModelConfig) -> None:
    """Check what can be checked without the repository.

    Raises:
        RepositoryError: a file's name or the configuration does not fit.
    """
    for file, source in files.items():
        check_file_name(file)
        check_source(Path(source))
    if config.name not in ("", name):
        raise RepositoryError(f"the configuration is of model {config.name!r}, and {name!r} is to be published")
    if config.model_filename and config.model_filename not in files:
        raise RepositoryError(
            f"the configuration serves {config.model_filename!r}, which is not among the files: "
            f"{', '.join(map(repr, files)) or 'none'}"
        )


def check_early(folder: Path, name: str, config: ModelConfig) -> None:
    """Refuse before gigabytes are copied. It is not under the lock: a model that goes meanwhile is no fault."""
    try:
        check_model(folder, name, config)
    except (FileNotFoundError, ConfigError):
        if folder.exists():
            raise


def check_model(folder: Path, name: str, config: ModelConfig) -> bool:
    """Return whether the model has no folder yet; check the configuration against the existing one otherwise."""
    if not folder.exists() or not any(folder.iterdir()):
        return True
    if not (folder / CONFIG_FILENAME).exists():
        raise RepositoryError(
            f"{folder} has no {CONFIG_FILENAME}, so Triton derives one that a new version could change",
            hint=f"Write {folder / CONFIG_FILENAME} (a running server shows the derived one), or use another name.",
        )
    existing = read_config(folder)
    if existing.name not in ("", name):
        raise RepositoryError(f"{folder / CONFIG_FILENAME} names the model {existing.name!r}, not {name!r}")
    differences = (
        *same_signature(existing, config),
        *_label_differences(folder, existing, config),
        *_variant_differences(folder, config),
    )
    if differences:
        raise RepositoryError(
            f"model {name!r} in {folder.parent} serves something else under its one {CONFIG_FILENAME}:\n  "
            + "\n  ".join(differences),
            hint="Publish under another model name, or derive the configuration to fit the existing one.",
        )
    return False


def _label_differences(folder: Path, existing: ModelConfig, config: ModelConfig) -> list[str]:
    """Labels lie beside the versions: a change would make Triton reload every version, so it is refused."""
    old_names = {o.name: o.label_filename for o in existing.message().output}
    found = []
    for output in config.message().output:
        labels = config.labels.get(output.label_filename)
        if labels is None:
            continue
        file = old_names.get(output.name, "")
        text = (folder / file).read_text(encoding="utf-8") if file and (folder / file).is_file() else None
        if text is None or tuple(line.rstrip() for line in text.splitlines()) != labels:
            state = "has no labels" if text is None else f"has other labels in {file}"
            found.append(f"output {output.name!r} {state}")
    return found


def _variant_differences(folder: Path, config: ModelConfig) -> list[str]:
    """Configurations for --model-config-name lie beside the versions, too: they come with the first version only."""
    found = []
    for name, text in config.variants.items():
        path = folder / VARIANTS_FOLDER / f"{name}.pbtxt"
        existing = path.read_text(encoding="utf-8") if path.is_file() else None
        if existing != text:
            state = "there is none" if existing is None else "it says something else"
            found.append(f"configuration {VARIANTS_FOLDER}/{name}.pbtxt: {state}")
    return found
