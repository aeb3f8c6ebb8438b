"""The timed subject: an engine on the GPU, or, in a rehearsal, ONNX Runtime on the CPU in its place."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import repo_manager
from repo_manager.onnx_model.inputs import natural_inputs
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import signature_of

__all__ = ["Power", "PowerMeter", "engine_runner", "measure", "rehearsal_runner"]

Run = Callable[[], None]
_BACKEND = Path(repo_manager.__file__).parent / "server" / "backends" / "tensorrt"


def engine_runner(library: ModuleType, plan: Path, batch: int) -> tuple[Run, Callable[[], None]]:
    """Return (run one batch on the GPU and wait for it, free everything).

    Inputs are on the device already, so the engine is timed, not the copies.
    """
    sys.path.insert(0, str(_BACKEND))
    cuda_module, engine_module = _module("rm_trt_cuda"), _module("rm_trt_engine")
    cuda = cuda_module.Cuda(0)
    engine = engine_module.Engine(library, plan, cuda)
    sizes = {tensor.name: (batch, *tensor.shape[1:]) for tensor in engine.tensors if tensor.is_input}
    feed = {name: [_values(engine, name, shape)] for name, shape in sizes.items()}
    engine.run(feed)  # shapes, addresses and data are set from here on
    (context,) = engine._contexts.values()
    stream = engine._stream

    def run() -> None:
        context.execute_async_v3(stream)
        cuda.synchronize(stream)

    return run, engine.close


def _values(engine: Any, name: str, shape: tuple[int, ...]) -> Any:
    import numpy as np

    (dtype,) = (tensor.numpy_type for tensor in engine.tensors if tensor.name == name)
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def _module(name: str) -> Any:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    return importlib.import_module(name)


def rehearsal_runner(model: Path, batch: int) -> tuple[Run, Callable[[], None]]:
    """Return the same for the ONNX file on the CPU: its times mean nothing."""
    loaded = load_model(model)
    session = Session(loaded)
    inputs = natural_inputs(signature_of(loaded), batch=batch)
    return (lambda: session.run(inputs) and None), (lambda: None)


def measure(run: Run, seconds: float) -> list[int]:
    """Run for a while and return each run's time in nanoseconds."""
    for _ in range(3):
        run()
    times: list[int] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not times:
        start = time.perf_counter_ns()
        run()
        times.append(time.perf_counter_ns() - start)
    return times


@dataclasses.dataclass
class Power:
    """The GPU's power while something ran, filled at the end of `PowerMeter.watch`.

    Attributes:
        watts: the mean, from the card's energy counter; `None` where it has none.
        sm_mhz: the mean clock of its multiprocessors over the samples; `None` without samples.
    """

    watts: float | None = None
    sm_mhz: float | None = None


class PowerMeter:
    """Mean power by the card's energy counter (NVML), and the clock by `nvidia-smi`.

    The counter, because `power.draw` is the mean of the past second on Hopper and newer: at the beginning of a round
    it still tells of the variant before.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._nvml, self._device = None, ctypes.c_void_p()
        if enabled:
            nvml = ctypes.CDLL("libnvidia-ml.so.1")
            if nvml.nvmlInit_v2() == 0 and nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._device)) == 0:
                self._nvml = nvml

    @contextlib.contextmanager
    def watch(self) -> Iterator[Power]:
        """Measure from here to the end of the block."""
        power = Power()
        if not self._enabled:
            yield power
            return
        command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "-i", "0", "-lms", "200"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            before, start = self._millijoules(), time.perf_counter()
            try:
                yield power
            finally:
                after, end = self._millijoules(), time.perf_counter()
                process.terminate()
                text = process.communicate(timeout=10)[0]
        clocks = [float(line) for line in text.split() if line.isdigit()]
        power.sm_mhz = statistics.fmean(clocks) if clocks else None
        if before is not None and after is not None:
            power.watts = (after - before) / 1000 / (end - start)

    def _millijoules(self) -> int | None:
        """Read the card's energy since its driver was loaded, in millijoules."""
        value = ctypes.c_ulonglong()
        if self._nvml is None or self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(value)):
            return None
        return value.value
