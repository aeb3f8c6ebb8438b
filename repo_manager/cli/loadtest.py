"""Load on a served model: loadtest."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repo_manager.cli.options import (
    JsonOutput,
    Quiet,
    Repository,
    parse_shapes,
    parse_target,
    resolve_repository,
    writing,
)
from repo_manager.errors import GateError, InconclusiveError, ServerRefusedError, ServerUnreachableError

if TYPE_CHECKING:
    from repo_manager.loadtest import Gate, LoadTestOptions, Verdict
    from repo_manager.report.terminal import Terminal

__all__ = ["register", "server_of", "shapes_of"]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("loadtest")(loadtest)


def loadtest(
    target: Annotated[str, typer.Argument(metavar="NAME[:VERSION]", help="The served model.", show_default=False)],
    url: Annotated[
        str | None,
        typer.Option("--url", "--to", metavar="URL", help="grpc:// or http://host:port [default: the running serve]."),
    ] = None,
    repository: Repository = None,
    concurrency: Annotated[
        str | None,
        typer.Option("--concurrency", "-c", help="Requests in flight: 8, 1,4,16 or 1:16 (doubling) [default: 1:16]."),
    ] = None,
    rate: Annotated[
        str | None, typer.Option("--rate", help="Requests a second, open loop: 200, or 100:500:100.")
    ] = None,
    arrival: Annotated[
        str, typer.Option("--arrival", help="Of --rate: constant, poisson, burst or ramp.")
    ] = "constant",
    replay: Annotated[Path | None, typer.Option("--replay", help="JSON or CSV file of recorded send times.")] = None,
    until_saturation: Annotated[
        bool, typer.Option("--until-saturation", help="Double the load until the knee.")
    ] = False,
    protocol: Annotated[str | None, typer.Option("--protocol", help="grpc or http [default: the URL's].")] = None,
    client: Annotated[str, typer.Option("--client", help="native or perf_analyzer.")] = "native",
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Samples in a request.")] = 1,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="NAME:SIZES", help="Sizes of dynamic axes, without the batch."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--input-data", help=".npz, .npy or perf_analyzer JSON [default: random].")
    ] = None,
    warmup: Annotated[float, typer.Option("--warmup", min=0.0, help="Seconds of load before each measurement.")] = 1.0,
    duration: Annotated[
        float | None, typer.Option("--duration", min=0.1, help="Seconds per level [default: until stable].")
    ] = None,
    request_count: Annotated[
        int | None, typer.Option("--request-count", min=1, help="Requests per level instead.")
    ] = None,
    slo: Annotated[
        list[str] | None,
        typer.Option("--slo", metavar="GATE", help='"p99<20ms", "throughput>500", "errors<0.1%" (may be given often).'),
    ] = None,
    over: Annotated[
        str, typer.Option("--slo-over", help="every: each level holds the gates; some: one level does.")
    ] = "every",
    seed: Annotated[int, typer.Option("--seed", help="Of the random inputs and arrivals.")] = 0,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", metavar="FILE.json", help="An earlier JSON report: fail on a regression."),
    ] = None,
    allow_zeros: Annotated[bool, typer.Option("--allow-zeros", help="Accept input data that is all zeros.")] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes of the native client [default: one per 4 CPUs].")
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option("--report", metavar="FILE", help="Also .html, .json, .md, .xml (JUnit) or .prom; repeatable."),
    ] = None,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Measure latency, throughput, errors and server times of a served model; gates decide the exit code.

    Exit code 4 when a gate fails, 6 when the measurement decides neither way.
    """
    from repo_manager.loadtest import LoadTestOptions, parse_levels, parse_rates, parse_slo
    from repo_manager.report.load_files import check_report_path
    from repo_manager.report.terminal import Terminal

    terminal = Terminal(as_json=json, quiet=quiet)
    gates = tuple(parse_slo(text) for text in _split(slo))
    name, version = parse_target(target)
    where, metrics_url = server_of(url, repository, protocol)
    has_level = concurrency or rate or replay or until_saturation
    options = LoadTestOptions(
        url=where,
        model=name,
        version=version,
        protocol=protocol,
        concurrency=parse_levels(concurrency or "1:16") if concurrency or not has_level else (),
        rate=parse_rates(rate) if rate else (),
        arrival=arrival,
        replay=replay,
        until_saturation=until_saturation,
        batch_size=batch_size,
        shapes=shapes_of(terminal, shape, (name, version), repository, local=metrics_url is not None),
        data=data,
        seed=seed,
        warmup_s=warmup,
        duration_s=duration,
        request_count=request_count,
        client=client,
        allow_zeros=allow_zeros,
        workers=workers,
        metrics_url=metrics_url,
        command=shlex.join(["repo-manager", *sys.argv[1:]]),
    )
    _run(terminal, options, (gates, over, baseline), tuple(check_report_path(path) for path in report or ()))


def _run(
    terminal: Terminal,
    options: LoadTestOptions,
    judging: tuple[tuple[Gate, ...], str, Path | None],
    files: tuple[Path, ...],
) -> None:
    from repo_manager.files import write_atomic
    from repo_manager.loadtest import judge, judge_against, read_report, run_load_test
    from repo_manager.report.load_files import report_text
    from repo_manager.report.load_tables import load_view, verdict_view
    from repo_manager.types import as_json

    gates, over, baseline = judging
    earlier = None if baseline is None else read_report(baseline)
    report = run_load_test(options, progress=terminal.load_progress())
    verdict = judge(report, gates, over=over) if gates else None
    regression = None if earlier is None else judge_against(report, earlier)
    for path in files:
        with writing(path):
            write_atomic(path, report_text(path, report, verdict).encode())
        terminal.note(f"Report: {path}")
    verdicts = [one for one in (verdict, regression) if one is not None]
    result = {**as_json(report), "verdict": as_json(verdict), "regression": as_json(regression)}
    terminal.result(result, *load_view(report), *(view for one in verdicts for view in verdict_view(one)))
    if all(point.outcome == "failed" for point in report.points):
        raise ServerRefusedError("No load level could be measured", hint="See the reasons above.")
    _raise_for(verdicts)


def _raise_for(verdicts: list[Verdict]) -> None:
    outcomes = {str(verdict.outcome) for verdict in verdicts}
    if "fail" in outcomes:
        raise GateError("A gate failed", hint="See the table of gates above.")
    if "inconclusive" in outcomes:
        raise InconclusiveError(
            "The measurement does not decide",
            hint="The gates' table says why: measure longer (--duration), or on a quieter machine.",
        )


def _split(texts: list[str] | None) -> list[str]:
    """Several gates may stand in one text, separated by commas."""
    return [part.strip() for text in texts or [] for part in text.split(",") if part.strip()]


def shapes_of(
    terminal: Terminal, texts: list[str] | None, target: tuple[str, int | None], repository: str | None, *, local: bool
) -> dict[str, tuple[int, ...]]:
    """Return the sizes given, and for a model of our own repository those of its golden sample for the rest."""
    from repo_manager.pipeline.load_shapes import golden_shapes

    given = parse_shapes(texts)
    known = golden_shapes(resolve_repository(repository), *target) if local or repository is not None else {}
    taken = {name: shape for name, shape in known.items() if name not in given}
    if taken:
        listed = ", ".join(f"{name}:{','.join(map(str, shape))}" for name, shape in taken.items())
        terminal.note(f"Sizes of dynamic axes as in the version's golden sample: {listed} (--shape changes them)")
    return {**taken, **given}


def server_of(url: str | None, repository: str | None, protocol: str | None) -> tuple[str, str | None]:
    """Return the URL to load, and the metrics' URL when it is a server of ours."""
    from repo_manager.server import running_server
    from repo_manager.settings import load_settings

    chosen = url or load_settings().server
    if chosen is not None:
        return chosen, None
    root = resolve_repository(repository)
    running = running_server(root)
    if running is None:
        raise ServerUnreachableError(
            f"No server runs on {root}", hint="Start one with repo-manager serve, or deploy a model, or pass --url."
        )
    return (running.http_url if protocol == "http" else running.grpc_url), running.metrics_url
