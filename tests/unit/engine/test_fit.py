from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from repo_manager.engine.fit import (
    ContainerRelease,
    FitProblem,
    FitTarget,
    PlanFacts,
    check_fit,
    plan_facts,
    release_of_container,
    release_of_server,
    releases,
)
from repo_manager.errors import EngineError
from repo_manager.types import Backend

TRT, RTX = Backend.TENSORRT, Backend.TENSORRT_RTX
ALL = frozenset({"triton", "tensorrt", "cuda", "driver"})
R2607 = ContainerRelease("26.07", "2.71.0", "11.1", "13.3.0.035", "610.43.02", ALL, ())


def only(plan: PlanFacts, target: FitTarget) -> FitProblem:
    (problem,) = check_fit(plan, target)
    return problem


def test_the_same_version_on_the_same_gpu_fits() -> None:
    plan = PlanFacts(TRT, "11.1.0.106", ("9.0",), version_compatible=False)
    assert check_fit(plan, FitTarget(R2607, "9.0", "610.43.02")) == ()


def test_nothing_known_of_the_server_is_nothing_said() -> None:
    assert check_fit(PlanFacts(TRT, "10.5.0", ("8.0",)), FitTarget()) == ()


def test_another_version_and_another_gpu_are_both_said() -> None:
    plan = PlanFacts(TRT, "11.2.0.3", ("8.0",), version_compatible=False)
    version, gpu = check_fit(plan, FitTarget(R2607, "9.0"))
    assert version.blocks
    assert "built with TensorRT 11.2.0.3; the server's release 26.07 has TensorRT 11.1" in version.message
    assert gpu.blocks
    assert "for compute capability 8.0; the server's GPU has 9.0" in gpu.message
    assert "--for 8.0=" in gpu.hint


@pytest.mark.parametrize(
    ("version", "compatible", "blocks"),
    [
        ("11.0.0", True, False),  # older, same major: loads with the server's flag
        ("11.2.0", True, True),  # newer than the server
        ("10.13.3", True, True),  # another major
        ("11.0.0", False, True),
        ("11.0.0", None, False),  # not our plan: it may be version-compatible
    ],
)
def test_version_compatibility_reaches_forward_within_a_major(
    version: str, compatible: bool | None, blocks: bool
) -> None:
    problem = only(PlanFacts(TRT, version, (), compatible), FitTarget(R2607))
    assert problem.blocks is blocks
    if compatible and not blocks:
        assert "version-compatible=true" in problem.hint


def test_a_version_from_memory_warns_and_does_not_block() -> None:
    unverified = ContainerRelease("24.09", "2.50.0", "10.4.0.26", "", "", frozenset(), ())
    problem = only(PlanFacts(TRT, "10.5.0", (), version_compatible=False), FitTarget(unverified))
    assert not problem.blocks
    assert "not verified" in problem.message


@pytest.mark.parametrize(("gpu", "fits"), [("7.5", False), ("8.9", True), ("12.0", True)])
def test_ampere_plus_reaches_newer_gpus(gpu: str, fits: bool) -> None:
    plan = PlanFacts(TRT, "11.1.0", ("8.0",), hardware_compatibility="ampere_plus")
    assert (check_fit(plan, FitTarget(compute_capability=gpu)) == ()) is fits


def test_an_rtx_engine_is_for_its_own_gpus_and_no_tensorrt_version() -> None:
    plan = PlanFacts(RTX, "1.7.1.116", ("8.6", "8.9"))
    problem = only(plan, FitTarget(compute_capability="9.0"))
    assert "8.6, 8.9" in problem.message
    assert "--compute-capability 9.0" in problem.hint


def test_tritons_own_container_has_no_backend_for_rtx_engines() -> None:
    problem = only(PlanFacts(RTX, "1.7.1.116"), FitTarget(R2607))
    assert not problem.blocks, "somebody may have put ours there"
    assert "no tensorrt_rtx backend" in problem.message


def test_no_engine_loads_without_a_gpu() -> None:
    problem = only(PlanFacts(TRT, "11.1.0"), FitTarget(has_gpu=False))
    assert problem.blocks
    assert "no NVIDIA GPU" in problem.message


def test_an_old_driver_warns() -> None:
    problem = only(PlanFacts(TRT, "11.1.0"), FitTarget(R2607, driver="550.54.15"))
    assert not problem.blocks
    assert "550.54.15 is older than 610.43.02" in problem.message


def plan(path: Path, version: tuple[int, ...] = (11, 1, 0, 5)) -> Path:
    path.write_bytes(b"ftrt" + bytes(20) + bytes(version) + bytes(100))
    return path


def engine(version: str, **options: Any) -> dict[str, Any]:
    defaults = {"version_compatible": False, "hardware_compatibility": None}
    return {"build": {"version": version, "options": {**defaults, **options}}, "compute_capabilities": ["8.0"]}


def test_our_manifest_adds_what_the_head_does_not_tell(tmp_path: Path) -> None:
    facts = plan_facts(plan(tmp_path / "p"), engine("11.1.0.5", version_compatible=True))
    assert facts == PlanFacts(TRT, "11.1.0.5", ("8.0",), True, None)


def test_a_plan_that_others_built_leaves_the_rest_open(tmp_path: Path) -> None:
    assert plan_facts(plan(tmp_path / "p")) == PlanFacts(TRT, "11.1.0.5")


def test_a_manifest_of_another_plan_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"built by version 11\.1\.0\.5, and its manifest says 10\.5\.0"):
        plan_facts(plan(tmp_path / "p"), engine("10.5.0"))


def test_the_table_is_monthly_unique_and_says_what_is_verified() -> None:
    rows = releases()
    names = [row.release for row in rows]
    assert names == sorted(set(names))
    assert (names[0], names[-1]) == ("22.12", "26.09")
    assert {column for row in rows for column in row.verified} <= ALL
    for row in rows:
        assert all(getattr(row, column) for column in row.verified), row.release
        assert bool(row.verified) is bool(row.sources), row.release


def test_every_source_is_described() -> None:
    text = Path(__file__).parents[3].joinpath("docs/tensorrt-versions.md").read_text(encoding="utf-8")
    assert {source for row in releases() for source in row.sources if f"| `{source}` |" not in text} == set()


def test_triton_versions_rise_by_one_a_release() -> None:
    minors = [int(row.triton.split(".")[1]) for row in releases() if row.triton]
    assert minors == list(range(minors[0], minors[0] + len(minors)))


def test_a_release_is_found_by_server_version_and_by_image_tag() -> None:
    found = release_of_server("2.51.0")
    assert found is not None
    assert (found.release, found.is_verified("triton")) == ("24.10", True)
    assert release_of_container("26.07-py3") == release_of_server("2.71.0")
    assert release_of_server("") is None
    assert release_of_server("9.9.9") is None
