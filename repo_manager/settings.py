"""The user's file and environment, validated. Only the command line and the pipeline read it.

Order, later wins: the defaults below, the file (`$REPO_MANAGER_SETTINGS`, else
`$XDG_CONFIG_HOME/repo-manager/settings.yaml`), then `REPO_MANAGER_<FIELD>` in the environment. An option on the
command line wins over all.

A context is a named set of settings in the file, for one of several repositories with its servers:

    context: staging                     # taken where no other is named
    contexts:
      staging: {repository: /srv/staging, server: "grpc://staging:8001"}
      prod: {repository: "s3://models/prod", server: "@servers.txt", signed_by: [release.pub], protected: true}

`--context NAME`, else `REPO_MANAGER_CONTEXT`, else `context:` chooses one; `none` takes none. A named context wins
over the environment. The one of the file gives way as a whole where the environment sets repository or server.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repo_manager.errors import UsageError
from repo_manager.files import document, reason_of

__all__ = ["Context", "Settings", "load_contexts", "load_settings", "settings_path", "use_context"]

_PREFIX = "REPO_MANAGER_"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a user for all commands."""

    repository: str = "model_repository"
    """The model repository of all commands: a folder, or a URL as Triton takes it."""
    server: str | None = None
    """Where `deploy`, `rollback` and `loadtest` go (`grpc://host:port`). None: the embedded server."""
    backend: str | None = None
    """The backend for `add` without `--backend`. None: `auto`."""
    tls_ca: Path | None = None
    """PEM file with the authorities to check servers' certificates against. None: the system's."""
    tls_cert: Path | None = None
    """PEM file with this client's certificate, for mutual TLS."""
    tls_key: Path | None = None
    """PEM file with its key."""
    tls_server_name: str | None = None
    """The name in the servers' certificate, when it is not the URL's host."""
    header_file: Path | None = None
    """Headers to send to servers, one `Name: value` a line."""
    token_file: Path | None = None
    """A file with the bearer token to send to servers."""
    token: str | None = dataclasses.field(default=None, repr=False, metadata={"json": False})
    """The bearer token itself (`REPO_MANAGER_TOKEN`)."""
    grafana: str | None = None
    """Grafana's URL (`https://host`): roll-outs become annotations there. None: they do not."""
    grafana_token: str | None = dataclasses.field(default=None, repr=False, metadata={"json": False})
    """A token of Grafana with the right to write annotations (`REPO_MANAGER_GRAFANA_TOKEN`)."""
    code_modules: tuple[str, ...] = ()
    """Modules whose functions `apply` may call as calibration data without `--allow-code`, and those below them. From
    the environment, never the current folder.
    """
    signed_by: tuple[Path, ...] = ()
    """The policy: when not empty, `deploy` refuses versions vouched for by none of these public keys (or root
    certificates), and `verify` checks it. In the environment separated by `:`. In the file a list, relative to it.
    """
    context: str | None = None
    """The context these settings are of. None: no context."""


@dataclasses.dataclass(frozen=True)
class Context:
    """A context of the settings file.

    Attributes:
        name: name of the context, for `--context`.
        repository: its repository. `None`: the one outside the contexts.
        server: its servers. `None`: none is set.
        protected: changes need it to be named in the command.
    """

    name: str
    repository: str | None
    server: str | None
    protected: bool


_NO_CONTEXT = "none"
_CHOSEN: list[str | None] = [None]


def use_context(name: str | None) -> None:
    """Take a context in this process, whatever the environment says. `None` leaves it to environment and file.

    Args:
        name: name of the context. `None`: leave the choice to environment and file.
    """
    _CHOSEN[0] = name


_LISTS = ("code_modules", "signed_by")
_FIELDS = tuple(field.name for field in dataclasses.fields(Settings))


def settings_path(environment: Mapping[str, str]) -> Path:
    """Return where the user's settings file is, whether it exists or not."""
    if explicit := environment.get(_PREFIX + "SETTINGS"):
        return Path(explicit)
    base = environment.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "repo-manager" / "settings.yaml"


def load_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """Read the settings file and the environment.

    Args:
        environment: `None` takes the process's own.

    Raises:
        UsageError: the file is no YAML mapping, or a value does not fit. Every problem is listed.
    """
    environment = os.environ if environment is None else environment
    path = settings_path(environment)
    values = _read_file(path, required=_PREFIX + "SETTINGS" in environment)
    contexts, of_file = _contexts(values, path), values.pop("context", None)
    named = _CHOSEN[0] or environment.get(_PREFIX + "CONTEXT")
    moved = any(_PREFIX + field in environment for field in ("REPOSITORY", "SERVER"))
    name = named or (None if moved else of_file)
    own = _context_of(name, contexts, path)
    values |= own
    if "signed_by" in values:
        values["signed_by"] = _beside(path, values["signed_by"])
    sources = dict.fromkeys(values, str(path))
    for field in _FIELDS:
        variable = _PREFIX + field.upper()
        if variable in environment and field != "context" and not (named and field in own):
            values[field] = _list_of(environment[variable]) if field in _LISTS else environment[variable]
            sources[field] = f"the environment ({variable})"
    return _validated(values, sources, path) if values else Settings()


def load_contexts(environment: Mapping[str, str] | None = None) -> Mapping[str, Context]:
    """Return the contexts of the settings file, by name.

    Args:
        environment: environment variables. `None`: those of this process.

    Raises:
        UsageError: the file cannot be read, or a context is no mapping.
    """
    environment = os.environ if environment is None else environment
    path = settings_path(environment)
    values = _read_file(path, required=_PREFIX + "SETTINGS" in environment)
    found = {}
    for name, own in _contexts(values, path).items():
        repository, server = (None if own.get(key) is None else str(own[key]) for key in ("repository", "server"))
        found[name] = Context(name, repository, server, own.get("protected") is True)
    return found


def _contexts(values: dict[str, object], path: Path) -> dict[str, dict[str, object]]:
    """Take the contexts out of a file's values.

    Raises:
        UsageError: they are no mappings, or one has an unknown setting.
    """
    contexts = values.pop("contexts", None) or {}
    if not isinstance(contexts, dict) or not all(isinstance(own, dict) for own in contexts.values()):
        raise UsageError(f"{path}: contexts: expected a mapping of names to settings")
    known = {*_FIELDS, "protected"} - {"context"}
    for name, own in contexts.items():
        unknown = [str(key) for key in own if key not in known]
        if unknown:
            raise UsageError(
                f"{path}: context {name}: there is no setting {', '.join(unknown)}",
                hint=f"Known settings: {', '.join(sorted(known))}.",
            )
        if not isinstance(own.get("protected", False), bool):
            raise UsageError(f"{path}: context {name}: protected is {own['protected']!r}, expected true or false")
    return {str(name): {str(key): value for key, value in own.items()} for name, own in contexts.items()}


def _context_of(name: object, contexts: Mapping[str, dict[str, object]], path: Path) -> dict[str, object]:
    """Return the settings of a context, and its name.

    Raises:
        UsageError: no context has the name.
    """
    if name is None or name == _NO_CONTEXT:
        return {}
    if not isinstance(name, str) or name not in contexts:
        known = ", ".join(contexts) or "none"
        close = difflib.get_close_matches(str(name), list(contexts), n=1)
        raise UsageError(
            f"There is no context {name!r} in {path}; there is {known}",
            hint=f"Did you mean {close[0]!r}?" if close else f"{document('contexts.md')} shows how to write one.",
        )
    return {**{key: value for key, value in contexts[name].items() if key != "protected"}, "context": name}


def _validated(values: Mapping[str, object], sources: Mapping[str, str], path: Path) -> Settings:
    if (plain := _of_texts(values)) is not None:
        return plain
    # Imported only if validation is needed: it takes a third of a short command's time.
    pydantic = importlib.import_module("pydantic")
    checked = pydantic.with_config(pydantic.ConfigDict(extra="forbid", hide_input_in_errors=True))(Settings)
    try:
        settings: Settings = pydantic.TypeAdapter(checked).validate_python(dict(values))
    except pydantic.ValidationError as exc:
        problems = "; ".join(
            f"{problem['loc'][0]} from {sources.get(str(problem['loc'][0]), str(path))}: {problem['msg']}"
            for problem in exc.errors()
        )
        known = ", ".join(_FIELDS)
        raise UsageError(f"Settings are wrong: {problems}", hint=f"Known settings: {known}.") from exc
    return settings


def _of_texts(values: Mapping[str, object]) -> Settings | None:
    """Return the settings when all values are texts, as the environment's are, or `None` when there is more to
    check.
    """
    types = {field.name: str(field.type) for field in dataclasses.fields(Settings)}
    taken: dict[str, Any] = {}
    for name, value in values.items():
        kind = types.get(name, "")
        if isinstance(value, list) and kind.startswith("tuple[") and all(isinstance(one, str) for one in value):
            taken[name] = tuple(map(Path, value)) if "Path" in kind else tuple(value)
        elif isinstance(value, str) and kind.startswith(("str", "Path")):
            taken[name] = Path(value) if kind.startswith("Path") else value
        else:
            return None
    return Settings(**taken)


def _list_of(text: str) -> list[str]:
    """Take one text for a list: the environment has nothing else."""
    return [part for part in text.split(os.pathsep) if part]


def _beside(path: Path, value: object) -> object:
    """Return the policy's keys with paths relative to the settings file, wherever a command runs."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return value  # the validation reports the error
    return [str(path.parent / Path(name).expanduser()) for name in names]


def _read_file(path: Path, *, required: bool) -> dict[str, object]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if required:
            raise UsageError(f"{path}: no such settings file (named by {_PREFIX}SETTINGS)") from None
        return {}
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path}: the settings file cannot be read: {reason_of(exc)}") from exc
    yaml = importlib.import_module("yaml")
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as exc:
        raise UsageError(f"{path}: not valid YAML: {exc}") from exc
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected a mapping of settings, found {type(values).__name__}")
    return {str(key): value for key, value in values.items()}
