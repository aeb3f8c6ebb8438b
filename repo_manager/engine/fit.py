"""Predict whether a plan will load on a server.

Rules (TensorRT developer guide, "Version Compatibility" and "Hardware Compatibility"): a plan loads in the TensorRT
version of its build. A version-compatible plan also loads in later versions with the same major number. It loads on
the compute capability of its build, unless a hardware compatibility level widens the rule. A failed load costs GPU
memory for good (triton-inference-server/server#8969), so it is checked first.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from repo_manager.errors import EngineError
from repo_manager.types import Backend

__all__ = [
    "HEADER_BYTES",
    "ContainerRelease",
    "FitProblem",
    "FitTarget",
    "PlanFacts",
    "PlanHeader",
    "check_fit",
    "parse_plan_header",
    "plan_facts",
    "plan_facts_of",
    "read_plan_header",
    "release_of_container",
    "release_of_server",
    "releases",
]


# Triton container releases and their contents. The data is in triton_releases.csv.
#
# A column of a row is verified when its source could be read (docs/tensorrt-versions.md lists them). The others are
# from memory, and messages say so. An empty cell is unknown.


@dataclasses.dataclass(frozen=True)
class ContainerRelease:
    """One monthly container, `tritonserver:<release>-py3`.

    Attributes:
        release: year and month as in the image tag, for instance `24.10`.
        triton: the server's version, as its metadata says it. Empty when it is not known.
        tensorrt: TensorRT's version. Empty when it is not known.
        cuda: CUDA's version. Empty when it is not known.
        driver: the smallest driver of the table. Data-centre GPUs may use older branches.
        verified: the columns read from a source.
        sources: short names of the sources, explained in docs/tensorrt-versions.md.
    """

    release: str
    triton: str
    tensorrt: str
    cuda: str
    driver: str
    verified: frozenset[str]
    sources: tuple[str, ...]

    def is_verified(self, column: str) -> bool:
        """Return whether a column's value has a source."""
        return column in self.verified


@functools.cache
def releases() -> tuple[ContainerRelease, ...]:
    """Return all releases, oldest first."""
    text = Path(__file__).with_name("triton_releases.csv").read_text(encoding="utf-8")
    return tuple(
        ContainerRelease(
            release=row["release"],
            triton=row["triton"],
            tensorrt=row["tensorrt"],
            cuda=row["cuda"],
            driver=row["driver"],
            verified=frozenset(row["verified"].split()),
            sources=tuple(row["sources"].split()),
        )
        for row in csv.DictReader(text.splitlines())
    )


def release_of_server(version: str) -> ContainerRelease | None:
    """Find a release by the server's version, for instance `2.51.0`. `None` when the table lacks it."""
    return next((release for release in releases() if release.triton and release.triton == version), None)


def release_of_container(name: str) -> ContainerRelease | None:
    """Find a release by its name or image tag, for instance `24.10` or `24.10-py3`."""
    return next((release for release in releases() if name.split("-")[0] == release.release), None)


# Facts from the first bytes of a plan, without a GPU or the library.
#
# Layout of the first 28 bytes, little endian: tag (4), serialization version (4), 16 bytes with a different meaning in
# each library, then the library's version, one byte a part. Source for TensorRT: `printPlanVersion` in
# samples/common/sampleEngines.cpp of NVIDIA/TensorRT (tag `ftrt`, serialization version 0). TensorRT-RTX uses the tag
# `vtrt`. It has a second tag at byte 28, followed by one bit for each compute capability. Observed in engines built by
# 1.4.0 and 1.7.1 for each capability (tests/integration/test_engine_rtx.py repeats the check).
#
# Layout of the first 28 bytes, little endian: tag (4), serialization version (4), 16 bytes with a different meaning in
# each library, then the library's version, one byte a part. Source for TensorRT: `printPlanVersion` in
# samples/common/sampleEngines.cpp of NVIDIA/TensorRT (tag `ftrt`, serialization version 0). TensorRT-RTX uses the tag
# `vtrt`. A second tag at byte 28 precedes one bit for each compute capability. Observed in engines built by 1.4.0 and
# 1.7.1 for each capability (tests/integration/test_engine_rtx.py repeats the check).

_TAGS = {b"ftrt": Backend.TENSORRT, b"vtrt": Backend.TENSORRT_RTX}
HEADER_BYTES = 36
"""How many of a plan's first bytes are read."""
_VERSION = slice(24, 28)
_RTX_TARGETS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


@dataclasses.dataclass(frozen=True)
class PlanHeader:
    """The head of a plan.

    Attributes:
        backend: the Triton backend for it.
        version: of the library behind it, for instance `10.13.3.9`.
        compute_capabilities: GPUs it was built for. Empty where the header does not tell (TensorRT).
    """

    backend: Backend
    version: str
    compute_capabilities: tuple[str, ...]


def read_plan_header(path: Path) -> PlanHeader:
    """Read the head of a TensorRT plan or a TensorRT-RTX engine.

    Raises:
        EngineError: it is neither, or of an unknown layout.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return parse_plan_header(file.read(HEADER_BYTES), where=str(path))


def parse_plan_header(head: bytes, *, where: str) -> PlanHeader:
    """Read a plan's first bytes.

    Args:
        head: `HEADER_BYTES` of them, or more.
        where: the plan's name, for an error.

    Raises:
        EngineError: it is no plan, or of an unknown layout.
    """
    backend = _TAGS.get(head[:4])
    if backend is None or len(head) < HEADER_BYTES:
        raise EngineError(
            f"{where}: not a TensorRT plan: it starts with {head[:4]!r}, expected b'ftrt' (TensorRT) or b'vtrt' "
            "(TensorRT-RTX)",
            hint="Give a file that IBuilder.build_serialized_network or trtexec --saveEngine wrote.",
        )
    (layout,) = struct.unpack_from("<I", head, 4)
    if layout != 0:
        raise EngineError(f"{where}: a plan of serialization version {layout}; this program knows version 0")
    return PlanHeader(backend, ".".join(str(part) for part in head[_VERSION]), _rtx_targets(backend, head))


def _rtx_targets(backend: Backend, head: bytes) -> tuple[str, ...]:
    if backend is not Backend.TENSORRT_RTX or head[28:32] != b"vtrt":
        return ()
    (bits,) = struct.unpack_from("<I", head, 32)
    return tuple(target for index, target in enumerate(_RTX_TARGETS) if bits >> index & 1)


@dataclasses.dataclass(frozen=True)
class PlanFacts:
    """The facts behind the load of a plan.

    Attributes:
        backend: which Triton backend loads it.
        version: of the library behind it.
        compute_capabilities: GPUs it is for. Empty when neither manifest nor header tells.
        version_compatible: whether later versions load it. `None`: not known (a plan built by others).
        hardware_compatibility: `ampere_plus` or `same_compute_capability`. `None`: only GPUs of the build's kind, or
            not known.
    """

    backend: Backend
    version: str
    compute_capabilities: tuple[str, ...] = ()
    version_compatible: bool | None = None
    hardware_compatibility: str | None = None


@dataclasses.dataclass(frozen=True)
class FitTarget:
    """Where the plan will be loaded. `None` is not known, and not checked.

    Attributes:
        release: release of the server's container: its TensorRT and its smallest driver are compared.
        compute_capability: of the server's GPU, for instance `9.0`.
        driver: version of the GPU driver, for instance `550.54.15`. An older one than the release lists is a warning.
        library_versions: of the TensorRT libraries for engines, where they are not the release's own: our embedded
            server runs engines in those installed for Python.
        has_gpu: whether the server has any NVIDIA GPU.
    """

    release: ContainerRelease | None = None
    compute_capability: str | None = None
    driver: str | None = None
    library_versions: Mapping[Backend, str] = dataclasses.field(default_factory=dict)
    has_gpu: bool | None = None


@dataclasses.dataclass(frozen=True)
class FitProblem:
    """One reason against a load.

    Attributes:
        blocks: whether the load would fail, else it is a warning.
        message: what was found and expected.
        hint: advice for the user in whole sentences. Never empty.
    """

    blocks: bool
    message: str
    hint: str


def plan_facts(path: Path, engine: Mapping[str, Any] | None = None) -> PlanFacts:
    """Collect a plan's facts from its own head and, when we built it, from its manifest.

    Args:
        path: the plan: a `.plan` or `.engine` file.
        engine: the manifest's section `engine`. `None` for a plan built by others.

    Raises:
        EngineError: it is no plan, or the manifest speaks of another one.
    """
    return plan_facts_of(read_plan_header(path), engine or {}, where=str(path))


def plan_facts_of(header: PlanHeader, engine: Mapping[str, Any], *, where: str) -> PlanFacts:
    """Join a plan's head and the manifest's section `engine` (empty for a plan built by others).

    Args:
        header: the plan's head, as read from its file.
        engine: section `engine` of the manifest. Empty: the plan was built elsewhere.
        where: place of the value, as the error message names it.

    Raises:
        EngineError: the manifest speaks of another plan.
    """
    build = engine.get("build")
    if not isinstance(build, Mapping) or "version" not in build:
        return PlanFacts(header.backend, header.version, header.compute_capabilities)
    if build["version"] != header.version and not header.version.startswith(f"{build['version']}."):
        raise EngineError(
            f"{where}: built by version {header.version}, and its manifest says {build['version']}",
            hint="Run repo-manager verify: the file is not the published one.",
        )
    options = build.get("options", {})
    return PlanFacts(
        backend=header.backend,
        version=header.version,
        compute_capabilities=header.compute_capabilities or tuple(engine.get("compute_capabilities", ())),
        version_compatible=options.get("version_compatible"),
        hardware_compatibility=options.get("hardware_compatibility"),
    )


def check_fit(plan: PlanFacts, target: FitTarget) -> tuple[FitProblem, ...]:
    """List the objections to loading a plan on a server. Empty when nothing known does."""
    return (
        *_place_problems(plan, target),
        *_library_problems(plan, target),
        *_version_problems(plan, target),
        *_gpu_problems(plan, target),
        *_driver_problems(target),
    )


def _place_problems(plan: PlanFacts, target: FitTarget) -> Iterator[FitProblem]:
    if target.has_gpu is False:
        yield FitProblem(
            True,
            "the server's machine has no NVIDIA GPU, and an engine needs one",
            "Serve it on a machine that has one, or add the model again with --backend onnxruntime.",
        )
    if plan.backend is Backend.TENSORRT_RTX and target.release is not None:
        yield FitProblem(
            False,
            f"Triton {target.release.release} itself has no tensorrt_rtx backend; the embedded server has",
            "Start it with repo-manager serve, or lay repo_manager/server/backends beside the server's backends.",
        )


def _library_problems(plan: PlanFacts, target: FitTarget) -> Iterator[FitProblem]:
    """Compare with the library known to be there. It refuses another major version before it loads."""
    installed = target.library_versions.get(plan.backend)
    if installed is None or _numbers(installed)[:3] == _numbers(plan.version)[:3]:
        return
    ours, theirs = _numbers(plan.version), _numbers(installed)
    older = plan.version_compatible is not False and ours < theirs
    yield FitProblem(
        ours[:1] != theirs[:1] or (plan.backend is Backend.TENSORRT and not older),
        f"the engine was built with {plan.backend} {plan.version}; the server runs {installed}",
        f"Build it with {installed}, or install {plan.version} where the server runs.",
    )


def _version_problems(plan: PlanFacts, target: FitTarget) -> Iterator[FitProblem]:
    release = target.release
    if plan.backend is not Backend.TENSORRT or release is None or not release.tensorrt:
        return
    ours, theirs = _numbers(plan.version), _numbers(release.tensorrt)
    shared = min(len(ours), len(theirs))
    if ours[:shared] == theirs[:shared]:
        return
    listed = f"TensorRT {release.tensorrt}" + (
        "" if release.is_verified("tensorrt") else " (from memory, not verified)"
    )
    found = f"the plan was built with TensorRT {plan.version}; the server's release {release.release} has {listed}"
    if plan.version_compatible and ours[0] == theirs[0] and ours < theirs:
        yield FitProblem(
            False,
            f"{found}; the plan is version-compatible",
            "The server needs --backend-config=tensorrt,version-compatible=true.",
        )
        return
    blocks = release.is_verified("tensorrt") and plan.version_compatible is not None
    yield FitProblem(
        blocks,
        f"{found}: it will not load",
        f"Build it with TensorRT {release.tensorrt} (in the release's container), or serve it with a release that has "
        f"TensorRT {plan.version}.",
    )


def _gpu_problems(plan: PlanFacts, target: FitTarget) -> Iterator[FitProblem]:
    gpu = target.compute_capability
    if gpu is None or not plan.compute_capabilities or gpu in plan.compute_capabilities:
        return
    if plan.hardware_compatibility == "ampere_plus" and float(gpu) >= 8.0:
        return
    wanted = ", ".join(plan.compute_capabilities)
    hint = (
        f"Build it again with --compute-capability {gpu}, if TensorRT-RTX knows it."
        if plan.backend is Backend.TENSORRT_RTX
        else f"Build it on a GPU of compute capability {gpu} and give both: --for {plan.compute_capabilities[0]}=... "
        f"--for {gpu}=..."
    )
    yield FitProblem(True, f"the plan is for compute capability {wanted}; the server's GPU has {gpu}", hint)


def _driver_problems(target: FitTarget) -> Iterator[FitProblem]:
    release, driver = target.release, target.driver
    if release is None or driver is None or not release.driver or _numbers(driver) >= _numbers(release.driver):
        return
    yield FitProblem(
        False,
        f"driver {driver} is older than {release.driver}, which release {release.release} lists",
        "Data-centre GPUs may still work through CUDA's forward compatibility; else update the driver.",
    )


def _numbers(version: str) -> tuple[int, ...]:
    """`10.13.3.9` as numbers. Stops at the first part without one."""
    parts: list[int] = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        parts.append(int(part))
    return tuple(parts)
