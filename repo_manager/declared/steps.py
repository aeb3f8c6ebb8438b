"""The plan of `apply`: one plan a model, one step a change."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repo_manager.declared.request import Request
from repo_manager.declared.schema import Config, Evaluation, FileReference, Model
from repo_manager.errors import InputError
from repo_manager.files import sha256_bytes, url_parts
from repo_manager.summary import Summarized
from repo_manager.triton_config.config import parse_config

__all__ = [
    "ApplyResult",
    "ModelPlan",
    "ModelResult",
    "Step",
    "StepAction",
    "config_changes",
    "request_of",
    "wanted_labels",
]


class StepAction(str, enum.Enum):
    """One kind of change, in the order of appearance made."""

    CONFIG = "config"
    BUILD = "build"
    LABELS = "labels"
    TAG = "tag"
    SERVE = "serve"
    DEPLOY = "deploy"
    UNLOAD = "unload"
    REMOVE = "remove"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class Step:
    """One change.

    Attributes:
        action: kind of the step. It decides, too, about the fields in use.
        what: the step in words, without the model's name.
        version: the version it is about. `None`: the one this plan builds, or the whole model.
        versions: the versions to serve. 0 is the version this plan builds.
        changes: of config.pbtxt, as `change_config` takes them. Empty for a model without versions, whose config.pbtxt
            is derived first and then compared with the declared fields.
        labels: output -> its labels, in the order of the classes. They replace the present ones.
        tag: the tag to set on `version`. Empty for any other step.
        targets: addresses of the servers to act on.
    """

    action: StepAction
    what: str
    version: int | None = None
    versions: tuple[int, ...] = ()
    changes: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict, metadata={"json": False})
    tag: str = ""
    targets: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelPlan:
    """The plan for one model.

    Attributes:
        name: name of the model, from the file, or from the repository if undeclared.
        declared: whether the file declares it.
        version: the version of its source. `None` when it must be built, or there is no source.
        steps: in order. Empty when everything is as declared.
        error: why it cannot be brought to the declared state. Nothing is done then.
        exit_code: of that error. 0 without one.
        request: the request for a build.
    """

    name: str
    declared: bool
    version: int | None
    steps: tuple[Step, ...]
    error: str | None = None
    exit_code: int = 0
    request: Request | None = dataclasses.field(default=None, repr=False, metadata={"json": False})

    @property
    def builds(self) -> bool:
        """Whether a model is converted."""
        return any(step.action is StepAction.BUILD for step in self.steps)


@dataclasses.dataclass(frozen=True)
class ModelResult:
    """The changes made to one model.

    Attributes:
        name: name of the model, as in its `ModelPlan`.
        done: the steps made, in words.
        version: the version built. `None` when none was.
        error: why the rest was not done. `None` when all was.
        exit_code: of that error. 0 without one.
    """

    name: str
    done: tuple[str, ...]
    version: int | None
    error: str | None
    exit_code: int


@dataclasses.dataclass(frozen=True, repr=False)
class ApplyResult(Summarized):
    """The result of `apply`.

    Attributes:
        models: the models with a step, in order.
        unchanged: how many were as declared already.
        seconds: wall time of the steps, without the planning before them.
    """

    models: tuple[ModelResult, ...]
    unchanged: int
    seconds: float

    def _summary(self) -> Mapping[str, Any]:
        return {
            "changed": ", ".join(model.name for model in self.models if model.done) or "nothing",
            "unchanged": self.unchanged,
            "failed": ", ".join(model.name for model in self.failed) or None,
        }

    @property
    def failed(self) -> tuple[ModelResult, ...]:
        """Models not in the declared state."""
        return tuple(model for model in self.models if model.error is not None)


# Translate a declared model into arguments of the repository's functions.

_DELAY = "dynamic_batching.max_queue_delay_microseconds"
_PREFERRED = "dynamic_batching.preferred_batch_size"


def request_of(model: Model, base: Path, backend: str | None) -> Request | None:
    """Return the request for a version of a declared model, or `None` without a source.

    Args:
        model: the model as the file declares it.
        base: the folder of the YAML file.
        backend: backend of the existing model, for `auto`. `None`: there is no such model.
    """
    if model.source is None:
        return None
    calibration = None if model.calibration is None else _calibration(model.calibration, base)
    engine = _not_default(model.engine)
    if model.shapes:
        engine["shapes"] = {
            name: {"min": list(shape.min), "opt": list(shape.opt), "max": list(shape.max)}
            for name, shape in sorted(model.shapes.items())
        }
    return Request(
        source=base / model.source.path,
        url=model.source.path if url_parts(model.source.path) else "",
        digest=model.source.digest,
        precision=model.precision,
        backend=backend if model.backend == "auto" else model.backend,
        sparsity=model.sparsity,
        calibration=calibration,
        calibration_digest=None if model.calibration is None else model.calibration.digest,
        convert=_not_default(model.convert),
        engine=engine,
        accuracy={} if model.eval is None else _accuracy(model.eval, base),
    )


def config_changes(name: str, config: Config, text: str, base: Path, *, where: str) -> dict[str, str | None]:
    """Return the fields `change_config` must set for a config.pbtxt with the declared values.

    Args:
        name: name of the model. It selects the changes in the result of a tuning.
        config: the declared fields of config.pbtxt.
        text: text of the present config.pbtxt.
        base: the folder of the YAML file.
        where: its name in an error.

    Raises:
        ConfigError: the text cannot be parsed.
        InputError: the result of a tuning cannot be read, has another digest than the pinned one, or is about other
            models.
    """
    message = parse_config(text, where=where).message()
    changes = {} if config.tuned is None else _tuned(name, config.tuned, base)
    if config.max_batch_size is not None:
        changes["max_batch_size"] = str(config.max_batch_size)
    if config.instance_group is not None:
        changes["instance_group.count"] = str(config.instance_group.count)
        changes["instance_group.kind"] = f"KIND_{config.instance_group.kind.upper()}"
    batching = config.dynamic_batching
    if batching is False:
        changes["dynamic_batching"] = None
    elif batching is not None:
        if not message.HasField("dynamic_batching"):
            changes["dynamic_batching"] = "{}"
        if batching is not True:
            changes[_DELAY] = str(batching.max_queue_delay_us) if batching.max_queue_delay_us else None
            sizes = ", ".join(map(str, batching.preferred_batch_sizes))
            changes[_PREFERRED] = f"[{sizes}]" if sizes else None
    changes.update({field: _field_text(value) for field, value in config.set.items()})
    return changes


def _tuned(name: str, reference: FileReference, base: Path) -> dict[str, str | None]:
    """Return a tuning's changes of a model.

    Raises:
        InputError: as `config_changes`.
    """
    path = base / reference.path
    try:
        content = path.read_bytes()
        document = json.loads(content)
        models, changes = set(document["versions"]), dict(document["changes"].get(name, {}))
    except OSError as exc:
        raise InputError(f"{path}: the tuning cannot be read: {exc.strerror or exc}") from exc
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise InputError(
            f"{path} is no result of a tuning", hint=f"Make one: repo-manager tune {name} --json > {path.name}"
        ) from exc
    if reference.digest is not None and sha256_bytes(content) != reference.digest:
        raise InputError(
            f"{path} differs from its pinned digest: {reference.digest}",
            hint="Put the right file there, or change `digest:` in the YAML file.",
        )
    if name not in models:
        raise InputError(f"{path} is a tuning of {', '.join(sorted(models)) or 'nothing'}, not of {name}")
    return {str(field): None if value is None else str(value) for field, value in changes.items()}


def wanted_labels(labels: Mapping[str, FileReference | tuple[str, ...]], base: Path) -> dict[str, tuple[str, ...]]:
    """Return output -> labels, files read.

    Raises:
        InputError: a file cannot be read.
    """
    return {
        output: wanted if isinstance(wanted, tuple) else _read_labels(base / wanted.path)
        for output, wanted in labels.items()
    }


def _read_labels(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as exc:
        raise InputError(f"{path}: the labels cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise InputError(f"{path}: the labels are not UTF-8 text: {exc}") from exc
    return tuple(line.strip() for line in lines if line.strip())


def _calibration(reference: FileReference, base: Path) -> str:
    """A path relative to the file. `module:function` stays as it is."""
    path = base / reference.path
    return reference.path if ":" in reference.path and not path.exists() else str(path)


def _accuracy(declared: Evaluation, base: Path) -> dict[str, Any]:
    """The file is relative to the YAML file. `module:function` stays as it is."""
    data = str(base / declared.data) if ".npz:" in declared.data else declared.data
    return {"data": data, "min_accuracy": declared.min_accuracy, "max_drop": declared.max_accuracy_drop}


def _not_default(part: Any) -> dict[str, Any]:
    found = part.model_dump(mode="json", exclude_defaults=True)
    return {key: found[key] for key in found if found[key] is not None}


def _field_text(value: str | int | bool | None) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return str(value).lower() if isinstance(value, bool) else str(value)
