"""The declared state: repository.yaml read, compared with a repository and its servers, and written from one."""

from repo_manager.declared.plan import plan_declaration, planned
from repo_manager.declared.read import parse_declaration, read_declaration
from repo_manager.declared.schema import Declaration, json_schema
from repo_manager.declared.servers import Servers
from repo_manager.declared.steps import ApplyResult, ModelPlan, ModelResult, Step, StepAction

__all__ = [
    "ApplyResult",
    "Declaration",
    "ModelPlan",
    "ModelResult",
    "Servers",
    "Step",
    "StepAction",
    "json_schema",
    "parse_declaration",
    "plan_declaration",
    "planned",
    "read_declaration",
]
