"""`apply`: bring a repository and its servers to the declared state, one model after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from repo_manager.accuracy import AccuracyOptions
from repo_manager.declared import Declaration, ModelPlan, Servers, Step, StepAction, planned
from repo_manager.declared.request import FetchedSource, Request
from repo_manager.declared.schema import Config
from repo_manager.declared.steps import ApplyResult, ModelResult, config_changes
from repo_manager.engine.options import EngineOptions
from repo_manager.engine.profiles import ShapeRange
from repo_manager.errors import InputError, RepoManagerError, UsageError
from repo_manager.onnx_model.model import load_model
from repo_manager.pipeline.adding import AddOptions, SparsityMode, add
from repo_manager.precision import ConvertOptions
from repo_manager.precision.calibration.load import import_installed
from repo_manager.repository.configuration import change_config, set_served_versions
from repo_manager.repository.location import Location, LocationLike, as_location
from repo_manager.repository.relabel import set_labels
from repo_manager.repository.remove import remove
from repo_manager.repository.scan import find_model
from repo_manager.repository.signing import SigningKey, check_served, sign_version
from repo_manager.repository.tags import set_tag
from repo_manager.rollout.deploy import deploy
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.targets.urls import To
from repo_manager.sources.source import open_source
from repo_manager.triton_config.options import ConfigOptions
from repo_manager.types import Precision, StrPath
from repo_manager.validation import check_fields

__all__ = ["ApplyOptions", "apply", "carry_out", "fetching"]

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class ApplyOptions:
    """How to apply.

    Attributes:
        prune: also remove undeclared models and versions.
        sign: sign each version built. `None` does not.
        rollout: options of every deployment. Its `signed_by` also holds for changes of the version policy.
        allow_code: call the functions the file names as calibration (`module:function`). Off, since anyone who writes
            the file would run code as anyone who applies it.
        code_modules: modules whose functions are called all the same, and those of modules below them. They are
            imported from the environment, never from the current folder.
    """

    prune: bool = False
    sign: SigningKey | None = None
    rollout: RolloutOptions = dataclasses.field(default_factory=RolloutOptions)
    allow_code: bool = False
    code_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)


def apply(
    declaration: Declaration,
    base: StrPath,
    repository: LocationLike,
    servers: Servers,
    *,
    options: ApplyOptions | None = None,
    report: Report = lambda _: None,
    show: Callable[[tuple[ModelPlan, ...]], None] = lambda _: None,
) -> ApplyResult:
    """Plan, show, and apply.

    Every model is brought to its declared state on its own: a failed one keeps its old state, and the others are done
    all the same. Undeclared models and versions are removed last, and not at all when a model failed.

    Args:
        declaration: the file, read and checked.
        base: the folder of its file.
        repository: where. Made when it does not exist.
        servers: clients of the servers the file names.
        options: pruning, consent to run code, and the roll-out's options. `None` takes the defaults.
        report: called with a line of text for each step.
        show: given the plan before anything is done.

    Raises:
        RepositoryError: another `apply` of this repository runs, or its record is damaged.
    """
    base, repository = Path(base), as_location(repository)
    options = ApplyOptions() if options is None else options
    rollout, prune = options.rollout, options.prune
    with (
        fetching(report) as fetch,
        planned(declaration, base, repository, servers, prune=prune, fetch=fetch, rollout=rollout) as plans,
    ):
        show(plans)
        return carry_out(plans, declaration, base, repository, servers, options=options, report=report)


@contextlib.contextmanager
def fetching(report: Report = lambda _: None) -> Iterator[Callable[[str], FetchedSource]]:
    """Give a function to fetch the source of a URL once. The copy stays while the block runs."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def fetch(url: str) -> FetchedSource:
            source = stack.enter_context(open_source(url, report))
            return FetchedSource(source.path, source)

        yield fetch


def carry_out(
    plans: Sequence[ModelPlan],
    declaration: Declaration,
    base: StrPath,
    repository: LocationLike,
    servers: Servers,
    *,
    options: ApplyOptions,
    report: Report = lambda _: None,
) -> ApplyResult:
    """Execute the steps of plans, and nothing else. Call it inside the `planned` block of the plans.

    Args:
        plans: the plan of each model.
        declaration: the declaration behind the plans.
        base: the folder of its file.
        repository: where. Made when it does not exist.
        servers: clients of the servers the file names.
        options: key for new versions, consent to run code, and the roll-out's options. `prune` counts in the plan only.
        report: receives one line per step.
    """
    base, repository = Path(base), as_location(repository)
    start = time.monotonic()
    runner = _Runner(declaration, base, repository, servers, options, report)
    results: list[ModelResult] = []
    for plan in plans:
        if not plan.steps and plan.error is None:
            continue
        if not plan.declared and any(result.error is not None for result in results):
            what = f"{plan.name} is not declared, and stays because a declared model failed"
            results.append(ModelResult(plan.name, (), None, what, 0))
            continue
        results.append(runner.run(plan))
    return ApplyResult(tuple(results), len(plans) - len(results), time.monotonic() - start)


@dataclasses.dataclass(frozen=True)
class _Runner:
    declaration: Declaration
    base: Path
    repository: Location
    servers: Servers
    options: ApplyOptions
    report: Report

    def run(self, plan: ModelPlan) -> ModelResult:
        """Do one model's steps until one fails."""
        if plan.error is not None:
            return ModelResult(plan.name, (), None, plan.error, plan.exit_code)
        done: list[str] = []
        built: int | None = None
        try:
            for step in plan.steps:
                self.report(f"{plan.name}: {step.action}: {step.what}")
                if step.action is StepAction.BUILD:
                    new = not self._exists(plan.name)
                    built = self._build(plan, new=new)
                    done.append(f"built version {built}: {step.what}")
                    continue
                self._do(plan.name, step, built)
                done.append(f"{step.action}: {step.what}")
        except RepoManagerError as exc:
            return ModelResult(plan.name, tuple(done), built, _named(str(exc), plan.request), exc.exit_code)
        return ModelResult(plan.name, tuple(done), built, None, 0)

    def _build(self, plan: ModelPlan, *, new: bool) -> int:
        if plan.request is None:
            raise AssertionError("a plan that builds has a request")
        calibration, evaluated = plan.request.calibration, plan.request.accuracy.get("data")
        if calibration is not None and not Path(calibration).exists():
            self._allow_code(f"{plan.name}: calibration {calibration}", calibration)
        if evaluated is not None and ".npz:" not in evaluated:
            self._allow_code(f"{plan.name}: eval {evaluated}", evaluated)
        if plan.request.digest is not None and load_model(plan.request.source).digest != plan.request.digest:
            raise InputError(
                f"{plan.request.shown} differs from its pinned digest: {plan.request.digest}",
                hint="Put the right file there, or change `digest:` in the YAML file.",
            )
        # Later versions use the existing config.pbtxt, already changed to the declared state.
        options = _add_options(plan.request, _first_config(self.declaration.models[plan.name].config, new=new))
        fetched = plan.request.fetched
        source = plan.request.source if fetched is None else fetched.opened
        version = add(source, plan.name, self.repository, options, report=self.report).version
        if self.options.sign is not None:
            sign_version(self.repository, plan.name, version, self.options.sign)
        return version

    def _allow_code(self, what: str, reference: str) -> None:
        """Check whether a `module:function` of the file may be called.

        Raises:
            UsageError: neither the command nor the settings allow it.
        """
        if self.options.allow_code:
            return
        module = reference.partition(":")[0]
        if not any(f"{module}.".startswith(f"{allowed}.") for allowed in self.options.code_modules):
            raise UsageError(
                f"{what} is not a file, and an applied file runs no code",
                hint="Give the path of an .npz or a folder; or allow the named code: apply --allow-code, or "
                "code_modules in the settings.",
            )
        import_installed(module)

    def _configure(self, name: str, step: Step) -> None:
        changes = step.changes
        if not changes:  # first version: its config.pbtxt was derived after the plan
            before = change_config(self.repository, name, {}, dry_run=True).before
            declared = self.declaration.models[name].config
            changes = config_changes(name, declared, before, self.base, where=f"{name}/config.pbtxt")
        change_config(self.repository, name, changes)

    def _do(self, name: str, step: Step, built: int | None) -> None:
        version = step.version or built
        if step.action is StepAction.CONFIG:
            self._configure(name, step)
        elif step.action is StepAction.LABELS:
            for output, labels in step.labels.items():
                set_labels(self.repository, name, output, labels)
        elif step.action is StepAction.TAG and version is not None:
            set_tag(self.repository, name, step.tag, version)
        elif step.action is StepAction.SERVE:
            self._serve(name, self._numbers(step, built))
        elif step.action is StepAction.DEPLOY:
            self._deploy(name, self._numbers(step, built)[0], step)
        elif step.action is StepAction.UNLOAD:
            for client in self.servers.clients(step.targets):
                client.unload(name)
        elif step.action is StepAction.REMOVE:
            remove(self.repository, name, step.version, force=step.version is None)

    def _serve(self, name: str, versions: tuple[int, ...]) -> None:
        """Change the policy. The settings' conditions on deployments hold for it as well."""
        if self.options.rollout.signed_by:
            check_served(self.repository, name, versions, self.options.rollout.signed_by)
        set_served_versions(self.repository, name, versions)

    def _deploy(self, name: str, version: int, step: Step) -> None:
        clients = self.servers.clients(step.targets, start=True)
        goals: list[To] = [*([clients] if clients else []), *self.servers.clusters(step.targets)]
        for goal in goals:
            deploy(self.repository, name, version, goal, options=self.options.rollout, report=self.report)

    def _exists(self, name: str) -> bool:
        try:
            return bool(find_model(self.repository, name).versions)
        except RepoManagerError:
            return False

    @staticmethod
    def _numbers(step: Step, built: int | None) -> tuple[int, ...]:
        return tuple(number or built or 0 for number in step.versions)


def _first_config(declared: Config, *, new: bool) -> ConfigOptions:
    """Return the fields a model's configuration needs from the first version on. All others are set afterwards."""
    if not new:
        return ConfigOptions()
    filename = declared.set.get("default_model_filename")
    return ConfigOptions(max_batch_size=declared.max_batch_size, model_filename=str(filename) if filename else None)


def _named(message: str, request: Request | None) -> str:
    """Return a message with a source's URL in place of the file it was fetched to."""
    if request is None or request.fetched is None:
        return message
    return message.replace(str(request.fetched.path), request.shown)


def _add_options(request: Request, config: ConfigOptions) -> AddOptions:
    engine: dict[str, Any] = dict(request.engine)
    shapes = {
        name: ShapeRange(*(tuple(shape[size]) for size in ("min", "opt", "max")))
        for name, shape in engine.pop("shapes", {}).items()
    }
    return AddOptions(
        precision=Precision(request.precision),
        backend=request.backend or "auto",
        sparsity=SparsityMode(request.sparsity),
        calibration=request.calibration,
        config=config,
        engine=EngineOptions(shapes=shapes, **_arguments(engine)),
        convert=ConvertOptions(**_arguments(request.convert)),
        accuracy=AccuracyOptions(**request.accuracy) if request.accuracy else None,
    )


def _arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options from JSON as the dataclasses take them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
