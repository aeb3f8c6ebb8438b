"""Capabilities of an installed TensorRT, looked up once, so nothing else compares versions."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Mapping
from types import ModuleType

from repo_manager.types import Backend

__all__ = ["FLOAT_OPERATORS", "Capabilities", "StrongTyping", "capabilities_of"]

FLOAT_OPERATORS: Mapping[Backend, tuple[str, ...]] = {Backend.TENSORRT_RTX: ("ConvTranspose",)}
"""Operators a builder computes in floating point whatever Q/DQ surrounds them; found by building each with
TensorRT-RTX 1.7. A test repeats it. An operator of another builder is found out when its engine is built."""


class StrongTyping(str, enum.Enum):
    """How a builder takes every type from the graph.

    ABSENT: it cannot be (8.6): the precision flags are needed even for a typed graph.
    ASK: by a flag of the network (10.x, TensorRT-RTX before 1.5).
    ALWAYS: every network is strongly typed; the flag is accepted (11.x, TensorRT-RTX from 1.5).
    """

    ABSENT = "absent"
    ASK = "ask"
    ALWAYS = "always"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """One TensorRT's abilities; docs/tensorrt-versions.md is this table for the known versions.

    Attributes:
        backend: the Triton backend for its engines.
        version: the library's own `__version__`, for instance `10.13.3.9`.
        builder_flags: names of the `BuilderFlag` members this library has.
        explicit_batch: whether `EXPLICIT_BATCH` has to be asked for.
        strong_typing: whether and how a network takes its types from the graph, see `StrongTyping`.
        compute_capabilities: the targets open to naming, `8.0` style. Empty where a plan is for the GPU at hand.
        hardware_levels: names of `HardwareCompatibilityLevel` the builder honours.
        timing_cache: whether the timing cache has any effect.
        progress_monitor: whether a build reports its steps and can be cancelled.
        parser_names_nodes: whether a parser's error carries the node's name and operator.
        needs_gpu: whether a build needs a GPU.
        lean_runtime: whether a version-compatible plan can carry its own runtime.
        tactic_sources: names of `TacticSource`, the libraries whose kernels may be used.
    """

    backend: Backend
    version: str
    builder_flags: frozenset[str]
    explicit_batch: bool
    strong_typing: StrongTyping
    compute_capabilities: tuple[str, ...]
    hardware_levels: tuple[str, ...]
    timing_cache: bool
    progress_monitor: bool
    parser_names_nodes: bool
    needs_gpu: bool
    lean_runtime: bool
    tactic_sources: tuple[str, ...] = ()

    @property
    def precision_flags(self) -> frozenset[str]:
        """The flags for a precision. None where types come from the graph alone."""
        return self.builder_flags & {"FP16", "BF16", "INT8", "FP8", "INT4", "FP4"}

    @property
    def strip_flag(self) -> str | None:
        """The flag for a plan without weights, by its current or its 10.0 name."""
        return next((name for name in ("STRIP_PLAN", "WEIGHTLESS") if name in self.builder_flags), None)


@functools.cache
def capabilities_of(library: ModuleType) -> Capabilities:
    """Look up the capabilities of `tensorrt` or `tensorrt_rtx`.

    The presence of names decides, not the version number. Three abilities do not show in names and
    are known from running the library without a GPU: TensorRT-RTX builds there, ignores the
    timing cache, and refuses hardware compatibility levels.
    """
    is_rtx = library.__name__ == "tensorrt_rtx"
    flags = _members(library, "BuilderFlag")
    network_flags = _members(library, "NetworkDefinitionCreationFlag")
    targets = [name for name in _members(library, "ComputeCapability") if name.startswith("SM")]
    return Capabilities(
        backend=Backend.TENSORRT_RTX if is_rtx else Backend.TENSORRT,
        version=library.__version__,
        builder_flags=frozenset(flags),
        explicit_batch="EXPLICIT_BATCH" in network_flags,
        strong_typing=_strong_typing(flags, network_flags),
        compute_capabilities=tuple(_dotted(name) for name in targets),
        hardware_levels=()
        if is_rtx
        else tuple(n for n in _members(library, "HardwareCompatibilityLevel") if n != "NONE"),
        timing_cache=not is_rtx,
        progress_monitor=hasattr(library, "IProgressMonitor"),
        parser_names_nodes=hasattr(library.ParserError, "node_name"),
        needs_gpu=not is_rtx,
        lean_runtime=not is_rtx,
        tactic_sources=_members(library, "TacticSource"),
    )


def _members(library: ModuleType, name: str) -> tuple[str, ...]:
    """Names of an enumeration; none where this version does not have it."""
    return tuple(getattr(getattr(library, name, None), "__members__", ()))


def _strong_typing(flags: tuple[str, ...], network_flags: tuple[str, ...]) -> StrongTyping:
    if "FP16" not in flags:
        return StrongTyping.ALWAYS
    return StrongTyping.ASK if "STRONGLY_TYPED" in network_flags else StrongTyping.ABSENT


def _dotted(name: str) -> str:
    """`SM80` -> `8.0`, `SM120` -> `12.0`."""
    digits = name.removeprefix("SM")
    return f"{digits[:-1]}.{digits[-1]}"
