"""The capability table and the calls of the code, compared with the recorded APIs of real libraries."""

from __future__ import annotations

import enum
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from repo_manager.engine.capabilities import Capabilities, StrongTyping, capabilities_of
from repo_manager.engine.network import create_config
from repo_manager.engine.options import EngineOptions, check_options
from repo_manager.errors import UsageError
from repo_manager.optional import is_installed, require
from repo_manager.types import Precision

ROOT = Path(__file__).parents[3]
RECORDS = sorted((ROOT / "tests" / "data" / "tensorrt_api").glob("*.json"))
# The calls of the builder, the profiler and the backends, by class.
CALLED = {
    "Builder": "create_builder_config create_network create_optimization_profile build_serialized_network",
    "IBuilderConfig": "set_flag set_memory_pool_limit builder_optimization_level profiling_verbosity "
    "hardware_compatibility_level add_optimization_profile create_timing_cache set_timing_cache get_timing_cache "
    "get_tactic_sources set_tactic_sources",
    "ITimingCache": "combine serialize",
    "OnnxParser": "parse parse_from_file num_errors get_error",
    "ParserError": "node desc code",
    "Runtime": "deserialize_cuda_engine engine_host_code_allowed",
    "ICudaEngine": "create_execution_context create_engine_inspector num_io_tensors get_tensor_name get_tensor_mode "
    "get_tensor_shape get_tensor_dtype num_optimization_profiles get_tensor_profile_shape",
    "IExecutionContext": "set_input_shape set_tensor_address execute_async_v3 get_tensor_shape profiler "
    "set_optimization_profile_async",
    "EngineInspector": "get_engine_information",
    "INetworkDefinition": "num_inputs get_input num_layers get_layer",
    "ILayer": "type num_outputs get_output precision",
    "ITensor": "name shape dtype is_shape_tensor",
    "IProfiler": "report_layer_time",
}


def record_of(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def library_of(record: dict[str, Any]) -> ModuleType:
    """A module with the recorded names, and nothing behind them."""
    module = ModuleType(record["module"])
    module.__dict__["__version__"] = record["version"]
    for name, members in record["enums"].items():
        setattr(module, name, enum.Enum(name, {member: index for index, member in enumerate(members)}))
    for name, words in record["classes"].items():
        setattr(module, name, type(name, (), dict.fromkeys(words)))
    return module


def able(name: str) -> Capabilities:
    (path,) = [path for path in RECORDS if path.stem.startswith(name)]
    return capabilities_of(library_of(record_of(path)))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_call_that_is_made_exists(path: Path) -> None:
    classes = record_of(path)["classes"]
    for name, words in CALLED.items():
        missing = set(words.split()) - set(classes[name])
        if path.stem.startswith("tensorrt_rtx"):
            # Where types come from the graph, the precision of a layer cannot be set, and nothing asks for it.
            missing -= {"precision"} if name == "ILayer" else set()
        assert not missing, f"{path.stem}: {name} has no {missing}"


def test_tensorrt_8_6() -> None:
    found = able("tensorrt-8.6")
    assert found.strong_typing is StrongTyping.ABSENT
    assert {"FP16", "INT8"} <= found.precision_flags
    assert found.explicit_batch
    assert not found.progress_monitor
    assert not found.parser_names_nodes
    assert found.strip_flag is None
    assert found.hardware_levels == ("AMPERE_PLUS",)
    assert found.compute_capabilities == ()
    assert found.needs_gpu
    assert "ERROR_ON_TIMING_CACHE_MISS" not in found.builder_flags
    assert {"SPARSE_WEIGHTS", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "REFIT"} <= found.builder_flags


def test_tensorrt_rtx_1_7() -> None:
    found = able("tensorrt_rtx")
    assert found.strong_typing is StrongTyping.ALWAYS
    assert not found.precision_flags
    assert found.progress_monitor
    assert found.parser_names_nodes
    assert not found.needs_gpu
    assert found.strip_flag == "STRIP_PLAN"
    assert {"SPARSE_WEIGHTS", "ERROR_ON_TIMING_CACHE_MISS"} <= found.builder_flags


@pytest.mark.skipif(not is_installed("tensorrt_rtx"), reason="tensorrt_rtx is not installed")
def test_the_record_is_of_the_installed_library() -> None:
    library = require("tensorrt_rtx")
    for record in map(record_of, RECORDS):
        if (record["module"], record["version"]) == (library.__name__, library.__version__):
            assert capabilities_of(library_of(record)) == capabilities_of(library)


@pytest.mark.parametrize("name", ["tensorrt-8.6", "tensorrt_rtx"])
def test_the_documents_table_says_the_same(name: str) -> None:
    text = (ROOT / "docs" / "tensorrt-versions.md").read_text(encoding="utf-8")
    rows = {cells[1]: cells[2:-1] for line in text.split("\n") if len(cells := re.split(r"\s*\|\s*", line)) == 8}
    heads = rows[""]
    column = next(
        index
        for index, head in enumerate(heads)
        if head in ("8.6.0", "RTX 1.6, 1.7") and (head == "8.6.0") == (name == "tensorrt-8.6")
    )
    said = {row: cells[column] for row, cells in rows.items()}
    found = able(name)
    assert (said["strongly typed networks"] == "no") is (found.strong_typing is StrongTyping.ABSENT)
    assert (said["precision flags"] == "none") is not bool(found.precision_flags)
    assert set(said["precision flags"].split()) - {"none"} == found.precision_flags
    assert (said["progress monitor, cancelling"] == "yes") is found.progress_monitor
    assert (said["builds without a GPU"] == "yes") is not found.needs_gpu
    assert (said["parser names the failing node"] == "yes") is found.parser_names_nodes
    assert (said["`SPARSE_WEIGHTS`"] == "yes") is ("SPARSE_WEIGHTS" in found.builder_flags)


def test_what_8_6_lacks_is_refused_with_the_next_step() -> None:
    found = able("tensorrt-8.6")
    for options in (
        {"strip": True},
        {"hardware_compatibility": "same_compute_capability"},
        {"compute_capabilities": ("8.9",)},
        {"refit": True},
    ):
        with pytest.raises(UsageError) as caught:
            check_options(EngineOptions(**options), found)  # type: ignore[arg-type]
        assert caught.value.hint


def test_a_configuration_of_8_6_uses_names_that_it_has() -> None:
    (path,) = [path for path in RECORDS if path.stem.startswith("tensorrt-8.6")]
    library = library_of(record_of(path))
    attributes = set(record_of(path)["classes"]["IBuilderConfig"])

    class Config:
        """Accepts only the recorded members of the class."""

        def __init__(self) -> None:
            self.flags: set[str] = set()

        def set_flag(self, flag: enum.Enum) -> None:
            self.flags.add(flag.name)

        def set_memory_pool_limit(self, *_: Any) -> None:
            pass

        def __setattr__(self, name: str, value: Any) -> None:
            assert name == "flags" or name in attributes, name
            super().__setattr__(name, value)

    class Builder:
        def create_builder_config(self) -> Config:
            return Config()

    options = EngineOptions(
        workspace_bytes=1, optimization_level=0, hardware_compatibility="ampere_plus", version_compatible=True
    )
    config = create_config(library, Builder(), options, capabilities_of(library), Precision.INT8_FP16)
    assert config.flags == {"SPARSE_WEIGHTS", "INT8", "FP16", "VERSION_COMPATIBLE"}
