"""Triton's own rules for a configuration, checked before a server does.

Each rule is one row of a table: a name, the function of Triton it restates, and a check. The rules follow
`ValidateModelConfig`, `ValidateModelIOConfig`, `ValidateBatchIO`, `ValidateInstanceGroup`,
`ValidateEnsembleSchedulingConfig`, the sequence scheduler and the warm-up of triton-inference-server/core (2.51 to
2.71), and the parameters the onnxruntime and python backends check. Rules on other models or files are not here.
"""

from __future__ import annotations

from repo_manager.triton_config.config import ModelConfig
from repo_manager.triton_config.problems import Problem, Severity
from repo_manager.triton_config.rules.backends import BACKEND_RULES
from repo_manager.triton_config.rules.placement import ENSEMBLE_RULES, PLACEMENT_RULES
from repo_manager.triton_config.rules.rule import Rule
from repo_manager.triton_config.rules.scheduling import BATCHING_RULES, SEQUENCE_RULES
from repo_manager.triton_config.rules.tensors import TENSOR_RULES, WARMUP_RULES

__all__ = ["RULES", "Rule", "check_rules"]

RULES: tuple[Rule, ...] = (
    *PLACEMENT_RULES,
    *TENSOR_RULES,
    *BATCHING_RULES,
    *SEQUENCE_RULES,
    *ENSEMBLE_RULES,
    *WARMUP_RULES,
    *BACKEND_RULES,
)
# These backends complete inputs and outputs only if the configuration lists none.
_NEVER_CURED = {"onnxruntime", "tensorrt_rtx"}
_CURED = "the server may complete it; one with --disable-auto-complete-config refuses the model"


def check_rules(config: ModelConfig, *, where: str = "config.pbtxt", completes: bool = True) -> list[Problem]:
    """Check a configuration on its own, without a model.

    Args:
        config: configuration of the model (config.pbtxt).
        where: the subject of the findings.
        completes: whether the server completes configurations, as servers do by default. Fields a backend may fill in
            are then warnings.

    Returns:
        Faults by which a model of this configuration does not load, and others to look at. Each with its rule.
    """
    message = config.message()
    never = not completes or config.backend in _NEVER_CURED or message.HasField("ensemble_scheduling")
    return [
        Problem(where, fault.what, Severity.WARNING, _CURED, rule=rule.name)
        if fault.curable and not never
        else Problem(where, fault.what, fault.severity, fault.hint, rule=rule.name)
        for rule in RULES
        for fault in rule.check(message)
    ]
