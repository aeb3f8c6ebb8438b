"""Triton's own rules for a configuration, checked before a server does.

Each rule is one row of a table: a name, the function of Triton that it restates, and a check. The rules follow
`ValidateModelConfig`, `ValidateModelIOConfig`, `ValidateBatchIO`, `ValidateInstanceGroup`,
`ValidateEnsembleSchedulingConfig`, the sequence scheduler and the warm-up of
triton-inference-server/core (2.51 to 2.71).
Rules that need other models or files are not here.
"""

from __future__ import annotations

from repo_manager.triton_config.config import ModelConfig
from repo_manager.triton_config.problems import Problem
from repo_manager.triton_config.rules.placement import ENSEMBLE_RULES, PLACEMENT_RULES
from repo_manager.triton_config.rules.rule import Rule
from repo_manager.triton_config.rules.scheduling import BATCHING_RULES, SEQUENCE_RULES
from repo_manager.triton_config.rules.tensors import TENSOR_RULES, WARMUP_RULES

__all__ = ["COMPLETED_RULES", "RULES", "Rule", "check_rules"]

RULES: tuple[Rule, ...] = (
    *PLACEMENT_RULES,
    *TENSOR_RULES,
    *BATCHING_RULES,
    *SEQUENCE_RULES,
    *ENSEMBLE_RULES,
    *WARMUP_RULES,
)
COMPLETED_RULES = frozenset({"tensor-data-type", "tensor-dims"})
"""What a server with auto-completion may fill in."""


def check_rules(config: ModelConfig, *, where: str = "config.pbtxt") -> list[Problem]:
    """Check a configuration by itself, without a model.

    Args:
        config: any configuration.
        where: the subject of the findings.

    Returns:
        What keeps a model of this configuration from loading, and what a person should look at; each with its rule.
    """
    message = config.message()
    return [
        Problem(where, fault.what, fault.severity, fault.hint, rule=rule.name)
        for rule in RULES
        for fault in rule.check(message)
    ]
