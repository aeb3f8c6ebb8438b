"""Load on a served model: loadtest."""

from __future__ import annotations

import contextlib
import datetime
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repo_manager.cli.connection import Connection, client_options, connecting
from repo_manager.cli.default_group import DefaultGroup
from repo_manager.cli.load_merge import merge
from repo_manager.cli.load_output import Over, Reports, Slo, raise_for, show_report, split_gates
from repo_manager.cli.options import (
    JsonOutput,
    Quiet,
    Repository,
    parse_shapes,
    parse_target,
    resolve_repository,
)
from repo_manager.errors import (
    ServerUnreachableError,
    UsageError,
)

if TYPE_CHECKING:
    from repo_manager.loadtest import Gate, LoadTestOptions, LoadTestReport, Verdict
    from repo_manager.report.terminal import Terminal

__all__ = ["register", "server_of", "shapes_of"]

_INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    group = typer.Typer(cls=DefaultGroup, rich_markup_mode=None, help=loadtest.__doc__)
    group.command("run")(connecting(loadtest))
    group.command("merge")(merge)
    app.add_typer(group, name="loadtest")


def loadtest(
    target: Annotated[
        str,
        typer.Argument(
            metavar="NAME[:VERSION]", help="The served model; or: merge FILES..., see its --help.", show_default=False
        ),
    ],
    connection: Connection,
    url: Annotated[
        str | None,
        typer.Option("--url", "--to", metavar="URL", help="grpc(s):// or http(s)://host:port [default: serve's]."),
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
    burst_size: Annotated[int, typer.Option("--burst-size", min=1, help="Requests at once, of --arrival burst.")] = 10,
    ramp_from: Annotated[
        float, typer.Option("--ramp-from", min=0.0, help="Requests a second at which --arrival ramp begins.")
    ] = 0.0,
    replay: Annotated[Path | None, typer.Option("--replay", help="JSON or CSV file of recorded send times.")] = None,
    until: Annotated[
        str | None,
        typer.Option(
            "--until", metavar="saturation", help="Double the concurrency until throughput rises by less than 5 %."
        ),
    ] = None,
    protocol: Annotated[str | None, typer.Option("--protocol", help="grpc or http [default: the URL's].")] = None,
    client: Annotated[str, typer.Option("--client", help="native or perf_analyzer.")] = "native",
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Samples in a request.")] = 1,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="NAME:SIZES", help="Sizes of dynamic axes, without the batch."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--input-data", help=".npz, .npy, perf_analyzer JSON, an image or a folder [default: random]."),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image", metavar="KEY=VALUE", help="Of images: resize, color, scale, mean, std, layout (repeatable)."
        ),
    ] = None,
    distinct: Annotated[
        int, typer.Option("--distinct", min=1, help="Different random requests, sent in rotation.")
    ] = 64,
    shared_memory: Annotated[
        str, typer.Option("--shared-memory", help="system: inputs in POSIX shared memory; the server is local.")
    ] = "none",
    warmup: Annotated[float, typer.Option("--warmup", min=0.0, help="Seconds of load before each measurement.")] = 1.0,
    duration: Annotated[
        float | None, typer.Option("--duration", min=0.1, help="Seconds per level [default: until stable].")
    ] = None,
    request_count: Annotated[
        int | None, typer.Option("--request-count", min=1, help="Requests per level instead.")
    ] = None,
    window: Annotated[
        float, typer.Option("--window", min=0.1, help="Seconds of a measuring window; three have to agree.")
    ] = 1.0,
    stability: Annotated[
        float, typer.Option("--stability", min=0.1, help="Percent by which agreeing windows may differ.")
    ] = 10.0,
    slo: Slo = None,
    over: Over = "every",
    seed: Annotated[int, typer.Option("--seed", help="Of the random inputs and arrivals.")] = 0,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", metavar="FILE.json", help="An earlier JSON report: fail on a regression."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0.0, help="Percent that may be lost against --baseline.")
    ] = 5.0,
    allow_zeros: Annotated[bool, typer.Option("--allow-zeros", help="Accept input data that is all zeros.")] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes of the native client [default: one per 4 CPUs].")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics-url", metavar="URL", help="Triton's metrics [default: port 8002 of the host]."),
    ] = None,
    start_at: Annotated[
        str | None,
        typer.Option("--start-at", metavar="TIME", help="Begin at this moment: Unix seconds or ISO 8601 with a zone."),
    ] = None,
    report: Reports = None,
    json: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Measure latency, throughput, errors and server times of a served model; gates decide the exit code.

    Exit code 4 when a gate fails, 5 when the server failed at a level, 6 when the measurement decides neither way.
    Ctrl-C shows what was measured until then. Reports of several machines: repo-manager loadtest merge FILES...
    """
    from repo_manager.loadtest import LoadTestOptions, parse_levels, parse_rates, parse_slo, read_report
    from repo_manager.report.load_files import check_report_path
    from repo_manager.report.terminal import Terminal

    terminal = Terminal(as_json=json, quiet=quiet)
    gates = tuple(parse_slo(text) for text in split_gates(slo))
    name, version = parse_target(target)
    where, metrics_url = server_of(url, repository, protocol)
    if until not in (None, "saturation"):
        raise UsageError(f"--until {until}: expected saturation")
    has_level = concurrency or rate or replay or until
    options = LoadTestOptions(
        url=where,
        model=name,
        version=version,
        protocol=protocol,
        concurrency=parse_levels(concurrency or "1:16") if concurrency or not has_level else (),
        rate=parse_rates(rate) if rate else (),
        arrival=arrival,
        burst_size=burst_size,
        ramp_from_per_s=ramp_from,
        replay=replay,
        until_saturation=until is not None,
        batch_size=batch_size,
        shapes=shapes_of(terminal, shape, (name, version), repository, local=metrics_url is not None),
        data=data,
        distinct=distinct,
        seed=seed,
        window_s=window,
        stability=stability / 100,
        warmup_s=warmup,
        duration_s=duration,
        request_count=request_count,
        client=client,
        allow_zeros=allow_zeros,
        workers=workers,
        metrics_url=metrics or metrics_url,
        access=client_options(connection, [where]),
        shared_memory=shared_memory,
        image=_image_options(image),
        start_at=_moment(start_at),
        command=shlex.join(["repo-manager", *sys.argv[1:]]),
    )
    earlier = None if baseline is None else (read_report(baseline), tolerance / 100)
    _run(terminal, options, (gates, over, earlier), tuple(check_report_path(path) for path in report or ()))


def _run(
    terminal: Terminal,
    options: LoadTestOptions,
    judging: tuple[tuple[Gate, ...], str, tuple[LoadTestReport, float] | None],
    files: tuple[Path, ...],
) -> None:
    from repo_manager.loadtest import LoadTestInterrupted, combine_verdicts, judge, judge_against, run_load_test
    from repo_manager.report.load_live import load_progress

    gates, over, earlier = judging
    is_interrupted = False
    try:
        with load_progress(terminal.progress_console, quiet=terminal.quiet) as progress:
            report = run_load_test(options, progress=progress)
    except LoadTestInterrupted as exc:
        report, is_interrupted = exc.report, True
    verdicts: list[Verdict] = []
    if gates and not is_interrupted:
        verdicts.append(judge(report, gates, over=over))
    if earlier is not None and not is_interrupted:
        baseline, tolerance = earlier
        verdicts.append(judge_against(report, baseline, tolerance=tolerance))
    verdict = combine_verdicts(verdicts)
    show_report(terminal, report, verdict, files)
    if is_interrupted:
        raise typer.Exit(_INTERRUPTED)
    raise_for(report, verdict)


def _image_options(texts: list[str] | None) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts or []]
    if any(not mark for _, mark, _ in pairs):
        raise UsageError(f"--image {texts}: expected KEY=VALUE", hint="For instance --image mean=0.485,0.456,0.406.")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _moment(text: str | None) -> float | None:
    """Read a moment: Unix seconds, or ISO 8601 with a time zone."""
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        return float(text)
    try:
        moment = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise UsageError(f"--start-at {text}: expected Unix seconds or ISO 8601 with a zone, as 2026-01-31T12:00:00Z")
    return moment.timestamp()


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
