"""Roll-outs on Kubernetes and KServe: the targets `k8s://` and `kserve://` of deploy and rollback."""

from __future__ import annotations

from collections.abc import Sequence

from repo_manager.cli.shadow_options import Trial
from repo_manager.errors import UsageError
from repo_manager.report.kubernetes_tables import kserve_view, kubernetes_view
from repo_manager.report.terminal import Terminal
from repo_manager.repository import Location
from repo_manager.rollout import RolloutOptions
from repo_manager.rollout.targets.kserve import KServeCanary, deploy_kserve, parse_kserve_target, previous_on_kserve
from repo_manager.rollout.targets.kubernetes import (
    deploy_kubernetes,
    parse_kubernetes_target,
    previous_on_kubernetes,
)
from repo_manager.server import ClientOptions

__all__ = ["is_cluster", "roll_out_on_cluster"]

_SCHEMES = ("k8s://", "kserve://")


def is_cluster(texts: Sequence[str]) -> bool:
    """Say whether `--to` names a whole deployment in a cluster, and nothing else.

    Raises:
        UsageError: it names one among others.
    """
    found = [text for text in texts if text.startswith(_SCHEMES)]
    if found and len(texts) > 1:
        raise UsageError(f"{found[0]} stands for a whole deployment", hint="Give it as the only --to.")
    return bool(found)


def roll_out_on_cluster(
    terminal: Terminal,
    root: Location,
    what: tuple[str, int | None],
    where: tuple[str, ClientOptions],
    options: RolloutOptions,
    trial: Trial | None = None,
) -> None:
    """Deploy to a cluster and show what was done; no version: the one before.

    Raises:
        UsageError: a trial that such a target cannot give.
    """
    (name, version), (text, connection) = what, where
    report = terminal.reporter()
    if text.startswith("kserve://"):
        service = parse_kserve_target(text)
        chosen = previous_on_kserve(service, root, name) if version is None else version
        canary = _canary(trial)
        done = deploy_kserve(service, root, name, chosen, options=options, report=report, canary=canary)
        terminal.result({"kserve": done}, *kserve_view(done))
        return
    if trial is not None and trial.is_wanted:
        raise UsageError(
            f"--shadow and --canary are for single servers and kserve://, not for {text}",
            hint="Two releases behind an HTTPRoute make a canary: deploy/gateway/http-route.yaml.",
        )
    target = parse_kubernetes_target(text)
    chosen = previous_on_kubernetes(target, name) if version is None else version
    made = deploy_kubernetes(target, root, name, chosen, options=options, report=report, connection=connection)
    terminal.result({"kubernetes": made}, *kubernetes_view(made))


def _canary(trial: Trial | None) -> KServeCanary | None:
    """Return the steps of `--canary`, as KServe takes them.

    Raises:
        UsageError: --shadow or --gate, which need servers that can be asked.
    """
    chosen = None if trial is None else trial.options()
    if trial is None or chosen is None:
        return None
    if trial.shadow is not None or trial.gate or trial.weights_file is not None:
        raise UsageError(
            "--shadow, --gate and --weights-file need servers that can be asked, not kserve://",
            hint="KServe's own conditions are watched at each step; alerts are in deploy/prometheus.",
        )
    percents = tuple(round(step * 100) for step in chosen.steps if step < 1)
    return KServeCanary(percents, step_s=chosen.step_s)
