"""Two served models, or versions, under the same load: compare."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from repo_manager.cli.connection import ConnectionFlags
from repo_manager.cli.durations import seconds_option
from repo_manager.cli.load_options import DataFlags, Load, ServerFlags, advice_for
from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import Output, check_input, check_outputs, writing
from repo_manager.cli.repository_options import RepositoryFlag, model_versions
from repo_manager.errors import RepositoryError, UsageError
from repo_manager.files import write_atomic
from repo_manager.loadtest.compare import ComparePlan, Comparison, compare_all
from repo_manager.loadtest.options import LoadTestOptions, parse_levels
from repo_manager.report.load_html import compare_page
from repo_manager.report.load_tables import comparison_view
from repo_manager.report.progress import compare_progress
from repo_manager.repository.location import Location
from repo_manager.repository.scan import find_model
from repo_manager.settings import load_settings

__all__ = ["app"]

app = typer.Typer()
_CONTROLS = ("dense", "noflag")


@dataclasses.dataclass(frozen=True)
class SideFlags(ServerFlags):
    """The two models, and their servers."""

    control: list[str] | None = option(
        "--control",
        metavar="dense|noflag|NAME",
        help="Compare the model with its control: A__dense or A__noflag, as `add --control` makes them (may be given "
        "often).",
    )
    url_b: str | None = option("--url-b", metavar="URL", help="The server of B [default: the server of A].")


@dataclasses.dataclass(frozen=True)
class PairFlags:
    """How much load, and how many blocks."""

    PANEL: ClassVar[str] = "Load"
    concurrency: int = option(
        "--concurrency", "-c", sets=(compare_all, "concurrency"), min=1, help="Requests in flight."
    )
    rate: float | None = option("--rate", help="Requests a second instead (open loop).")
    batch_sizes: str = option(
        "--batch-sizes",
        "-b",
        sets=(compare_all, "batch_sizes"),
        read=parse_levels,
        show=lambda sizes: ",".join(map(str, sizes)),
        help="Samples per request: 1, 1,8,32 or 1:256 (doubling).",
    )
    pairs: int = option("--pairs", sets=(ComparePlan, "pairs"), help="Number of block pairs, at least 6.")
    block: float = seconds_option("--block", sets=(ComparePlan, "block_s"), help="Measured seconds per block.")
    html: Path | None = option(
        "--html", metavar="FILE", help="Also write a one-file HTML page.", rich_help_panel="Output"
    )


@app.command("compare")
@grouped
def compare_command(
    a: Annotated[
        str,
        typer.Argument(metavar="A[:VERSION]", help="The reference.", show_default=False, autocompletion=model_versions),
    ],
    b: Annotated[
        str | None,
        typer.Argument(
            metavar="[B[:VERSION]]",
            help="The model to compare it with. Leave it out with --control.",
            show_default=False,
            autocompletion=model_versions,
        ),
    ] = None,
    *,
    place: RepositoryFlag,
    sides: SideFlags,
    flags: PairFlags,
    data: DataFlags,
    output: Output,
    connection: ConnectionFlags,
) -> None:
    """Compare two served models by interleaved, paired blocks in random order, with intervals on the ratios."""
    terminal = output.terminal()
    load = Load(terminal, place, sides, data, connection)
    level = {"concurrency": (flags.concurrency,)} if flags.rate is None else {"rate": (flags.rate,)}
    pairs, levels = _couples(a, b, sides.control or []), settings_of(compare_all, flags)
    plan = ComparePlan(**settings_of(ComparePlan, flags), seed=data.seed)
    check_outputs(flags.html)
    check_input(data.data)
    for each in {each for pair in pairs for each in pair}:
        load.check(each, level)

    command = shlex.join(["repo-manager", *sys.argv[1:]])

    def side(named_version: str, url: str | None) -> LoadTestOptions:
        return LoadTestOptions(**load.settings(named_version, url), **level, command=command)

    couples = [(side(first, sides.url), side(second, sides.url_b or sides.url)) for first, second in pairs]
    named = [each for pair in pairs for each in pair]
    with advice_for(place, *named), compare_progress(terminal.console, quiet=output.quiet) as progress:
        results = compare_all(couples, **levels, plan=plan, progress=progress)
    if sides.url is None and sides.url_b is None and load_settings().server is None:
        results = tuple(_with_precisions(each, place.root()) for each in results)
    if flags.html is not None:
        with writing(flags.html):
            write_atomic(flags.html, compare_page(results).encode())
        terminal.note(f"Page: {flags.html}")
    terminal.result({"comparisons": results}, *comparison_view(results))


def _with_precisions(found: Comparison, root: Location) -> Comparison:
    """Add both manifests' facts: the server is the repository's own."""

    def precision(model: str, version: str) -> str:
        try:
            manifest = find_model(root, model).version(int(version)).manifest
        except (RepositoryError, ValueError):  # the server still serves a version removed from this repository
            return ""
        return "" if manifest is None else str(manifest.precision or "")

    sides = (precision(found.a.model, found.a.version), precision(found.b.model, found.b.version))
    return dataclasses.replace(found, precisions=sides)


def _couples(a: str, b: str | None, controls: list[str]) -> list[tuple[str, str]]:
    """Return the pairs to compare: A with B, and each control (the reference) with the last of them.

    Raises:
        UsageError: there is nothing to compare A with.
    """
    if b is None and not controls:
        raise UsageError(
            f"{a} needs a second model to compare it with",
            hint=f"Name another model, or give --control dense ({a}__dense).",
        )
    model = a if b is None else b
    name = model.partition(":")[0]
    references = [f"{name}__{control}" if control in _CONTROLS else control for control in controls]
    return [*([] if b is None else [(a, b)]), *((reference, model) for reference in references)]
