"""Compare a declaration with a repository and its servers. Nothing is changed."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from repo_manager.declared.request import FetchedSource, Request, check_accuracy, fulfils
from repo_manager.declared.schema import Declaration, Model
from repo_manager.declared.servers import EMBEDDED, Servers
from repo_manager.declared.steps import ModelPlan, Step, StepAction, config_changes, request_of, wanted_labels
from repo_manager.errors import ConfigError, InputError, RepoManagerError, RepositoryError
from repo_manager.files import file_lock
from repo_manager.repository.configuration import change_config
from repo_manager.repository.ensembles import ensembles_in
from repo_manager.repository.location import Location, LocationLike, as_location, local_folder
from repo_manager.repository.relabel import read_labels
from repo_manager.repository.scan import ModelEntry, VersionEntry, find_model, scan
from repo_manager.repository.signing import check_served
from repo_manager.repository.state import ModelState, current_version, previous_version
from repo_manager.repository.stores import open_store
from repo_manager.repository.tags import model_states
from repo_manager.rollout.checks import refuse
from repo_manager.rollout.deploy import deploy
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.plan import plan_deploy
from repo_manager.rollout.targets.urls import To
from repo_manager.triton_config.ensembles import pinned_versions
from repo_manager.triton_config.problems import Severity
from repo_manager.types import StrPath

__all__ = ["NEW", "plan_declaration", "planned"]

NEW = 0
"""Represents the version a plan builds, whose number is not known yet."""
_LOCK_FILENAME = ".repo-manager.apply.lock"


Fetch = Callable[[str], FetchedSource]


def _no_fetch(url: str) -> FetchedSource:
    raise InputError(f"{url} is not fetched here")


@contextlib.contextmanager
def planned(
    declaration: Declaration,
    base: StrPath,
    repository: LocationLike,
    servers: Servers,
    *,
    prune: bool = False,
    fetch: Fetch = _no_fetch,
    rollout: RolloutOptions | None = None,
) -> Iterator[tuple[ModelPlan, ...]]:
    """Plan, and keep a second `apply` of a local repository out until the block ends.

    Inside one block, the executed plan is the shown one. The kernel releases the lock when its holder dies. There is
    no lock for a new repository, nor in object storage, where each change is atomic, nor for a read-only one, where a
    change fails on its own.

    Args:
        declaration: the file, read and checked.
        base: the folder of its file: the base of relative paths in it.
        repository: where. Need not exist yet.
        servers: clients of the servers the file names.
        prune: also plan the removal of undeclared models and versions.
        fetch: fetches the source a URL names.
        rollout: how versions are deployed. A deployment it would refuse is an error of the plan. `None`: the defaults.

    Yields:
        One plan per model, as `plan_declaration` returns it.

    Raises:
        RepositoryError: another `apply` of this repository runs, or its record is damaged.
    """
    base, repository = Path(base), as_location(repository)
    with contextlib.ExitStack() as stack:
        root = local_folder(repository)
        if root is not None and root.is_dir() and os.access(root, os.W_OK):
            stack.enter_context(file_lock(root / _LOCK_FILENAME, timeout_s=0.0))
        yield plan_declaration(declaration, base, repository, servers, prune=prune, fetch=fetch, rollout=rollout)


def plan_declaration(
    declaration: Declaration,
    base: StrPath,
    repository: LocationLike,
    servers: Servers,
    *,
    prune: bool = False,
    fetch: Fetch = _no_fetch,
    rollout: RolloutOptions | None = None,
    signs: bool = True,
) -> tuple[ModelPlan, ...]:
    """Plan every declared model, in the file's order, then the removals.

    Args:
        declaration: the file, read and checked.
        base: the folder of its file: the base of relative paths in it.
        repository: where. Need not exist yet.
        servers: clients of the servers the file names.
        prune: also plan the removal of undeclared models and versions.
        fetch: fetches the source a URL names; not called for one whose `digest` a version was made from.
        rollout: how versions are deployed. A deployment it would refuse is an error of the plan. `None`: the defaults.
        signs: whether new versions are signed. If not, serving one is an error of the plan under `signed_by`.

    Returns:
        One plan a model. A model without a plan has its error in it. The others are planned all the same.

    Raises:
        RepositoryError: the repository's record is damaged.
    """
    base, repository = Path(base), as_location(repository)
    folder = local_folder(repository)
    exists = folder is None or folder.is_dir()
    states = model_states(repository) if exists else {}
    present = {entry.name for entry in scan(repository, deep=False)} if exists else set()
    plans = []
    rollout = RolloutOptions() if rollout is None else rollout
    for name, model in declaration.models.items():
        try:
            entry = find_model(repository, name) if name in present else None
            state = states.get(name, ModelState())
            planner = _Planner(declaration, name, model, entry, state, base, fetch, rollout, signs)
            plans.append(planner.plan(repository, servers, prune=prune))
        except RepoManagerError as exc:
            plans.append(ModelPlan(name, True, None, (), str(exc), exc.exit_code))
    if prune:
        for name in sorted(present - set(declaration.models)):
            plans.append(_plan_undeclared(declaration, name, states.get(name, ModelState()), servers))
    return tuple(plans)


@dataclasses.dataclass(frozen=True)
class _Planner:
    declaration: Declaration
    name: str
    model: Model
    entry: ModelEntry | None
    state: ModelState
    base: Path
    fetch: Fetch
    rollout: RolloutOptions
    signs: bool

    @property
    def targets(self) -> tuple[str, ...]:
        return self.declaration.targets if self.model.targets is None else self.model.targets

    @property
    def existing(self) -> tuple[int, ...]:
        return () if self.entry is None else tuple(version.version for version in self.entry.versions)

    def plan(self, repository: Location, servers: Servers, *, prune: bool) -> ModelPlan:
        backend = self.entry.backend or None if self.entry is not None and self.entry.versions else None
        request = self._fetched(request_of(self.model, self.base, backend))
        version = self._version(request)
        steps: list[Step] = []
        if self.entry is not None and self.entry.versions:
            steps += self._config(repository)
        if version == NEW and request is not None:
            steps.append(_build(request))
            steps += self._first_config() if not self.existing else []
        steps += self._labels(repository)
        tags = self._tags(version)
        steps += [step for step in tags.values() if self.state.tags.get(step.tag) != step.version or not step.version]
        served = self._served(version)
        serving = self._serving(served, repository, servers, before=steps)
        steps += serving
        if prune and self.entry is not None:
            steps += self._removals(version, served, deploys=bool(serving) and serving[0].action is StepAction.DEPLOY)
        return ModelPlan(self.name, True, version or None, tuple(steps), request=request)

    def _fetched(self, request: Request | None) -> Request | None:
        """Fetch the source of a URL, unless a version was made from the pinned content."""
        if request is None or not request.url or (request.digest is not None and self._made_from(request)):
            return request
        fetched = self.fetch(request.url)
        return dataclasses.replace(request, source=fetched.path, fetched=fetched)

    def _made_from(self, request: Request) -> VersionEntry | None:
        """Return the newest version made as asked."""
        versions = reversed(self.entry.versions) if self.entry is not None else ()
        return next((each for each in versions if each.manifest is not None and fulfils(each.manifest, request)), None)

    def _version(self, request: Request | None) -> int:
        """Return the version of the source. `NEW` when there is none yet. Without a source the newest."""
        if request is None:
            if not self.existing:
                raise InputError(
                    f"{self.name}: the repository has no version of it, and it has no source",
                    hint="Declare `source:`, or add the model first.",
                )
            return self.existing[-1]
        entry = self._made_from(request)
        if entry is not None and entry.manifest is not None:
            check_accuracy(f"{self.name}:{entry.version}", entry.manifest, request)
            return entry.version
        if not request.source.is_file():
            raise InputError(
                f"{request.source} does not exist, and no version of {self.name} was made from its pinned content",
                hint="Give the source's path relative to the YAML file.",
            )
        return NEW

    def _config(self, repository: Location) -> Iterator[Step]:
        """Compare with the meaning of config.pbtxt, not with its spelling."""
        before = change_config(repository, self.name, {}, dry_run=True).before
        changes = config_changes(self.name, self.model.config, before, self.base, where=f"{self.name}/config.pbtxt")
        planned = change_config(repository, self.name, changes, dry_run=True)
        if not planned.fields:
            return
        errors = [problem.what for problem in planned.problems if problem.severity is Severity.ERROR]
        if errors:
            raise ConfigError(f"{self.name}: config.pbtxt would not load any more: {'; '.join(errors)}")
        yield Step(StepAction.CONFIG, f"config.pbtxt: {', '.join(planned.fields)}", changes=changes)

    def _first_config(self) -> Iterator[Step]:
        """Announce the declared fields. There is no config.pbtxt to compare with before the first version."""
        declared = config_changes(self.name, self.model.config, "", self.base, where=self.name)
        fields = [field for field in declared if field != "max_batch_size"]  # `add` sets this field
        if fields:
            yield Step(StepAction.CONFIG, f"config.pbtxt: {', '.join(fields)}")

    def _labels(self, repository: Location) -> Iterator[Step]:
        wanted = wanted_labels(self.model.labels, self.base)
        present = read_labels(repository, self.name) if self.entry is not None and self.entry.versions else {}
        for output, labels in wanted.items():
            if present.get(output) != labels:
                yield Step(StepAction.LABELS, f"{len(labels)} labels of {output}", labels={output: labels})

    def _tags(self, version: int) -> dict[str, Step]:
        found = {}
        for tag, wanted in self.model.tags.items():
            number = version if wanted == "newest" else wanted
            if number not in self.existing and number != NEW:
                raise RepositoryError(f"{self.name}: tag {tag}: there is no version {number}")
            found[tag] = Step(StepAction.TAG, f"{tag} -> {_shown(number)}", version=number or None, tag=tag)
        return found

    def _served(self, version: int) -> tuple[int, ...]:
        """Return the versions to serve. Empty: as it is."""
        wanted = self.model.serve
        if wanted is None:
            return (version,) if self.targets else ()
        if wanted == "newest":
            return (version,)
        if isinstance(wanted, str):
            number = self.model.tags.get(wanted, self.state.tags.get(wanted))
            if number is None:
                known = ", ".join({*self.model.tags, *self.state.tags}) or "none"
                close = difflib.get_close_matches(wanted, ["newest", *self.model.tags, *self.state.tags], n=1)
                raise RepositoryError(
                    f"{self.name}: serve: {wanted!r} is neither 'newest' nor a tag; tags are: {known}",
                    hint=f"Did you mean {close[0]!r}?" if close else None,
                )
            wanted = version if number == "newest" else int(number)
        versions = wanted if isinstance(wanted, tuple) else (wanted,)
        missing = [number for number in versions if number not in self.existing and number != NEW]
        if missing:
            raise RepositoryError(
                f"{self.name}: serve: there is no version {', '.join(map(str, missing))}; "
                f"there are {', '.join(map(str, self.existing)) or 'none'}",
                hint="`serve: newest` serves the version of the source.",
            )
        return tuple(sorted(set(versions)))

    def _serving(
        self, served: tuple[int, ...], repository: Location, servers: Servers, *, before: Sequence[Step]
    ) -> list[Step]:
        """Plan the deployments, after the steps before them.

        Raises:
            RepoManagerError: it would be refused.
        """
        if not served:
            return []
        numbers, keys = ", ".join(map(_shown, served)), self.rollout.signed_by
        if keys and NEW in served and not self.signs:
            raise RepositoryError(
                f"{self.name}: the new version would not be signed, and signed_by lets only signed ones be served",
                hint="Sign new versions: apply --sign KEY.pem. Or declare no `serve:` and no targets, then sign it.",
            )
        if not self.targets:
            if self.entry is not None and self.entry.policy == served:
                return []
            if keys and NEW not in served:
                check_served(repository, self.name, served, keys)
            self._check_pinned(repository, served)
            return [Step(StepAction.SERVE, f"the next load serves {numbers}", versions=served)]
        step = Step(StepAction.DEPLOY, f"{numbers} on {', '.join(self.targets)}", versions=served, targets=self.targets)
        in_clusters = servers.clusters(self.targets)
        if served[0] == NEW or (EMBEDDED in self.targets and not servers.running()):
            return [step]
        clients = servers.clients(self.targets)
        if not before:
            plans = [plan_deploy(repository, self.name, served[0], client) for client in clients]
            clients = tuple(client for client, plan in zip(clients, plans, strict=True) if plan.changes)
            held = {each: servers.held_by(each).get(self.name, ()) for each in in_clusters}
            in_clusters = tuple(each for each in in_clusters if served[-1:] != held[each][-1:])
            differing = [*(client.url for client in clients), *in_clusters]
            if not differing:
                return []
            step = dataclasses.replace(step, what=f"{numbers} on {', '.join(differing)}")
        if all(each.action is StepAction.TAG for each in before):  # otherwise an earlier step still changes the version
            self._rehearse(served[0], repository, [*([clients] if clients else []), *in_clusters])
        return [step]

    def _check_pinned(self, repository: Location, served: tuple[int, ...]) -> None:
        """Check that the next load keeps every version pinned by an ensemble.

        Raises:
            RepositoryError: it does not.
        """
        selected = () if self.entry is None else self.entry.selected
        pinned = pinned_versions(ensembles_in(open_store(repository)), self.name) if selected else {}
        for version, ensembles in pinned.items():
            if version in selected and version not in served:
                raise RepositoryError(
                    f"{self.name}: version {version} would not be served any more, and {', '.join(ensembles)} needs "
                    "it: Triton would not load the ensemble",
                    hint="Serve it as well, or change model_version in the ensemble's config.pbtxt first.",
                )

    def _rehearse(self, version: int, repository: Location, goals: Sequence[To]) -> None:
        """Ask each goal whether it would take a version: a plan `apply` would refuse is none.

        Raises:
            RepoManagerError: it would not.
        """
        options = dataclasses.replace(self.rollout, dry_run=True)
        for goal in goals:
            for server in deploy(repository, self.name, version, goal, options=options).servers:
                refuse(f"{self.name}:{version}", server.checks, options)

    def _removals(self, version: int, served: tuple[int, ...], *, deploys: bool) -> Iterator[Step]:
        """Plan the removal of versions without a use after the plan's other steps."""
        state = self.state.deployed(served[0] or max(self.existing) + 1) if deploys else self.state
        after = self.existing if version else (*self.existing, max(self.existing) + 1)
        tags = {**self.state.tags, **{tag: n for tag, n in self.model.tags.items() if n != "newest"}}
        kept = {version, *served, *self.model.versions, *(int(number) for number in tags.values())}
        kept |= {number for number in (current_version(state), previous_version(state, after)) if number is not None}
        if not served and self.entry is not None:
            kept |= set(self.entry.selected)
        for number in self.existing:
            if number not in kept:
                yield Step(StepAction.REMOVE, f"version {number}", version=number)


def _build(request: Request) -> Step:
    backend = "" if request.backend is None else f" for {request.backend}"
    source = request.source.name if request.fetched is None else request.shown
    return Step(StepAction.BUILD, f"a version of {source} in {request.precision}{backend}")


def _plan_undeclared(declaration: Declaration, name: str, state: ModelState, servers: Servers) -> ModelPlan:
    """Plan the removal of a model: first from the servers, so no served version is ever removed."""
    targets = tuple(
        dict.fromkeys([*declaration.targets, *(t for m in declaration.models.values() for t in m.targets or ())])
    )
    try:
        clients = {client.url: client for client in (*servers.running(), *servers.clients(targets))}
        loaded = [url for url, client in clients.items() if _is_loaded(client.versions(name).values())]
        for cluster in servers.clusters(targets):
            if name in servers.held_by(cluster):
                raise RepositoryError(
                    f"{name} is not declared, and {cluster} serves it",
                    hint=f"Take it out of service first: repo-manager undeploy {name} --to {cluster}",
                )
        if state.is_deployed and not clients and not servers.clusters(targets):
            last = state.deployments[-1]
            raise RepositoryError(
                f"{name} is not declared, but version {last.version} was deployed at {last.at}, and no server is "
                "declared to unload it from",
                hint=f"Declare `targets:`, or remove it by hand: repo-manager remove {name} --force",
            )
    except RepoManagerError as exc:
        return ModelPlan(name, False, None, (), str(exc), exc.exit_code)
    steps = [Step(StepAction.UNLOAD, f"from {', '.join(loaded)}", targets=tuple(loaded))] if loaded else []
    return ModelPlan(name, False, None, (*steps, Step(StepAction.REMOVE, "the whole undeclared model")))


def _is_loaded(entries: object) -> bool:
    return any(getattr(entry, "state", "") in ("READY", "LOADING") for entry in entries)  # type: ignore[attr-defined]


def _shown(number: int) -> str:
    return f"version {number}" if number else "the new version"
