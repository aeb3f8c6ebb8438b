"""Two served models, or versions, under the same load: compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repo_manager.cli.loadtest import server_of, shapes_of
from repo_manager.cli.options import JsonOutput, Quiet, Repository, parse_target, writing

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("compare")(compare_command)


def compare_command(
    a: Annotated[str, typer.Argument(metavar="A[:VERSION]", help="The reference.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B[:VERSION]", help="What is held against it.", show_default=False)],
    url: Annotated[str | None, typer.Option("--url", "--to", metavar="URL", help="The server of A (and of B).")] = None,
    url_b: Annotated[str | None, typer.Option("--url-b", metavar="URL", help="The server of B, if another.")] = None,
    repository: Repository = None,
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Requests in flight.")] = 8,
    rate: Annotated[float | None, typer.Option("--rate", help="Requests a second, open loop, instead.")] = None,
    batch_sizes: Annotated[str, typer.Option("--batch-sizes", "-b", help="Samples in a request: 1, or 1,8,32.")] = "1",
    pairs: Annotated[int, typer.Option("--pairs", help="Pairs of blocks, fixed beforehand; at least 6.")] = 30,
    block: Annotated[float, typer.Option("--block", help="Measured seconds of a block.")] = 1.0,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="NAME:SIZES", help="Sizes of dynamic axes, without the batch."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of blocks and the resampling.")] = 0,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a one-file HTML page.")
    ] = None,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Compare two served models by interleaved, paired blocks in random order, with intervals on the ratios."""
    from repo_manager.files import write_atomic
    from repo_manager.loadtest import ComparePlan, LoadTestOptions, compare_batch_sizes, parse_levels
    from repo_manager.report.load_html import compare_page
    from repo_manager.report.load_tables import comparison_view
    from repo_manager.report.terminal import Terminal

    terminal = Terminal(as_json=json, quiet=quiet)
    sides = []
    for target, where in ((a, url), (b, url_b or url)):
        name, version = parse_target(target)
        server, metrics_url = server_of(where, repository, None)
        sides.append(
            LoadTestOptions(
                url=server,
                model=name,
                version=version,
                concurrency=() if rate is not None else (concurrency,),
                rate=() if rate is None else (rate,),
                shapes=shapes_of(terminal, shape, (name, version), repository, local=metrics_url is not None),
                metrics_url=metrics_url,
                seed=seed,
            )
        )
    plan = ComparePlan(pairs=pairs, block_s=block, seed=seed)
    results = compare_batch_sizes(sides[0], sides[1], parse_levels(batch_sizes), plan=plan)
    if html is not None:
        with writing(html):
            write_atomic(html, compare_page(results).encode())
        terminal.note(f"Page: {html}")
    terminal.result({"comparisons": results}, *comparison_view(results))
