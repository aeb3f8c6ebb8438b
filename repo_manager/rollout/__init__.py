"""Putting a version into service: plan, apply, verify, undo."""

from repo_manager.rollout.deploy import deploy, rollback
from repo_manager.rollout.plan import Action, RolloutPlan, VersionPlan, plan_deploy
from repo_manager.rollout.result import Rollout, RolloutOptions
from repo_manager.rollout.smoke import OutputComparison, SmokeFailedError, SmokeResult, smoke_test

__all__ = [
    "Action",
    "OutputComparison",
    "Rollout",
    "RolloutOptions",
    "RolloutPlan",
    "SmokeFailedError",
    "SmokeResult",
    "VersionPlan",
    "deploy",
    "plan_deploy",
    "rollback",
    "smoke_test",
]
