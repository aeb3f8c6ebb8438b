"""The schema of a repository.yaml: the models behind docs/repository.schema.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

__all__ = [
    "NOTES_PREFIX",
    "Batching",
    "Config",
    "Conversion",
    "Declaration",
    "Engine",
    "Evaluation",
    "FileReference",
    "Instances",
    "Model",
    "Shape",
    "json_schema",
]

SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"
NOTES_PREFIX = "x-"
"""Keys at the top with this beginning are not read: places for anchors."""

Count = Annotated[int, pydantic.Field(strict=True, ge=1, le=2**31 - 1)]
Size = Annotated[int, pydantic.Field(strict=True, ge=0, le=2**31 - 1)]
Flag = Annotated[bool, pydantic.Field(strict=True)]
Number = Annotated[int, pydantic.Field(strict=True, ge=1, le=2**63 - 1)]
Text = Annotated[str, pydantic.Field(min_length=1, pattern=r"^[^\x00]*$")]
Digest = Annotated[str, pydantic.Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Served = Number | Literal["newest"] | Text


class _Part(pydantic.BaseModel):
    """A mapping of the file: no key it does not know, and no later change."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FileReference(_Part):
    """A file, and its digest. A text alone is its path."""

    path: Text
    """Relative to this file. For a source also a URL, as `add` takes it: s3://, gs://, as://, https://, models:/NAME/1.
    For calibration also a folder, or `module:function`."""
    digest: Digest | None = None
    """The digest it must have. A version made from it needs the file itself no more."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: pydantic.GetJsonSchemaHandler) -> dict[str, Any]:
        """Offer the short form to editors as well."""
        full = handler(core_schema)
        resolved = handler.resolve_ref_schema(full)
        described = {"description": resolved.get("description", "")}
        return {**described, "anyOf": [{"type": "string", "minLength": 1}, dict(resolved)]}


class Shape(_Part):
    """Shapes an engine takes for an input, batch axis included. A list alone is the one shape."""

    min: tuple[Count, ...]
    opt: tuple[Count, ...]
    max: tuple[Count, ...]

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return {"min": value, "opt": value, "max": value} if isinstance(value, list) else value

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Shape:
        sizes = (self.min, self.opt, self.max)
        if len({len(shape) for shape in sizes}) > 1:
            raise ValueError("min, opt and max must have the same number of axes")
        if any(not low <= best <= high for low, best, high in zip(*sizes, strict=True)):
            raise ValueError("min <= opt <= max must hold on every axis")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: pydantic.GetJsonSchemaHandler) -> dict[str, Any]:
        """Offer the short form to editors as well."""
        resolved = handler.resolve_ref_schema(handler(core_schema))
        sizes = {"type": "array", "items": {"type": "integer", "minimum": 1}}
        return {"description": resolved.get("description", ""), "anyOf": [sizes, dict(resolved)]}


class Conversion(_Part):
    """Gates and exceptions of the conversion, as the options of `add`."""

    keep_fp32: tuple[Text, ...] = ()
    """Patterns of layers to leave in FP32."""
    auto_keep: Size = 0
    """Search up to so many layers to keep, so the gate passes."""
    max_drift: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] | None = None
    """Largest relative error of an output against the source."""


class Evaluation(_Part):
    """Accuracy on held-out data, as `--eval` of `add`. A text alone is the data."""

    data: Text
    """`FILE.npz:LABELS` or `FILE.npz:LABELS:OUTPUT`, the file relative to this one, or `module:function`."""
    min_accuracy: Annotated[float, pydantic.Field(allow_inf_nan=False)] | None = None
    """The smallest accuracy accepted."""
    max_accuracy_drop: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] | None = None
    """How far it may be below the source's."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"data": value} if isinstance(value, str) else value

    @pydantic.field_validator("data")
    @classmethod
    def _named(cls, value: str) -> str:
        if ":" not in value:
            raise ValueError("expected FILE.npz:LABELS, FILE.npz:LABELS:OUTPUT, or module:function")
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: pydantic.GetJsonSchemaHandler) -> dict[str, Any]:
        """Offer the short form to editors as well."""
        resolved = handler.resolve_ref_schema(handler(core_schema))
        described = {"description": resolved.get("description", "")}
        return {**described, "anyOf": [{"type": "string", "minLength": 1}, dict(resolved)]}


class Engine(_Part):
    """How an engine is built, as the options of `add`. The onnxruntime backend has none."""

    sparse: Flag = True
    """Offer 2:4 weights to sparse kernels."""
    workspace_bytes: Count | None = None
    """Scratch memory of a kernel."""
    optimization_level: Annotated[int, pydantic.Field(strict=True, ge=0, le=5)] | None = None
    """0 (fast build) to 5 (fast engine)."""
    version_compatible: Flag = False
    """Also for later versions of the same major one."""
    hardware_compatibility: Literal["ampere_plus", "same_compute_capability"] | None = None
    """For more than the GPU at hand."""
    compute_capabilities: tuple[Annotated[str, pydantic.Field(pattern=r"^\d+\.\d+$")], ...] = ()
    """TensorRT-RTX: the GPUs it is for, such as "8.9" in quotes. None: all."""
    strip: Flag = False
    """Leave the weights out."""
    refit: Flag = False
    """Allow other weights later."""


class Instances(_Part):
    """The number of copies of the model, and their place: the first instance group of config.pbtxt."""

    count: Count = 1
    """Copies for each GPU, or in all on the CPU."""
    kind: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto`: every GPU the server sees, else the CPU."""


class Batching(_Part):
    """How waiting requests are joined."""

    max_queue_delay_us: Size = 0
    """How long a request may wait for others, in microseconds."""
    preferred_batch_sizes: tuple[Count, ...] = ()
    """Sizes the batcher prefers to wait for."""


class Config(_Part):
    """Fields of config.pbtxt. Undeclared ones stay as they are."""

    tuned: FileReference | None = None
    """A result of `tune --json`: its changes of this model are declared, except for fields given here."""
    max_batch_size: Size | None = None
    """0: no batching."""
    instance_group: Instances | None = None
    dynamic_batching: Batching | Flag | None = None
    """`false` takes it away, `true` adds it where there is none."""
    set: dict[Text, str | int | bool | None] = pydantic.Field(default_factory=dict)
    """Any other field, as `repo-manager config --set`. `null` clears it."""


class Model(_Part):
    """One model."""

    source: FileReference | None = None
    """The ONNX file. Without one the model must be in the repository already."""
    precision: Literal["fp32", "fp16", "bf16", "int8", "int8+fp16"] = "fp32"
    calibration: FileReference | None = None
    """Representative inputs: .npz, a folder, or `module:function`. INT8 needs them."""
    backend: Literal["auto", "onnxruntime", "tensorrt", "tensorrt_rtx"] = "auto"
    """`auto`: the existing model's, else by this machine."""
    sparsity: Literal["require", "report", "prune"] = "report"
    """Weights without the 2:4 pattern: fail, report, or prune them."""
    shapes: dict[Text, Shape] = pydantic.Field(default_factory=dict)
    """Shapes of an engine's inputs."""
    eval: Evaluation | None = None
    """Held-out data a new version is scored on, and its limits. An existing version is not scored again: its recorded
    score is compared with the limits."""
    convert: Conversion = Conversion()
    engine: Engine = Engine()
    config: Config = Config()
    labels: dict[Text, FileReference | tuple[Text, ...]] = pydantic.Field(default_factory=dict)
    """Class labels of an output: a list, or a file with one a line."""
    tags: dict[Text, Number | Literal["newest"]] = pydantic.Field(default_factory=dict)
    """Names for versions. `newest` is the version of the source."""
    serve: Served | tuple[Number, ...] | None = None
    """The version to serve: `newest` (the one of the source), a number, a tag, or several numbers. Left out: as it
    is."""
    versions: tuple[Number, ...] = ()
    """Number of versions `--prune` leaves, besides those used."""
    targets: tuple[Text, ...] | None = None
    """Servers for it, in place of the file's."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Model:
        if self.source is None and (self.calibration is not None or self.sparsity == "prune"):
            raise ValueError("calibration and sparsity: prune need a source")
        if self.source is None and self.eval is not None:
            raise ValueError("eval needs a source")
        if self.precision.startswith("int8") and self.source is not None and self.calibration is None:
            raise ValueError(f"precision {self.precision} needs calibration data")
        if isinstance(self.serve, tuple) and not self.serve:
            raise ValueError("serve is an empty list; a model serves at least one version")
        if isinstance(self.serve, tuple) and len(self.serve) > 1 and self.targets:
            raise ValueError("several versions can be served by the policy only; targets take one")
        return self


class Declaration(_Part):
    """The declared state of a model repository: `repo-manager apply FILE` brings it about."""

    schema_version: Literal[1] = 1
    """Of this format."""
    targets: tuple[Text, ...] = ()
    """Servers of all models without their own: URLs, dns://NAME:PORT, @FILE."""
    models: dict[Text, Model]
    """Name -> model."""


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema for editors (docs/repository.schema.json)."""
    schema = Declaration.model_json_schema()
    notes: dict[str, Any] = {"patternProperties": {f"^{NOTES_PREFIX}": {}}}
    return {"$schema": SCHEMA_ID, **schema, **notes, "title": "repository.yaml of repo-manager"}
