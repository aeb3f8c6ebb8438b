"""The form of a rule: every module of rules builds its table from these two types."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from repo_manager.triton_config.problems import Severity

__all__ = ["Fault", "Rule", "is_tensorrt"]


@dataclasses.dataclass(frozen=True)
class Fault:
    """A breach of a rule.

    Attributes:
        what: the finding and the expectation.
        severity: an error keeps the model from loading.
        hint: the next step. Empty when the text says it.
        curable: whether a server may cure it by completing the configuration, as servers do by default.
    """

    what: str
    severity: Severity = Severity.ERROR
    hint: str = ""
    curable: bool = False


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule of Triton's.

    Attributes:
        name: stable, for reports and for suppressing a finding.
        source: the function of triton-inference-server/core behind it.
        check: takes a `model_config_pb2.ModelConfig`. Yields each breach.
    """

    name: str
    source: str
    check: Callable[[Any], Iterator[Fault]]


def is_tensorrt(message: Any) -> bool:
    """Return whether Triton takes a configuration for a TensorRT model's. It fills in the platform of the backend.

    Without both it may be one: Triton then tells by the files.
    """
    return bool(message.platform == "tensorrt_plan" or (not message.platform and message.backend in ("tensorrt", "")))
