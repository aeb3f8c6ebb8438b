"""Rules for the data flow inside an ensemble; what its models say about it is not here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from repo_manager.triton_config.rules.placement import ENSEMBLE
from repo_manager.triton_config.rules.rule import Fault, Rule

__all__ = ["ENSEMBLE_RULES"]


def _is_ensemble(message: Any) -> bool:
    return bool(message.HasField("ensemble_scheduling"))


def _shape_of_an_ensemble(message: Any) -> Iterator[Fault]:
    if not _is_ensemble(message):
        if message.platform == ENSEMBLE:
            yield Fault('platform "ensemble" needs ensemble_scheduling, which says what the ensemble consists of')
        return
    if message.platform != ENSEMBLE:
        yield Fault('ensemble_scheduling needs platform: "ensemble"')
    for field, given in (
        ("instance_group", bool(message.instance_group)),
        ("optimization", message.HasField("optimization")),
        ("model_warmup", bool(message.model_warmup)),
    ):
        if given:
            yield Fault(f"an ensemble has no {field}: its models have their own", hint=f"remove {field}")


def _steps(message: Any) -> Iterator[Fault]:
    if _is_ensemble(message) and not message.ensemble_scheduling.step:
        yield Fault("ensemble_scheduling has no step")
    for index, step in enumerate(message.ensemble_scheduling.step):
        label = f"step {index} of ensemble_scheduling ({step.model_name or 'no model'})"
        for field in ("model_name", "input_map", "output_map"):
            if not getattr(step, field):
                yield Fault(f"{label} has no {field}")


def _makers(message: Any) -> Iterator[Fault]:
    made = [name for step in message.ensemble_scheduling.step for name in step.output_map.values()]
    for name in sorted({name for name in made if made.count(name) > 1}):
        yield Fault(f"ensemble tensor {name!r} is the output of {made.count(name)} steps; expected one")


def _flow(message: Any) -> Iterator[Fault]:
    """Follow the tensors from the ensemble's inputs, as ValidateEnsembleSchedulingConfig does.

    A tensor is ready when every input of the step that makes it is ready. An output that never gets ready waits for a
    tensor that nobody makes, or for itself (a cycle).
    """
    steps = message.ensemble_scheduling.step
    if not _is_ensemble(message) or not steps:
        return
    used = {name for step in steps for name in step.input_map.values()}
    sources = {made: set(step.input_map.values()) for step in steps for made in step.output_map.values()}
    ready = {tensor.name for tensor in message.input}
    while added := {made for made, needs in sources.items() if made not in ready and needs <= ready}:
        ready |= added
    outputs = {tensor.name for tensor in message.output}
    for name in sorted({tensor.name for tensor in message.input} - used - set(sources)):
        yield Fault(f"input {name!r} of the ensemble is used by no step")
    for name in sorted(outputs - used - set(sources)):
        yield Fault(f"output {name!r} of the ensemble is made by no step")
    for name in sorted((used | set(sources)) - ready):
        if name in sources:
            missing = sorted(sources[name] - ready)
            text = f"waits for {', '.join(map(repr, missing))}, which no step makes in time"
            yield Fault(f"ensemble tensor {name!r} {text}")
        else:
            yield Fault(f"ensemble tensor {name!r} is read, and neither an input nor made by a step")
    for name in sorted((set(sources) & ready) - used - outputs):
        yield Fault(f"ensemble tensor {name!r} is made and never used", hint="leave it out of the output_map")


ENSEMBLE_RULES = (
    Rule("ensemble", "ValidateEnsembleSchedulingConfig", _shape_of_an_ensemble),
    Rule("ensemble-step", "BuildEnsembleGraph", _steps),
    Rule("ensemble-tensor-makers", "BuildEnsembleGraph", _makers),
    Rule("ensemble-data-flow", "ValidateEnsembleSchedulingConfig", _flow),
)
