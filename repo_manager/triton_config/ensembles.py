"""Ensembles and the models they consist of: who needs whom, pinned versions, and whether the tensors fit.

Everything here is a pure function of configurations. Triton's checks after the models of an ensemble are loaded
(`ValidateEnsembleConfig` and `DependencyGraph` of triton-inference-server/core) are in `check_ensemble`. Its checks of
the ensemble's own config.pbtxt are a table of rules (`rules/placement.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from repo_manager.triton_config.config import CONFIG_FILENAME, ModelConfig
from repo_manager.triton_config.problems import Problem, Severity
from repo_manager.triton_config.rules import check_rules
from repo_manager.triton_messages import model_config_pb2

__all__ = [
    "USES",
    "EnsembleStep",
    "Member",
    "check_ensemble",
    "check_ensembles",
    "dependents_of",
    "dims_match",
    "is_ensemble",
    "models_needed_by",
    "models_of",
    "pinned_versions",
    "steps_of",
    "uses_of",
]

USES = "uses"
"""The parameter of config.pbtxt with the names, separated by commas, of the models a model's code asks (BLS)."""


@dataclasses.dataclass(frozen=True)
class EnsembleStep:
    """One step of an ensemble.

    Attributes:
        model: name of the model it runs, from the ensemble's own repository.
        version: the version it asks for. `None`: the newest served.
        inputs: input of the model -> tensor of the ensemble.
        outputs: output of the model -> tensor of the ensemble.
    """

    model: str
    version: int | None
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Member:
    """A model as an ensemble sees it.

    Attributes:
        config: its configuration, completed as the server would, if known.
        served: the versions a load serves.
        refused: why Triton would not load it. Empty when nothing is known of it.
    """

    config: ModelConfig
    served: tuple[int, ...]
    refused: str = ""


def is_ensemble(config: ModelConfig) -> bool:
    """Return whether a configuration is an ensemble's."""
    return bool(config.message().HasField("ensemble_scheduling"))


def steps_of(config: ModelConfig) -> tuple[EnsembleStep, ...]:
    """Return the steps of an ensemble in their order. None for any other model."""
    return tuple(
        EnsembleStep(
            step.model_name,
            None if step.model_version == -1 else int(step.model_version),
            dict(step.input_map),
            dict(step.output_map),
        )
        for step in config.message().ensemble_scheduling.step
    )


def uses_of(config: ModelConfig) -> tuple[str, ...]:
    """Return the models a model's code asks, as far as its configuration declares them."""
    parameters = config.message().parameters
    text = parameters[USES].string_value if USES in parameters else ""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def models_of(config: ModelConfig) -> tuple[str, ...]:
    """Return the models a model needs directly: the parts of an ensemble, and the models its code asks."""
    return tuple(dict.fromkeys((*(step.model for step in steps_of(config)), *uses_of(config))))


def pinned_versions(ensembles: Mapping[str, ModelConfig], name: str) -> dict[int, tuple[str, ...]]:
    """Return the versions of a model pinned by ensembles, each with its ensembles.

    Args:
        ensembles: name -> configuration. Models other than ensembles do no harm.
        name: name of a model in the ensembles' steps. Empty result: nothing pins it.
    """
    found: dict[int, set[str]] = {}
    for ensemble, config in ensembles.items():
        for step in steps_of(config):
            if step.model == name and step.version is not None:
                found.setdefault(step.version, set()).add(ensemble)
    return {version: tuple(sorted(names)) for version, names in sorted(found.items())}


def dependents_of(ensembles: Mapping[str, ModelConfig], name: str) -> tuple[str, ...]:
    """Return the models in need of a model, directly or through others, the inner ones first.

    Args:
        ensembles: name -> configuration, of ensembles and of models whose code asks others.
        name: name of the needed model. It is not part of the result.
    """
    direct = {ensemble: set(models_of(config)) for ensemble, config in ensembles.items()}
    found: dict[str, None] = {}
    wave = {name}
    while wave:
        wave = {ensemble for ensemble, models in direct.items() if models & wave and ensemble != name} - found.keys()
        found.update(dict.fromkeys(sorted(wave)))
    return _inner_first(tuple(found), direct)


def models_needed_by(models: Mapping[str, ModelConfig], name: str) -> tuple[str, ...]:
    """Return the models a model needs, directly or through others, in the order of loading.

    Args:
        models: name -> configuration. A needed model missing here is in the result all the same.
        name: an ensemble, or a model whose code asks others. The result is empty for any other.
    """
    direct: dict[str, set[str]] = {}
    waiting = [name]
    while waiting:
        each = waiting.pop()
        if each not in direct:
            direct[each] = set(models_of(models[each])) if each in models else set()
            waiting += sorted(direct[each])
    return tuple(model for model in _inner_first(tuple(direct), direct) if model != name)


def _inner_first(names: tuple[str, ...], direct: Mapping[str, Collection[str]]) -> tuple[str, ...]:
    """Order ensembles. Each comes after its parts. A cycle keeps the given order."""
    ordered: dict[str, None] = {}
    visiting: set[str] = set()

    def visit(name: str) -> None:
        if name in ordered or name in visiting:
            return
        visiting.add(name)
        for inner in sorted(direct.get(name, ())):
            if inner in names:
                visit(inner)
        ordered[name] = None

    for name in names:
        visit(name)
    return tuple(ordered)


def check_ensembles(names: Iterable[str], models: Mapping[str, Member]) -> list[Problem]:
    """Check ensembles and their parts: one with a refused part is refused, too.

    Args:
        names: the ensembles, and models whose code asks others. Others do no harm.
        models: name -> model. Of those the ensembles need, missing ones do not exist.

    Returns:
        The findings on the ensembles named, each with `NAME/config.pbtxt` as its subject.
    """
    known = dict(models)
    configs = {name: member.config for name, member in models.items()}
    found: list[Problem] = []
    for name in names:
        if name not in known:
            continue
        for each in (*models_needed_by(configs, name), name):
            if each not in known:
                continue
            problems = check_ensemble(each, known, where=f"{each}/{CONFIG_FILENAME}")
            if each == name:
                found += problems
            refusals = [problem for problem in problems if problem.severity is Severity.ERROR]
            errors = [problem.what for problem in (*_own_errors(configs[each]), *refusals)]
            if errors and not known[each].refused:
                known[each] = dataclasses.replace(known[each], refused=errors[0])
    return found


def _own_errors(config: ModelConfig) -> list[Problem]:
    """Return why Triton would refuse a configuration on its own, whatever a backend completes."""
    problems = check_rules(config)
    return [each for each in problems if each.severity is Severity.ERROR]


def check_ensemble(name: str, models: Mapping[str, Member], *, where: str) -> list[Problem]:
    """Check an ensemble against the models it consists of.

    Tensors of a model whose configuration does not list them are not compared: only the server's backend knows them.

    Args:
        name: name of the ensemble, or of a model with code asking others. A key of `models`.
        models: name -> model, of all existing models the ensemble needs. The ensemble itself included.
        where: the subject of the findings.

    Returns:
        Why Triton would refuse to load the ensemble. For a model whose code asks others: warnings of missing ones.
        Empty for any other.
    """
    config = models[name].config
    if not is_ensemble(config):
        return [
            Problem(
                where,
                f"its code asks the model {used!r}, which is not in the repository",
                Severity.WARNING,
                f"add the model {used!r}, or correct the parameter {USES}",
                rule=_MODEL,
            )
            for used in uses_of(config)
            if used not in models
        ]
    cycle = _cycle(name, models)
    if cycle:
        text = f"contains itself: {' -> '.join(cycle)}"
        return [Problem(where, text, hint="take one of them out of the other", rule="ensemble-cycle")]
    found = list(_absent(config, models, where))
    present = [step for step in steps_of(config) if step.model in models]
    found += [problem for step in present for problem in _batch_sizes(config, step, models[step.model], where)]
    tensors = _Tensors(name, config)
    for step in present:
        found += [Problem(where, text, rule="ensemble-tensors") for text in tensors.add(step, models[step.model])]
    if len(present) == len(steps_of(config)) and not found:
        found += [Problem(where, text, rule="ensemble-decoupled") for text in _mixed_streams(config, models)]
    return found


def _cycle(name: str, models: Mapping[str, Member]) -> tuple[str, ...]:
    """Return the way from an ensemble back to itself. Empty when there is none."""
    ways: list[tuple[str, ...]] = [(name,)]
    seen: set[str] = set()
    while ways:
        way = ways.pop()
        for inner in sorted({step.model for step in steps_of(models[way[-1]].config)}):
            if inner == name:
                return (*way, name)
            if inner in models and inner not in seen:
                seen.add(inner)
                ways.append((*way, inner))
    return ()


def _absent(config: ModelConfig, models: Mapping[str, Member], where: str) -> Iterator[Problem]:
    """Find needed models and versions the server would lack."""
    for name, version in dict.fromkeys((step.model, step.version) for step in steps_of(config)):
        if not name:
            continue  # another rule reports it
        member = models.get(name)
        if member is None:
            hint = f"add the model {name!r}, or correct the name"
            yield Problem(where, f"needs the model {name!r}, which is not in the repository", hint=hint, rule=_MODEL)
        elif member.refused:
            text = f"needs the model {name!r}, which Triton would not load: {member.refused}"
            yield Problem(where, text, hint=f"correct {name!r} first", rule=_MODEL)
        elif not member.served:
            yield Problem(where, f"needs the model {name!r}, of which no version would be served", rule=_MODEL)
        elif version is not None and version not in member.served:
            served = ", ".join(map(str, member.served))
            text = f"needs version {version} of {name!r}, which is not served; {name!r} serves {served}"
            hint = f"serve version {version} as well, or change model_version in the ensemble"
            yield Problem(where, text, hint=hint, rule="ensemble-version")


_MODEL = "ensemble-model"


def _batch_sizes(config: ModelConfig, step: EnsembleStep, member: Member, where: str) -> Iterator[Problem]:
    size = member.config.max_batch_size
    if 0 < size < config.max_batch_size:
        text = f"has max_batch_size {config.max_batch_size}, and its model {step.model!r} takes {size} at most"
        yield Problem(where, text, hint=f"set max_batch_size of the ensemble to {size} or less", rule="ensemble-batch")


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """The facts of a tensor of an ensemble, and their source."""

    source: str
    data_type: int
    dims: tuple[int, ...]
    full_dims: tuple[int, ...]

    def differs_from(self, other: _Tensor) -> str:
        """Return how another view of the same tensor contradicts this one. Empty when it does not."""
        if self.data_type != other.data_type:
            one, two = (model_config_pb2.DataType.Name(each) for each in (self.data_type, other.data_type))
            return f"it is {one} for {self.source} and {two} for {other.source}"
        if dims_match(self.dims, other.dims) or dims_match(self.full_dims, other.full_dims):
            return ""
        return f"it has shape {list(self.full_dims)} for {self.source} and {list(other.full_dims)} for {other.source}"


def dims_match(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Return whether two shapes can be the same tensor's: -1 represents any size (CompareDimsWithWildcard of core)."""
    return len(one) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(one, other, strict=True))


class _Tensors:
    """The tensors of an ensemble, as its own inputs and outputs and then step after step tells of them."""

    def __init__(self, name: str, config: ModelConfig) -> None:
        message = config.message()
        self._known: dict[str, _Tensor] = {}
        for tensor in (*message.input, *message.output):
            dims = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
            self._known.setdefault(tensor.name, _tensor(f"the ensemble {name!r}", config, tensor, dims))

    def add(self, step: EnsembleStep, member: Member) -> Iterator[str]:
        """Compare a step with the facts of its tensors. Yield each contradiction."""
        message = member.config.message()
        source = f"the model {step.model!r}"
        for kind, tensors, mapping in (
            ("input", message.input, step.inputs),
            ("output", message.output, step.outputs),
        ):
            if not tensors:
                continue  # the server's backend completes them
            names = [tensor.name for tensor in tensors]
            for name in sorted(mapping.keys() - set(names)):
                yield f"{kind}_map names the {kind} {name!r} of {source}, which has {', '.join(map(repr, names))}"
            for tensor in tensors:
                if tensor.name in mapping:
                    yield from self._compare(mapping[tensor.name], _tensor(source, member.config, tensor, tensor.dims))
                elif kind == "input" and not tensor.optional:
                    yield f"input {tensor.name!r} of {source} gets no tensor: it is not in the input_map"

    def _compare(self, name: str, tensor: _Tensor) -> Iterator[str]:
        known = self._known.setdefault(name, tensor)
        difference = known.differs_from(tensor)
        if difference:
            yield f"tensor {name!r}: {difference}"


def _tensor(source: str, config: ModelConfig, tensor: Any, dims: Any) -> _Tensor:
    dims = tuple(dims)
    return _Tensor(source, tensor.data_type, dims, (-1, *dims) if config.max_batch_size > 0 else dims)


def _mixed_streams(config: ModelConfig, models: Mapping[str, Member]) -> Iterator[str]:
    """Find steps that join the answers of several decoupled models, as the server does."""
    streams: dict[str, int] = {tensor.name: 0 for tensor in config.message().input}
    waiting, count = list(steps_of(config)), 0
    while ready := [step for step in waiting if set(step.inputs.values()) <= streams.keys()]:
        for step in ready:
            sources = {streams[name] for name in step.inputs.values()}
            if len(sources) > 1:
                yield f"the step of {step.model!r} has inputs that come from different decoupled models"
                return
            stream = sources.pop() if sources else 0
            if _is_decoupled(step.model, models):
                count += 1
                stream = count
            streams.update(dict.fromkeys(step.outputs.values(), stream))
        waiting = [step for step in waiting if step not in ready]
    if len({streams[tensor.name] for tensor in config.message().output if tensor.name in streams}) > 1:
        yield "its outputs come from different decoupled models, or only some of them from one"


def _is_decoupled(name: str, models: Mapping[str, Member]) -> bool:
    """Return whether a model streams. An ensemble does when one of its models does."""
    config = models[name].config
    inner = {step.model for step in steps_of(config)}
    if not inner:
        return bool(config.message().model_transaction_policy.decoupled)
    return any(each in models and _is_decoupled(each, models) for each in inner)
