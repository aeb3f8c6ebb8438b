"""The model repository: layout, manifests, publishing, scanning."""

from repo_manager.repository.layout import validate_model_name
from repo_manager.repository.manifest import FileRecord, Manifest, parse_manifest, read_manifest
from repo_manager.repository.policy import model_state, previous_deployment, record_deployment, set_served_versions
from repo_manager.repository.publish import PublishedVersion, PublishPlan, plan_publish, publish
from repo_manager.repository.scan import ModelEntry, VersionEntry, find_model, scan
from repo_manager.repository.state import Deployment, ModelState
from repo_manager.repository.verify import verify
from repo_manager.triton_config import Problem, Severity

__all__ = [
    "Deployment",
    "FileRecord",
    "Manifest",
    "ModelEntry",
    "ModelState",
    "Problem",
    "PublishPlan",
    "PublishedVersion",
    "Severity",
    "VersionEntry",
    "find_model",
    "model_state",
    "parse_manifest",
    "plan_publish",
    "previous_deployment",
    "publish",
    "read_manifest",
    "record_deployment",
    "scan",
    "set_served_versions",
    "validate_model_name",
    "verify",
]
