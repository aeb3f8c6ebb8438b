"""A stand-in for the library's cache object: the real one measures kernels on a GPU."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from repo_manager.engine.builder import default_cache_path, load_timing_cache, merge_timing_cache
from repo_manager.engine.capabilities import Capabilities, StrongTyping
from repo_manager.errors import InputError
from repo_manager.types import Backend

ABLE = Capabilities(
    backend=Backend.TENSORRT,
    version="8.6.0",
    builder_flags=frozenset(),
    explicit_batch=True,
    strong_typing=StrongTyping.ABSENT,
    compute_capabilities=(),
    hardware_levels=(),
    timing_cache=True,
    progress_monitor=False,
    parser_names_nodes=False,
    needs_gpu=True,
    lean_runtime=True,
)


class Cache:
    def __init__(self, data: bytes) -> None:
        self.times: dict[str, int] = json.loads(data) if data else {}

    def combine(self, other: Cache, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        self.times = {**other.times, **self.times}
        return True

    def serialize(self) -> bytes:
        return json.dumps(self.times).encode()


class Config:
    def __init__(self) -> None:
        self.cache = Cache(b"")

    def create_timing_cache(self, data: bytes) -> Cache | None:
        return None if data.startswith(b"other version") else Cache(data)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Cache:
        return self.cache


def test_of_two_builds_at_once_both_leave_their_times(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.cache"
    barrier = threading.Barrier(8)

    def build(number: int) -> None:
        config = Config()
        load_timing_cache(config, path)
        barrier.wait()
        config.cache.times[f"kernel{number}"] = number
        merge_timing_cache(config, path)

    threads = [threading.Thread(target=build, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(path.read_bytes()) == {f"kernel{number}": number for number in range(8)}
    assert [item.name for item in path.parent.iterdir() if item.suffix == ".tmp"] == []


def test_the_next_build_finds_the_times(tmp_path: Path) -> None:
    path = tmp_path / "a.cache"
    config = Config()
    config.cache.times["k"] = 7
    assert merge_timing_cache(config, path) == path.stat().st_size
    again = Config()
    load_timing_cache(again, path, required=True)
    assert again.cache.times == {"k": 7}


def test_another_versions_cache_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.cache"
    path.write_bytes(b"other version")
    with pytest.raises(InputError, match=r"a\.cache: not a timing cache of this TensorRT version"):
        load_timing_cache(Config(), path)


def test_deterministic_needs_times(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no timing cache at"):
        load_timing_cache(Config(), tmp_path / "none", required=True)


def test_there_is_one_per_library_version_and_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = default_cache_path(ABLE, "NVIDIA A100-SXM4-80GB sm8.0")
    assert first.is_relative_to(tmp_path)
    assert "tensorrt-8.6.0" in first.parts
    assert "/" not in first.name
    assert first != default_cache_path(ABLE, "NVIDIA H100 sm9.0")
