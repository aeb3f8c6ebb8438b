from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.serving import SCALING_CONFIG, scaling_model, write_model

from repo_manager.errors import RepositoryError
from repo_manager.onnx_model import runtime
from repo_manager.onnx_model.runtime import free_host_bytes
from repo_manager.repository.scan import find_model
from repo_manager.rollout.checks import Check, CheckOutcome, check_pinned, check_version, refuse
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.server_checks import Room, _memory, room_for
from repo_manager.server import metrics_page
from repo_manager.server.metrics_page import free_gpu_bytes, metrics_text, metrics_url_of

MIB = 2**20
METRICS = """# HELP nv_gpu_memory_total_bytes GPU total memory, in bytes
nv_gpu_memory_total_bytes{gpu_uuid="GPU-1"} 1000.000000
nv_gpu_memory_total_bytes{gpu_uuid="GPU-2"} 1000.000000
nv_gpu_memory_used_bytes{gpu_uuid="GPU-1"} 100.000000
nv_gpu_memory_used_bytes{gpu_uuid="GPU-2"} 950.000000
"""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def outcomes(repository: Path) -> dict[str, CheckOutcome]:
    checks = check_version(repository, find_model(repository, "m"), 1)
    return {check.name: check.outcome for check in checks}


def test_a_config_is_held_against_the_model_itself(tmp_path: Path) -> None:
    write_model(tmp_path, "m", SCALING_CONFIG, {1: scaling_model()})
    assert outcomes(tmp_path)["config"] is CheckOutcome.PASSED
    for wrong in (
        SCALING_CONFIG.replace('name: "x"', 'name: "other"'),
        SCALING_CONFIG.replace("dims: 4", "dims: 5"),
        SCALING_CONFIG.replace("TYPE_FP32", "TYPE_FP16"),
    ):
        write_model(tmp_path, "m", wrong, {})
        assert outcomes(tmp_path)["config"] is CheckOutcome.REFUSED
    write_model(tmp_path, "m", "backend: ", {})
    assert outcomes(tmp_path)["config"] is CheckOutcome.REFUSED


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ("dynamic_batching { priority_levels: 2 }", "default_priority_level is 0"),
        ("response_cache { enable: true } model_transaction_policy { decoupled: true }", "a decoupled model cannot"),
        ('platform: "tensorrt_plan"', "does not belong to backend"),
    ],
)
def test_what_triton_refuses_is_named_before_a_server_is_asked(tmp_path: Path, wrong: str, rule: str) -> None:
    text = SCALING_CONFIG.replace("dynamic_batching {}", "") + wrong
    write_model(tmp_path, "m", text, {1: scaling_model()})
    (config,) = [check for check in check_version(tmp_path, find_model(tmp_path, "m"), 1) if check.name == "config"]
    assert (config.outcome, rule in config.detail) == (CheckOutcome.REFUSED, True)


def test_a_published_version_whose_file_was_changed_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "m", SCALING_CONFIG, {1: scaling_model()})
    manifest = {
        "schema_version": 1,
        "model": "m",
        "version": 1,
        "created": "2026-01-01T00:00:00Z",
        "backend": "onnxruntime",
        "files": {"model.onnx": {"sha256": "0" * 64, "size_bytes": 5}},
    }
    (tmp_path / "m" / "1" / "manifest.json").write_text(json.dumps(manifest))
    assert outcomes(tmp_path) == {"files": CheckOutcome.REFUSED}


def test_every_reason_is_told_at_once_and_only_estimates_can_be_overridden() -> None:
    certain = Check("config", CheckOutcome.REFUSED, "wrong", "Mend it.")
    estimate = Check("memory", CheckOutcome.REFUSED, "little", estimate=True)
    with pytest.raises(RepositoryError, match="config: wrong; memory: little") as caught:
        refuse("m:1", (certain, estimate), RolloutOptions())
    assert "Mend it. --force overrides" in str(caught.value)
    refuse("m:1", (estimate,), RolloutOptions(force=True))
    with pytest.raises(RepositoryError, match="config"):
        refuse("m:1", (certain,), RolloutOptions(force=True))


def test_memory_is_judged_by_files_and_by_what_the_served_version_takes() -> None:
    assert _memory(None, 10).outcome is CheckOutcome.UNKNOWN
    assert _memory(Room("the GPU", 100 * MIB), 10 * MIB).outcome is CheckOutcome.PASSED
    assert _memory(Room("the GPU", 100 * MIB), 60 * MIB).outcome is CheckOutcome.WARNING
    refused = _memory(Room("the GPU", 100 * MIB), 200 * MIB)
    assert (refused.outcome, refused.estimate) == (CheckOutcome.REFUSED, True)
    assert "about 200.0 MiB (its files), the GPU has 100.0 MiB free" in refused.detail
    by_footprint = _memory(Room("the machine", 100 * MIB, footprint_bytes=150 * MIB), MIB)
    assert by_footprint.outcome is CheckOutcome.REFUSED
    assert "as much as the served version takes now" in by_footprint.detail


def test_the_gpu_with_the_least_room_counts() -> None:
    assert free_gpu_bytes(METRICS) == 50
    assert free_gpu_bytes("nv_inference_count 3\n") is None
    assert room_for("m", "grpc://far:8001", METRICS, wants_gpu=True) == Room("the GPU", 50)
    assert room_for("m", "grpc://far:8001", None, wants_gpu=True) is None


def test_the_hosts_memory_is_known_of_this_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_host_bytes()
    assert free is not None
    assert free > MIB
    (tmp_path / "meminfo").write_text("MemTotal: 9999 kB\nMemAvailable:    2048 kB\n")
    monkeypatch.setattr(runtime, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(runtime, "_CGROUP", tmp_path)
    assert free_host_bytes() == 2 * MIB
    (tmp_path / "memory.max").write_text(f"{3 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{2 * MIB}\n")
    assert free_host_bytes() == MIB
    (tmp_path / "memory.max").write_text("max\n")
    assert free_host_bytes() == 2 * MIB
    for url in ("grpc://127.0.0.1:1", "http://localhost:1", "grpc://[::1]:1"):
        assert room_for("m", url, None, wants_gpu=False) == Room("the machine", 2 * MIB)
    assert room_for("m", "grpc://10.0.0.1:1", None, wants_gpu=False) is None


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("grpc://h:8001", "http://h:8002/metrics"),
        ("http://[::1]:8000", "http://[::1]:8002/metrics"),
        ("grpc://h:9001", None),
        ("grpcs://h:8001", None),
        ("http://h:8000/behind/a/gateway", None),
    ],
)
def test_metrics_are_looked_for_where_triton_puts_them(url: str, expected: str | None) -> None:
    assert metrics_url_of(url) == expected


def test_metrics_that_cannot_be_had_are_no_error() -> None:
    assert metrics_text("http://127.0.0.1:9/metrics", timeout_s=0.5) is None
    assert metrics_page.free_gpu_bytes("") is None


def test_a_pinned_version_is_kept_for_ensembles_that_are_served() -> None:
    pinned = {1: ("first", "second"), 2: ("third",)}

    def found(served: tuple[str, ...] | None, **options: bool) -> list[tuple[CheckOutcome, str]]:
        checks = check_pinned("part", pinned, (1, 2), (3,), RolloutOptions(**options), served)
        return [(check.outcome, check.detail) for check in checks]

    (everything,) = found(None)
    assert everything[0] is CheckOutcome.REFUSED
    assert "first, second needs it: Triton drops the ensembles" in everything[1]
    refused, warned = found(("first",))
    assert refused == (
        CheckOutcome.REFUSED,
        "part:1 would not be served any more, and first needs it: Triton drops the ensemble then",
    )
    assert warned == (
        CheckOutcome.WARNING,
        "part:1 would not be served any more; second asks for it and is not served now; part:2 would not be served any "
        "more; third asks for it and is not served now",
    )
    assert [outcome for outcome, _ in found(())] == [CheckOutcome.WARNING]
    assert [outcome for outcome, _ in found(("first",), drop_pinned=True)] == [
        CheckOutcome.WARNING,
        CheckOutcome.WARNING,
    ]
