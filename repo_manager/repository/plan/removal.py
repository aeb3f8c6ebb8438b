"""The versions free to go: never a served one or a roll-back's aim, unless forced."""

from __future__ import annotations

import dataclasses
import datetime

from repo_manager.errors import RepositoryError
from repo_manager.repository.state import ModelState, current_version, previous_version
from repo_manager.repository.view import ModelView, VersionView
from repo_manager.triton_config.version_policy import replace_version_policy, served_by

__all__ = [
    "Removal",
    "check_versions_exist",
    "forget",
    "made_at",
    "old_versions",
    "plan_removal",
    "select_version",
    "without_versions",
]


@dataclasses.dataclass(frozen=True)
class Removal:
    """A removal, planned or done.

    Attributes:
        name: model the versions are taken from.
        versions: the versions to remove, ascending.
        whole_model: whether the model's folder goes as well.
        size_bytes: space freed in the store.
        in_use: reasons against the removal, overridden by `force`: one sentence each.
        applied: whether it was done. False for a dry run.
    """

    name: str
    versions: tuple[int, ...]
    whole_model: bool
    size_bytes: int
    in_use: tuple[str, ...]
    applied: bool


def select_version(view: ModelView, version: int | None) -> tuple[int, ...]:
    """Return the versions a removal means: one, or all of them for `None`.

    Raises:
        RepositoryError: there is no such version.
    """
    if version is None:
        return view.versions
    check_versions_exist(view, version)
    return (version,)


def check_versions_exist(view: ModelView, *versions: int) -> None:
    """Check whether versions exist.

    Raises:
        RepositoryError: one does not.
    """
    missing = [version for version in versions if version not in view.versions]
    if missing:
        raise RepositoryError(
            f"model {view.name!r} has no version {', '.join(map(str, missing))}; "
            f"it has {', '.join(map(str, view.versions)) or 'none'}",
            hint=f"`repo-manager show {view.name}` lists them.",
        )


def plan_removal(view: ModelView, versions: tuple[int, ...], *, whole: bool, force: bool) -> Removal:
    """Describe the removal of these versions.

    Args:
        view: the model with its state and its ensembles.
        versions: numbers of the versions to remove.
        whole: the model's folder as well.
        force: also versions in use. The reasons against it go to `Removal.in_use`.

    Returns:
        The removal, its size still unknown (0).

    Raises:
        RepositoryError: one is in use, or nothing else would be left to serve.
    """
    left = [version for version in view.versions if version not in versions]
    whole = whole or not left
    reasons = _reasons_to_keep(view, whole=whole) if versions else {}
    in_use = tuple(f"{view.name}:{v} {' and '.join(reasons[v])}" for v in versions if v in reasons)
    if whole and view.needed_by:
        in_use += (f"{view.name} is needed by {', '.join(view.needed_by)}",)
    if in_use and not force:
        raise RepositoryError("in use: " + "; ".join(in_use), hint=_way_out(view, versions, whole))
    serves = served_by(view.policy(), view.versions)  # empty while the version named by the policy is being published
    if not whole and versions and serves and not served_by(view.policy(), left):
        raise RepositoryError(
            f"without version {', '.join(map(str, versions))} model {view.name!r} would serve nothing",
            hint=f"Deploy one of its versions {', '.join(map(str, left))} first, or remove the whole model.",
        )
    return Removal(view.name, tuple(sorted(versions)), whole, 0, in_use, applied=False)


def _named(ensembles: tuple[str, ...]) -> str:
    return f"the ensemble{'s' if len(ensembles) > 1 else ''} {', '.join(ensembles)}"


def _way_out(view: ModelView, versions: tuple[int, ...], whole: bool) -> str:
    if (whole and view.needed_by) or any(version in view.pinned for version in versions):
        return "Change what needs it first, or use --force: Triton does not load an ensemble without what it needs."
    if view.state.is_deployed:
        return f"First repo-manager undeploy {view.name}, or deploy another version; or use --force."
    if set(view.state.tags.values()) & set(versions):
        return f"First take the tag away: repo-manager tag {view.name}:VERSION TAG --delete; or use --force."
    return f"Deploy another version first, remove the whole model (repo-manager remove {view.name}), or use --force."


def _reasons_to_keep(view: ModelView, *, whole: bool = False) -> dict[int, list[str]]:
    """Return for each version why it is in use. Versions without a use are left out.

    Of a whole model, neither the policy nor a roll-back keeps a version unless one is deployed: `add` writes a policy
    before anything is served, and `undeploy` leaves it.

    Args:
        view: the model with its state.
        whole: the whole model goes. Its policy and roll-back then count only while one is deployed.

    Raises:
        ConfigError: config.pbtxt is broken, so the served versions are unknown.
    """
    reasons: dict[int, list[str]] = {}
    numbered_here = view.state.highest_version > 0
    idle = whole and numbered_here and not view.state.is_deployed and view.state.unproven is None
    for version in () if idle else served_by(view.policy(), view.versions):
        reasons.setdefault(version, []).append("is selected by the version policy")
    for tag, version in view.state.tags.items():
        reasons.setdefault(version, []).append(f"has the tag {tag!r}")
    current, previous = current_version(view.state), previous_version(view.state, view.versions)
    if current is not None:
        reasons.setdefault(current, []).append("was deployed last")
    if previous is not None and not idle:
        reasons.setdefault(previous, []).append("is what a roll-back goes back to")
    for version, ensembles in view.pinned.items():
        reasons.setdefault(version, []).append(f"is pinned by {_named(ensembles)}")
    return {version: reasons[version] for version in view.versions if version in reasons}


def old_versions(view: ModelView, keep: int) -> tuple[int, ...]:
    """Return the versions without a use and not among the newest `keep`.

    Raises:
        ConfigError: config.pbtxt is broken, so the served versions are unknown.
    """
    needed = _reasons_to_keep(view)
    return tuple(version for version in view.versions[:-keep] if version not in needed)


def made_at(version: VersionView) -> float:
    """Return when a version was made, in seconds since 1970: its manifest's word, else the folder's time."""
    if version.has_manifest:
        try:
            created = version.manifest().created.replace("Z", "+00:00")
            return datetime.datetime.fromisoformat(created).timestamp()
        except (RepositoryError, ValueError):
            pass
    return version.modified_at


def without_versions(view: ModelView, versions: tuple[int, ...]) -> str | None:
    """Return config.pbtxt with these versions taken out of its policy. `None` when it does not name them.

    Raises:
        ConfigError: it is broken, or names nothing else.
    """
    policy = view.policy()
    if not isinstance(policy, tuple) or not set(policy) & set(versions):
        return None
    left = [version for version in policy if version not in versions]
    return replace_version_policy(view.config_text(), left, where=view.config_place)


def forget(state: ModelState, versions: tuple[int, ...], highest: int, *, whole: bool) -> ModelState:
    """Keep the numbers given out. Drop tags, load tests, and for a whole model its deployments.

    Args:
        state: record of the model before the removal. It is not changed itself.
        versions: numbers of the removed versions.
        highest: highest number ever given out.
        whole: whether the whole model was removed.
    """
    kept = tuple(test for test in state.load_tests if not whole and test.version not in versions)
    state = dataclasses.replace(state.numbered(highest).without_free(*versions), load_tests=kept)
    if whole:
        return dataclasses.replace(state, tags={}, deployments=())
    return dataclasses.replace(state, tags={tag: v for tag, v in state.tags.items() if v not in versions})
