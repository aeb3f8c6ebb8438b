from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from repo_manager.engine.fit import ContainerRelease, FitTarget
from repo_manager.engine.fit_check import check_version_fit, fit_target_of
from repo_manager.engine.gpu import Gpu, parse_gpus
from repo_manager.types import Backend

ALL = frozenset({"triton", "tensorrt", "cuda", "driver"})
R2607 = ContainerRelease("26.07", "2.71.0", "11.1", "13.3.0.035", "610.43.02", ALL, ())
A100 = Gpu("A100", "8.0", "610.43.02", 80 << 30, "GPU-aa")
H100 = Gpu("H100", "9.0", "610.43.02", 80 << 30, "GPU-bb")
METRICS = """# HELP nv_gpu_utilization GPU utilization rate [0.0 - 1.0)
# TYPE nv_gpu_utilization gauge
nv_gpu_utilization{gpu_uuid="GPU-bb"} 0.5
nv_gpu_power_usage{gpu_uuid="GPU-bb"} 100.0
nv_inference_count{model="m",version="1"} 3
"""


def head(tag: bytes, *version: int) -> bytes:
    return tag + bytes(20) + bytes(version) + bytes(100)


def manifest(version: str, capability: str, **options: Any) -> dict[str, Any]:
    defaults = {"version_compatible": False, "hardware_compatibility": None}
    return {
        "engine": {"build": {"version": version, "options": defaults | options}, "compute_capabilities": [capability]}
    }


def test_the_whole_sentence_before_a_load() -> None:
    files = {"model.plan": head(b"ftrt", 11, 2, 0, 5)}
    version, gpu = check_version_fit(files, manifest("11.2.0.5", "8.0"), FitTarget(R2607, "9.0"))
    assert version.blocks
    assert gpu.blocks
    assert "built with TensorRT 11.2.0.5; the server's release 26.07 has TensorRT 11.1" in version.message
    assert "compute capability 8.0; the server's GPU has 9.0" in gpu.message
    assert version.hint
    assert gpu.hint


def test_a_folder_is_read_like_the_first_bytes_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "model.plan").write_bytes(head(b"ftrt", 10, 5, 0, 1))
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    target = FitTarget(R2607)
    found = check_version_fit(tmp_path, None, target)
    assert found == check_version_fit({"model.plan": head(b"ftrt", 10, 5, 0, 1), "x.onnx": b""}, None, target)
    assert len(found) == 1


@pytest.mark.parametrize("files", [{}, {"model.onnx": b"\x08\x07"}])
def test_a_version_without_engines_has_no_problem(files: dict[str, bytes]) -> None:
    assert check_version_fit(files, {"engine": {"format": "onnx"}}, FitTarget(R2607, "9.0")) == ()


@pytest.mark.parametrize("broken", [b"", b"ftrt", b"junk" * 20])
def test_a_file_that_is_no_plan_blocks(broken: bytes) -> None:
    (problem,) = check_version_fit({"model.plan": broken}, None, FitTarget())
    assert problem.blocks
    assert "not a TensorRT plan" in problem.message


PLANS = {"engine": {"plans": {"8.0": {"file": "model_sm80.plan"}, "9.0": {"file": "model_sm90.plan"}}}}


def test_of_several_plans_only_the_one_for_the_servers_gpu_counts() -> None:
    files = {"model_sm80.plan": b"broken", "model_sm90.plan": head(b"ftrt", 11, 1, 0, 5)}
    assert check_version_fit(files, PLANS, FitTarget(R2607, "9.0")) == ()
    assert check_version_fit(files, PLANS, FitTarget(R2607, "8.0"))[0].blocks
    (missing,) = check_version_fit(files, PLANS, FitTarget(R2607, "8.9"))
    assert missing.blocks
    assert "8.0, 9.0" in missing.message
    assert "--for 8.9=FILE" in missing.hint


def test_a_manifest_that_is_not_ours_is_no_crash() -> None:
    files = {"model.plan": head(b"ftrt", 11, 1, 0, 5)}
    for odd in ({"engine": None}, {"engine": "x"}, {"engine": {"plans": 3}}, {}):
        assert check_version_fit(files, odd, FitTarget(R2607, "9.0")) == ()


def test_a_gpu_of_this_machine_is_known_by_its_uuid() -> None:
    target = fit_target_of("2.71.0", METRICS, gpus=(A100, H100))
    assert (target.compute_capability, target.driver) == ("9.0", "610.43.02")
    assert target.release is not None
    assert target.release.release == "26.07"
    assert target.library_versions == {}


def test_a_gpu_of_another_machine_is_not_guessed() -> None:
    assert fit_target_of("2.71.0", METRICS, gpus=(A100,)).compute_capability is None
    assert fit_target_of("2.71.0", None, gpus=(A100,)).compute_capability is None
    two = METRICS + 'nv_gpu_utilization{gpu_uuid="GPU-cc"} 0.1\n'
    assert fit_target_of("2.71.0", two, gpus=(H100,)).compute_capability is None
    assert fit_target_of("9.9.9", None, gpus=()).release is None


def test_gpus_of_two_kinds_are_no_kind() -> None:
    both = METRICS + 'nv_gpu_utilization{gpu_uuid="GPU-aa"} 0.1\n'
    assert fit_target_of("2.71.0", both, gpus=(A100, H100)).compute_capability is None


def test_the_embedded_server_runs_engines_in_what_is_installed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "repo_manager.engine.fit_check.installed_version", {"tensorrt": "8.6.0", "tensorrt-rtx": None}.get
    )
    target = fit_target_of("2.51.0", None, embedded=True, gpus=(A100,))
    assert target.release is None, "24.10's TensorRT is in the container, not here"
    assert (target.compute_capability, target.library_versions) == ("8.0", {Backend.TENSORRT: "8.6.0"})
    (problem,) = check_version_fit({"m.plan": head(b"ftrt", 10, 5, 0, 1)}, None, target)
    assert problem.blocks
    assert "built with tensorrt 10.5.0.1; the server runs 8.6.0" in problem.message
    assert check_version_fit({"m.plan": head(b"ftrt", 8, 6, 0, 12)}, None, target) == ()


def test_the_driver_tells_the_uuid() -> None:
    (gpu,) = parse_gpus("NVIDIA H100 80GB HBM3, 9.0, 550.54.15, 81559, GPU-bb\n")
    assert gpu.uuid == "GPU-bb"


def test_without_the_files_the_manifest_is_believed() -> None:
    record = manifest("11.2.0.5", "8.0")
    record["engine"]["build"]["backend"] = "tensorrt"
    version, gpu = check_version_fit({}, record, FitTarget(R2607, "9.0"))
    assert version.blocks
    assert gpu.blocks
    assert check_version_fit({}, manifest("11.2.0.5", "8.0"), FitTarget(R2607, "9.0")) == (), "of no known backend"


def test_whether_there_is_a_gpu_is_known_of_the_embedded_server_and_from_metrics() -> None:
    assert fit_target_of("2.51.0", None, embedded=True, gpus=()).has_gpu is False
    assert fit_target_of("2.51.0", None, embedded=True, gpus=(A100,)).has_gpu is True
    assert fit_target_of("2.71.0", METRICS, gpus=()).has_gpu is True
    assert fit_target_of("2.71.0", None, gpus=()).has_gpu is None


def test_without_the_files_the_record_of_each_plan_is_believed() -> None:
    plans = {
        kind: {"file": f"model_sm{kind[0]}{kind[2]}.plan", "backend": "tensorrt", "plan_version": version}
        for kind, version in (("8.0", "11.1.0.5"), ("9.0", "10.5.0.1"))
    }
    record = {"engine": {"plans": plans}}
    assert check_version_fit({}, record, FitTarget(R2607, "8.0")) == ()
    (problem,) = check_version_fit({}, record, FitTarget(R2607, "9.0"))
    assert "built with TensorRT 10.5.0.1" in problem.message
    (either,) = check_version_fit({}, record, FitTarget(R2607))
    assert either.message == problem.message
