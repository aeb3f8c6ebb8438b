"""Rules for the place of a model: backend, platform, instances, rate limiter, or an ensemble of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from repo_manager.triton_config.problems import Severity
from repo_manager.triton_config.rules.rule import Fault, Rule, is_tensorrt

__all__ = ["ENSEMBLE", "ENSEMBLE_RULES", "PLACEMENT_RULES"]


ENSEMBLE = "ensemble"
_PLATFORMS = {
    "tensorflow": ("tensorflow_graphdef", "tensorflow_savedmodel"),
    "tensorrt": ("tensorrt_plan",),
    "onnxruntime": ("onnxruntime_onnx",),
    "pytorch": ("pytorch_libtorch", "torch_aoti"),
}
"""Backend -> its platforms (`GetBackendTypeFromPlatform`). Other backends take any platform."""
_PLATFORMS_ALONE = {"libtorch", *(platform for platforms in _PLATFORMS.values() for platform in platforms)}
"""From these Triton fills in the backend (`AutoCompleteBackendFields`)."""


_BACKENDS = {*_PLATFORMS, "python", "openvino", "dali", "fil", "tensorrtllm", "vllm", "identity", "repeat", "square"}


def _backend(message: Any) -> Iterator[Fault]:
    """The backend or platform is one Triton knows, and an ensemble has none."""
    backend, platform = message.backend, message.platform
    if not backend and not platform:
        if message.WhichOneof("scheduling_choice") != "ensemble_scheduling":  # an ensemble rule requires a platform
            text = "states no backend; Triton guesses it from the files"
            yield Fault(text, Severity.WARNING, "write the backend down")
    elif backend == ENSEMBLE:
        yield Fault('backend "ensemble" does not exist', hint='write platform: "ensemble", and no backend')
    elif "/" in backend:
        yield Fault(f"backend {backend!r} is no name of a backend")
    elif backend not in _BACKENDS and backend.lower() in _BACKENDS:
        yield Fault(f"backend {backend!r} does not exist; Triton's is {backend.lower()!r}")
    elif platform == ENSEMBLE:
        if backend:
            yield Fault(f'platform "ensemble" has no backend; found backend: "{backend}"', hint="remove the backend")
    elif not backend:
        if platform not in _PLATFORMS_ALONE:
            yield Fault(f'platform "{platform}" is unknown to Triton', hint="state the backend instead")
    elif backend in _PLATFORMS and platform and platform not in _PLATFORMS[backend]:
        expected = " or ".join(f'"{each}"' for each in _PLATFORMS[backend])
        yield Fault(
            f'platform "{platform}" does not belong to backend "{backend}"; expected {expected}',
            hint="remove the platform: Triton fills it in",
        )


def _batch_size(message: Any) -> Iterator[Fault]:
    """`max_batch_size` is 0 or more."""
    if message.max_batch_size < 0:
        yield Fault(f"max_batch_size is {message.max_batch_size}; expected 0 or more")


def _instance_groups(message: Any) -> Iterator[Fault]:
    """A group on the CPU lists no GPUs, and a group has a count."""
    for group in message.instance_group:
        kind = group.Kind.Name(group.kind)
        if group.kind in (group.KIND_CPU, group.KIND_MODEL) and group.gpus:
            yield Fault(f"an instance group of {kind} lists GPUs {list(group.gpus)}")
        if group.count < 0:
            text = f"an instance group has count {group.count}; Triton takes its default instead"
            yield Fault(text, Severity.WARNING, "write a count of 1 or more")


def _profiles(message: Any) -> Iterator[Fault]:
    """A profile is the index of a TensorRT profile."""
    for group in message.instance_group:
        for profile in group.profile:
            if not is_tensorrt(message):
                yield Fault(f"an instance group names profile {profile!r}, which only TensorRT models have")
            elif not profile.strip().isdecimal():
                yield Fault(f"an instance group names profile {profile!r}; expected the index of a profile, from 0")


def _rate_limiter(message: Any) -> Iterator[Fault]:
    """Resources and priorities of the rate limiter, obeyed by a server only if told to."""
    resources = [each for group in message.instance_group for each in group.rate_limiter.resources]
    everywhere = {each.name for each in resources if getattr(each, "global")}
    for name in sorted({each.name for each in resources if not getattr(each, "global")} & everywhere):
        text = f"resource {name!r} of the rate limiter is both global and per device"
        yield Fault(text, Severity.WARNING, "a server with --rate-limit=execution_count refuses it")
    if any(group.HasField("rate_limiter") for group in message.instance_group):
        text = "rate_limiter has no effect unless the server runs with --rate-limit=execution_count"
        yield Fault(text, Severity.WARNING)


def _metrics(message: Any) -> Iterator[Fault]:
    """A metric control names a family and its buckets."""
    if "model_metrics" not in message.DESCRIPTOR.fields_by_name or not message.HasField("model_metrics"):
        return
    text = "model_metrics is unknown to Triton 2.51 and older, which refuse the model"
    yield Fault(text, Severity.WARNING, "leave it out for such a server")
    for control in message.model_metrics.metric_control:
        if not control.metric_identifier.family:
            yield Fault("a metric_control has no metric_identifier with a family")
        if not control.histogram_options.buckets:
            yield Fault("a metric_control has no histogram_options with buckets")


PLACEMENT_RULES = (
    Rule("backend", "ValidateModelConfig", _backend),
    Rule("max-batch-size", "ValidateModelConfig", _batch_size),
    Rule("instance-group", "ValidateInstanceGroup", _instance_groups),
    Rule("instance-group-profile", "ValidateInstanceGroup", _profiles),
    Rule("rate-limiter", "RateLimiter::ResourceManager", _rate_limiter),
    Rule("model-metrics", "ValidateModelMetrics", _metrics),
)


# Rules for the data flow inside an ensemble. Rules about its models are elsewhere.


def _is_ensemble(message: Any) -> bool:
    return bool(message.HasField("ensemble_scheduling"))


def _shape_of_an_ensemble(message: Any) -> Iterator[Fault]:
    """An ensemble has its scheduling, and none of the fields of its models."""
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
    """Every step of an ensemble names a model, its inputs and its outputs."""
    if _is_ensemble(message) and not message.ensemble_scheduling.step:
        yield Fault("ensemble_scheduling has no step")
    for index, step in enumerate(message.ensemble_scheduling.step):
        label = f"step {index} of ensemble_scheduling ({step.model_name or 'no model'})"
        for field in ("model_name", "input_map", "output_map"):
            if not getattr(step, field):
                yield Fault(f"{label} has no {field}")


def _makers(message: Any) -> Iterator[Fault]:
    """Each tensor of an ensemble comes from one step."""
    made = [name for step in message.ensemble_scheduling.step for name in step.output_map.values()]
    for name in sorted({name for name in made if made.count(name) > 1}):
        yield Fault(f"ensemble tensor {name!r} is the output of {made.count(name)} steps; expected one")


def _flow(message: Any) -> Iterator[Fault]:
    """Follow the tensors from the ensemble's inputs, as ValidateEnsembleSchedulingConfig does.

    A tensor is ready when every input of its step is ready. A never ready output waits for a tensor nobody makes, or
    for itself (a cycle).
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
