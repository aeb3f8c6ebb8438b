"""Putting a version into service: plan, apply, verify, undo."""

from repo_manager.rollout.amount import Amount
from repo_manager.rollout.canary import CanaryOptions, CanaryRollout, run_canary
from repo_manager.rollout.canary_gates import Gate, parse_gates
from repo_manager.rollout.canary_steps import CanaryStep, parse_steps, run_steps
from repo_manager.rollout.canary_weights import FileWeights, PublishedWeights, Weights
from repo_manager.rollout.deploy import deploy, rollback
from repo_manager.rollout.fleet import FleetRollout, deploy_fleet, rollback_fleet
from repo_manager.rollout.plan import Action, RolloutPlan, VersionPlan, plan_deploy
from repo_manager.rollout.preflight import Check, Outcome
from repo_manager.rollout.result import Rollout, RolloutOptions
from repo_manager.rollout.shadow import ShadowOptions, ShadowReport
from repo_manager.rollout.smoke import OutputComparison, SmokeFailedError, SmokeResult, smoke_test
from repo_manager.rollout.status import ModelStatus, status
from repo_manager.rollout.targets import Target, is_one_server, resolve_targets

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
