"""Inputs and outputs in memory the server maps, instead of in each request: POSIX shared memory, or a GPU's.

A POSIX region is a locked file below /dev/shm. It goes when the load test ends, whatever ends it. The next run
recognises a killed process's regions by their lock, gone with the process, and removes them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import mmap
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from repo_manager.errors import InputError, ServerError, ServerRefusedError, UsageError
from repo_manager.loadtest.inputs.cuda_memory import cuda_memory
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.served_model import ServedModel, ServedModelFacts
from repo_manager.request_data.tensors import NUMPY_OF_TRITON, InputFacts, Sample, elements_of, raw_bytes
from repo_manager.server.transport import CudaHandle, memory_kind

__all__ = ["Area", "Placement", "shared_samples", "sweep"]

# POSIX shared memory on Linux (shm_overview(7)). The server opens regions by name.
_FOLDER = Path("/dev/shm")
_PREFIX = "repo-manager-load-"
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Area:
    """A tensor's place in the region, in bytes."""

    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the tensors of each request are.

    Attributes:
        region: the name the server knows the memory by.
        inputs: for each sample, input name -> place.
        outputs: for each sample, output name -> place. Requests in flight with the same sample write to the same
            place: nobody reads it. Empty when the size of an output is not known in advance.
        size: of the region in bytes.
    """

    region: str
    inputs: tuple[Mapping[str, Area], ...]
    outputs: tuple[Mapping[str, Area], ...]
    size: int


@contextlib.contextmanager
def shared_samples(
    served: ServedModel, facts: ServedModelFacts, samples: list[Sample], options: LoadTestOptions
) -> Iterator[Placement | None]:
    """Put the samples into shared memory and register it, as long as the context lasts.

    Args:
        served: connection to the server under load.
        facts: the model's inputs, outputs and limits, as the server reports them.
        samples: input name -> array of each request. Their bytes are copied into the region at the start.
        options: with `shared_memory="none"` nothing happens and the placement is `None`.

    Raises:
        InputError: there is not enough shared memory.
        UsageError: there is none of the kind on this machine.
        ServerRefusedError: the server cannot map it, or does not allow it.
    """
    if options.shared_memory == "none":
        yield None
        return
    sweep(_FOLDER)
    placement = _plan(facts, samples, options)
    with cuda_memory(placement.size) if options.shared_memory == "cuda" else _posix_memory(placement) as memory:
        for sample, areas in zip(samples, placement.inputs, strict=True):
            for name, area in areas.items():
                memory.write(area.offset, raw_bytes(sample[name]))
        _register(served, placement, memory.key, options)
        try:
            if options.shared_memory == "system":  # nothing shows whether the run behind a CUDA region is alive
                _unregister_stale(served)
            yield placement
        finally:
            with contextlib.suppress(ServerError):  # the server may be gone, with its registrations
                served.unregister_memory(placement.region, memory_kind(memory.key))


def _plan(facts: ServedModelFacts, samples: list[Sample], options: LoadTestOptions) -> Placement:
    end = 0

    def place(size: int) -> Area:
        nonlocal end
        area = Area(end, size)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
        return area

    inputs = tuple({name: place(len(raw_bytes(array))) for name, array in sample.items()} for sample in samples)
    sizes = {item.name: _output_bytes(item, facts, options) for item in facts.output_facts}
    known = {name: size for name, size in sizes.items() if size is not None}
    outputs: tuple[Mapping[str, Area], ...] = ()
    if known and len(known) == len(facts.outputs):
        outputs = tuple({name: place(size) for name, size in known.items()} for _ in samples)
    return Placement(f"{_PREFIX}{uuid.uuid4().hex[:12]}", inputs, outputs, max(end, 1))


def _output_bytes(item: InputFacts, facts: ServedModelFacts, options: LoadTestOptions) -> int | None:
    """Return an output's size in a request, or `None` when a dimension or the type leaves it open."""
    if item.datatype == "BYTES" or any(size < 0 for size in item.shape):
        return None
    batch = options.batch_size if facts.max_batch_size > 0 else 1
    return batch * elements_of(item.shape) * NUMPY_OF_TRITON[item.datatype].itemsize


@dataclasses.dataclass(frozen=True)
class _PosixMemory:
    """A piece of POSIX shared memory, the counterpart of `CudaMemory` on a GPU."""

    memory: mmap.mmap
    key: str

    def write(self, offset: int, data: bytes) -> None:
        self.memory[offset : offset + len(data)] = data


@contextlib.contextmanager
def _posix_memory(placement: Placement) -> Iterator[_PosixMemory]:
    """Make the file: locked before it has a name, so no other run takes it for a dead one's."""
    path = _FOLDER / placement.region
    try:
        descriptor = os.open(_FOLDER, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as exc:
        raise UsageError(f"POSIX shared memory cannot be had here: {exc}", hint="Leave --shared-memory out.") from exc
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            os.posix_fallocate(descriptor, 0, placement.size)
        except OSError as exc:
            if exc.errno != errno.ENOSPC:
                raise
            raise InputError(
                f"{_FOLDER} has no room for {placement.size / 2**20:.0f} MiB of inputs and outputs",
                hint="Use a smaller batch or input, or give the container more (docker run --shm-size).",
            ) from exc
        _name(descriptor, path)
        try:
            with mmap.mmap(descriptor, placement.size) as memory:
                yield _PosixMemory(memory, f"/{placement.region}")
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _name(descriptor: int, path: Path) -> None:
    """Give a nameless file its name (open(2), O_TMPFILE). The folder's descriptor makes Python call `linkat`."""
    folder = os.open("/proc/self/fd", os.O_RDONLY)
    try:
        os.link(str(descriptor), path, src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


_NEEDS = {
    "system": "in a container with the same /dev/shm (--ipc=host), and as a user who may read this one's files",
    "cuda": "on the same GPU as number 0, and in a container with --ipc=host",
}


def _register(served: ServedModel, placement: Placement, key: str | CudaHandle, options: LoadTestOptions) -> None:
    try:
        served.register_memory(placement.region, key, placement.size)
    except ServerRefusedError as exc:
        raise ServerRefusedError(
            f"{options.url} cannot use this machine's shared memory: {exc.message}",
            hint=f"It has to run on this machine, {_NEEDS[memory_kind(key)]}. Or leave --shared-memory out.",
        ) from exc


def _unregister_stale(served: ServedModel) -> None:
    """Unregister the regions of killed runs from the server.

    Only called when the server has mapped a region of ours: then its /dev/shm is this one.
    """
    for name in served.registered_memory():
        if name.startswith(_PREFIX) and not (_FOLDER / name).exists():
            with contextlib.suppress(ServerError):  # another run unregistered it first
                served.unregister_memory(name)


def sweep(folder: Path) -> tuple[str, ...]:
    """Remove the regions of dead runs, and return their names.

    Args:
        folder: `/dev/shm`, or another folder with the regions.
    """
    removed = []
    for path in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # it belongs to another user or was just removed
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(path.name)
            finally:
                os.close(descriptor)
    return tuple(removed)
