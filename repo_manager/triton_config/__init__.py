"""Triton model configurations: config.pbtxt read, derived, compared and changed, always through protobuf."""

from repo_manager.triton_config.compare import ReloadEffect, changed_fields, check_config, reload_effect, same_signature
from repo_manager.triton_config.config import (
    CONFIG_FILENAME,
    DEFAULT_FILENAMES,
    VARIANTS_FOLDER,
    ModelConfig,
    format_config,
    parse_config,
    read_config,
)
from repo_manager.triton_config.derive import derive_config
from repo_manager.triton_config.fields import get_field, set_fields
from repo_manager.triton_config.options import DEFAULT_MAX_BATCH_SIZE, ConfigOptions
from repo_manager.triton_config.problems import Problem, Severity
from repo_manager.triton_config.rules import check_rules
from repo_manager.triton_config.served_signature import (
    ServedSignature,
    config_dtype,
    runtime_signature,
    served_signature,
    triton_dtype,
)
from repo_manager.triton_config.version_policy import (
    replace_version_policy,
    served_versions,
    version_policy,
    with_version_policy,
)

__all__ = [
    "CONFIG_FILENAME",
    "DEFAULT_FILENAMES",
    "DEFAULT_MAX_BATCH_SIZE",
    "VARIANTS_FOLDER",
    "ConfigOptions",
    "ModelConfig",
    "Problem",
    "ReloadEffect",
    "ServedSignature",
    "Severity",
    "changed_fields",
    "check_config",
    "check_rules",
    "config_dtype",
    "derive_config",
    "format_config",
    "get_field",
    "parse_config",
    "read_config",
    "reload_effect",
    "replace_version_policy",
    "runtime_signature",
    "same_signature",
    "served_signature",
    "served_versions",
    "set_fields",
    "triton_dtype",
    "version_policy",
    "with_version_policy",
]
