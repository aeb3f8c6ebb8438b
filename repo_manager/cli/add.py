"""The command that publishes: add."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repo_manager.cli.conversion_options import ConversionFlags, PrecisionOption
from repo_manager.cli.engine_options import AcceleratorFlags, EngineFlags, KindFlags
from repo_manager.cli.model import read_labels_file
from repo_manager.cli.option_groups import grouped
from repo_manager.cli.options import DryRun, JsonOutput, ModelFile, Quiet, Repository, resolve_repository, writing
from repo_manager.errors import UsageError
from repo_manager.types import Precision

if TYPE_CHECKING:
    from repo_manager.pipeline import Added, AddOptions
    from repo_manager.triton_config import ConfigOptions

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("add")(add_command)


@dataclasses.dataclass(frozen=True)
class ServingFlags:
    """What config.pbtxt says beyond what the model decides."""

    max_batch_size: Annotated[
        int | None,
        typer.Option("--max-batch-size", min=0, help="0: no batching [default: 8 if the model has a batch axis]."),
    ] = None
    instances: Annotated[int | None, typer.Option("--instances", min=1, help="Copies of the model to run.")] = None
    instance_kind: Annotated[str, typer.Option("--instance-kind", help="auto, cpu or gpu.")] = "auto"
    queue_delay_us: Annotated[
        int, typer.Option("--queue-delay-us", min=0, help="How long a request may wait to be batched.")
    ] = 0
    labels: Annotated[
        list[str] | None,
        typer.Option("--labels", metavar="OUTPUT=FILE", help="Class names of an output, one a line."),
    ] = None
    warmup: Annotated[bool, typer.Option("--warmup", help="Run a sample before the model is ready.")] = False

    def config_options(self) -> ConfigOptions:
        """Return the library's options."""
        from repo_manager.triton_config import ConfigOptions

        return ConfigOptions(
            max_batch_size=self.max_batch_size,
            instance_count=self.instances,
            instance_kind=self.instance_kind,
            max_queue_delay_us=self.queue_delay_us,
            labels=_read_labels(self.labels or []),
            warmup=self.warmup,
        )


@dataclasses.dataclass(frozen=True)
class MainFlags:
    """What is published, for which backend."""

    precision: PrecisionOption = Precision.FP32
    backend: Annotated[
        str | None,
        typer.Option("--backend", help="auto, onnxruntime, tensorrt or tensorrt_rtx.", show_default="auto"),
    ] = None
    sparsity: Annotated[
        str,
        typer.Option("--sparsity", help="Weights that are not 2:4: require (fail), report, or prune them."),
    ] = "report"


@dataclasses.dataclass(frozen=True)
class AddFlags(AcceleratorFlags, KindFlags, EngineFlags, ServingFlags, ConversionFlags, MainFlags):
    """Everything that decides what is published (the last base's options come first in the help)."""

    def add_options(self, *, dry_run: bool) -> AddOptions:
        """Return the library's options.

        Raises:
            UsageError: an option has another form.
        """
        from repo_manager.pipeline import AddOptions, SparsityMode
        from repo_manager.settings import load_settings

        engine = self.engine_options(self.plans())
        return AddOptions(
            precision=self.precision,
            backend=self.backend or load_settings().backend,
            sparsity=_choice("--sparsity", self.sparsity, SparsityMode),
            calibration=self.calibration,
            config=self.config_options(),
            engine=engine,
            convert=self.convert_options(),
            accelerator=self.accelerator_options(self.precision, engine),
            model_configs=self.model_configs(),
            control=self.control,
            target=self.target(),
            dry_run=dry_run,
        )


@grouped
def add_command(
    model: ModelFile,
    name: Annotated[str, typer.Option("--name", "-n", metavar="NAME", help="The model's name in Triton.")],
    repository: Repository = None,
    *,
    flags: AddFlags,
    sign: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY.pem", help="Sign the version with this key, as `sign` does.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write the evidence as a one-file HTML page.")
    ] = None,
    dry_run: DryRun = False,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Convert, check and publish a model as a new version. No server serves it until `deploy`."""
    from repo_manager.cli.sign import signing_key
    from repo_manager.pipeline import add
    from repo_manager.report.added_view import added_view
    from repo_manager.report.build_bar import build_bar
    from repo_manager.report.terminal import Terminal
    from repo_manager.repository import sign_version

    terminal = Terminal(as_json=json, quiet=quiet)
    key, root = signing_key(sign), resolve_repository(repository)
    options = flags.add_options(dry_run=dry_run)
    with build_bar(terminal) as progress:
        added = add(model, name, root, options, report=terminal.reporter(), progress=progress)
    published = [*((control.name, control.version) for control in added.controls), (name, added.version)]
    for one, version in published if key is not None and added.published else ():
        assert key is not None
        signature = sign_version(root, one, version, key)
        terminal.note(f"{one}:{version} is signed: {signature.file}")
    if html is not None:
        _write_page(html, added)
        terminal.note(f"Page: {html}")
    terminal.result(added, *added_view(added, repository))


def _write_page(path: Path, added: Added) -> None:
    from repo_manager.files import write_atomic
    from repo_manager.report.sparsity_html import sparsity_page

    title = f"{added.name}:{added.version} ({added.conversion.precision}, {added.backend.backend})"
    page = sparsity_page(added.sparsity, title=title, evidence=added.engine.get("layers", ()))
    with writing(path):
        write_atomic(path, page.encode())


def _choice(option: str, text: str, kind: Any) -> Any:
    try:
        return kind(text)
    except ValueError:
        known = ", ".join(member.value for member in kind)
        raise UsageError(f"{option} {text}: expected one of {known}") from None


def _read_labels(texts: list[str]) -> dict[str, tuple[str, ...]]:
    """Read `--labels OUTPUT=FILE` options: one label a line."""
    labels: dict[str, tuple[str, ...]] = {}
    for text in texts:
        output, separator, path = text.partition("=")
        if not separator or not output or not path:
            raise UsageError(f"--labels {text}: expected OUTPUT=FILE")
        labels[output] = read_labels_file(Path(path))
    return labels
