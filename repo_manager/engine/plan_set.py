"""One engine per GPU kind: plans built elsewhere, checked by their own heads, and those built here.

Triton chooses by `cc_model_filenames`: compute capability -> file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from repo_manager.engine.capabilities import Capabilities
from repo_manager.engine.fit import PlanHeader, read_plan_header
from repo_manager.engine.gpu import Gpu
from repo_manager.errors import EngineError, UsageError
from repo_manager.types import Backend

__all__ = ["AdoptedPlan", "adopt_plans", "check_buildable", "check_one_version", "parse_for", "plan_name"]

_SUFFIXES = {Backend.TENSORRT: "plan", Backend.TENSORRT_RTX: "engine"}


@dataclasses.dataclass(frozen=True)
class AdoptedPlan:
    """A plan built elsewhere, with the facts in its own head.

    Attributes:
        path: file with the plan, as the user named it.
        source: its name, for the manifest.
        version: of the library behind it.
        compute_capabilities: as its head says (TensorRT-RTX). Empty where the head does not tell.
    """

    path: Path = dataclasses.field(metadata={"json": False})
    source: str
    version: str
    compute_capabilities: tuple[str, ...]


def parse_for(texts: Sequence[str]) -> dict[str, Path | None]:
    """Read `--for 8.0=a.plan` (an existing plan) and `--for 8.9` (to be built here) options.

    Raises:
        UsageError: another form, or a GPU kind given twice.
    """
    plans: dict[str, Path | None] = {}
    for text in texts:
        capability, separator, path = text.partition("=")
        major, dot, minor = capability.partition(".")
        if not (dot and major.isdecimal() and minor.isdecimal()) or (separator and not path):
            raise UsageError(f"--for {text}: expected CAPABILITY=FILE or CAPABILITY, for instance 8.0=a100.plan")
        if capability in plans:
            raise UsageError(f"--for {text}: compute capability {capability} is given twice")
        plans[capability] = Path(path) if separator else None
    return plans


def plan_name(backend: Backend, capability: str) -> str:
    """Return a plan's name in the version's folder, for instance `model_sm80.plan`."""
    return f"model_sm{capability.replace('.', '')}.{_SUFFIXES[backend]}"


def adopt_plans(plans: Mapping[str, Path | None], backend: Backend) -> dict[str, AdoptedPlan]:
    """Read the heads of the plans built elsewhere.

    Args:
        plans: compute capability -> file. `None` entries are left out.
        backend: the Triton backend for them.

    Raises:
        EngineError: one is no plan, another backend's, for another GPU kind as far as its head tells, or of another
            version than the others: no single server loads both.
        UsageError: a file cannot be read.
    """
    adopted: dict[str, AdoptedPlan] = {}
    for capability, path in plans.items():
        if path is None:
            continue
        header = _header(path, backend)
        if header.compute_capabilities and capability not in header.compute_capabilities:
            raise EngineError(
                f"{path}: built for compute capability {', '.join(header.compute_capabilities)}, and given for "
                f"{capability}",
                hint=f"Give it as --for {header.compute_capabilities[0]}={path}.",
            )
        adopted[capability] = AdoptedPlan(path, path.name, header.version, header.compute_capabilities)
    check_one_version({capability: plan.version for capability, plan in adopted.items()})
    return adopted


def _header(path: Path, backend: Backend) -> PlanHeader:
    try:
        header = read_plan_header(path)
    except OSError as exc:
        raise UsageError(f"--for: {path} cannot be read: {exc.strerror}") from exc
    if header.backend is backend:
        return header
    if header.backend is Backend.TENSORRT_RTX:
        raise EngineError(
            f"{path}: a TensorRT-RTX engine, which Triton's tensorrt backend does not load",
            hint="Publish it with --backend tensorrt_rtx.",
        )
    raise EngineError(f"{path}: a TensorRT plan, and the backend is {backend}", hint="Use --backend tensorrt.")


def check_one_version(versions: Mapping[str, str]) -> None:
    """Check whether one server can load all plans.

    Args:
        versions: compute capability -> version of the library behind the plan.

    Raises:
        EngineError: they differ.
    """
    if len(set(versions.values())) > 1:
        found = ", ".join(f"{capability}: {version}" for capability, version in versions.items())
        raise EngineError(
            f"the plans were built with different versions ({found}); a server has one",
            hint="Build all of them in the container release to serve them.",
        )


def check_buildable(capability: str, able: Capabilities, gpus: Sequence[Gpu]) -> None:
    """Check whether an engine for a GPU kind can be built here.

    Args:
        capability: compute capability of the GPU, such as `8.9`.
        able: capabilities of the TensorRT library.
        gpus: GPUs of this machine, from `find_gpus`. They count only where `able` names no targets (TensorRT).

    Raises:
        UsageError: TensorRT builds for the GPU at hand only. TensorRT-RTX for those it knows.
    """
    known = able.compute_capabilities or tuple(dict.fromkeys(gpu.compute_capability for gpu in gpus))
    if capability in known:
        return
    where = "it builds for" if able.compute_capabilities else "a plan is built on its own kind of GPU; here is"
    raise UsageError(
        f"--for {capability}: {able.backend} {able.version} cannot build this: {where} {', '.join(known) or 'none'}",
        hint=f"Build the plan on such a machine and give it: --for {capability}=FILE.",
    )
