"""Putting a server back to what it served before, and what to tell a person when that does not work."""

from __future__ import annotations

from repo_manager.errors import ServerRefusedError
from repo_manager.repository import ModelEntry
from repo_manager.rollout.observe import ServedState, wait_until_only_ready
from repo_manager.rollout.plan import RolloutPlan
from repo_manager.rollout.result import RolloutOptions
from repo_manager.server import TritonClient

__all__ = ["by_hand", "reason_of", "restore_server", "unload"]

_UNLOAD_S = 3.0


def restore_server(
    client: TritonClient, name: str, before: ServedState, options: RolloutOptions, *, unseen: bool
) -> ServedState:
    """Make a server serve what it served before, and see that it does.

    Args:
        client: of the server.
        name: the model.
        before: what it served.
        options: deadlines.
        unseen: whether Triton does not see changes of the repository by itself (`changes_are_unseen`).

    Raises:
        RepoManagerError: it does not.
    """
    client.wait_live(options.reconnect_timeout_s)
    if not before.ready or unseen:
        unload(client, name, options)
    if before.ready:
        # It may have to wait for the load that was given up, however short a deadline that one had.
        client.load(name, timeout_s=max(options.load_timeout_s, options.settle_timeout_s))
    state = wait_until_only_ready(client, name, before.ready, options.settle_timeout_s)
    if state.ready != before.ready:
        raise ServerRefusedError(f"{state.sentence}, before it were {before.ready or 'none'}")
    return state


def unload(client: TritonClient, name: str, options: RolloutOptions) -> None:
    """Unload a model, and wait a moment until none of its versions is left."""
    client.unload(name, timeout_s=options.load_timeout_s)
    # Triton may wait for a dead process for ever; a version that is UNLOADING does not hinder a load.
    wait_until_only_ready(client, name, (), _UNLOAD_S, settled=True)


def by_hand(client: TritonClient, plan: RolloutPlan, before: ServedState, entry: ModelEntry, *, is_new: bool) -> str:
    """Say what a person has to do when putting things back failed.

    Args:
        client: of the server.
        plan: what was being done.
        before: what the server served.
        entry: the model.
        is_new: whether the model had no config.pbtxt before.
    """
    versions = ", ".join(map(str, before.ready)) or "none"
    policy = plan.policy_before
    text = policy if isinstance(policy, str) else "specific { versions: [" + ", ".join(map(str, policy)) + "] }"
    missing = " (it had no such file)" if is_new else ""
    return (
        f"By hand: set version_policy in config.pbtxt of {entry.path} to {text}{missing}, then load "
        f"{entry.name} through {client.url} (POST /v2/repository/models/{entry.name}/load). "
        f"Before, READY were: {versions}. Running the same command again is safe, too: it looks at what is there."
    )


def reason_of(cause: BaseException) -> str:
    """Say in words why a roll-out ended."""
    if isinstance(cause, KeyboardInterrupt):
        return "interrupted"
    return str(cause) or type(cause).__name__
