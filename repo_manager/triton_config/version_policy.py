"""The versions a configuration asks Triton to serve."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from repo_manager.errors import ConfigError
from repo_manager.triton_config.config import ModelConfig, parse_config
from repo_manager.triton_config.text_fields import replace_field
from repo_manager.triton_messages import model_config_pb2

__all__ = [
    "policy_of_text",
    "replace_version_policy",
    "served_by",
    "served_versions",
    "version_policy",
    "with_version_policy",
]

_FIELD = "version_policy"


def version_policy(config: ModelConfig) -> tuple[int, ...] | str:
    """Return the policy: the specific versions in ascending order, `"latest:n"` or `"all"`.

    No policy means `"latest:1"` (`NormalizeModelConfig` of triton-inference-server/core).
    """
    return _policy_of(config.message().version_policy)


def served_versions(config: ModelConfig, existing: Iterable[int]) -> tuple[int, ...]:
    """Return the versions Triton would serve, ascending.

    Args:
        config: configuration of the model (config.pbtxt).
        existing: the versions with a folder. A specific version without one is skipped with a log line, as in
            `VersionsToLoad` of triton-inference-server/core.
    """
    return served_by(version_policy(config), existing)


def served_by(policy: tuple[int, ...] | str, existing: Iterable[int]) -> tuple[int, ...]:
    """Apply a policy, as `version_policy` returns it, to the versions with a folder."""
    present = sorted(set(existing))
    if isinstance(policy, tuple):
        return tuple(version for version in policy if version in present)
    if policy == "all":
        return tuple(present)
    count = int(policy.partition(":")[2])
    return tuple(present[-count:]) if count else ()


def with_version_policy(config: ModelConfig, versions: Iterable[int]) -> ModelConfig:
    """Return the configuration with `specific { versions: ... }` as its policy.

    Raises:
        ConfigError: no version, or one below 1.
    """
    message = config.message()
    message.version_policy.CopyFrom(_specific(versions))
    return ModelConfig.from_message(message, labels=config.labels)


def replace_version_policy(text: str, versions: Iterable[int], *, where: str) -> str:
    """Change the policy in a config.pbtxt's text, and nothing else: comments and unknown fields stay.

    Args:
        text: present content of the config.pbtxt, with or without a policy.
        versions: versions to serve, in any order, 1 or above. They become the policy `specific`.
        where: the file's name in an error.

    Raises:
        ConfigError: the text is not a model configuration, or `versions` is empty or has one below 1.
    """
    wanted = _specific(versions)
    before = parse_config(text, where=where)
    block = f"{_FIELD} {{\n  specific {{\n    versions: [{', '.join(map(str, wanted.specific.versions))}]\n  }}\n}}"
    result = replace_field(text, _FIELD, block, where=where)
    expected = before.message()
    expected.version_policy.CopyFrom(wanted)
    if parse_config(result, where=where).message() != expected:
        raise ConfigError(
            f"{where}: the version policy cannot be changed without changing something else",
            hint="Write the version_policy field by hand, then run the command again.",
        )
    return result


@functools.lru_cache(maxsize=4096)
def policy_of_text(value: str) -> tuple[int, ...] | str:
    """Return the policy a `version_policy` field's text (with its braces) states.

    Raises:
        ConfigError: the text is no version policy.
    """
    return version_policy(parse_config(f"{_FIELD} {value}", where=_FIELD))


def _policy_of(policy: model_config_pb2.ModelVersionPolicy) -> tuple[int, ...] | str:
    choice = policy.WhichOneof("policy_choice")
    if choice == "specific":
        return tuple(sorted(set(policy.specific.versions)))
    if choice == "all":
        return "all"
    # Only a missing policy means latest 1. `latest { }` means latest 0 and fails to load.
    return f"latest:{policy.latest.num_versions}" if choice == "latest" else "latest:1"


def _specific(versions: Iterable[int]) -> model_config_pb2.ModelVersionPolicy:
    wanted = sorted(set(versions))
    if not wanted:
        raise ConfigError("a model must serve at least one version", hint="Unload the model to serve none.")
    if wanted[0] < 1:
        raise ConfigError(f"version {wanted[0]} cannot be served: versions start at 1")
    policy = model_config_pb2.ModelVersionPolicy()
    policy.specific.versions.extend(wanted)
    return policy
