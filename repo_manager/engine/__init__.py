"""Building what a backend serves: an ONNX file, a TensorRT plan, a TensorRT-RTX engine."""

from repo_manager.engine.artifact import Artifact, EngineSource, build_artifact
from repo_manager.engine.builder import EngineBuild, build_engine
from repo_manager.engine.capabilities import Capabilities, capabilities_of
from repo_manager.engine.evidence import BuilderEvidence, LayerEvidence, join_evidence, read_evidence
from repo_manager.engine.gpu import Gpu, find_gpus
from repo_manager.engine.layer_precision import LayerPrecision
from repo_manager.engine.layers import EngineLayer
from repo_manager.engine.options import EngineOptions
from repo_manager.engine.plan_header import PlanHeader, read_plan_header
from repo_manager.engine.profiles import ShapeRange, derive_profile, find_dim_ranges, parse_shape_range
from repo_manager.engine.select import BackendChoice, choose_backend

__all__ = [
    "Artifact",
    "BackendChoice",
    "BuilderEvidence",
    "Capabilities",
    "EngineBuild",
    "EngineLayer",
    "EngineOptions",
    "EngineSource",
    "Gpu",
    "LayerEvidence",
    "LayerPrecision",
    "PlanHeader",
    "ShapeRange",
    "build_artifact",
    "build_engine",
    "capabilities_of",
    "choose_backend",
    "derive_profile",
    "find_dim_ranges",
    "find_gpus",
    "join_evidence",
    "parse_shape_range",
    "read_evidence",
    "read_plan_header",
]
