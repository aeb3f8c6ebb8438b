"""The operations on a repository, on disk and in object storage alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from repo_manager.repository.adopt import adopt as _adopt
from repo_manager.repository.config_file import read_config_bytes as _read_config_bytes
from repo_manager.repository.config_file import touch_config as _touch_config
from repo_manager.repository.config_file import write_config_bytes as _write_config_bytes
from repo_manager.repository.dispatch import by_location, object_function
from repo_manager.repository.edit import change_config as _change_config
from repo_manager.repository.edit import edit_config as _edit_config
from repo_manager.repository.gc import gc as _gc
from repo_manager.repository.location import Location, ObjectRepository
from repo_manager.repository.policy import model_state as _model_state
from repo_manager.repository.policy import model_states as _model_states
from repo_manager.repository.policy import previous_deployment as _previous_deployment
from repo_manager.repository.policy import record_deployment as _record_deployment
from repo_manager.repository.policy import set_served_versions as _set_served_versions
from repo_manager.repository.publish import plan_publish as _plan_publish
from repo_manager.repository.publish import publish as _publish
from repo_manager.repository.relabel import read_labels as _read_labels
from repo_manager.repository.relabel import set_labels as _set_labels
from repo_manager.repository.remove import remove as _remove
from repo_manager.repository.repair import repair as _repair
from repo_manager.repository.scan import find_model as _find_model
from repo_manager.repository.scan import scan as _scan
from repo_manager.repository.signing import check_signature as _check_signature
from repo_manager.repository.signing import sign_version as _sign_version
from repo_manager.repository.tags import remove_tag as _remove_tag
from repo_manager.repository.tags import resolve_version as _resolve_version
from repo_manager.repository.tags import set_tag as _set_tag
from repo_manager.repository.verify import verify as _verify

__all__ = [
    "adopt",
    "change_config",
    "check_signature",
    "edit_config",
    "find_model",
    "gc",
    "model_state",
    "model_states",
    "plan_publish",
    "previous_deployment",
    "publish",
    "read_config_bytes",
    "read_labels",
    "record_deployment",
    "remove",
    "remove_tag",
    "repair",
    "resolve_version",
    "scan",
    "set_labels",
    "set_served_versions",
    "set_tag",
    "sign_version",
    "touch_config",
    "verify",
    "version_files",
    "write_config_bytes",
]


adopt = by_location(_adopt, "verify.adopt")
change_config = by_location(_change_config, "change.change_config")
read_config_bytes = by_location(_read_config_bytes, "change.read_config_bytes")
touch_config = by_location(_touch_config, "change.touch_config")
write_config_bytes = by_location(_write_config_bytes, "change.write_config_bytes")
edit_config = by_location(_edit_config, "change.edit_config")
find_model = by_location(_find_model, "scan.find_model")
gc = by_location(_gc, "remove.gc")
model_state = by_location(_model_state, "scan.model_state")
model_states = by_location(_model_states, "scan.model_states")
plan_publish = by_location(_plan_publish, "publish.plan_publish")
previous_deployment = by_location(_previous_deployment, "scan.previous_deployment")
publish = by_location(_publish, "publish.publish")
read_labels = by_location(_read_labels, "change.read_labels")
record_deployment = by_location(_record_deployment, "change.record_deployment")
remove = by_location(_remove, "remove.remove")
remove_tag = by_location(_remove_tag, "change.remove_tag")
repair = by_location(_repair, "repair.repair")
resolve_version = by_location(_resolve_version, "scan.resolve_version")
scan = by_location(_scan, "scan.scan")
check_signature = by_location(_check_signature, "signing.check_signature")
sign_version = by_location(_sign_version, "signing.sign_version")
set_labels = by_location(_set_labels, "change.set_labels")
set_served_versions = by_location(_set_served_versions, "change.set_served_versions")
set_tag = by_location(_set_tag, "change.set_tag")
verify = by_location(_verify, "verify.verify")


@contextlib.contextmanager
def version_files(version: Location, names: Sequence[str] | None = None) -> Iterator[Path]:
    """Give a folder on this machine that holds a version's files, for as long as the block lasts.

    On disk it is the version's own folder. From object storage the files are fetched, and what was published with a
    digest is compared with it.

    Args:
        version: `VersionEntry.path`.
        names: the files wanted, those that do not exist are left out; `None`: all of them. The manifest is always
            there when the version has one.

    Raises:
        RepositoryError: a file cannot be fetched, or is not what the manifest says.
    """
    if isinstance(version, ObjectRepository):
        with object_function("fetch.version_files")(version, names) as folder:
            yield folder
    else:
        yield version
