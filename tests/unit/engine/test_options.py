from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from repo_manager.engine.capabilities import Capabilities, StrongTyping
from repo_manager.engine.options import EngineOptions, check_options
from repo_manager.errors import UsageError
from repo_manager.types import Backend

# As found in tensorrt 8.6.0 and in tensorrt-rtx 1.7.1.116; docs/tensorrt-versions.md has the whole table.
V8 = Capabilities(
    backend=Backend.TENSORRT,
    version="8.6.0",
    builder_flags=frozenset({"FP16", "INT8", "REFIT", "SPARSE_WEIGHTS", "VERSION_COMPATIBLE"}),
    explicit_batch=True,
    strong_typing=StrongTyping.ABSENT,
    compute_capabilities=(),
    hardware_levels=("AMPERE_PLUS",),
    timing_cache=True,
    progress_monitor=False,
    parser_names_nodes=False,
    needs_gpu=True,
    lean_runtime=True,
)
RTX = dataclasses.replace(
    V8,
    backend=Backend.TENSORRT_RTX,
    version="1.7.1",
    builder_flags=frozenset({"REFIT", "REFIT_IDENTICAL", "SPARSE_WEIGHTS", "STRIP_PLAN", "VERSION_COMPATIBLE"}),
    strong_typing=StrongTyping.ALWAYS,
    compute_capabilities=("8.0", "8.9", "12.0"),
    hardware_levels=(),
    timing_cache=False,
)


@pytest.mark.parametrize(
    ("able", "options", "match"),
    [
        (V8, {"refit": True}, "contradicts sparse"),
        (V8, {"strip": True}, "no such flag"),
        (V8, {"compute_capabilities": ("8.0",)}, "for the GPU that it is built on"),
        (V8, {"hardware_compatibility": "same_compute_capability"}, "it offers: ampere_plus"),
        (RTX, {"hardware_compatibility": "ampere_plus"}, "it offers: none"),
        (RTX, {"compute_capabilities": ("8.0", "9.0")}, r"9\.0.*it builds for 8\.0, 8\.9, 12\.0"),
        (RTX, {"deterministic": True}, "no timing cache to pin"),
        (RTX, {"timing_cache": Path("x")}, "measures no kernels"),
        (V8, {"optimization_level": 6}, "expected 0"),
        (V8, {"optimization_level": -1}, "expected 0"),
        (V8, {"workspace_bytes": 0}, "above 0"),
        (V8, {"plan_detail": "all"}, "layer_names_only, detailed, none"),
    ],
)
def test_contradictions_are_refused_with_the_reason(able: Capabilities, options: dict[str, object], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        check_options(EngineOptions(**options), able)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("able", "options"),
    [
        (V8, {}),
        (V8, {"refit": True, "sparse": False}),
        (V8, {"deterministic": True, "timing_cache": Path("x"), "hardware_compatibility": "ampere_plus"}),
        (V8, {"optimization_level": 0}),
        (RTX, {"strip": True}),
        (RTX, {"compute_capabilities": ("8.9",), "version_compatible": True}),
    ],
)
def test_what_goes_together_passes(able: Capabilities, options: dict[str, object]) -> None:
    check_options(EngineOptions(**options), able)  # type: ignore[arg-type]


def test_strip_with_sparse_kernels_needs_a_refit_with_the_same_weights() -> None:
    older = dataclasses.replace(RTX, builder_flags=RTX.builder_flags - {"REFIT_IDENTICAL"})
    with pytest.raises(UsageError, match="--strip with sparse kernels"):
        check_options(EngineOptions(strip=True), older)
    check_options(EngineOptions(strip=True, sparse=False), older)
