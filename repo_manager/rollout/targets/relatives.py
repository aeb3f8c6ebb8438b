"""The models around the one rolled out: its parts, and the models in need of it, on one server.

Triton loads the parts of an ensemble with it, by their own version policies, and reloads an ensemble when a part of it
changes (`DependencyGraph` of triton-inference-server/core). A load proves neither: here the parts are served and proven
first, and the dependent models are asked again after each change.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

from repo_manager.errors import RepositoryError, ServerError, ServerRefusedError
from repo_manager.repository.configuration import read_config_bytes, set_served_versions, write_config_bytes
from repo_manager.repository.scan import ModelEntry, find_model
from repo_manager.repository.signing import SignatureCheck
from repo_manager.rollout.checks import Check, check_loaded, check_version
from repo_manager.rollout.observe import load_on_server, observe, wait_until_only_ready
from repo_manager.rollout.plan import Relative
from repo_manager.rollout.rollout_context import RolloutContext
from repo_manager.rollout.smoke import smoke_test
from repo_manager.server.client import TritonClient
from repo_manager.triton_config.config import ModelConfig
from repo_manager.triton_config.ensembles import dependents_of, is_ensemble, pinned_versions

__all__ = ["Family", "Needed", "Relatives", "put_back"]

_POLL_S = 0.02
READY = "READY"


@dataclasses.dataclass(frozen=True)
class Needed:
    """A model needed by the one rolled out.

    Attributes:
        entry: the needed model, as scanned.
        versions: versions to serve, ascending, those pinned by ensembles included.
        original: text of its config.pbtxt before the roll-out.
    """

    entry: ModelEntry
    versions: tuple[int, ...]
    original: bytes | None

    @property
    def name(self) -> str:
        """The model's name."""
        return self.entry.name


class Family:
    """The repository's record of the models around one.

    Args:
        context: the roll-out's context: model, options, deadline, report.
    """

    def __init__(self, context: RolloutContext) -> None:
        self._context = context
        self._configs = context.ensembles
        self.dependents = dependents_of(self._configs, context.name)
        self.needs = context.needs

    def needed(self, ready: Sequence[Mapping[str, tuple[int, ...]]]) -> tuple[Needed, ...]:
        """Return the needed models some server does not serve, in the order of loading.

        A version served somewhere stays, else it is the newest one config.pbtxt serves, else the newest. Versions
        pinned by an ensemble are always among them.

        Args:
            ready: of each server, model -> the READY versions.
        """
        within = {name: self._configs[name] for name in (*self.needs, self._context.name) if name in self._configs}
        found = []
        for name in self.needs:
            entry = find_model(self._context.repository, name)
            served = {version for each in ready for version in each.get(name, ())}
            existing = {each.version for each in entry.versions}
            if not served and existing:
                served = {max(entry.selected or existing)}
            wanted = tuple(sorted(served | (pinned_versions(within, name).keys() & existing)))
            if wanted and any(not set(wanted) <= set(each.get(name, ())) for each in ready):
                original = read_config_bytes(self._context.repository, name)
                found.append(Needed(entry, wanted, original))
        return tuple(found)

    def lost(self, served: Sequence[int]) -> set[str]:
        """Return the models that cannot be served with these versions of it, because they pin another one."""
        pinned = self._context.pinned.items()
        direct = {name for version, names in pinned if version not in served for name in names}
        return direct.union(*(dependents_of(self._configs, name) for name in direct))

    def why(self, dependent: str) -> str:
        """Describe the effect of a change of the model on a dependent one."""
        config = self._configs[dependent]
        if not is_ensemble(config):
            return f"its code asks {self._context.name}; Triton leaves it as it is"
        pins = pinned_versions({dependent: config}, self._context.name)
        asks = f"version {', '.join(map(str, pins))}" if pins else "the newest served version"
        return f"Triton loads it again whenever {self._context.name} changes; it asks for {asks}"


class Relatives:
    """The models around one, on one server.

    Args:
        context: the roll-out's context: model, options, deadline, report.
        client: connected client of the server.
        family: the repository's record of the models around it.
    """

    def __init__(self, context: RolloutContext, client: TritonClient, family: Family) -> None:
        self._context, self._client, self._family = context, client, family
        around = {*family.needs, *family.dependents}
        self.ready: dict[str, tuple[int, ...]] = self._ready(around) if around else {}
        self.needed: tuple[Needed, ...] = ()
        self._mute: dict[str, str] = {}
        self._vouched: list[SignatureCheck] = []

    def _ready(self, names: set[str]) -> dict[str, tuple[int, ...]]:
        found: dict[str, list[int]] = {}
        for entry in self._context.retried(self._client.repository_index):
            if entry.name in names and entry.state == READY and entry.version is not None:
                found.setdefault(entry.name, []).append(entry.version)
        return {name: tuple(sorted(versions)) for name, versions in found.items()}

    @property
    def dependents(self) -> tuple[str, ...]:
        """The served models that depend on this one, the inner ones first."""
        return tuple(name for name in self._family.dependents if name in self.ready)

    @property
    def brought(self) -> tuple[Needed, ...]:
        """The models this server does not serve as they must be."""
        return tuple(each for each in self.needed if not set(each.versions) <= set(self.ready.get(each.name, ())))

    def plan(self) -> tuple[tuple[Relative, ...], tuple[Relative, ...]]:
        """Return the models the roll-out brings along, and the dependent ones proven with it."""
        brings = tuple(Relative(each.name, each.versions, f"{self._context.name} needs it") for each in self.brought)
        dependents = tuple(Relative(each, self.ready[each], self._family.why(each)) for each in self.dependents)
        return brings, dependents

    def check(self) -> tuple[Check, ...]:
        """Check the models brought along like the model itself."""
        context = self._context
        self._vouched.clear()
        serving = {each.name: each.versions for each in self.needed}
        return tuple(
            dataclasses.replace(check, detail=f"{each.name}:{version}: {check.detail}")
            for each in self.brought
            for version in each.versions
            for check in check_version(
                context.repository,
                each.entry,
                version,
                signed_by=context.options.signed_by,
                vouched=self._vouched,
                serving=serving,
            )
        )

    def bring(self) -> None:
        """Serve and prove the model's parts, the inner ones first. Before that, record how the dependent models
        answer.

        Raises:
            ServerRefusedError: a model does not load.
            SmokeFailedError: one does not answer as it must.
        """
        context = self._context
        for name in self.dependents:
            try:
                self._ask(name, self.ready[name], compare=False)
            except ServerRefusedError as exc:
                self._mute[name] = exc.reason or exc.message  # no reference answer, so no comparison later
        for each in self.brought:
            context.note(f"serving {each.name}:{', '.join(map(str, each.versions))}, which {context.name} needs")
            self._serve(each)
            self._ask(each.name, each.versions)

    def _serve(self, needed: Needed) -> None:
        context = self._context
        if not set(needed.versions) <= set(needed.entry.selected):
            context.change(lambda: set_served_versions(context.repository, needed.name, needed.versions))
        timeout_s = context.deadline.remaining_s(context.options.load_timeout_s)
        keys = context.options.signed_by
        context.retried(lambda: load_on_server(self._client, context.repository, needed.name, timeout_s, keys))
        for version in needed.versions if keys else ():
            vouched = [each for each in self._vouched if (each.name, each.version) == (needed.name, version)]
            config = ModelConfig.from_message(self._client.model_config(needed.name))
            check_loaded(context.repository, needed.entry, version, keys, vouched, config)

    def prove(self, served: Sequence[int]) -> None:
        """Ask the dependent models. The values of its answers may be others now.

        Args:
            served: the model's versions now. A model that pins another version is lost, as `drop_pinned` allows.

        Raises:
            ServerRefusedError: it is not READY again, or does not answer.
        """
        lost = self._family.lost(served)
        for name in self.dependents:
            if name in lost:
                self._context.note(f"{name} asks for a version that is not served any more: Triton drops it")
                continue
            self._wait(name, self.ready[name])
            if name in self._mute:
                self._context.note(f"{name} is ready; it was not asked, because it refused before: {self._mute[name]}")
                continue
            try:
                self._ask(name, self.ready[name], compare=False)
            except ServerError as exc:
                error = type(exc)(f"{name}, which needs {self._context.name}, does not answer: {exc.message}")
                raise error from exc
            self._context.note(f"{name}, which needs {self._context.name}, answers")

    def take_back(self) -> None:
        """Stop serving the models brought along, and confirm the dependent ones are served as before.

        Raises:
            ServerRefusedError: a dependent model is not served as before.
        """
        for each in self.brought[::-1]:
            timeout_s = self._context.options.settle_timeout_s
            if each.name in self.ready:
                options = self._context.options
                load_s = max(timeout_s, options.load_timeout_s)
                load_on_server(self._client, self._context.repository, each.name, load_s, options.signed_by)
            else:
                self._client.unload(each.name, timeout_s=timeout_s)
            wait_until_only_ready(self._client, each.name, self.ready.get(each.name, ()), timeout_s)
        for name in self.dependents:
            self._wait(name, self.ready[name])

    def _wait(self, name: str, versions: tuple[int, ...]) -> None:
        deadline = time.monotonic() + self._context.options.settle_timeout_s
        while not set(versions) <= set((state := observe(self._client, name)).ready):
            if time.monotonic() >= deadline or (not state.ready and not state.busy and state.reasons):
                reasons = "; ".join(dict.fromkeys(state.reasons.values()))
                raise ServerRefusedError(
                    f"{name}, which needs {self._context.name}, is not ready any more on {self._client.url}"
                    + (f": {reasons}" if reasons else "")
                )
            time.sleep(_POLL_S)

    def _ask(self, name: str, versions: Sequence[int], *, compare: bool = True) -> None:
        context = self._context
        config = ModelConfig.from_message(self._client.model_config(name))
        try:
            entry = find_model(context.repository, name)
        except RepositoryError:
            return  # removed from the repository, but still served
        for version in versions:
            timeout_s = context.deadline.remaining_s(context.options.smoke_timeout_s)
            smoke_test(
                self._client,
                entry.path / str(version),
                name,
                version,
                config,
                timeout_s=timeout_s,
                readiness_only=context.options.proof == "readiness",
                compare=compare,
            )


def put_back(context: RolloutContext, needed: Sequence[Needed]) -> None:
    """Restore every config.pbtxt."""
    for each in needed:
        write_config_bytes(context.repository, each.name, each.original)
