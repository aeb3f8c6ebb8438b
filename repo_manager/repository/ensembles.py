"""The ensembles of a repository: who needs a model, and the faults between an ensemble and its models."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Mapping

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.repository.look import each
from repo_manager.repository.stores.base import Store, model_names
from repo_manager.repository.view import ModelView
from repo_manager.triton_config.config import CONFIG_FILENAME, ModelConfig, parse_config
from repo_manager.triton_config.ensembles import (
    Member,
    check_ensembles,
    dependents_of,
    is_ensemble,
    models_needed_by,
    models_of,
    pinned_versions,
    uses_of,
)
from repo_manager.triton_config.problems import Problem, Severity
from repo_manager.triton_config.version_policy import served_versions

__all__ = ["ensembles_in", "ensembles_problems", "models_needed", "problems_around", "with_dependents"]

_MARK = re.compile(rb"ensemble_scheduling|\buses\b")


def ensembles_in(store: Store) -> dict[str, ModelConfig]:
    """Read every ensemble of a repository, and every model whose code asks others, by name.

    An unreadable config.pbtxt is left out.

    Of other models only the text of config.pbtxt is read: 10,000 of them on a disk take half a second.
    """

    def read(name: str) -> tuple[str, bytes | None]:
        try:
            return name, store.read(f"{name}/{CONFIG_FILENAME}")
        except RepositoryError:
            return name, None  # `verify` reports the error

    found: dict[str, ModelConfig] = {}
    for name, content in each(store, read, model_names(store)):
        if content is not None and _MARK.search(content):
            try:
                config = parse_config(content.decode())
            except (ConfigError, UnicodeDecodeError):
                continue
            if is_ensemble(config) or uses_of(config):
                found[name] = config
    return found


def with_dependents(store: Store, view: ModelView, ensembles: Mapping[str, ModelConfig] | None = None) -> ModelView:
    """Return the view with the model's ensembles, and their pinned versions of it.

    Args:
        store: the repository's open store. Read only where `ensembles` is `None`.
        view: the model as it was read, with the files beside its versions.
        ensembles: result of `ensembles_in`. `None` reads it now.
    """
    ensembles = ensembles_in(store) if ensembles is None else ensembles
    direct = [name for name, config in ensembles.items() if view.name in models_of(config)]
    needed_by = tuple(sorted(name for name in direct if name != view.name))
    return dataclasses.replace(view, needed_by=needed_by, pinned=pinned_versions(ensembles, view.name))


def models_needed(store: Store, name: str, ensembles: Mapping[str, ModelConfig] | None = None) -> tuple[str, ...]:
    """Return the models of the repository a model needs, directly or through others, in the order of loading.

    Args:
        store: the repository's open store. Needed models missing in it are left out.
        name: an ensemble, or a model whose code asks others. Any other needs none.
        ensembles: result of `ensembles_in`. `None` reads it now.
    """
    ensembles = ensembles_in(store) if ensembles is None else ensembles
    return tuple(each for each in models_needed_by(ensembles, name) if store.look(each).exists)


def problems_around(store: Store, view: ModelView, config: ModelConfig) -> list[Problem]:
    """Check the ensembles a model is, or is part of, with another configuration of this model.

    Args:
        store: the repository's open store. All its ensembles are read, and the models they use.
        view: the model as it was read, with the files beside its versions.
        config: its configuration as it will be.

    Returns:
        The faults Triton would refuse then and does not refuse now. Where another model is hurt it is a warning: of
        two models to be changed together, one comes first.
    """
    ensembles = ensembles_in(store)
    before, after = ensembles, {**ensembles, view.name: config}
    with contextlib.suppress(ConfigError):
        before = {**ensembles, view.name: view.parsed_config()}
    around = (*dependents_of(after, view.name), view.name)
    known = {(problem.where, problem.rule) for problem in _checked(store, around, before)}
    own = f"{view.name}/{CONFIG_FILENAME}"
    return [
        problem if problem.where == own else dataclasses.replace(problem, severity=Severity.WARNING)
        for problem in _checked(store, around, after)
        if (problem.where, problem.rule) not in known
    ]


def ensembles_problems(
    store: Store, names: Iterable[str] | None = None, *, serving: Mapping[str, tuple[int, ...]] | None = None
) -> list[Problem]:
    """Check the ensembles of a repository against their models.

    Args:
        store: the repository's open store, for config.pbtxt of ensembles and their models.
        names: these models, and the ensembles they are part of. `None`: all.
        serving: model -> the versions it will serve, if not those of its config.pbtxt. `None`: config.pbtxt holds for
            all.
    """
    ensembles = ensembles_in(store)
    if names is None:
        wanted = tuple(ensembles)
    else:
        wanted = tuple(dict.fromkeys(each for name in names for each in (name, *dependents_of(ensembles, name))))
    return _checked(store, wanted, ensembles, serving or {})


def _checked(
    store: Store,
    names: Iterable[str],
    configs: Mapping[str, ModelConfig],
    serving: Mapping[str, tuple[int, ...]] | None = None,
) -> list[Problem]:
    names = [name for name in names if name in configs]
    members: dict[str, Member] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in members and (member := _member(store, name, configs.get(name))) is not None:
            served = (serving or {}).get(name, member.served)
            members[name] = dataclasses.replace(member, served=served)
            waiting += models_of(member.config)
    return check_ensembles(names, members)


def _member(store: Store, name: str, config: ModelConfig | None) -> Member | None:
    """Look at a model as ensembles see it. `None` when there is none.

    Args:
        store: where to look. Its refusal becomes the member's `refused`.
        name: name of the model. It may be missing.
        config: configuration to assume for it. `None`: the one in its config.pbtxt.
    """
    try:
        view = store.look(name)
        if not view.exists:
            return None
        config = config or (view.parsed_config() if view.has_config else parse_config(""))
    except (ConfigError, RepositoryError) as exc:
        return Member(parse_config(""), (), refused=exc.message)
    return Member(config, served_versions(config, view.versions))
