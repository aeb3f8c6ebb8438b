"""Messages as TensorRT-RTX 1.7.1 and TensorRT 8.6.0 gave them on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from repo_manager.engine.build_log import BuildLog, build_error
from repo_manager.engine.capabilities import Capabilities, StrongTyping
from repo_manager.types import Backend

ABLE = Capabilities(
    backend=Backend.TENSORRT_RTX,
    version="1.7.1.116",
    builder_flags=frozenset(),
    explicit_batch=False,
    strong_typing=StrongTyping.ALWAYS,
    compute_capabilities=("8.0",),
    hardware_levels=(),
    timing_cache=False,
    progress_monitor=True,
    parser_names_nodes=True,
    needs_gpu=False,
    lean_runtime=False,
)


def log(*errors: str) -> BuildLog:
    return BuildLog([("VERBOSE", "noise"), *(("ERROR", error) for error in errors), ("INFO", "more noise")])


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("Tactic Selection: no tactics to implement the operation within workspace limit.", "--workspace"),
        ("Compiling this graph requires workspace memory greater than 0.", "--workspace"),
        ("Cannot compile operation 'fcmm' for Turing (SM75): FP32 GEMM is not supported.", "--compute-capability"),
        ("MyelinCheckException: graph_jit.cpp:278: CHECK(status == CUDA_SUCCESS) failed.", "needs a GPU"),
        ("Cuda Runtime (cudaError 35: CUDA driver version is insufficient for CUDA runtime version)", "needs a GPU"),
        ("something that nobody has seen yet", "--backend onnxruntime"),
    ],
)
def test_known_failures_have_their_own_next_step(message: str, hint: str) -> None:
    error = build_error(Path("m.onnx"), log(message), ABLE)
    assert hint in str(error.hint)
    assert message in error.message
    assert "m.onnx: tensorrt_rtx 1.7.1.116 cannot build this model" in error.message


def test_places_in_the_librarys_source_and_repetitions_are_left_out() -> None:
    error = build_error(Path("m.onnx"), log(*["failed. In compileGraph at /_src/x/codeGenerator.cpp:2012)"] * 3), ABLE)
    assert "/_src" not in error.message
    assert error.message.count("failed.") == 1


def test_a_silent_failure_says_so() -> None:
    assert "it gave no reason" in build_error(Path("m.onnx"), log(), ABLE).message
