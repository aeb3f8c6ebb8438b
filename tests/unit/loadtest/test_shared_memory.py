"""The region's life on this machine, and its use in requests. A real server maps it in tests/integration."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repo_manager.errors import InputError, ServerRefusedError, UsageError
from repo_manager.loadtest.inputs.shared_memory import shared_samples, sweep
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.loadtest.wire.payload import build_endpoint
from repo_manager.request_data.tensors import InputFacts
from repo_manager.server.transport import CudaHandle

X, Y = InputFacts("x", "FP32", (3,)), InputFacts("y", "INT8", (5,))
FACTS = ServedModelFacts("u", "grpc", "t", "1", "m", "1", "b", 8, (X,), ("y",), False, False, False, False, (Y,))
OPTIONS = LoadTestOptions("grpc://a:1", "m", concurrency=(1,), shared_memory="system", batch_size=2)
SAMPLES = [{"x": np.arange(6, dtype=np.float32).reshape(2, 3) + number} for number in range(2)]


class Server:
    """Keeps its calls, like a server that can map the memory, or cannot."""

    def __init__(self, *, refuses: bool = False, regions: tuple[str, ...] = ()) -> None:
        self.refuses = refuses
        self.regions = dict.fromkeys(regions, b"")

    def register_memory(self, name: str, key: str, size_bytes: int) -> None:
        if self.refuses:
            raise ServerRefusedError("Unable to open shared memory region")
        self.regions[name] = Path("/dev/shm", key.removeprefix("/")).read_bytes()
        assert len(self.regions[name]) == size_bytes

    def unregister_memory(self, name: str, kind: str = "system") -> None:
        del self.regions[name]

    def registered_memory(self, kind: str = "system") -> tuple[str, ...]:
        return tuple(self.regions)


def test_the_server_sees_the_inputs_and_nothing_is_left():
    server = Server(regions=("repo-manager-load-dead", "another"))
    with shared_samples(server, FACTS, SAMPLES, OPTIONS) as placement:
        memory = server.regions[placement.region]
        assert Path("/dev/shm", placement.region).exists()
        for sample, areas in zip(SAMPLES, placement.inputs, strict=True):
            area = areas["x"]
            assert memory[area.offset : area.offset + area.size] == sample["x"].tobytes()
        taken = sorted((a.offset, a.size) for areas in (*placement.inputs, *placement.outputs) for a in areas.values())
        assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(taken))
        assert placement.outputs[1]["y"].size == 10
        assert taken[-1][0] + taken[-1][1] <= placement.size
    assert list(server.regions) == ["another"]
    assert not Path("/dev/shm", placement.region).exists()


def test_messages_name_the_places_and_carry_no_data():
    from tritonclient.grpc import service_pb2

    with shared_samples(Server(), FACTS, SAMPLES, OPTIONS) as placement:
        endpoint = build_endpoint(FACTS, SAMPLES, OPTIONS, placement)
        over_http = build_endpoint(FACTS, SAMPLES, dataclasses.replace(OPTIONS, url="http://a:1"), placement)
    request = service_pb2.ModelInferRequest.FromString(endpoint.messages[1])
    assert list(request.raw_input_contents) == []
    wanted = {
        "shared_memory_region": placement.region,
        "shared_memory_offset": placement.inputs[1]["x"].offset,
        "shared_memory_byte_size": 24,
    }
    found = request.inputs[0].parameters
    assert found["shared_memory_region"].string_param == wanted["shared_memory_region"]
    assert found["shared_memory_offset"].int64_param == wanted["shared_memory_offset"]
    assert found["shared_memory_byte_size"].int64_param == 24
    assert request.outputs[0].parameters["shared_memory_byte_size"].int64_param == 10
    document = json.loads(over_http.messages[1])
    assert over_http.json_bytes[1] == len(over_http.messages[1])
    assert document["inputs"][0]["parameters"] == wanted
    assert document["outputs"][0]["parameters"]["shared_memory_offset"] == placement.outputs[1]["y"].offset


@pytest.mark.parametrize("output", [InputFacts("y", "FP32", (-1,)), InputFacts("y", "BYTES", (2,))])
def test_outputs_of_unknown_size_come_in_the_answer(output):
    facts = dataclasses.replace(FACTS, output_facts=(output,))
    with shared_samples(Server(), facts, SAMPLES, OPTIONS) as placement:
        assert placement.outputs == ()


class _Driver:
    """CUDA's driver with one GPU, whose memory is this process's: tests/gpu has the real one."""

    def __init__(self) -> None:
        self.memory: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.freed: list[str] = []
        self.fails: dict[str, int] = {}
        self._acts: dict[str, Callable[..., object]] = {
            "cuMemAlloc_v2": self._allocate,
            "cuIpcGetMemHandle": self._export,
            "cuMemcpyHtoD_v2": lambda place, data, size: ctypes.memmove(place.value, data, size.value),
            "cuMemFree_v2": lambda address: self.freed.append("memory"),
            "cuDevicePrimaryCtxRelease_v2": lambda number: self.freed.append("context"),
            "cuGetErrorString": self._explain,
        }

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: object) -> int:
            if name in self._acts and name not in self.fails:
                self._acts[name](*arguments)
            return self.fails.get(name, 0)

        return call

    def _allocate(self, address: Any, size: ctypes.c_size_t) -> None:
        buffer = ctypes.create_string_buffer(size.value)
        self.memory[ctypes.addressof(buffer)] = buffer
        address._obj.value = ctypes.addressof(buffer)

    def _export(self, handle: Any, address: ctypes.c_uint64) -> None:
        handle.raw = address.value.to_bytes(64, "little")

    def _explain(self, status: int, text: Any) -> None:
        text._obj.value = b"out of memory" if status == 2 else b"operation not supported"


CUDA = dataclasses.replace(OPTIONS, shared_memory="cuda")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> _Driver:
    driver = _Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    return driver


def test_the_inputs_lie_on_the_gpu_and_nothing_is_left(driver):
    handles = []

    class GpuServer(Server):
        def register_memory(self, name, key, size_bytes):
            assert isinstance(key, CudaHandle)
            handles.append(key)
            (memory,) = driver.memory.values()
            assert (key.device, len(key.raw), len(memory)) == (0, 64, size_bytes)
            self.regions[name] = memory.raw

    server = GpuServer(regions=("repo-manager-load-of-another-container",))
    with shared_samples(server, FACTS, SAMPLES, CUDA) as placement:
        for sample, areas in zip(SAMPLES, placement.inputs, strict=True):
            area = areas["x"]
            assert server.regions[placement.region][area.offset : area.offset + area.size] == sample["x"].tobytes()
        assert not Path("/dev/shm", placement.region).exists()
        assert driver.freed == []
    assert list(server.regions) == ["repo-manager-load-of-another-container"]
    assert len(handles) == 1
    assert driver.freed == ["memory", "context"]


@pytest.mark.parametrize(
    ("call", "status", "error", "message"),
    [
        ("cuInit", 100, UsageError, "cuInit: operation not supported"),
        ("cuMemAlloc_v2", 2, InputError, "no room for the inputs and outputs: out of memory"),
        ("cuIpcGetMemHandle", 801, UsageError, "cuIpcGetMemHandle: operation not supported"),
    ],
)
def test_what_the_driver_refuses_is_said_and_nothing_is_left(driver, call, status, error, message):
    driver.fails[call] = status
    with pytest.raises(error, match=message), shared_samples(Server(), FACTS, SAMPLES, CUDA):
        pass
    assert driver.freed == {"cuInit": [], "cuMemAlloc_v2": ["context"]}.get(call, ["memory", "context"])


def test_a_machine_without_a_driver_is_told(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(UsageError, match="no NVIDIA driver") as caught, shared_samples(Server(), FACTS, SAMPLES, CUDA):
        pass
    assert "NVIDIA GPU" in caught.value.hint


def test_without_the_option_nothing_is_shared():
    with shared_samples(Server(refuses=True), FACTS, SAMPLES, dataclasses.replace(OPTIONS, shared_memory="none")) as no:
        assert no is None


def test_a_server_that_cannot_map_it_is_told_apart_and_nothing_is_left():
    before = set(Path("/dev/shm").glob("repo-manager-load-*"))
    with pytest.raises(ServerRefusedError, match="shared memory") as caught:
        shared_samples(Server(refuses=True), FACTS, SAMPLES, OPTIONS).__enter__()
    assert "--ipc=host" in caught.value.hint
    assert set(Path("/dev/shm").glob("repo-manager-load-*")) == before


def test_too_little_memory_is_said_before_anything_is_written():
    huge = dataclasses.replace(Y, shape=(1 << 46,))
    with pytest.raises(InputError, match="no room") as caught:
        shared_samples(Server(), dataclasses.replace(FACTS, output_facts=(huge,)), SAMPLES, OPTIONS).__enter__()
    assert "--shm-size" in caught.value.hint


def test_what_a_killed_run_left_is_removed_and_a_living_ones_is_not(tmp_path):
    script = f"""
import fcntl, os, sys, time
descriptor = os.open({str(tmp_path / "repo-manager-load-x")!r}, os.O_CREAT | os.O_RDWR)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        assert sweep(tmp_path) == ()
        process.kill()
        process.wait()
        assert sweep(tmp_path) == ("repo-manager-load-x",)
    assert list(tmp_path.iterdir()) == []
