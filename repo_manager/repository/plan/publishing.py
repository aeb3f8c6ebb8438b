"""Conditions for publishing a version: on its files, and on the model it joins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.repository.file_system import check_source
from repo_manager.repository.layout import check_file_name, validate_model_name
from repo_manager.repository.look import check_no_link
from repo_manager.repository.view import ModelView
from repo_manager.triton_config.compare import same_signature
from repo_manager.triton_config.config import CONFIG_FILENAME, VARIANTS_FOLDER, ModelConfig, format_config
from repo_manager.triton_config.labels import labels_text
from repo_manager.triton_config.version_policy import (
    replace_version_policy,
    served_by,
    version_policy,
    with_version_policy,
)

__all__ = [
    "check_model",
    "check_names",
    "check_sources",
    "files_beside",
    "first_config_text",
    "served_after_publishing",
]


def check_names(name: str, files: Iterable[str], config: ModelConfig) -> None:
    """Make the checks possible without the repository.

    Args:
        name: name to publish under. The configuration's own must be the same, or empty.
        files: names of the version's files.
        config: configuration of the model (config.pbtxt).

    Raises:
        RepositoryError: a name or the configuration does not fit.
    """
    validate_model_name(name)
    files = list(files)
    for file in files:
        check_file_name(file)
    if config.name not in ("", name):
        raise RepositoryError(f"the configuration is of model {config.name!r}, and {name!r} is to be published")
    if config.model_filename and config.model_filename not in files:
        raise RepositoryError(
            f"the configuration serves {config.model_filename!r}, which is not among the files: "
            f"{', '.join(map(repr, files)) or 'none'}"
        )


def check_sources(files: Mapping[str, Path]) -> None:
    """Check the files to publish.

    Raises:
        RepositoryError: one is missing or no regular file.
    """
    for name, source in files.items():
        check_file_name(name)
        check_source(Path(source))


def check_model(view: ModelView, config: ModelConfig, *, appears_at_once: bool) -> bool:
    """Check that a version of this configuration fits the existing model.

    Args:
        view: the model, with the files beside its versions.
        config: configuration of the model (config.pbtxt).
        appears_at_once: whether Triton sees all of a version or nothing. Elsewhere a policy that would take a version
            still being uploaded is refused.

    Returns:
        Whether there is no model yet.

    Raises:
        RepositoryError: the version does not fit the model, or the model may not get another one.
        ConfigError: the existing config.pbtxt is broken.
    """
    check_no_link(str(view.place), view.link)
    if view.in_the_way:
        raise RepositoryError(view.in_the_way, hint="Remove the file.")
    if not view.exists or not (view.folders or view.level.files):
        return True
    if not view.has_config:
        raise RepositoryError(
            f"{view.place} has no {CONFIG_FILENAME}, so Triton derives one that a new version could change",
            hint=f"Write {view.config_place} (a running server shows the derived one), or use another name.",
        )
    existing = view.parsed_config()
    if existing.name not in ("", view.name):
        raise RepositoryError(f"{view.config_place} names the model {existing.name!r}, not {view.name!r}")
    others = (*same_signature(existing, config), *_variant_differences(view, config))
    labels = tuple(_label_differences(view, existing, config))
    if others or labels:
        way = "Publish under another model name."
        if not others:
            way = f"Set the labels first: repo-manager labels {view.name} --output OUTPUT --file FILE."
        raise RepositoryError(
            f"model {view.name!r} in {view.place.parent} serves something else under its one {CONFIG_FILENAME}:\n  "
            + "\n  ".join((*others, *labels)),
            hint=f"{way} For a copy, --with-config brings labels and configuration along.",
        )
    policy = version_policy(existing)
    if isinstance(policy, str) and not appears_at_once:
        raise RepositoryError(
            f"model {view.name!r} in {view.place.parent} has the version policy {policy!r}: Triton "
            "could load the new version while it is uploaded, as no object store has a rename",
            hint=f"Name the versions to serve: repo-manager deploy {view.name}:VERSION, or repo-manager config "
            f"{view.name} --set 'version_policy={{specific {{versions: [VERSION]}}}}'.",
        )
    return False


def _label_differences(view: ModelView, existing: ModelConfig, config: ModelConfig) -> list[str]:
    """Labels are beside the versions: a change would make Triton reload every version, so it is refused."""
    old_names = {o.name: o.label_filename for o in existing.message().output}
    found = []
    for output in config.message().output:
        labels = config.labels.get(output.label_filename)
        if labels is None:
            continue
        file = old_names.get(output.name, "")
        data = view.beside.get(file) if file else None
        if data is None:
            found.append(f"output {output.name!r} has no labels")
        elif tuple(line.rstrip() for line in data.decode(errors="replace").splitlines()) != labels:
            found.append(f"output {output.name!r} has other labels in {file}")
    return found


def _variant_differences(view: ModelView, config: ModelConfig) -> list[str]:
    """Configurations for --model-config-name are beside the versions, too: they come with the first version only."""
    found = []
    for name, text in config.variants.items():
        file = f"{VARIANTS_FOLDER}/{name}.pbtxt"
        existing = view.beside.get(file)
        if existing != text.encode():
            state = "there is none" if existing is None else "it says something else"
            found.append(f"configuration {file}: {state}")
    return found


def files_beside(config: ModelConfig) -> dict[str, bytes]:
    """Return the files beside the versions, written with the first one only: labels, and variants of config.pbtxt."""
    labels = {check_file_name(file): labels_text(text).encode() for file, text in config.labels.items()}
    variants = {
        check_file_name(f"{VARIANTS_FOLDER}/{name}.pbtxt"): text.encode() for name, text in config.variants.items()
    }
    return {**labels, **variants}


def first_config_text(version: int, config: ModelConfig, config_text: str | None) -> str:
    """Return the config.pbtxt of a model whose first version is the only one to be served.

    Args:
        version: number of the first version, the only one in the new policy.
        config: configuration of the model (config.pbtxt).
        config_text: text to keep instead of the canonical one, except for the policy. `None`: the canonical text.
    """
    if config_text is not None:
        return replace_version_policy(config_text, (version,), where=CONFIG_FILENAME)
    return format_config(with_version_policy(config, (version,)))


def served_after_publishing(view: ModelView, version: int) -> bool:
    """Return whether a load would serve a version of the model once it is published.

    Raises:
        ConfigError: config.pbtxt is broken.
    """
    return version in served_by(view.policy(), sorted({*view.used_numbers, version}))
