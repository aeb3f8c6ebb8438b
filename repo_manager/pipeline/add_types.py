"""What `add` is asked for, and what it did."""

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
    """What `add` does about weights that are not 2:4."""

    REQUIRE = "require"
    REPORT = "report"
    PRUNE = "prune"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class AddOptions:
    """Options of `add`.

    Attributes:
        precision: what the published version computes in.
        backend: `auto` or a `Backend`'s name.
        sparsity: whether weights that are not 2:4 stop the command, are reported, or are pruned.
        calibration: .npz file, folder of .npy, or others. INT8 needs it. Others measure their drift on it,
            instead of on made-up inputs, when it is given.
        config: what config.pbtxt says beyond what the model decides.
        engine: how an engine is built. The onnxruntime backend has none.
        convert: gates and exceptions of the conversion.
        accelerator: let Triton's onnxruntime backend run the model through TensorRT on the server's GPU. `None`: not.
        model_configs: name for tritonserver's `--model-config-name` -> a compute capability or a file, see
            `engine.config_variant`.
        control: also publish the matched controls, `NAME__dense` and, of an engine, `NAME__noflag`.
        accuracy: held-out data on which the converted model is scored, and its limits. `None`: not scored.
        target: the server the engine is for: what speaks against its load stops the command. `None`: not checked.
        prune_drift: with pruning on calibration data: prune the most compute whose drift stays below this, see
            `PruneOptions.max_drift`. `None`: every layer.
        dry_run: do everything except publishing.
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
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        names = ("auto", *(each.value for each in Backend))
        if self.backend not in names:
            raise UsageError(f"AddOptions.backend is {self.backend!r}, expected one of {', '.join(names)}")


@dataclasses.dataclass(frozen=True)
class Control:
    """A control that was published beside the model: its name, version, and what comparing with it tells."""

    name: str
    version: int
    purpose: str


@dataclasses.dataclass(frozen=True, repr=False)
class Added(Summarized):
    """What `add` did.

    Attributes:
        name: the model's name.
        version: the new version's number. With `dry_run` the one it would get.
        path: the version's folder. With `dry_run` where it would be.
        published: false with `dry_run`.
        backend: and why it was chosen.
        batch_axis: whether the model has one, and how found out.
        sparsity: of the published weights.
        pruned: what pruning did, when it was asked for.
        conversion: its checks and its drift against the source.
        golden: how a server's answer is compared.
        config: the config.pbtxt of the model.
        config_kept: fields in which the existing config.pbtxt, which stays as it is, says something else.
        engine: what is known of the engine: library, per-layer precision and sparsity evidence.
        fit: what speaks against a load on `AddOptions.target`, as warnings.
        controls: the controls. With `dry_run` those that would be published.
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
class Target:
    """What a run of `add` works for: name and repository, the backend, a scratch folder, and the gate of accuracy."""

    name: str
    repository: Location
    choice: BackendChoice
    work: Path
    gate: AccuracyGate | None = None
