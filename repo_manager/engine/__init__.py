"""Building what a backend serves: an ONNX file, a TensorRT plan, a TensorRT-RTX engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repo_manager.engine.releases import Release, release_of_container, release_of_server, releases
from repo_manager.lazy import lazy_exports

if TYPE_CHECKING:
    from repo_manager.engine.artifact import Artifact, EngineSource, build_artifact
    from repo_manager.engine.builder import EngineBuild, build_engine
    from repo_manager.engine.capabilities import Capabilities, capabilities_of
    from repo_manager.engine.control import ControlTwin, control_twins, dense_twin
    from repo_manager.engine.evidence import BuilderEvidence, LayerEvidence, join_evidence, read_evidence
    from repo_manager.engine.fit import FitProblem, FitTarget, PlanFacts, check_fit, plan_facts
    from repo_manager.engine.fit_check import check_version_fit, fit_target_of
    from repo_manager.engine.gpu import Gpu, find_gpus
    from repo_manager.engine.layer_precision import LayerPrecision
    from repo_manager.engine.layer_times import join_times, layer_times_of, measure_layer_times
    from repo_manager.engine.layers import EngineLayer
    from repo_manager.engine.options import EngineOptions
    from repo_manager.engine.plan_header import PlanHeader, read_plan_header
    from repo_manager.engine.plan_set import AdoptedPlan, parse_for
    from repo_manager.engine.profiles import ShapeRange, derive_profile, find_dim_ranges, parse_shape_range
    from repo_manager.engine.select import BackendChoice, choose_backend
    from repo_manager.engine.triton_options import (
        AcceleratorOptions,
        config_variant,
        parse_config_names,
        with_accelerator,
        with_plans_by_capability,
    )

__all__ = [
    "AcceleratorOptions",
    "AdoptedPlan",
    "Artifact",
    "BackendChoice",
    "BuilderEvidence",
    "Capabilities",
    "ControlTwin",
    "EngineBuild",
    "EngineLayer",
    "EngineOptions",
    "EngineSource",
    "FitProblem",
    "FitTarget",
    "Gpu",
    "LayerEvidence",
    "LayerPrecision",
    "PlanFacts",
    "PlanHeader",
    "Release",
    "ShapeRange",
    "build_artifact",
    "build_engine",
    "capabilities_of",
    "check_fit",
    "check_version_fit",
    "choose_backend",
    "config_variant",
    "control_twins",
    "dense_twin",
    "derive_profile",
    "find_dim_ranges",
    "find_gpus",
    "fit_target_of",
    "join_evidence",
    "join_times",
    "layer_times_of",
    "measure_layer_times",
    "parse_config_names",
    "parse_for",
    "parse_shape_range",
    "plan_facts",
    "read_evidence",
    "read_plan_header",
    "release_of_container",
    "release_of_server",
    "releases",
    "with_accelerator",
    "with_plans_by_capability",
]

_MODULES = {
    "artifact": (
        "Artifact",
        "EngineSource",
        "build_artifact",
    ),
    "builder": (
        "EngineBuild",
        "build_engine",
    ),
    "capabilities": (
        "Capabilities",
        "capabilities_of",
    ),
    "control": (
        "ControlTwin",
        "control_twins",
        "dense_twin",
    ),
    "evidence": (
        "BuilderEvidence",
        "LayerEvidence",
        "join_evidence",
        "read_evidence",
    ),
    "fit": (
        "FitProblem",
        "FitTarget",
        "PlanFacts",
        "check_fit",
        "plan_facts",
    ),
    "fit_check": (
        "check_version_fit",
        "fit_target_of",
    ),
    "gpu": (
        "Gpu",
        "find_gpus",
    ),
    "layer_precision": ("LayerPrecision",),
    "layer_times": (
        "join_times",
        "layer_times_of",
        "measure_layer_times",
    ),
    "layers": ("EngineLayer",),
    "options": ("EngineOptions",),
    "plan_header": (
        "PlanHeader",
        "read_plan_header",
    ),
    "plan_set": (
        "AdoptedPlan",
        "parse_for",
    ),
    "profiles": (
        "ShapeRange",
        "derive_profile",
        "find_dim_ranges",
        "parse_shape_range",
    ),
    "select": (
        "BackendChoice",
        "choose_backend",
    ),
    "triton_options": (
        "AcceleratorOptions",
        "config_variant",
        "parse_config_names",
        "with_accelerator",
        "with_plans_by_capability",
    ),
}
__getattr__ = lazy_exports(__name__, _MODULES)
