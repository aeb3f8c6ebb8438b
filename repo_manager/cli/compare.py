"""Two served models, or versions, under the same load: compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repo_manager.cli.connection import Connection, client_options, connecting
from repo_manager.cli.loadtest import server_of, shapes_of
from repo_manager.cli.options import JsonOutput, Quiet, Repository, parse_target, writing
from repo_manager.errors import UsageError

if TYPE_CHECKING:
    from repo_manager.loadtest import LoadTestOptions

__all__ = ["register"]

_CONTROLS = ("dense", "noflag")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("compare")(connecting(compare_command))


def compare_command(
    a: Annotated[str, typer.Argument(metavar="A[:VERSION]", help="The reference.", show_default=False)],
    connection: Connection,
    b: Annotated[
        str | None,
        typer.Argument(
            metavar="[B[:VERSION]]", help="What is held against it; left out with --control.", show_default=False
        ),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            metavar="dense|noflag|NAME",
            help="Hold the model against its control: A__dense or A__noflag, as `add --control` makes them.",
        ),
    ] = None,
    url: Annotated[str | None, typer.Option("--url", "--to", metavar="URL", help="The server of A (and of B).")] = None,
    url_b: Annotated[str | None, typer.Option("--url-b", metavar="URL", help="The server of B, if another.")] = None,
    repository: Repository = None,
    protocol: Annotated[str | None, typer.Option("--protocol", help="grpc or http [default: the URL's].")] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Requests in flight.")] = 8,
    rate: Annotated[float | None, typer.Option("--rate", help="Requests a second, open loop, instead.")] = None,
    batch_sizes: Annotated[
        str, typer.Option("--batch-sizes", "-b", help="Samples in a request: 1, 1,8,32 or 1:256 (doubling).")
    ] = "1",
    pairs: Annotated[int, typer.Option("--pairs", help="Pairs of blocks, fixed beforehand; at least 6.")] = 30,
    block: Annotated[float, typer.Option("--block", help="Measured seconds of a block.")] = 1.0,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="NAME:SIZES", help="Sizes of dynamic axes, without the batch."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--input-data", help=".npz, .npy, perf_analyzer JSON, an image or a folder.")
    ] = None,
    shared_memory: Annotated[
        str, typer.Option("--shared-memory", help="system: inputs in POSIX shared memory; the server is local.")
    ] = "none",
    seed: Annotated[int, typer.Option("--seed", help="Of the order of blocks and the resampling.")] = 0,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a one-file HTML page.")
    ] = None,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Compare two served models by interleaved, paired blocks in random order, with intervals on the ratios."""
    from repo_manager.files import write_atomic
    from repo_manager.loadtest import ComparePlan, LoadTestOptions, compare_all, parse_levels
    from repo_manager.report.load_html import compare_page
    from repo_manager.report.load_live import compare_progress
    from repo_manager.report.load_tables import comparison_view
    from repo_manager.report.terminal import Terminal

    terminal = Terminal(as_json=json, quiet=quiet)

    def side(target: str, where: str | None) -> LoadTestOptions:
        name, version = parse_target(target)
        server, metrics_url = server_of(where, repository, protocol)
        return LoadTestOptions(
            url=server,
            model=name,
            version=version,
            protocol=protocol,
            concurrency=() if rate is not None else (concurrency,),
            rate=() if rate is None else (rate,),
            shapes=shapes_of(terminal, shape, (name, version), repository, local=metrics_url is not None),
            data=data,
            shared_memory=shared_memory,
            metrics_url=metrics_url,
            access=client_options(connection, [server]),
            seed=seed,
        )

    couples = [(side(first, url), side(second, url_b or url)) for first, second in _couples(a, b, control or [])]
    plan = ComparePlan(pairs=pairs, block_s=block, seed=seed)
    with compare_progress(terminal.progress_console, quiet=quiet) as progress:
        results = compare_all(couples, parse_levels(batch_sizes), plan=plan, progress=progress)
    if html is not None:
        with writing(html):
            write_atomic(html, compare_page(results).encode())
        terminal.note(f"Page: {html}")
    terminal.result({"comparisons": results}, *comparison_view(results))


def _couples(a: str, b: str | None, controls: list[str]) -> list[tuple[str, str]]:
    """Return what is compared with what: A and B, and each control (the reference) with the last of them.

    Raises:
        UsageError: there is nothing to compare A with.
    """
    if b is None and not controls:
        raise UsageError(
            f"{a} is compared with nothing", hint=f"Name another model, or give --control dense ({a}__dense)."
        )
    model = a if b is None else b
    name = model.partition(":")[0]
    references = [f"{name}__{control}" if control in _CONTROLS else control for control in controls]
    return [*([] if b is None else [(a, b)]), *((reference, model) for reference in references)]
