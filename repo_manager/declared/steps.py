"""What `apply` would do: one plan a model, one step a change."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from repo_manager.declared.request import Request

__all__ = ["Action", "ApplyResult", "ModelPlan", "ModelResult", "Step"]


class Action(str, enum.Enum):
    """One kind of change, in the order in which they are made."""

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
        action: its kind.
        what: it in words.
        version: the version that it is about; `None`: the one that this plan builds, or the whole model.
        versions: the versions to serve.
        changes: of config.pbtxt, as `change_config` takes them; empty for a model without versions, whose
            config.pbtxt is derived first and then compared with what is declared.
        labels: output -> its labels.
        tag: the tag to set.
        targets: the servers.
    """

    action: Action
    what: str
    version: int | None = None
    versions: tuple[int, ...] = ()
    changes: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict, metadata={"json": False})
    tag: str = ""
    targets: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelPlan:
    """What is to be done about one model.

    Attributes:
        name: the model.
        declared: whether the file declares it.
        version: the version of its source; `None` when it has to be built, or there is no source.
        steps: in order; empty when everything is as declared.
        error: why it cannot be brought to what is declared; nothing is done then.
        exit_code: of that error; 0 without one.
        request: what a build is asked for.
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
        return any(step.action is Action.BUILD for step in self.steps)


@dataclasses.dataclass(frozen=True)
class ModelResult:
    """What was done about one model.

    Attributes:
        name: the model.
        done: the steps that were done, in words.
        version: the version that was built; `None` when none was.
        error: why the rest was not done; `None` when all was.
        exit_code: of that error; 0 without one.
    """

    name: str
    done: tuple[str, ...]
    version: int | None
    error: str | None
    exit_code: int


@dataclasses.dataclass(frozen=True)
class ApplyResult:
    """What was done.

    Attributes:
        models: those about which something had to be done, in order.
        unchanged: how many were as declared already.
        seconds: duration.
    """

    models: tuple[ModelResult, ...]
    unchanged: int
    seconds: float

    @property
    def failed(self) -> tuple[ModelResult, ...]:
        """Models that are not what is declared."""
        return tuple(model for model in self.models if model.error is not None)
