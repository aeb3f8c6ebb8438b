"""The effect of a change of config.pbtxt, and its faults."""

from __future__ import annotations

import dataclasses
import difflib

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.repository.view import ModelView, VersionView
from repo_manager.triton_config.compare import ReloadEffect, changed_fields, misfits, reload_effect
from repo_manager.triton_config.config import CONFIG_FILENAME, ModelConfig, parse_config
from repo_manager.triton_config.problems import Problem
from repo_manager.triton_config.rules import check_rules
from repo_manager.triton_config.slips import meant_field
from repo_manager.triton_config.version_policy import served_versions, version_policy

__all__ = ["ConfigChange", "against_manifest", "missing_for_gpus", "plan_change", "served_model_file"]


@dataclasses.dataclass(frozen=True)
class ConfigChange:
    """A change of a config.pbtxt, done or planned.

    Attributes:
        name: model whose config.pbtxt changes.
        before: the file's text as it was.
        after: the file's text as it will be.
        fields: the top-level fields that differ.
        effect: the effect on a running server at its next load, by Triton's reload rules.
        served: the versions the next load serves.
        reloaded: those of them it would load again.
        problems: faults of the new configuration. An error keeps it from being written.
        applied: whether it was written. False for a dry run, and where nothing differs.
    """

    name: str
    before: str
    after: str
    fields: tuple[str, ...]
    effect: ReloadEffect
    served: tuple[int, ...]
    reloaded: tuple[int, ...]
    problems: tuple[Problem, ...]
    applied: bool

    @property
    def diff(self) -> str:
        """The change as a unified diff. Empty when there is none."""
        lines = difflib.unified_diff(
            self.before.splitlines(), self.after.splitlines(), CONFIG_FILENAME, f"{CONFIG_FILENAME} (new)", lineterm=""
        )
        return "\n".join(lines)


def plan_change(view: ModelView, before: str, after: str) -> ConfigChange:
    """Describe the effect of a new config.pbtxt. The versions it would serve are not looked into.

    Args:
        view: the model, with the files beside its versions.
        before: config.pbtxt as it is. May be broken.
        after: the whole config.pbtxt as it would be. It must parse.

    Raises:
        ConfigError: `after` is no model configuration, or it would serve a version still being published.
    """
    new = parse_config(after, where=view.config_place)
    try:
        old: ModelConfig | None = parse_config(before, where=view.config_place)
    except ConfigError:
        old = None  # the new configuration replaces an invalid one
    _refuse_open_policy(view, new)
    served = served_versions(new, view.versions)
    known = set(old.unknown_fields) if old is not None else set()
    problems = [
        Problem(
            CONFIG_FILENAME, f"field {field!r} is not in Triton's schema" + _meant(field), rule="config-unknown-field"
        )
        for field in new.unknown_fields
        if field not in known
    ]
    problems += _check(view, new, served)
    effect = ReloadEffect.RELOAD if old is None else reload_effect(old, new)
    fields = changed_fields(old, new) if old is not None else ()
    reloaded = served if effect == ReloadEffect.RELOAD else ()
    return ConfigChange(view.name, before, after, fields, effect, served, reloaded, tuple(problems), applied=False)


def _meant(field: str) -> str:
    meant = meant_field(field)
    return f"; did you mean {meant!r}?" if meant else ""


def _refuse_open_policy(view: ModelView, config: ModelConfig) -> None:
    """With `latest` or `all` Triton would take a version whose upload is under way, or broke off."""
    if view.work and isinstance(version_policy(config), str):
        said = "; ".join(work.sentence for work in view.work)
        raise ConfigError(
            f"the version policy would let Triton load an incomplete version: {said}",
            hint="Let it end, or sweep its rest with `repo-manager gc`; or name the versions to serve.",
        )


def _check(view: ModelView, config: ModelConfig, served: tuple[int, ...]) -> list[Problem]:
    problems = check_rules(config, where=CONFIG_FILENAME)
    if config.name not in ("", view.name):
        problems.append(
            Problem(CONFIG_FILENAME, f"name is {config.name!r}; the folder's is {view.name!r}", rule="config-name")
        )
    if view.versions and not served:
        problems.append(
            Problem(CONFIG_FILENAME, f"the version policy serves none of {view.versions}", rule="version-policy")
        )
    for label_file in config.label_filenames:
        if label_file not in view.beside:
            problems.append(
                Problem(CONFIG_FILENAME, f"label file {label_file!r} does not exist", rule="labels-missing")
            )
    return problems


def served_model_file(config: ModelConfig) -> str:
    """Return the file a version is served from. Empty where config.pbtxt does not name it."""
    return "" if config.message().cc_model_filenames else config.model_filename


def missing_for_gpus(version: VersionView, config: ModelConfig) -> dict[str, str]:
    """Return the files of `cc_model_filenames` a version lacks: file -> its fault.

    Triton opens one only on a GPU of its compute capability. On any other device it does without.
    """
    empty = {entry.name for entry in version.files if entry.size_bytes == 0}
    capabilities: dict[str, list[str]] = {}
    for capability, file in sorted(config.message().cc_model_filenames.items()):
        if file in empty or not version.holds(file):
            capabilities.setdefault(file, []).append(capability)
    return {
        file: f"is {'empty' if file in empty else 'missing'}, and GPUs of compute capability {', '.join(of)} serve it"
        for file, of in capabilities.items()
    }


def against_manifest(version: VersionView, config: ModelConfig) -> list[Problem]:
    """Compare a configuration with the one derived from the version's model when it was published."""
    try:
        text = version.manifest().config
    except RepositoryError:
        return []  # nothing is recorded about this version, and `verify` reports it
    if not text:
        return []
    published = parse_config(text, where=f"{version.number}/{MANIFEST_FILENAME}")
    return [Problem(str(version.number), misfit, rule="config-signature") for misfit in misfits(config, published)]
