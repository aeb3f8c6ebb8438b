"""Putting a version into service: plan, apply, verify, undo."""

from repo_manager.rollout.deploy import deploy, rollback
from repo_manager.rollout.fleet import FleetRollout, deploy_fleet
from repo_manager.rollout.plan import Action, RolloutPlan, VersionPlan, plan_deploy
from repo_manager.rollout.result import Rollout, RolloutOptions
from repo_manager.rollout.smoke import OutputComparison, SmokeFailedError, SmokeResult, smoke_test
from repo_manager.rollout.status import ModelStatus, status

__all__ = [
    "Action",
    "FleetRollout",
    "ModelStatus",
    "OutputComparison",
    "Rollout",
    "RolloutOptions",
    "RolloutPlan",
    "SmokeFailedError",
    "SmokeResult",
    "VersionPlan",
    "deploy",
    "deploy_fleet",
    "plan_deploy",
    "rollback",
    "smoke_test",
    "status",
]
