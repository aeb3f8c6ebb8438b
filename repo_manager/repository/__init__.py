"""The model repository: layout, manifests, publishing, looking, checking, changing, cleaning."""

from repo_manager.repository.adopt import Adoption, adopt
from repo_manager.repository.configuration import (
    change_config,
    edit_config,
    read_config_bytes,
    set_served_versions,
    settle_trial,
    touch_config,
    write_config_bytes,
)
from repo_manager.repository.difference import FileDifference, VersionDifference, compare_versions
from repo_manager.repository.layout import validate_model_name
from repo_manager.repository.location import (
    Location,
    LocationLike,
    ObjectRepository,
    as_location,
    local_folder,
    parse_location,
)
from repo_manager.repository.manifest import FileRecord, Manifest, parse_manifest, read_manifest
from repo_manager.repository.plan.configuration import ConfigChange
from repo_manager.repository.plan.removal import Removal
from repo_manager.repository.publish import PublishedVersion, PublishPlan, plan_publish, publish
from repo_manager.repository.relabel import LabelChange, read_labels, set_labels
from repo_manager.repository.remove import GcResult, gc, remove
from repo_manager.repository.repair import Repair, repair
from repo_manager.repository.scan import ModelEntry, VersionEntry, find_model, scan
from repo_manager.repository.signing import (
    Signature,
    SignatureCheck,
    SigningKey,
    check_served,
    check_signature,
    sign_version,
)
from repo_manager.repository.state import Deployment, KeptLoadTest, ModelState, RolloutRecord
from repo_manager.repository.tags import (
    begin_trial,
    end_trial,
    model_state,
    model_states,
    previous_deployment,
    record_deployment,
    record_load_test,
    record_rollout,
    remove_tag,
    resolve_version,
    set_tag,
)
from repo_manager.repository.transfer import Transfer, copy_needed, copy_version, version_files
from repo_manager.repository.verify import verify
from repo_manager.triton_config import Problem, Severity

__all__ = [
    "Adoption",
    "ConfigChange",
    "Deployment",
    "FileDifference",
    "FileRecord",
    "GcResult",
    "KeptLoadTest",
    "LabelChange",
    "Location",
    "LocationLike",
    "Manifest",
    "ModelEntry",
    "ModelState",
    "ObjectRepository",
    "Problem",
    "PublishPlan",
    "PublishedVersion",
    "Removal",
    "Repair",
    "RolloutRecord",
    "Severity",
    "Signature",
    "SignatureCheck",
    "SigningKey",
    "Transfer",
    "VersionDifference",
    "VersionEntry",
    "adopt",
    "as_location",
    "begin_trial",
    "change_config",
    "check_served",
    "check_signature",
    "compare_versions",
    "copy_needed",
    "copy_version",
    "edit_config",
    "end_trial",
    "find_model",
    "gc",
    "local_folder",
    "model_state",
    "model_states",
    "parse_location",
    "parse_manifest",
    "plan_publish",
    "previous_deployment",
    "publish",
    "read_config_bytes",
    "read_labels",
    "read_manifest",
    "record_deployment",
    "record_load_test",
    "record_rollout",
    "remove",
    "remove_tag",
    "repair",
    "resolve_version",
    "scan",
    "set_labels",
    "set_served_versions",
    "set_tag",
    "settle_trial",
    "sign_version",
    "touch_config",
    "validate_model_name",
    "verify",
    "version_files",
    "write_config_bytes",
]
