from __future__ import annotations

import pytest

from repo_manager.engine.control import join_times, profiler_for
from repo_manager.engine.evidence import LayerEvidence
from repo_manager.engine.gpu import find_gpus
from repo_manager.optional import is_installed, require
from repo_manager.report.added_view import evidence_table, servers_for


def row(layer: str, engine_layer: str | None) -> LayerEvidence:
    return LayerEvidence(layer, "Conv", "valid", engine_layer, True, None, "", "")


def test_times_are_joined_by_the_onnx_node_however_the_builders_fused() -> None:
    sparse = [row("a", "a + relu"), row("b", "b + c"), row("c", "b + c"), row("d", None)]
    dense = [row("a", "a"), row("b", "b"), row("c", "c"), row("d", "d")]
    joined = join_times(sparse, {"a + relu": 5, "b + c": 0}, dense, {"a": 9, "b": 7, "d": 3})
    assert [(item.time_sparse_ns, item.time_dense_ns) for item in joined] == [(5, 9), (0, 7), (0, None), (None, 3)]
    assert [item.layer for item in joined] == ["a", "b", "c", "d"]


@pytest.mark.skipif(not is_installed("tensorrt_rtx"), reason="tensorrt_rtx is not installed")
def test_the_profiler_of_the_real_library_keeps_what_it_is_told() -> None:
    library = require("tensorrt_rtx")
    profiler = profiler_for(library)
    assert isinstance(profiler, library.IProfiler)
    profiler.report_layer_time("a", 0.0015)
    profiler.report_layer_time("a", 0.002)
    assert profiler.times_ns == {"a": [1500, 2000]}


def test_without_a_gpu_nothing_is_timed() -> None:
    from repo_manager.engine.control import layer_times_of

    if not find_gpus():
        assert layer_times_of(None) is None  # type: ignore[arg-type]  # not even looked at


def test_the_table_has_columns_for_times_only_where_there_are_some() -> None:
    from rich.console import Console

    def shown(rows: list[LayerEvidence]) -> str:
        console = Console(width=200)
        with console.capture() as capture:
            console.print(evidence_table(rows))
        return capture.get()

    assert "dense" not in shown([row("a", None)])
    timed = shown(list(join_times([row("a", "a")], {"a": 12_345}, [row("a", "a")], {})))
    assert "12.3 µs" in timed
    assert "dense" in timed


def test_releases_are_named_only_where_a_source_names_their_tensorrt() -> None:
    assert servers_for("11.1.0.106") == "Triton 26.07"
    assert servers_for("8.6.3.1") == "Triton 24.02", "24.03 and 24.04 are from memory"
    assert "no release is known" in servers_for("10.5.0.18")
