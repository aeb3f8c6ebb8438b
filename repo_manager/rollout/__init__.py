"""Putting a version into service: look, check, apply, prove, finish, or undo.

The verbs are in `deploy.py`; the one engine that runs them in `engine.py`; what it rolls out to in `targets/`: Triton
servers, Kubernetes, KServe. On trial beside the old version: `trial/`. What a load will do to each version: `plan.py`
and `prediction/`.
"""

from __future__ import annotations

from repo_manager.rollout.checks import Check, Outcome
from repo_manager.rollout.deploy import To, deploy, rollback
from repo_manager.rollout.options import Amount, RolloutOptions, ShadowOptions, TrialOptions
from repo_manager.rollout.plan import Action, RolloutPlan, VersionPlan, plan_deploy
from repo_manager.rollout.result import PodProof, Rollout, ServerResult, SnapshotChange, TrialResult
from repo_manager.rollout.smoke import OutputComparison, SmokeFailedError, SmokeResult, smoke_test
from repo_manager.rollout.status import ModelStatus, status
from repo_manager.rollout.targets.urls import ServerAddress, is_one_server, resolve_targets

__all__ = [
    "Action",
    "Amount",
    "Check",
    "ModelStatus",
    "Outcome",
    "OutputComparison",
    "PodProof",
    "Rollout",
    "RolloutOptions",
    "RolloutPlan",
    "ServerAddress",
    "ServerResult",
    "ShadowOptions",
    "SmokeFailedError",
    "SmokeResult",
    "SnapshotChange",
    "To",
    "TrialOptions",
    "TrialResult",
    "VersionPlan",
    "deploy",
    "is_one_server",
    "plan_deploy",
    "resolve_targets",
    "rollback",
    "smoke_test",
    "status",
]
