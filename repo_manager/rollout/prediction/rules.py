"""The effect of a load on every version of a model, from Triton's reload rules. Pure, so it is tested at length.

The rules are those of `ModelRepositoryManager` and `ModelLifeCycle` of triton-inference-server/core. Each is listed
with its test in docs/triton-reload.md, and `tests/integration/test_prediction.py` holds this module against the real
server over hundreds of random changes.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from repo_manager.errors import ConfigError
from repo_manager.rollout.observe import ServedState
from repo_manager.rollout.prediction.files import Fingerprint, read_fingerprint
from repo_manager.triton_config.config import CONFIG_FILENAME, ModelConfig, read_config
from repo_manager.triton_config.version_policy import served_versions

__all__ = [
    "FREE_FIELDS",
    "INSTANCES",
    "IN_PLACE",
    "Prediction",
    "VersionFate",
    "VersionPlan",
    "WantedLoad",
    "changed_config_fields",
    "instances_differ",
    "predict",
    "read_wanted",
]


# Decide whether Triton treats two configurations as equal after it fills in its defaults.
#
# Source: `ConfigChangeRequiresReload`, `NormalizeModelConfig` and `NormalizeInstanceGroup` of
# triton-inference-server/core.

# The one field changed in place by a load: Triton adds or removes instances and reloads no version.
INSTANCES = "instance_group"
# Changes of only these fields reload nothing.
FREE_FIELDS = ("version_policy", INSTANCES)
# The server always fills these in, so their absence from the file is not a change.
_FILLED_IN = {"platform", "backend", "runtime", "default_model_filename"}
# Filled in from the model if the server completes configurations (the default).
_COMPLETED = {"input", "output", "max_batch_size"}
_SEQUENCE_IDLE_US = 1_000_000
# Backends with one instance per group by default, and with two on a CPU. Other backends may state a default of their
# own.
_ONE_INSTANCE = {"python", "tensorrt", "tensorrt_rtx", "pytorch"}
_TWO_ON_A_CPU = {"onnxruntime", "tensorflow"}


def changed_config_fields(served: ModelConfig, wanted: ModelConfig, *, auto_complete: bool = True) -> tuple[str, ...]:
    """Return the top-level fields for whose sake a load reloads every version.

    Args:
        served: the configuration the server shows.
        wanted: the content of config.pbtxt, or of the load's own configuration.
        auto_complete: whether the server completes configurations from the model. Then a field absent from the file,
            possibly found by the server, is no change.
    """
    theirs, ours = _normalised(served, served), _normalised(wanted, served)
    silent = _FILLED_IN | (_COMPLETED if auto_complete else set())
    if ours.HasField("ensemble_scheduling"):
        silent = silent | {"model_transaction_policy"}  # `ValidateEnsembleConfig` copies it from the models
    changed = []
    for field in theirs.DESCRIPTOR.fields:
        name = field.name
        is_set = _is_set(ours, field)
        if name in (*FREE_FIELDS, "name") or (name in silent and not is_set):
            continue
        one, other = getattr(theirs, name), getattr(ours, name)
        if _is_set(theirs, field) == is_set and one == other:
            continue
        if auto_complete and name in _COMPLETED and _within(other, one):
            continue
        if auto_complete and name == "dynamic_batching" and not is_set and _is_bare_batching(one):
            continue
        changed.append(name)
    return tuple(changed)


def instances_differ(served: ModelConfig, wanted: ModelConfig) -> bool:
    """Return whether a load changes a model's instances in place.

    Triton fills in a group's kind, count and GPUs where config.pbtxt leaves them out. Fields it filled in are no
    difference. The name of a group is free text.

    Args:
        served: the configuration the server shows.
        wanted: the content of config.pbtxt, or of the load's own configuration.
    """
    theirs, ours = served.message(), wanted.message()
    if theirs.HasField("ensemble_scheduling") or ours.HasField("ensemble_scheduling"):
        return False
    if not ours.instance_group:
        ours.instance_group.add()
    if len(theirs.instance_group) != len(ours.instance_group):
        return bool(theirs.instance_group)  # without any group from the server, nothing is known
    backend = theirs.backend or ours.backend
    groups = zip(theirs.instance_group, ours.instance_group, strict=True)
    return any(_completed(group, like, backend) != _completed(like, like, backend) for like, group in groups)


def _completed(group: Any, like: Any, backend: str) -> Any:
    """Fill in the fields a group leaves out, as Triton has done in the group it serves."""
    message = type(group)()
    message.CopyFrom(group)
    message.name = ""
    if message.kind == type(group).KIND_AUTO:
        message.kind = like.kind
    if not message.gpus:
        message.gpus.extend(like.gpus)
    if message.count < 1:
        on_cpu = message.kind == type(group).KIND_CPU
        known = {**dict.fromkeys(_ONE_INSTANCE, 1), **dict.fromkeys(_TWO_ON_A_CPU, 2 if on_cpu else 1)}
        message.count = known.get(backend, like.count)
    return message


def _is_set(message: Any, field: Any) -> bool:
    if field.has_presence:
        return bool(message.HasField(field.name))
    return bool(getattr(message, field.name))


def _normalised(config: ModelConfig, served: ModelConfig) -> Any:
    """Fill in the fields as Triton does. Its own answer is not changed by it."""
    message = config.message()
    for name in ("input_pinned_memory", "output_pinned_memory"):
        if not message.optimization.HasField(name):
            getattr(message.optimization, name).enable = True
    batch = served.max_batch_size or message.max_batch_size  # another maximum is reported as its own difference
    for parent, name in ((message, "dynamic_batching"), (message.sequence_batching, "oldest")):
        if parent.HasField(name) and not getattr(parent, name).preferred_batch_size:
            getattr(parent, name).preferred_batch_size.extend([batch] * bool(batch))
    if message.HasField("sequence_batching") and not message.sequence_batching.max_sequence_idle_microseconds:
        message.sequence_batching.max_sequence_idle_microseconds = _SEQUENCE_IDLE_US
    return message


def _is_bare_batching(batching: Any) -> bool:
    """Return whether nothing is set but the default: completion turns it on for a model with a batch axis."""
    return [field.name for field, _ in batching.ListFields()] in ([], ["preferred_batch_size"])


def _within(ours: Any, theirs: Any) -> bool:
    """Return whether everything one list of tensors, or number, says is so in the other."""
    if not hasattr(ours, "__len__"):
        return bool(ours == theirs)
    by_name = {tensor.name: tensor for tensor in theirs}
    return all(
        tensor.name in by_name
        and all(value == getattr(by_name[tensor.name], field.name) for field, value in tensor.ListFields())
        for tensor in ours
    )


IN_PLACE = f"{CONFIG_FILENAME} has another {INSTANCES}: its instances change in place, nothing loads again"


class VersionFate(str, enum.Enum):
    """The fate of one version.

    `UPDATE`: the version stays loaded, and its instances become those of the configuration.
    `NOTHING`: the load answers 200 and the version stays as it is, although something else was asked for.
    `FAIL`: the load is refused because of it or with it, and it stays as it is.
    """

    LOAD = "load"
    KEEP = "keep"
    UPDATE = "update"
    RELOAD = "reload"
    DROP = "drop"
    NOTHING = "nothing"
    FAIL = "fail"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class VersionPlan:
    """One version's fate and why."""

    version: int
    action: VersionFate
    reason: str


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The effect of a load.

    Attributes:
        versions: the fate of every version READY or wanted, ascending.
        refusal: why the load will be answered with an error. `None` when it will be answered with 200.
    """

    versions: tuple[VersionPlan, ...]
    refusal: str | None = None

    @property
    def ready_after(self) -> tuple[int, ...]:
        """Versions READY afterwards, including READY ones that could not be replaced."""
        served = (VersionFate.LOAD, VersionFate.KEEP, VersionFate.UPDATE, VersionFate.RELOAD)
        return tuple(each.version for each in self.versions if each.action in served)


@dataclasses.dataclass(frozen=True)
class WantedLoad:
    """The repository's side of a load.

    Attributes:
        files: the model's folder as it is. `None` when it is gone.
        config: the content of config.pbtxt, or of the configuration sent with the load. `None` when it cannot be read.
        problem: why the configuration cannot be used. `None` when it can.
        unloadable: versions known not to load, and why (damaged, or their last load failed and nothing has changed).
        sent: whether the configuration is sent with the load: then Triton looks at the model in any case.
        auto_complete: whether the server completes configurations (its default).
    """

    files: Fingerprint | None
    config: ModelConfig | None
    problem: str | None = None
    unloadable: Mapping[int, str] = dataclasses.field(default_factory=dict)
    sent: bool = False
    auto_complete: bool = True


def read_wanted(folder: Path, *, unloadable: Mapping[int, str] | None = None, auto_complete: bool = True) -> WantedLoad:
    """Read the repository's side from a model's folder.

    Args:
        folder: local folder of the model. Its name is compared with the one in config.pbtxt.
        unloadable: version -> reason why it cannot load. `None`: all can.
        auto_complete: whether the server completes configurations.

    Raises:
        RepositoryError: the folder cannot be read.
    """
    files = read_fingerprint(folder)
    config, problem = None, None
    try:
        config = read_config(folder / CONFIG_FILENAME)
        if config.name not in ("", folder.name):
            problem = f"{CONFIG_FILENAME} names {config.name!r}, the folder is {folder.name!r}"
        elif config.unknown_fields:
            problem = f"{CONFIG_FILENAME} has the field {config.unknown_fields[0]}, which Triton's schema has not"
    except ConfigError as exc:
        problem = exc.message
    return WantedLoad(files, config, problem, dict(unloadable or {}), auto_complete=auto_complete)


def predict(served: ServedState, loaded: Fingerprint | None, wanted: WantedLoad) -> Prediction:
    """Predict the effect of the next load.

    Args:
        served: the versions the server serves now, and its configuration.
        loaded: the folder as it was at the last load Triton acted on with success. `None` when it has none in
            mind: it never loaded the model, or unloaded it. After a first load that failed past its configuration it
            knows the model and no time of it: `Fingerprint({})`.
        wanted: the folder and configuration the load will find.
    """
    if wanted.files is None:
        return _refused(served, (), "the model's folder is gone")
    if not wanted.sent and loaded is not None and wanted.files.newest_ns <= loaded.newest_ns:
        return _overlooked(served, loaded, wanted, wanted.files)
    if wanted.config is None or wanted.problem is not None:
        return _refused(served, (), wanted.problem or f"there is no {CONFIG_FILENAME}")
    if wanted.files.dangling:
        return _refused(served, (), f"{', '.join(wanted.files.dangling)} is a link to nothing")
    versions = served_versions(wanted.config, wanted.files.versions)
    if not versions:
        return _refused(served, (), "no version that the policy asks for has a folder")
    plans = tuple(_fate(version, versions, served, loaded, wanted) for version in sorted({*versions, *served.ready}))
    unloadable = {**wanted.files.phantoms, **wanted.unloadable}
    culprits = {
        plan.version: unloadable[plan.version]
        for plan in plans
        if plan.action in (VersionFate.LOAD, VersionFate.RELOAD) and plan.version in unloadable
    }
    if culprits:
        reasons = "; ".join(f"version {version}: {reason}" for version, reason in culprits.items())
        return _refused(served, versions, reasons, culprits, plans)
    return Prediction(plans)


def _fate(
    version: int, versions: Iterable[int], served: ServedState, loaded: Fingerprint | None, wanted: WantedLoad
) -> VersionPlan:
    """Return the fate of one version when the load is acted on and succeeds."""
    if version not in versions:
        return VersionPlan(version, VersionFate.DROP, _why_dropped(version, wanted))
    if version not in served.ready:
        return VersionPlan(version, VersionFate.LOAD, served.reasons.get(version) or "it is not loaded")
    before = 0 if loaded is None else loaded.version_ns(version)
    now = 0 if wanted.files is None else wanted.files.version_ns(version)
    if now > before and wanted.files is not None:
        own = wanted.files.times_ns.get(str(version), 0)
        what = "its folder has" if own == now else f"{wanted.files.newest_beside}, beside the versions, has"
        return VersionPlan(version, VersionFate.RELOAD, f"{what} changed since it was loaded")
    if served.config is not None and wanted.config is not None:
        fields = changed_config_fields(served.config, wanted.config, auto_complete=wanted.auto_complete)
        if fields:
            reason = f"{CONFIG_FILENAME} differs from the loaded one in {', '.join(fields)}"
            return VersionPlan(version, VersionFate.RELOAD, reason)
    if _updates(served, wanted):
        return VersionPlan(version, VersionFate.UPDATE, IN_PLACE)
    return VersionPlan(version, VersionFate.KEEP, "it is loaded, and nothing that it depends on has changed")


def _updates(served: ServedState, wanted: WantedLoad) -> bool:
    """Return whether a load that is acted on changes the instances of the versions kept."""
    return served.config is not None and wanted.config is not None and instances_differ(served.config, wanted.config)


def _why_dropped(version: int, wanted: WantedLoad) -> str:
    gone = wanted.files is not None and version not in wanted.files.versions
    return "its folder is gone" if gone else "it is not among the versions to serve"


def _overlooked(served: ServedState, loaded: Fingerprint, wanted: WantedLoad, files: Fingerprint) -> Prediction:
    """Predict a load Triton answers with 200 without looking any further."""
    why = f"nothing in the folder is newer than at the last load ({_blindness(loaded, files)})"
    versions = () if wanted.config is None else served_versions(wanted.config, files.versions)
    fields: tuple[str, ...] = ()
    if served.config is not None and wanted.config is not None:
        fields = changed_config_fields(served.config, wanted.config, auto_complete=wanted.auto_complete)
        fields += (INSTANCES,) * _updates(served, wanted)
    plans = []
    for version in sorted({*versions, *served.ready}):
        if version not in served.ready:
            plans.append(VersionPlan(version, VersionFate.NOTHING, f"it stays unloaded: {why}"))
        elif version not in versions:
            plans.append(VersionPlan(version, VersionFate.NOTHING, f"it stays loaded: {why}"))
        elif fields:
            reason = f"it goes on with its own {', '.join(fields)}: {why}"
            plans.append(VersionPlan(version, VersionFate.NOTHING, reason))
        else:
            plans.append(VersionPlan(version, VersionFate.KEEP, "it is loaded, and nothing has changed"))
    return Prediction(tuple(plans))


def _blindness(loaded: Fingerprint, files: Fingerprint) -> str:
    if files.lookalikes:
        return f"{', '.join(files.lookalikes)} is taken for a second {CONFIG_FILENAME}: remove it"
    if loaded.newest_entry == CONFIG_FILENAME and loaded.newest_ns > files.newest_ns:
        return f"a configuration sent with a load is in the way: touch {CONFIG_FILENAME}"
    return f"the newest is {loaded.newest_entry}; if its time is in the future, unload the model and load it"


def _refused(
    served: ServedState,
    versions: Iterable[int],
    refusal: str,
    culprits: Mapping[int, str] | None = None,
    fates: Iterable[VersionPlan] = (),
) -> Prediction:
    """Predict a load refused: every version stays as it is, except for instances changed by then."""
    culprits = culprits or {}
    plans = []
    updated = {fate.version: fate for fate in fates if fate.action is VersionFate.UPDATE}
    for version in sorted({*versions, *served.ready}):
        if version in culprits:
            plans.append(VersionPlan(version, VersionFate.FAIL, culprits[version]))
        elif version in updated:
            plans.append(updated[version])
        elif version in served.ready:
            plans.append(VersionPlan(version, VersionFate.KEEP, "the load will be refused, so it stays"))
        else:
            plans.append(VersionPlan(version, VersionFate.FAIL, "all wanted versions load or none does"))
    return Prediction(tuple(plans), refusal)
