"""Drives the real perf_analyzer: one process a load level, its CSV into the same `LoadPoint`.

In a sweep, perf_analyzer ends at the first unstable level, and exits with 0 unless that level was the first. With one
process per level, its exit code (0, 2 unstable, 3 options, 99) or a missing row is the level's outcome.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repo_manager.errors import MissingDependencyError, ServerUnreachableError, UsageError
from repo_manager.files import reason_of, work_folder
from repo_manager.loadtest.inputs.samples import drawn_note, make_samples, resolve_shapes
from repo_manager.loadtest.measure import Level
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.perf_analyzer.install import PerfAnalyzer, cached_perf_analyzer
from repo_manager.loadtest.result import ClientUse, Latency, LoadPoint, ServerTimes
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.loadtest.wire.sequences import DEFAULT_LENGTH
from repo_manager.request_data.read import write_rows
from repo_manager.request_data.tensors import InputFacts
from repo_manager.stats.quantiles import PERCENTILES

__all__ = ["command_of", "find_perf_analyzer", "parse_csv", "parse_profile_export", "run_perf_analyzer"]

_STUB_BYTES = 100_000
_EXPORTED_ELEMENTS = 1024  # elements: the export repeats all inputs, so images would take minutes and gigabytes
_DRAWN_ELEMENTS = 1 << 20  # elements of all samples together: perf_analyzer reads them as text
_REQUEST_COUNT = re.compile(r"^\s*Request count: (\d+)", re.M)
_KILL_AFTER_S = 60.0
# Over HTTP, it uses one thread per request. Too many starve the measuring thread (2.50: from 8 on 2 CPUs).
_THREADS_PER_CPU = 2
_UNSTABLE_EXIT, _OPTION_EXIT = 2, 3
# Printed before a level is measured. The exit code for wrong options also means: no request finished in time.
_MEASURED = re.compile(r"^\s*Request (?:concurrency|rate): ", re.M | re.I)


def find_perf_analyzer(cache: Path | None = None) -> PerfAnalyzer:
    """Return the binary on PATH (a working one, not pip's stub) or in `cache` (`None`: the user's cache).

    The libraries of one on PATH may be in a folder `lib` beside it, also where PATH has a link to it.

    Raises:
        MissingDependencyError: neither has one.
    """
    on_path = shutil.which("perf_analyzer")
    why = ""
    if on_path is not None and Path(on_path).stat().st_size <= _STUB_BYTES:
        why = f"{on_path} is the empty stub that pip installs where glibc is old; "
    elif on_path is not None:
        beside = Path(on_path).resolve().parent / "lib"
        found = PerfAnalyzer(Path(on_path), beside if beside.is_dir() else None)
        lacks = found.lacks()
        if not lacks:
            return found
        why = f"{on_path} does not start: {lacks}; "
    cached = cached_perf_analyzer(cache)
    if cached is not None:
        return cached
    raise MissingDependencyError(
        f"{why}no perf_analyzer was found on PATH or in the user's cache",
        hint="Fetch it with: repo-manager doctor --install-perf-analyzer, or use --client native.",
    )


def command_of(binary: Path, level: Level, facts: ServedModelFacts, options: LoadTestOptions, files: Path) -> list[str]:
    """Return the command line of one level. Results go to `files`/result.csv and `files`/profile.json.

    Args:
        binary: path of the perf_analyzer binary.
        level: the load: requests in flight, or a rate.
        facts: the model's inputs, outputs and limits, as the server reports them.
        options: settings of the load test.
        files: folder perf_analyzer is to write both results to.

    Raises:
        UsageError: the options are beyond perf_analyzer.
    """
    if level.mode == "replay" or level.arrival in ("burst", "ramp"):
        raise UsageError(f"perf_analyzer has no {level.arrival} arrivals", hint="Use --client native.")
    if options.headers:
        raise UsageError(
            "perf_analyzer ignores headers over gRPC, and over HTTP takes them only on its command line, "
            "where every user of the machine can read them",
            hint="Use --client native.",
        )
    host, port = options.address
    address = f"[{host}]:{port}{options.path}" if ":" in host else f"{host}:{port}{options.path}"
    command = [
        str(binary),
        "-m",
        facts.model,
        "-i",
        options.wire,
        "-u",
        f"{'https://' if options.wire == 'http' and options.tls else ''}{address}",
        "-b",
        str(options.batch_size),
    ]
    if options.version is not None:
        command += ["-x", str(options.version)]
    if level.mode == "concurrency":
        command += ["--concurrency-range", f"{level.level:g}"]
        if options.wire == "http" and not facts.sequence and level.level > _THREADS_PER_CPU * (os.cpu_count() or 1):
            command += ["--async"]
    else:
        distribution = "poisson" if level.arrival == "poisson" else "constant"
        command += ["--request-rate-range", f"{level.level:g}", "--request-distribution", distribution]
    command += _kind_arguments(facts, options, is_open=level.mode != "concurrency")
    command += _input_arguments(facts, options)
    if options.shared_memory != "none":
        command += ["--shared-memory", options.shared_memory]
    command += _tls_arguments(options)
    if options.request_count is not None:
        command += ["--request-count", str(options.request_count)]
    else:
        window_s = options.window_s if options.duration_s is None else options.duration_s / 3
        command += ["-p", str(max(round(window_s * 1000), 1)), "-s", f"{options.stability * 100:g}"]
        command += ["-r", str(max(options.max_windows, 3))]
    command += ["-f", str(files / "result.csv"), "--verbose-csv"]
    if sum(math.prod(item.shape) for item in _sized(facts, options)) <= _EXPORTED_ELEMENTS:
        command += ["--profile-export-file", str(files / "profile.json")]
    return command


def _kind_arguments(facts: ServedModelFacts, options: LoadTestOptions, *, is_open: bool) -> list[str]:
    """Return the arguments for sequences, streams of responses and request parameters."""
    arguments: list[str] = []
    if facts.sequence:
        low, _, high = (options.sequence_length or DEFAULT_LENGTH).rpartition(":")
        if low == "mean":
            raise UsageError("perf_analyzer draws lengths of sequences evenly", hint="Give --sequence-length 10:30.")
        bounds = (int(low or high), int(high))
        mean = sum(bounds) / 2
        arguments += ["--sequence-length", f"{mean:.0f}"]
        arguments += ["--sequence-length-variation", f"{100 * (bounds[1] - mean) / mean:.0f}"]
        arguments += ["--num-of-sequences", str(options.sequences)] if is_open else []
    if facts.decoupled and options.streaming is False:
        raise UsageError("perf_analyzer keeps one stream open for all requests", hint="Use --client native.")
    if facts.decoupled or options.streaming:
        arguments += ["--async", "--streaming"]
    if options.compression != "none":
        if options.wire == "http":
            raise UsageError("perf_analyzer compresses over gRPC only", hint="Use --client native.")
        arguments += ["--grpc-compression-algorithm", options.compression]
    types = {bool: "bool", int: "int", float: "double", str: "string"}
    for name, value in options.parameters.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        arguments += ["--request-parameter", f"{name}:{text}:{types[type(value)]}"]
    return arguments


def _input_arguments(facts: ServedModelFacts, options: LoadTestOptions) -> list[str]:
    """Return the arguments for the inputs."""
    arguments: list[str] = []
    batch = 1 if facts.max_batch_size > 0 else 0
    shapes = {} if options.data is not None else resolve_shapes(facts, options)
    for name, shape in shapes.items():
        if name in options.shapes:
            arguments += ["--shape", f"{name}:{_joined(shape[batch:])}"]
    if (
        options.data is not None and facts.sequence
    ):  # otherwise our own file states every row's shape, and --shape must be absent
        arguments += [
            word for name, shape in options.shapes.items() for word in ("--shape", f"{name}:{_joined(shape)}")
        ]
    if options.data is not None:
        if options.data.suffix.lower() != ".json":
            raise UsageError(
                f"perf_analyzer reads JSON input data, not {options.data.name}", hint="Use --client native."
            )
        arguments += ["--input-data", str(options.data)]
    return arguments


def _joined(shape: Sequence[int]) -> str:
    return ",".join(map(str, shape))


def _tls_arguments(options: LoadTestOptions) -> list[str]:
    """Return perf_analyzer's own options for an encrypted connection."""
    files = options.tls
    if files is None:
        return []
    names = {
        "grpc": ("--ssl-grpc-root-certifications-file", "--ssl-grpc-certificate-chain-file",
                 "--ssl-grpc-private-key-file"),
        "http": ("--ssl-https-ca-certificates-file", "--ssl-https-client-certificate-file",
                 "--ssl-https-private-key-file"),
    }[options.wire]  # fmt: skip
    if files.server_name is not None:
        raise UsageError("perf_analyzer takes no other name of the server than the URL's", hint="Use --client native.")
    paths = (files.root_certificates, files.client_certificate, files.client_key)
    given = [text for name, path in zip(names, paths, strict=True) if path is not None for text in (name, str(path))]
    return (["--ssl-grpc-use-ssl"] if options.wire == "grpc" else []) + given


def _sized(facts: ServedModelFacts, options: LoadTestOptions) -> list[InputFacts]:
    """Return the inputs with the sizes of a request. A dimension known only to the data file counts as large."""
    return [
        dataclasses.replace(
            item,
            shape=tuple(
                size if size > 0 else _EXPORTED_ELEMENTS + 1
                for size in (*options.shapes.get(item.name, item.shape), options.batch_size)
            ),
        )
        for item in facts.inputs
    ]


def run_perf_analyzer(perf: PerfAnalyzer, level: Level, facts: ServedModelFacts, options: LoadTestOptions) -> LoadPoint:
    """Run one level, as `command_of` writes it, and return its row in any case.

    Raises:
        UsageError: the options are beyond perf_analyzer, or it rejected them.
        ServerUnreachableError: it reached no server.
    """
    with work_folder("repo-manager-perf-analyzer-") as folder:
        files = Path(folder)
        command = command_of(perf.binary, level, facts, _with_inputs_file(facts, options, files), files)
        limit_s = (
            options.window_s * options.max_windows + (options.duration_s or 0.0) + options.timeout_s + _KILL_AFTER_S
        )
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                env=perf.environment(),
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return _failed(level, options, f"perf_analyzer did not end within {limit_s:.0f} s and was stopped")
        except OSError as exc:
            raise MissingDependencyError(f"{perf.binary} cannot be run: {reason_of(exc)}") from exc
        text = f"{done.stdout}\n{done.stderr}".strip()
        rows = parse_csv(_read(files / "result.csv"))
        profile = parse_profile_export(_read(files / "profile.json"))
    return _point(level, options, done.returncode, (text, rows, profile))


def _with_inputs_file(facts: ServedModelFacts, options: LoadTestOptions, folder: Path) -> LoadTestOptions:
    """Write the inputs as its JSON: a file's samples, read and checked as for the native client, or drawn integers.

    Drawn where integers have ranges of their own: perf_analyzer draws from the whole type. A sequence model's file is
    left to it, with its streams. A recorded sequence is one stream.
    """
    is_drawn = options.data is None and not options.recorded
    if (facts.sequence and not options.recorded) or (is_drawn and drawn_note(facts, options) is None):
        return options
    single = dataclasses.replace(options, batch_size=1)
    if is_drawn:
        elements = sum(math.prod(shape) for shape in resolve_shapes(facts, single).values())
        count = max(1, min(options.distinct, _DRAWN_ELEMENTS // max(elements, 1)))
        single = dataclasses.replace(single, distinct=count)
    rows = make_samples(facts, single)
    if facts.max_batch_size > 0:
        rows = [{name: array[0] for name, array in row.items()} for row in rows]
    path = folder / "inputs.json"
    write_rows(path, rows, as_stream=facts.sequence)
    return dataclasses.replace(options, data=path)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _point(
    level: Level, options: LoadTestOptions, code: int, found: tuple[str, list[dict[str, float]], dict[str, float]]
) -> LoadPoint:
    text, rows, profile = found
    tail = " | ".join(line.strip() for line in text.splitlines()[-4:] if line.strip())[:400]
    if "error while loading shared libraries" in text:
        raise MissingDependencyError(
            f"perf_analyzer lacks a library: {tail}",
            hint="Install it again: repo-manager doctor --install-perf-analyzer.",
        )
    if code == _OPTION_EXIT and _MEASURED.search(text) is None:
        raise UsageError(f"perf_analyzer rejected its options: {tail}")
    if "failed to connect" in text.lower() or "connection refused" in text.lower():
        raise ServerUnreachableError(f"perf_analyzer reached no server at {options.url}: {tail}")
    if not rows and code == _UNSTABLE_EXIT:
        return _failed(
            level,
            options,
            f"perf_analyzer found no stable measurement (exit code 2) and gives no numbers: {tail}",
            "unstable",
        )
    if not rows:
        outcome = "over_limit" if code == 0 else "failed"
        return _failed(level, options, f"perf_analyzer wrote no row (exit code {code}): {tail}", outcome)
    row = rows[-1]
    outcome = "stable" if code == 0 else "unstable"
    counted = _REQUEST_COUNT.search(text)
    if not profile and counted is not None:
        requests, rate = float(counted.group(1)), row["Inferences/Second"]
        profile = {"requests": requests, "duration_s": requests * options.batch_size / rate if rate else 0.0}
    return LoadPoint(
        mode=level.mode,
        level=level.level,
        outcome=outcome,
        reason=f"perf_analyzer's own rule (exit code {code})",
        batch_size=options.batch_size,
        client=ClientUse("perf_analyzer", note="it reports neither its CPU use nor its lateness"),
        arrival=level.arrival,
        duration_s=profile.get("duration_s", 0.0),
        requests=int(profile.get("requests", 0)),
        throughput_per_s=row["Inferences/Second"],
        latency=_latency(row),
        server=_server(row, profile),
    )


def _failed(level: Level, options: LoadTestOptions, reason: str, outcome: str = "failed") -> LoadPoint:
    return LoadPoint(
        level.mode, level.level, outcome, reason, options.batch_size, ClientUse("perf_analyzer"), level.arrival
    )


def _ns(row: Mapping[str, float], column: str) -> int | None:
    value = row.get(column)
    return None if value is None else round(value * 1e3)


def _latency(row: Mapping[str, float]) -> Latency:
    return Latency(
        mean_ns=_ns(row, "Avg latency"),
        **{percentile.field: _ns(row, f"{percentile.key} latency") for percentile in PERCENTILES},
    )


def _server(row: Mapping[str, float], profile: Mapping[str, float]) -> ServerTimes:
    return ServerTimes(
        requests=int(profile.get("requests", 0)),
        inferences=0,
        executions=0,
        failures=0,
        cache_hits=0,
        queue_ns=_ns(row, "Server Queue"),
        compute_input_ns=_ns(row, "Server Compute Input"),
        compute_infer_ns=_ns(row, "Server Compute Infer"),
        compute_output_ns=_ns(row, "Server Compute Output"),
        mean_batch=None,
        batches={},
    )


def parse_csv(text: str) -> list[dict[str, float]]:
    """Return the rows of a perf_analyzer CSV (microseconds), by column. Cells without numbers are left out.

    Columns differ between versions and models, so they are found by name. GPU cells (`GPU-...:12`) are left out.
    """
    rows: list[dict[str, float]] = []
    for record in csv.DictReader(text.splitlines()):
        row: dict[str, float] = {}
        for name, cell in record.items():
            try:
                row[(name or "").strip()] = float(cell)
            except (TypeError, ValueError):
                continue
        if "Inferences/Second" in row:
            rows.append(row)
    return rows


def parse_profile_export(text: str) -> dict[str, float]:
    """Return `requests` and `duration_s` of a profile export, empty when there is none.

    The export holds every request of the run. The ones inside the last three windows made the row.
    """
    try:
        experiments: list[dict[str, Any]] = json.loads(text).get("experiments", []) if text else []
    except (ValueError, RecursionError):
        return {}
    if not experiments:
        return {}
    requests = experiments[-1].get("requests", [])
    bounds = [int(moment) for moment in experiments[-1].get("window_boundaries", [])]
    answers = [int(request["response_timestamps"][-1]) for request in requests if request.get("response_timestamps")]
    if len(bounds) >= 2:
        low, high = bounds[max(len(bounds) - 4, 0)], bounds[-1]
    elif answers:
        low, high = min(int(request["timestamp"]) for request in requests), max(answers)
    else:
        return {}
    inside = sum(low <= answer <= high for answer in answers)
    return {"requests": float(inside), "duration_s": (high - low) / 1e9}
