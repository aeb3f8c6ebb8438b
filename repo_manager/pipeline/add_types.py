"""Options and results of `add`."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repo_manager.accuracy import AccuracyGate, AccuracyOptions
from repo_manager.engine.fit import FitProblem, FitTarget
from repo_manager.engine.gpu import BackendChoice
from repo_manager.engine.options import EngineOptions
from repo_manager.engine.triton_options import AcceleratorOptions
from repo_manager.errors import UsageError
from repo_manager.onnx_model.batch_axis import BatchAxis
from repo_manager.pipeline.golden import GoldenFacts
from repo_manager.precision import Conversion, ConvertOptions
from repo_manager.repository.location import Location
from repo_manager.sparsity import PruneReport, SparsityReport
from repo_manager.summary import Summarized
from repo_manager.triton_config.options import ConfigOptions
from repo_manager.types import Backend, Precision
from repo_manager.validation import check_fields

__all__ = ["AddOptions", "Added", "Control", "SparsityMode"]


class SparsityMode(str, enum.Enum):
    """How `add` treats weights without the 2:4 pattern."""

    REQUIRE = "require"
    REPORT = "report"
    PRUNE = "prune"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class AddOptions:
    """Options of `add`.

    Attributes:
        precision: number format of the published version's arithmetic.
        backend: `auto` or a `Backend`'s name.
        sparsity: whether weights without the 2:4 pattern stop the command, are reported, or are pruned.
        calibration: .npz file, folder of .npy, or others. INT8 needs it. Others measure their drift on it,
            instead of on made-up inputs, when it is given.
        config: settings for config.pbtxt beyond those the model decides.
        engine: how an engine is built. The onnxruntime backend has none.
        convert: gates and exceptions of the conversion.
        accelerator: let Triton's onnxruntime backend run the model through TensorRT on the server's GPU. `None`: not.
        model_configs: name for tritonserver's `--model-config-name` -> a compute capability or a file, see
            `engine.config_variant`.
        control: also publish the matched controls, `NAME__dense` and, of an engine, `NAME__noflag`.
        accuracy: held-out data to score the converted model on, and its limits. `None`: not scored.
        target: the server the engine is for: an objection to a load there stops the command. `None`: not checked.
        prune_drift: with pruning on calibration data: prune the most compute whose drift stays below this, see
            `PruneOptions.max_drift`. `None`: every layer.
        permute: with pruning on calibration data: reorder channels first, see `PruneOptions.permute`.
        distill: with pruning on calibration data: train the remaining values afterwards, see `PruneOptions.distill`.
        dry_run: make all checks and files, and publish nothing.
    """

    precision: Precision = Precision.FP32
    backend: str = "auto"
    sparsity: SparsityMode = SparsityMode.REPORT
    calibration: str | Path | None = None
    config: ConfigOptions = dataclasses.field(default_factory=ConfigOptions)
    engine: EngineOptions = dataclasses.field(default_factory=EngineOptions)
    convert: ConvertOptions = dataclasses.field(default_factory=ConvertOptions)
    accelerator: AcceleratorOptions | None = None
    model_configs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    control: bool = False
    accuracy: AccuracyOptions | None = None
    target: FitTarget | None = None
    prune_drift: float | None = None
    permute: bool = False
    distill: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        names = ("auto", *(each.value for each in Backend))
        if self.backend not in names:
            raise UsageError(f"AddOptions.backend is {self.backend!r}, expected one of {', '.join(names)}")


@dataclasses.dataclass(frozen=True)
class Control:
    """A control published beside the model: its name, version, and the meaning of a comparison with it."""

    name: str
    version: int
    purpose: str


@dataclasses.dataclass(frozen=True, repr=False)
class Added(Summarized):
    """The result of `add`.

    Attributes:
        name: the name it has in the repository, as given to `add`.
        version: the new version's number. With `dry_run` the one it would get.
        path: the version's folder. With `dry_run` where it would be.
        published: whether the repository has the version now. False with `dry_run`.
        backend: the backend, and the reason for its choice.
        batch_axis: whether the model has one, and how it was found out.
        sparsity: the 2:4 report of the published weights.
        pruned: result of pruning, when it was asked for.
        conversion: its checks and its drift against the source.
        golden: how a server's answer is compared.
        config: the config.pbtxt of the model.
        config_kept: fields with other values in the existing config.pbtxt, which is kept.
        engine: facts of the engine: library, per-layer precision and sparsity evidence.
        fit: objections to a load on `AddOptions.target`, as warnings.
        controls: the controls. With `dry_run` those to be published.
        files: names in the version's folder.
    """

    name: str
    version: int
    path: Location
    published: bool
    backend: BackendChoice
    batch_axis: BatchAxis
    sparsity: SparsityReport
    pruned: PruneReport | None
    conversion: Conversion
    golden: GoldenFacts
    config: str
    config_kept: tuple[str, ...]
    engine: Mapping[str, Any]
    fit: tuple[FitProblem, ...]
    controls: tuple[Control, ...]
    files: tuple[str, ...]

    def _summary(self) -> Mapping[str, Any]:
        return {
            "model": f"{self.name}:{self.version}" + ("" if self.published else " (dry run)"),
            "backend": self.backend.backend,
            "precision": self.conversion.precision,
            "largest drift": f"{self.conversion.worst_drift:.3g}",
            "2:4": self.sparsity.share_text,
            "path": self.path,
        }


@dataclasses.dataclass(frozen=True)
class AddTask:
    """One run of `add`: name and repository, the backend, a scratch folder, and the gate of accuracy."""

    name: str
    repository: Location
    choice: BackendChoice
    work: Path
    gate: AccuracyGate | None = None
