"""Rules for what runs a model, and where: backend, platform, instance groups, rate limiter, metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from repo_manager.triton_config.problems import Severity
from repo_manager.triton_config.rules.rule import Fault, Rule, is_tensorrt

__all__ = ["ENSEMBLE", "PLACEMENT_RULES"]

ENSEMBLE = "ensemble"
_PLATFORMS = {
    "tensorflow": ("tensorflow_graphdef", "tensorflow_savedmodel"),
    "tensorrt": ("tensorrt_plan",),
    "onnxruntime": ("onnxruntime_onnx",),
    "pytorch": ("pytorch_libtorch", "torch_aoti"),
}
"""Backend -> its platforms (`GetBackendTypeFromPlatform`); other backends take any platform."""
_PLATFORMS_ALONE = {"libtorch", *(platform for platforms in _PLATFORMS.values() for platform in platforms)}
"""From these Triton fills in the backend (`AutoCompleteBackendFields`)."""


def _backend(message: Any) -> Iterator[Fault]:
    backend, platform = message.backend, message.platform
    if not backend and not platform:
        if message.WhichOneof("scheduling_choice") != "ensemble_scheduling":  # a rule of ensembles asks for it
            text = "states no backend; Triton guesses it from the files"
            yield Fault(text, Severity.WARNING, "write the backend down")
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
    if message.max_batch_size < 0:
        yield Fault(f"max_batch_size is {message.max_batch_size}; expected 0 or more")


def _instance_groups(message: Any) -> Iterator[Fault]:
    for group in message.instance_group:
        kind = group.Kind.Name(group.kind)
        if group.kind in (group.KIND_CPU, group.KIND_MODEL) and group.gpus:
            yield Fault(f"an instance group of {kind} lists GPUs {list(group.gpus)}")
        if group.count < 0:
            text = f"an instance group has count {group.count}; Triton takes its default instead"
            yield Fault(text, Severity.WARNING, "write a count of 1 or more")


def _profiles(message: Any) -> Iterator[Fault]:
    for group in message.instance_group:
        for profile in group.profile:
            if not is_tensorrt(message):
                yield Fault(f"an instance group names profile {profile!r}, which only TensorRT models have")
            elif not profile.strip().isdecimal():
                yield Fault(f"an instance group names profile {profile!r}; expected the index of a profile, from 0")


def _rate_limiter(message: Any) -> Iterator[Fault]:
    resources = [each for group in message.instance_group for each in group.rate_limiter.resources]
    everywhere = {each.name for each in resources if getattr(each, "global")}
    for name in sorted({each.name for each in resources if not getattr(each, "global")} & everywhere):
        text = f"resource {name!r} of the rate limiter is both global and per device"
        yield Fault(text, Severity.WARNING, "a server with --rate-limit=execution_count refuses it")
    if any(group.HasField("rate_limiter") for group in message.instance_group):
        text = "rate_limiter has no effect unless the server runs with --rate-limit=execution_count"
        yield Fault(text, Severity.WARNING)


def _metrics(message: Any) -> Iterator[Fault]:
    if "model_metrics" not in message.DESCRIPTOR.fields_by_name or not message.HasField("model_metrics"):
        return
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
