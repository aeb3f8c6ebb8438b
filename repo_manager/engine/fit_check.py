"""Whether a published version will load on a running server: manifest and plans' heads against the server's answers.

A server tells its version (enough for TensorRT, CUDA and driver by the release table) and the UUIDs of its GPUs in its
metrics. It tells neither its TensorRT nor a compute capability: it is known only of GPUs of this machine, by their
UUID. Unknown facts are not checked.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repo_manager.engine.fit import (
    HEADER_BYTES,
    FitProblem,
    FitTarget,
    PlanFacts,
    PlanHeader,
    check_fit,
    parse_plan_header,
    plan_facts_of,
    release_of_server,
)
from repo_manager.engine.gpu import Gpu, find_gpus
from repo_manager.errors import EngineError
from repo_manager.optional import installed_version
from repo_manager.types import Backend

__all__ = ["PLAN_SUFFIXES", "check_version_fit", "fit_target_of"]

PLAN_SUFFIXES = (".plan", ".engine")
"""Endings of the files with an engine."""

_GPU_UUID = re.compile(r'^nv_gpu_\w+\{[^}]*gpu_uuid="(?P<uuid>[^"]+)"', re.MULTILINE)


def fit_target_of(
    server_version: str,
    metrics: str | None = None,
    *,
    embedded: bool = False,
    gpus: Sequence[Gpu] | None = None,
) -> FitTarget:
    """Collect the facts of a server before a load on it.

    Args:
        server_version: as its metadata says it, for instance `2.51.0`.
        metrics: the text of its metrics page. `None` when it cannot be read.
        embedded: whether it is our embedded server, whose engines run in the TensorRT installed for Python here, not
            in the container's.
        gpus: of this machine. `None` asks the driver's tool.
    """
    here = {gpu.uuid: gpu for gpu in (find_gpus() if gpus is None else gpus) if gpu.uuid}
    uuids = tuple(dict.fromkeys(match["uuid"] for match in _GPU_UUID.finditer(metrics or "")))
    known = [here[uuid] for uuid in uuids if uuid in here]
    if not known and embedded:
        known = list(here.values())
    capabilities = tuple(dict.fromkeys(gpu.compute_capability for gpu in known))
    # A GPU of another machine could be of any kind, so no claim is made about kinds.
    whole = len(known) == len(uuids) or (embedded and not uuids)
    return FitTarget(
        release=None if embedded else release_of_server(server_version),
        compute_capability=capabilities[0] if whole and len(capabilities) == 1 else None,
        driver=known[0].driver_version if known else None,
        library_versions=_installed() if embedded else {},
        has_gpu=bool(here) if embedded else True if uuids else None,
    )


def _installed() -> dict[Backend, str]:
    packages = {Backend.TENSORRT: "tensorrt", Backend.TENSORRT_RTX: "tensorrt-rtx"}
    found = {backend: installed_version(package) for backend, package in packages.items()}
    return {backend: version for backend, version in found.items() if version is not None}


def check_version_fit(
    files: Path | Mapping[str, bytes], manifest: Mapping[str, Any] | None, target: FitTarget
) -> tuple[FitProblem, ...]:
    """List the objections to loading a version on a server. Empty when nothing known does.

    Args:
        files: the version's folder, or name -> the first `HEADER_BYTES` (or more) of each file with the suffix `.plan`
            or `.engine`. Empty for a version whose files are not at hand: then its manifest is believed.
        manifest: the version's manifest as read from JSON. `None` for a version made by others.
        target: release, GPU and libraries of the server (`fit_target_of`).

    Returns:
        Problems, with the sure failures of the load first. A version without engines has none.
    """
    heads = _heads(files) if isinstance(files, Path) else {n: b for n, b in files.items() if n.endswith(PLAN_SUFFIXES)}
    section = (manifest or {}).get("engine")
    section = section if isinstance(section, Mapping) else {}
    by_capability = _plans_of(section)
    if by_capability and target.compute_capability is not None and target.compute_capability not in by_capability:
        return (_no_plan_for(target.compute_capability, tuple(by_capability)),)
    problems: dict[str, FitProblem] = {}
    for name, head in heads.items():
        owners = [capability for capability, plan in by_capability.items() if plan == name]
        if target.compute_capability is not None and owners and target.compute_capability not in owners:
            continue  # the plan of another GPU kind: Triton does not open it on this GPU
        for problem in _problems_of(name, head, section, owners, target):
            problems.setdefault(problem.message, problem)
    if not heads:
        problems = {problem.message: problem for problem in _problems_by_manifest(section, target)}
    return tuple(sorted(problems.values(), key=lambda problem: not problem.blocks))


def _problems_by_manifest(section: Mapping[str, Any], target: FitTarget) -> tuple[FitProblem, ...]:
    """Judge engines by their record."""
    plans = section.get("plans")
    if isinstance(plans, Mapping):
        wanted = target.compute_capability
        kinds = [kind for kind in plans if isinstance(plans[kind], Mapping) and wanted in (None, kind)]
        return tuple(problem for kind in kinds for problem in _problems_of_record(plans[kind], (kind,), target))
    build = section.get("build")
    record = {**build, **section} if isinstance(build, Mapping) else {}
    return _problems_of_record(record, tuple(section.get("compute_capabilities", ())), target)


def _problems_of_record(
    record: Mapping[str, Any], capabilities: tuple[str, ...], target: FitTarget
) -> tuple[FitProblem, ...]:
    if record.get("backend") not in [str(backend) for backend in Backend]:
        return ()
    version = str(record.get("plan_version") or record.get("version", ""))
    header = PlanHeader(Backend(record["backend"]), version, capabilities)
    return check_fit(plan_facts_of(header, record, where="manifest.json"), target)


def _plans_of(section: Mapping[str, Any]) -> dict[str, str]:
    """Return compute capability -> file of a version with a plan per GPU kind. Empty for any other."""
    plans = section.get("plans")
    if not isinstance(plans, Mapping):
        return {}
    return {key: plan["file"] for key, plan in plans.items() if isinstance(plan, Mapping) and "file" in plan}


def _heads(folder: Path) -> dict[str, bytes]:
    heads = {}
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        if path.name.endswith(PLAN_SUFFIXES) and path.is_file():
            with path.open("rb") as file:
                heads[path.name] = file.read(HEADER_BYTES)
    return heads


def _problems_of(
    name: str, head: bytes, section: Mapping[str, Any], owners: Sequence[str], target: FitTarget
) -> tuple[FitProblem, ...]:
    built = section if not owners else section["plans"][owners[0]]
    try:
        facts: PlanFacts = plan_facts_of(parse_plan_header(head, where=name), built, where=name)
    except EngineError as exc:
        return (FitProblem(True, exc.message, exc.hint or "Run repo-manager verify."),)
    if owners:
        facts = dataclasses.replace(facts, compute_capabilities=tuple(owners))
    return check_fit(facts, target)


def _no_plan_for(capability: str, known: Sequence[str]) -> FitProblem:
    return FitProblem(
        True,
        f"the version has plans for compute capability {', '.join(known)}; the server's GPU has {capability}",
        f"Build one on a GPU of compute capability {capability} and add a version with --for {capability}=FILE too.",
    )
