"""The commands for publishing: add, ensemble."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import typer

from repo_manager.cli.conversion import AccuracyFlags, ConversionFlags
from repo_manager.cli.engine_options import AcceleratorFlags, EngineFlags, KindFlags
from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import Output, RuntimeFlags, check_outputs, parse_changes, read_labels_file, writing
from repo_manager.cli.repository_options import RepositoryFlag, model_names, model_versions
from repo_manager.cli.signing import signing_key
from repo_manager.engine.options import EngineOptions
from repo_manager.errors import UsageError
from repo_manager.files import write_atomic
from repo_manager.pipeline.adding import Added, AddOptions, SparsityMode, add
from repo_manager.pipeline.adding_files import FilesOptions, add_files
from repo_manager.pipeline.cards import version_cards
from repo_manager.pipeline.ensembling import EnsembleOptions, make_ensemble
from repo_manager.pipeline.given_files import is_converted
from repo_manager.pipeline.preprocessing import AddedWithImages, add_with_images
from repo_manager.report.added_view import added_files_view, added_view, ensemble_view, images_view
from repo_manager.report.card import card_html
from repo_manager.report.progress import build_bar
from repo_manager.report.sparsity_html import sparsity_page, sparsity_part
from repo_manager.report.terminal import Terminal
from repo_manager.repository.location import Location
from repo_manager.repository.signing import SigningKey, sign_version
from repo_manager.settings import load_settings
from repo_manager.sources import Source, open_source
from repo_manager.triton_config.options import ConfigOptions, InstanceKind
from repo_manager.types import Precision, as_json

__all__ = ["app"]

app = typer.Typer()

BackendName = Literal[
    "auto",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "dali",
    "fil",
    "openvino",
    "python",
    "pytorch",
    "tensorflow",
    "vllm",
]


@dataclasses.dataclass(frozen=True)
class MainFlags:
    """The model to publish, and its backend."""

    precision: Precision = option(
        "--precision", "-p", sets=(AddOptions, "precision"), help="Compute precision of the version."
    )
    backend: BackendName | None = option(
        "--backend",
        help="Triton backend. For a converted ONNX file: one of the first four. --config names any other [default: "
        "the settings' backend, else auto; for other files the one they name].",
    )
    sparsity: SparsityMode = option(
        "--sparsity",
        sets=(AddOptions, "sparsity"),
        help="Weights without the 2:4 pattern: fail, report, or prune them.",
    )
    prune_drift: float | None = option(
        "--prune-drift",
        sets=(AddOptions, "prune_drift"),
        min=0.0,
        help="With --sparsity prune --calibration: prune the most compute whose drift stays, with 95 % confidence, "
        "below this [default: prune every layer].",
    )
    permute: bool = option(
        "--permute", sets=(AddOptions, "permute"), help="With --sparsity prune --calibration: as `prune --permute`."
    )
    distill: bool = option(
        "--distill", sets=(AddOptions, "distill"), help="With --sparsity prune --calibration: as `prune --distill`."
    )
    preprocess: Path | None = option(
        "--preprocess",
        metavar="FILE.yaml",
        help="Also publish a model to preprocess images as in this calibration.yaml, and an ensemble of both.",
    )
    sign: Path | None = option("--sign", metavar="KEY.pem", help="Sign the version with this key, as `sign` does.")
    html: Path | None = option("--html", metavar="FILE", help="Also write the version's card as an HTML page.")
    dry_run: bool = option(
        "--dry-run", sets=(AddOptions, "dry_run"), help="Show the planned changes without making them."
    )


@dataclasses.dataclass(frozen=True)
class ServingFlags:
    """Fields of config.pbtxt beyond those of the model."""

    PANEL: ClassVar[str] = "Configuration"
    max_batch_size: int | None = option(
        "--max-batch-size",
        sets=(ConfigOptions, "max_batch_size"),
        min=0,
        help="Largest batch; 0: no batching [default: 8 if the model has a batch axis].",
    )
    instances: int | None = option(
        "--instances", sets=(ConfigOptions, "instance_count"), min=1, help="Copies of the model to run."
    )
    instance_kind: InstanceKind = option(
        "--instance-kind", sets=(ConfigOptions, "instance_kind"), help="Device of the copies."
    )
    queue_delay_us: int = option(
        "--queue-delay-us",
        sets=(ConfigOptions, "max_queue_delay_us"),
        min=0,
        help="How long a request may wait for a batch to fill.",
    )
    labels: list[str] | None = option(
        "--labels",
        metavar="OUTPUT=FILE",
        sets=(ConfigOptions, "labels"),
        read=lambda texts: _read_labels(texts),
        help="Class names of an output, one per line (may be given often).",
    )
    warmup: bool = option(
        "--warmup", sets=(ConfigOptions, "warmup"), help="Run a sample through the model before Triton calls it ready."
    )
    fields: list[str] | None = option(
        "--set",
        metavar="FIELD=VALUE",
        sets=(ConfigOptions, "fields"),
        read=parse_changes,
        help="Any other field of config.pbtxt, such as response_cache.enable=true (may be given often).",
    )


@dataclasses.dataclass(frozen=True)
class FilesFlags:
    """Files to publish unchanged."""

    PANEL: ClassVar[str] = "Folders and other files"
    config: Path | None = option(
        "--config",
        metavar="FILE",
        sets=(FilesOptions, "config"),
        help="The config.pbtxt. With it, an ONNX file is published unchanged [default: the folder's, the model's].",
    )
    sample: Path | None = option(
        "--sample",
        metavar="FILE",
        sets=(FilesOptions, "sample"),
        help="Requests (.npz, .npy, .json, .jsonl). The version is run on them here, and every deploy checks their "
        "answers.",
    )
    uses: list[str] | None = option(
        "--uses",
        metavar="NAME",
        sets=(FilesOptions, "uses"),
        help="A model its code calls (BLS). It is kept and deployed with this one (may be given often).",
    )


@dataclasses.dataclass(frozen=True)
class AddFlags(
    AcceleratorFlags, KindFlags, EngineFlags, FilesFlags, ServingFlags, AccuracyFlags, ConversionFlags, MainFlags
):
    """All options with an effect on the result (the last base's options come first in the help)."""

    def add_options(self) -> AddOptions:
        """Return the library's options.

        Raises:
            UsageError: an option has another form.
        """
        engine = EngineOptions(**settings_of(EngineOptions, self))
        return AddOptions(
            backend=self.backend or load_settings().backend or AddOptions.backend,
            calibration=self.calibration,
            config=ConfigOptions(**settings_of(ConfigOptions, self)),
            engine=engine,
            convert=self.convert_options(),
            accuracy=self.accuracy_options(),
            accelerator=self.accelerator_options(self.precision, engine),
            **settings_of(AddOptions, self),
        )

    def files_options(self, path: Path, runtime: RuntimeFlags) -> FilesOptions:
        """Return the library's options for files to publish unchanged.

        Raises:
            UsageError: an option of the conversion was given.
        """
        taken = {field.name for field in dataclasses.fields(FilesFlags)} | {"backend", "sign", "dry_run", "for_server"}
        given = [
            str(field.metadata["parameter"].default)  # Typer keeps the parameter's first name in `default`
            for field in dataclasses.fields(self)
            if field.name not in taken and getattr(self, field.name) != field.default
        ]
        if limits := runtime.given():
            raise UsageError(
                f"{', '.join(limits)}: {path} is published as it is, and ONNX Runtime does not run it here",
                hint="Leave it out. A --sample is run on the embedded server, which has no such limits.",
            )
        if given:
            raise UsageError(
                f"{', '.join(given)}: {path} is published as it is, so there is nothing to convert or to derive"
            )
        target = settings_of(AddOptions, self)["target"]
        return FilesOptions(
            backend=self.backend, target=target, dry_run=self.dry_run, **settings_of(FilesOptions, self)
        )


@app.command("add")
@grouped
def add_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL.onnx|FILE|FOLDER|URL",
            help="An ONNX file, or a file or folder to publish unchanged: a plan, TorchScript, a folder with "
            "model.py, ... A local path, or s3://, gs://, as://, https://, models:/NAME/VERSION or runs:/RUN/PATH of "
            "MLflow.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str,
        typer.Option("--name", "-n", metavar="NAME", help="The model's name in Triton.", autocompletion=model_names),
    ],
    *,
    place: RepositoryFlag,
    flags: AddFlags,
    runtime: RuntimeFlags,
    output: Output,
) -> None:
    """Convert, check and publish a model as a new version. No server serves it until `deploy`.

    A folder, or a file other than an ONNX file, is published as it is, with its config.pbtxt, for any Triton backend.
    """
    terminal = output.terminal()
    key, root = signing_key(flags.sign), place.root()
    as_it_is = flags.config is not None or flags.sample is not None or bool(flags.uses)
    with open_source(model, terminal.reporter()) as source:
        if not as_it_is and is_converted(source.path, flags.backend):
            _add_converted(terminal, source, name, place, flags)
            return
        files = add_files(source, name, root, flags.files_options(source.path, runtime), report=terminal.reporter())
    if key is not None and files.published:
        _sign(terminal, root, [(files.name, files.version)], key)
    terminal.result(files, *added_files_view(files, place.repository))


def _add_converted(terminal: Terminal, source: Source, name: str, place: RepositoryFlag, flags: AddFlags) -> None:
    """Run `add` for an ONNX file converted."""
    key, root = signing_key(flags.sign), place.root()
    options = flags.add_options()
    check_outputs(flags.html)
    made: AddedWithImages | None = None
    with build_bar(terminal) as progress:
        if flags.preprocess is None:
            added = add(source, name, root, options, report=terminal.reporter(), progress=progress)
        else:
            say = terminal.reporter()
            made = add_with_images(source, name, root, flags.preprocess, options, report=say, progress=progress)
            added = made.added
    if key is not None and added.published:
        beside = [(each.name, each.version) for each in added.controls]
        beside += [(each.name, each.version) for each in (made.beside if made is not None else ())]
        _sign(terminal, root, [*beside, (added.name, added.version)], key)
    if flags.html is not None:
        _write_page(flags.html, added, root)
        terminal.note(f"Page: {flags.html}")
    if made is None:
        terminal.result(added, *added_view(added, place.repository))
    else:
        terminal.result(made, *added_view(added, place.repository), *images_view(made, place.repository))


@dataclasses.dataclass(frozen=True)
class EnsembleFlags:
    """How the models are joined."""

    maps: list[str] | None = option(
        "--map",
        metavar="SOURCE=TARGET",
        sets=(EnsembleOptions, "maps"),
        help="Source of an input: OUTPUT=INPUT or MODEL.OUTPUT=MODEL.INPUT. input:NAME=MODEL.INPUT makes it an input "
        "of the ensemble (may be given often).",
    )
    outputs: list[str] | None = option(
        "--output",
        metavar="[MODEL.]OUTPUT",
        sets=(EnsembleOptions, "outputs"),
        help="An output the ensemble returns (may be given often) [default: every output that no later model takes].",
    )
    pin: bool = option(
        "--pin/--no-pin",
        sets=(EnsembleOptions, "pin"),
        help="Pin each model's version, so the ensemble does not follow new versions.",
    )
    sample: Path | None = option(
        "--sample",
        metavar="FILE",
        sets=(EnsembleOptions, "sample"),
        help="Requests (.npz, .npy, .json, .jsonl) whose answers every deploy checks [default: the first model's].",
    )
    sign: Path | None = option("--sign", metavar="KEY.pem", help="Sign the version with this key, as `sign` does.")
    dry_run: bool = option(
        "--dry-run", sets=(EnsembleOptions, "dry_run"), help="Show the planned changes without making them."
    )


@app.command("ensemble")
@grouped
def ensemble_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The ensemble's name in Triton.", show_default=False)],
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL[:VERSION]...",
            help="Its models, in the order of the data flow. VERSION, a number or a tag, pins one.",
            show_default=False,
            autocompletion=model_versions,
        ),
    ],
    *,
    place: RepositoryFlag,
    flags: EnsembleFlags,
    output: Output,
) -> None:
    """Join published models into an ensemble: tensors are matched by name, type and dims.

    The ensemble is run on the embedded server and recorded before it is published. No server serves it until `deploy`.
    """
    terminal = output.terminal()
    key, root = signing_key(flags.sign), place.root()
    options = EnsembleOptions(**settings_of(EnsembleOptions, flags))
    made = make_ensemble(root, name, models, options, report=terminal.reporter())
    if key is not None and made.added.published:
        _sign(terminal, root, [(made.added.name, made.added.version)], key)
    terminal.result(made, *ensemble_view(made, place.repository))


def _sign(terminal: Terminal, root: Location, published: list[tuple[str, int]], key: SigningKey) -> None:
    for name, version in published:
        signature = sign_version(root, name, version, key)
        terminal.note(f"{name}:{version} is signed: {signature.file}")


def _write_page(path: Path, added: Added, root: Location) -> None:
    """Write the version's card with its layers. Of a dry run the layers alone: it publishes nothing."""
    layers, pruned = added.engine.get("layers", ()), as_json(added.pruned)
    if added.published:
        (card,) = version_cards(root, f"{added.name}:{added.version}")
        page = card_html(card, sparsity=sparsity_part(added.sparsity, evidence=layers, pruned=pruned))
    else:
        title = f"{added.name}:{added.version} ({added.conversion.precision}, {added.backend.backend})"
        page = sparsity_page(added.sparsity, title=title, evidence=layers, pruned=pruned)
    with writing(path):
        write_atomic(path, page.encode())


def _read_labels(texts: list[str]) -> dict[str, tuple[str, ...]]:
    """Read `--labels OUTPUT=FILE` options: one label a line."""
    labels: dict[str, tuple[str, ...]] = {}
    for text in texts:
        output, separator, path = text.partition("=")
        if not separator or not output or not path:
            raise UsageError(f"--labels {text}: expected OUTPUT=FILE")
        labels[output] = read_labels_file(Path(path))
    return labels
