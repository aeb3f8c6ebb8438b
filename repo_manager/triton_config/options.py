"""The choices in a model's configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from repo_manager.errors import ConfigError
from repo_manager.validation import check_fields

__all__ = ["DEFAULT_MAX_BATCH_SIZE", "ConfigOptions", "InstanceKind"]

DEFAULT_MAX_BATCH_SIZE = 8
InstanceKind = Literal["auto", "cpu", "gpu"]
"""Where instances run, see `ConfigOptions.instance_kind`."""


def _written(path: str, *, default: Any) -> Any:
    """Declare a choice of one field of config.pbtxt, written where it differs from Triton's default.

    Args:
        path: the field, as `set_fields` takes it.
        default: default of the choice. At this value the field is not written.
    """
    return dataclasses.field(default=default, metadata={"field": path})


@dataclasses.dataclass(frozen=True)
class ConfigOptions:
    """Choices the model itself does not decide.

    A choice of one field of config.pbtxt is one line here, and an option of `add` if people need it.

    Attributes:
        max_batch_size: `None`: 8 when the model has a batch axis, else 0. 0 on a batched model leaves the batch axis
            in the dims, and Triton then joins no requests.
        instance_count: instances per GPU (`gpu`) or in all (`cpu`). `None`: 1.
        instance_kind: `cpu`, `gpu`, or `auto`: Triton then takes every GPU it sees and the backend can use, else the
            CPU. A `gpu` model does not load on a server without a GPU.
        dynamic_batching: let Triton join waiting requests. Used only when `max_batch_size` > 0.
        preferred_batch_sizes: sizes the batcher prefers to wait for. Empty is best for most models.
        max_queue_delay_us: how long the batcher may hold a request back, in microseconds.
        labels: output name -> class labels, in order.
        warmup: run the model once per batch size 1 and maximum before it is READY.
        warmup_shapes: input name -> shape without the batch axis, for inputs whose config dims are dynamic.
        threads: ONNX Runtime's intra-op threads of each instance. `None`: its default (all cores).
        parameters: more `parameters` of the backend.
        model_filename: the file in the version's folder. `None`: the backend's default.
        fields: any other field of config.pbtxt -> its value, as `set_fields` takes them.
    """

    max_batch_size: int | None = None
    instance_count: int | None = None
    instance_kind: str = "auto"
    dynamic_batching: bool = True
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_us: int = _written("dynamic_batching.max_queue_delay_microseconds", default=0)
    labels: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    warmup: bool = False
    warmup_shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    threads: int | None = None
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    model_filename: str | None = None
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def written(self) -> dict[str, str]:
        """Return the fields of config.pbtxt set as they are -> their values."""
        single = {
            field.metadata["field"]: str(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if "field" in field.metadata and getattr(self, field.name) != field.default
        }
        return {**single, **self.fields}

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_batch_size is not None and not 0 <= self.max_batch_size < 2**31:
            raise ConfigError(f"max_batch_size is {self.max_batch_size}; expected 0 or more")
        if self.instance_count is not None and self.instance_count < 1:
            raise ConfigError(f"instance_count is {self.instance_count}; expected 1 or more")
        kinds = get_args(InstanceKind)
        if self.instance_kind not in kinds:
            raise ConfigError(f"instance_kind is {self.instance_kind!r}; expected {', '.join(kinds)}")
        if self.max_queue_delay_us < 0:
            raise ConfigError(f"max_queue_delay_us is {self.max_queue_delay_us}; expected 0 or more")
        if self.threads is not None and self.threads < 0:
            raise ConfigError(f"threads is {self.threads}; expected 0 (ONNX Runtime decides) or more")
