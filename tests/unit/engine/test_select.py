from __future__ import annotations

import stat
from pathlib import Path

import pytest

from repo_manager.engine.artifact import build_artifact
from repo_manager.engine.gpu import choose_backend, find_gpus
from repo_manager.errors import MissingDependencyError, UsageError
from repo_manager.optional import is_installed
from repo_manager.types import Backend

A100 = "NVIDIA A100-SXM4-80GB, 8.0, 550.54.15, 81920, GPU-aa"
T4 = "Tesla T4, 7.5, 550.54.15, 15360, GPU-tt"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the driver's tool: no machine has every card."""
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tool


def answer(tool: Path, text: str, code: int = 0) -> None:
    tool.write_text(f"#!/bin/sh\ncat <<'E'\n{text}\nE\nexit {code}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)


def test_gpus_are_read_with_units(nvidia_smi: Path) -> None:
    answer(nvidia_smi, f"{A100}\n{T4}\nGPU, [N/A], [N/A], [N/A], [N/A]")
    a100, t4 = find_gpus()
    assert (a100.name, a100.compute_capability, a100.memory_bytes) == ("NVIDIA A100-SXM4-80GB", "8.0", 81920 * 2**20)
    assert a100.has_sparse_tensor_cores
    assert not t4.has_sparse_tensor_cores


def test_a_driver_that_fails_means_no_gpu(nvidia_smi: Path) -> None:
    answer(nvidia_smi, "NVIDIA-SMI has failed", code=9)
    assert find_gpus() == ()


def test_no_driver_means_no_gpu_and_onnxruntime(nvidia_smi: Path) -> None:
    assert find_gpus() == ()
    choice = choose_backend("auto")
    assert choice.backend is Backend.ONNXRUNTIME
    assert "no NVIDIA GPU" in choice.reason


def test_auto_says_what_is_missing_beside_a_gpu(nvidia_smi: Path) -> None:
    answer(nvidia_smi, A100)
    choice = choose_backend("auto")
    assert choice.backend in {Backend.ONNXRUNTIME, Backend.TENSORRT}
    assert "A100" in choice.reason


def test_an_unknown_backend_is_a_usage_error_that_lists_the_known() -> None:
    with pytest.raises(UsageError, match="auto, onnxruntime, tensorrt, tensorrt_rtx"):
        choose_backend("openvino")


def test_onnxruntime_serves_the_files_under_tritons_names() -> None:
    artifact = build_artifact((Path("/x/conv.onnx"), Path("/x/conv.onnx.data")), Backend.ONNXRUNTIME)
    assert artifact.files == {"model.onnx": Path("/x/conv.onnx"), "conv.onnx.data": Path("/x/conv.onnx.data")}


@pytest.mark.skipif(is_installed("tensorrt"), reason="tensorrt is installed here")
def test_a_missing_builder_names_the_extra() -> None:
    with pytest.raises(MissingDependencyError) as caught:
        build_artifact((Path("/x/m.onnx"),), Backend.TENSORRT)
    assert "tensorrt" in str(caught.value)
    assert caught.value.hint
