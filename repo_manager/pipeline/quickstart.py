"""The whole path on the shipped model: inspect, FP16 and INT8, add, serve, deploy, load test."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from repo_manager import samples
from repo_manager.errors import RepositoryError
from repo_manager.files import reason_of
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.result import LoadTestReport
from repo_manager.loadtest.run import run_load_test
from repo_manager.pipeline.adding import Added, AddOptions, SparsityMode, add
from repo_manager.pipeline.doctor import Machine, examine_machine
from repo_manager.pipeline.inspect import Inspection, inspect_model
from repo_manager.rollout.deploy import deploy
from repo_manager.rollout.result import Rollout
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.server.installation import find_triton
from repo_manager.types import Backend, Precision, StrPath

__all__ = ["Quickstart", "QuickstartModel", "quickstart"]

FOLDER_NAME = "repo-manager-quickstart"
REPOSITORY_NAME = "model_repository"
_MODELS = {"digits_fp16": Precision.FP16, "digits_int8": Precision.INT8}
_LEVELS = (1, 8)
_ACCURACY_BATCH = 8
_WARMUP_S = 0.5

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class QuickstartModel:
    """One precision of the shipped model, all the way to its load test.

    Attributes:
        added: result of conversion and publishing.
        rollout: result of its deployment on the quickstart's own server.
        accuracy: share of the held-out images the served model classified right, 0 to 1.
        images: how many held-out images there were.
        load: its load test with 1 and with 8 concurrent requests.
    """

    added: Added
    rollout: Rollout
    accuracy: float
    images: int
    load: LoadTestReport


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """The result of quickstart.

    Attributes:
        folder: the folder with all files of the quickstart.
        repository: the model repository in it.
        machine: the findings on this machine.
        decisions: the choices made from them, in words.
        inspection: signature and sparsity of the shipped ONNX file, before any conversion.
        models: the FP16 model, then the INT8 model.
    """

    folder: Path
    repository: Path
    machine: Machine
    decisions: tuple[str, ...]
    inspection: Inspection
    models: tuple[QuickstartModel, ...]


def quickstart(
    folder: StrPath | None = None, *, seconds_per_level: float = 2.0, report: Report = lambda _: None
) -> Quickstart:
    """Take the shipped sparse model from the ONNX file to a load-tested deployment on a real tritonserver.

    The server runs on free ports of the loopback for the time of this call only. A second run adds the
    next versions to the same repository.

    Args:
        folder: where to work. `None` takes `repo-manager-quickstart` in the current folder, or a new temporary folder
            when the current one cannot be written.
        seconds_per_level: how long each load level is measured.
        report: told what is being done.

    Raises:
        MissingDependencyError: there is no tritonserver on this machine.
        RepositoryError: `folder` cannot be written.
    """
    folder = None if folder is None else Path(folder)
    find_triton()  # fail before any work if there is none
    machine = examine_machine()
    decisions = _decisions(machine)
    for decision in decisions:
        report(decision)
    folder = _work_folder(folder)
    repository = folder / REPOSITORY_NAME
    inspection = inspect_model(samples.sample_model())
    totals = inspection.sparsity.totals
    report(
        f"Inspected the shipped model: {len(inspection.sparsity.valid)} of {len(inspection.sparsity.layers)} layers "
        f"are 2:4 sparse, {totals.valid_parameters / totals.parameters:.0%} of their parameters"
    )
    added = [_add(name, precision, repository, report) for name, precision in _MODELS.items()]
    report("Starting tritonserver on free ports of 127.0.0.1")
    with (
        EmbeddedServer(ServerOptions(str(repository.resolve()), auto_complete=False, record=False)) as server,
        TritonClient.connect(server.grpc_url) as client,
    ):
        models = tuple(_serve(one, client, server, repository, seconds_per_level, report) for one in added)
    return Quickstart(folder, repository, machine, decisions, inspection, models)


def _decisions(machine: Machine) -> tuple[str, ...]:
    """Describe the findings and the choices."""
    tensorrt = "TensorRT" if machine.has("tensorrt") else "no TensorRT"
    if not machine.gpus:
        return (
            f"Found no NVIDIA GPU and {tensorrt} on this machine.",
            "Therefore the models run on the CPU by ONNX Runtime, where 2:4 sparsity brings no speed: "
            "this shows the path and its checks, not the gain.",
        )
    gpu = machine.gpus[0]
    cores = "with" if gpu.has_sparse_tensor_cores else "without"
    return (
        f"Found {gpu.name} (compute capability {gpu.compute_capability}, {cores} Sparse Tensor Cores) and {tensorrt}.",
        "This quickstart serves by ONNX Runtime, as it does on every machine; "
        "repo-manager add --backend tensorrt builds sparse engines for the GPU.",
    )


def _work_folder(folder: Path | None) -> Path:
    """Make the folder to work in."""
    if folder is None:
        here = Path.cwd() / FOLDER_NAME
        if os.access(here if here.exists() else here.parent, os.W_OK):
            folder = here
        else:
            return Path(tempfile.mkdtemp(prefix=f"{FOLDER_NAME}-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise RepositoryError(f"{folder} cannot be made: {reason_of(exc)}", hint="Pass another --directory.") from exc
    return folder


def _add(name: str, precision: Precision, repository: Path, report: Report) -> Added:
    options = AddOptions(
        precision=precision,
        backend=Backend.ONNXRUNTIME.value,
        sparsity=SparsityMode.REQUIRE,
        calibration=str(samples.calibration_data()),
    )
    added = add(samples.sample_model(), name, repository, options)
    worst = added.conversion.worst_drift
    report(f"Added {name}:{added.version} ({precision}), {worst:.3g} relative error against FP32, 2:4 kept")
    return added


def _serve(
    added: Added,
    client: TritonClient,
    server: EmbeddedServer,
    repository: Path,
    seconds: float,
    report: Report,
) -> QuickstartModel:
    rollout = deploy(repository, added.name, added.version, client)
    report(f"Deployed {added.name}:{added.version}: ready, and its answer is ONNX Runtime's")
    accuracy, images = _accuracy(client, added)
    options = LoadTestOptions(
        url=server.grpc_url,
        model=added.name,
        version=added.version,
        concurrency=_LEVELS,
        duration_s=seconds,
        warmup_s=min(_WARMUP_S, seconds),
        metrics_url=server.metrics_url,
        data=None,
        command=f"repo-manager loadtest {added.name}:{added.version} --concurrency {','.join(map(str, _LEVELS))}",
    )
    load = run_load_test(options)
    best = max(point.throughput_per_s for point in load.points)
    report(f"Load-tested {added.name}:{added.version}: up to {best:,.0f} inferences/s")
    return QuickstartModel(added, rollout, accuracy, images, load)


def _accuracy(client: TritonClient, added: Added) -> tuple[float, int]:
    """Classify the held-out images on the server."""
    with np.load(samples.held_out(), allow_pickle=False) as archive:
        images, labels = archive["image"], archive["labels"]
    right = 0
    for start in range(0, len(images), _ACCURACY_BATCH):
        batch = images[start : start + _ACCURACY_BATCH]
        logits = client.infer(added.name, added.version, {"image": batch})["logits"]
        right += int(np.count_nonzero(logits.argmax(axis=1) == labels[start : start + _ACCURACY_BATCH]))
    return right / len(images), len(images)
