"""Putting a version into service: plan, apply, verify, undo."""

from repo_manager.rollout.amount import Amount
from repo_manager.rollout.deploy import deploy, rollback
from repo_manager.rollout.fleet import FleetRollout, deploy_fleet, rollback_fleet
from repo_manager.rollout.plan import Action, RolloutPlan, VersionPlan, plan_deploy
from repo_manager.rollout.preflight import Check, Outcome
from repo_manager.rollout.result import Rollout, RolloutOptions
from repo_manager.rollout.smoke import OutputComparison, SmokeFailedError, SmokeResult, smoke_test
from repo_manager.rollout.status import ModelStatus, status
from repo_manager.rollout.targets import Target, is_one_server, resolve_targets

__all__ = [
    "Action",
    "Amount",
    "Check",
    "FleetRollout",
    "ModelStatus",
    "Outcome",
    "OutputComparison",
    "Rollout",
    "RolloutOptions",
    "RolloutPlan",
    "SmokeFailedError",
    "SmokeResult",
    "Target",
    "VersionPlan",
    "deploy",
    "deploy_fleet",
    "is_one_server",
    "plan_deploy",
    "resolve_targets",
    "rollback",
    "rollback_fleet",
    "smoke_test",
    "status",
]
