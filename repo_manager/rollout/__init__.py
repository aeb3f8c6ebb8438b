"""Putting a version into service: plan, apply, verify, undo.

On one server: `deploy.py`, step by step in `attempt.py`; what is found before it (`plan.py`, `preflight.py`) and
after it (`smoke.py`, `status.py`). On several servers: `fleet/`. On trial beside the old version: `trial/`. In
Kubernetes, in KServe or behind a gateway: `targets/`. What a load will do to each version: `prediction/`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from repo_manager.lazy import lazy_exports
from repo_manager.rollout.checks import Check, Outcome
from repo_manager.rollout.deploy import deploy, rollback
from repo_manager.rollout.fleet.amount import Amount
from repo_manager.rollout.fleet.deploy import deploy_fleet, rollback_fleet
from repo_manager.rollout.fleet.result import FleetRollout
from repo_manager.rollout.plan import Action, RolloutPlan, VersionPlan, plan_deploy
from repo_manager.rollout.result import Rollout, RolloutOptions
from repo_manager.rollout.smoke import OutputComparison, SmokeFailedError, SmokeResult, smoke_test
from repo_manager.rollout.status import ModelStatus, status
from repo_manager.rollout.targets.urls import Target, is_one_server, resolve_targets

if TYPE_CHECKING:
    from repo_manager.rollout.trial.canary import CanaryOptions, CanaryRollout, run_canary
    from repo_manager.rollout.trial.gates import Gate, parse_gates
    from repo_manager.rollout.trial.shadow import ShadowOptions, ShadowReport
    from repo_manager.rollout.trial.steps import CanaryStep, parse_steps, run_steps
    from repo_manager.rollout.trial.weights import FileWeights, PublishedWeights, Weights

__all__ = [
    "Action",
    "Amount",
    "CanaryOptions",
    "CanaryRollout",
    "CanaryStep",
    "Check",
    "FileWeights",
    "FleetRollout",
    "Gate",
    "ModelStatus",
    "Outcome",
    "OutputComparison",
    "PublishedWeights",
    "Rollout",
    "RolloutOptions",
    "RolloutPlan",
    "ShadowOptions",
    "ShadowReport",
    "SmokeFailedError",
    "SmokeResult",
    "Target",
    "VersionPlan",
    "Weights",
    "deploy",
    "deploy_fleet",
    "is_one_server",
    "parse_gates",
    "parse_steps",
    "plan_deploy",
    "resolve_targets",
    "rollback",
    "rollback_fleet",
    "run_canary",
    "run_steps",
    "smoke_test",
    "status",
]

_MODULES = {
    "trial.canary": (
        "CanaryOptions",
        "CanaryRollout",
        "run_canary",
    ),
    "trial.gates": (
        "Gate",
        "parse_gates",
    ),
    "trial.shadow": (
        "ShadowOptions",
        "ShadowReport",
    ),
    "trial.steps": (
        "CanaryStep",
        "parse_steps",
        "run_steps",
    ),
    "trial.weights": (
        "FileWeights",
        "PublishedWeights",
        "Weights",
    ),
}
__getattr__ = lazy_exports(__name__, _MODULES)
