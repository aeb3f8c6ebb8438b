"""Options of load on a server, for `loadtest` and `compare`: the server, the data, the model's sizes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from repo_manager.cli.connection import ConnectionFlags, client_options
from repo_manager.cli.durations import seconds_option
from repo_manager.cli.option_groups import option, settings_of
from repo_manager.cli.options import parse_named_version, parse_shapes, writing
from repo_manager.cli.repository_options import RepositoryFlag, resolve_repository
from repo_manager.errors import (
    GateError,
    InconclusiveError,
    RepositoryError,
    ServerRefusedError,
    ServerUnreachableError,
    UsageError,
)
from repo_manager.files import write_atomic
from repo_manager.gates import Gate, Verdict
from repo_manager.loadtest.judge import Over, judge, parse_slo
from repo_manager.loadtest.options import Compression, LoadTestOptions, Parameter, Protocol, SharedMemory
from repo_manager.loadtest.result import LoadTestReport
from repo_manager.loadtest.served_model import DEPLOY_FIRST
from repo_manager.pipeline.load_inputs import KnownInputs, known_inputs
from repo_manager.report.load_files import check_report_path, report_text
from repo_manager.report.load_tables import load_view, verdict_view
from repo_manager.report.terminal import Terminal, next_command
from repo_manager.repository.scan import scan
from repo_manager.server.records import running_server
from repo_manager.settings import load_settings
from repo_manager.types import as_json

__all__ = ["DataFlags", "GateFlags", "Load", "ServerFlags", "advice_for", "raise_for", "show_report"]


@dataclasses.dataclass(frozen=True)
class ServerFlags:
    """The server under load."""

    url: str | None = option(
        "--url", "--to", metavar="URL", help="grpc(s):// or http(s)://host:port [default: the running serve]."
    )
    protocol: Protocol | None = option(
        "--protocol", sets=(LoadTestOptions, "protocol"), help="Protocol of the server [default: the URL's]."
    )
    timeout: float = seconds_option(
        "--timeout",
        sets=(LoadTestOptions, "timeout_s"),
        help="A request without an answer for this long is an error.",
    )


def _only(files: list[Path] | None) -> Path | None:
    """Return the one file of requests.

    Raises:
        UsageError: there are several; the last would silently be the only one.
    """
    if files and len(files) > 1:
        given = ", ".join(map(str, files))
        raise UsageError(f"--input-data is given {len(files)} times: {given}", hint="Join the files to one.")
    return files[0] if files else None


@dataclasses.dataclass(frozen=True)
class DataFlags:
    """Content of the requests."""

    PANEL: ClassVar[str] = "Data"
    shape: list[str] | None = option(
        "--shape", metavar="NAME:SIZES", help="Sizes of dynamic axes, without the batch (may be given often)."
    )
    data_files: list[Path] | None = option(
        "--input-data",
        metavar="PATH",
        sets=(LoadTestOptions, "data"),
        read=lambda files: _only(files),
        help=".npz, .npy, perf_analyzer JSON, an image or a folder [default: random].",
    )
    parameter: list[str] | None = option(
        "--parameter",
        metavar="KEY=VALUE",
        sets=(LoadTestOptions, "parameters"),
        read=lambda texts: _parameters(texts),
        help="A parameter of each request, such as priority=1 or timeout=50000 (may be given often).",
    )
    compression: Compression = option(
        "--compression",
        sets=(LoadTestOptions, "compression"),
        help="Compression of the requests, and over HTTP also of the answers.",
    )
    golden: bool = option("--golden", default=False, help="Send the version's golden sample.")

    @property
    def data(self) -> Path | None:
        """The file of the requests; `None`: random ones."""
        return _only(self.data_files)

    shared_memory: SharedMemory = option(
        "--shared-memory",
        sets=(LoadTestOptions, "shared_memory"),
        help="system: inputs in POSIX shared memory. cuda: inputs on the GPU. Both need a server on this machine.",
    )
    seed: int = option(
        "--seed", sets=(LoadTestOptions, "seed"), help="Seed of everything random: inputs, arrivals, order."
    )


_RESERVED = ("sequence_id", "sequence_start", "sequence_end", "binary_data_output")


def _parameters(texts: list[str]) -> dict[str, Parameter]:
    """Read KEY=VALUE options. True, false and numbers are read as such.

    Raises:
        UsageError: one has another form, or a name reserved for the library.
    """
    pairs: dict[str, Parameter] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key or key in _RESERVED or key.startswith("triton_"):
            raise UsageError(
                f"--parameter {text}: expected KEY=VALUE, KEY not one of {', '.join(_RESERVED)}, triton_..."
            )
        pairs[key] = _value(value)
    return pairs


def _value(text: str) -> Parameter:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


@dataclasses.dataclass(frozen=True)
class Load:
    """A command's options of load, together."""

    terminal: Terminal
    place: RepositoryFlag
    server: ServerFlags
    data: DataFlags
    connection: ConnectionFlags

    def check(self, named_version: str, own: Mapping[str, Any]) -> None:
        """Check whether the options fit together, before any server is contacted.

        Args:
            named_version: the model to load, as `NAME` or `NAME:VERSION`.
            own: the settings of the command's own options.

        Raises:
            UsageError: they do not.
        """
        name, _ = parse_named_version(named_version)
        parse_shapes(self.data.shape)
        url = self.server.url or ("http://localhost:1" if self.server.protocol == "http" else "grpc://localhost:1")
        LoadTestOptions(**{**settings_of(LoadTestOptions, self.server, self.data), **own, "url": url, "model": name})

    def settings(self, named_version: str, url: str | None, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the settings of `LoadTestOptions` for a model on a server.

        Args:
            named_version: the model to load, as `NAME` or `NAME:VERSION`.
            url: the server. `None`: the settings' one, else the running `serve`.
            own: the settings of the command's own options. `None`: it has none.

        Raises:
            UsageError: a text has another form.
            ServerUnreachableError: there is no server.
        """
        name, version = parse_named_version(named_version)
        where, metrics_url = _server_of(url, self.place.repository, self.server.protocol)
        is_here = metrics_url is not None or self.place.repository is not None
        known = known_inputs(self.place.root(), name, version) if is_here else KnownInputs()
        return {
            **settings_of(LoadTestOptions, self.server, self.data),
            "url": where,
            "model": name,
            "version": version,
            "metrics_url": metrics_url,
            "shapes": self._shapes(known),
            "int_ranges": known.ranges,
            "recorded": self._recorded(known, own),
            "fallback": known.golden,
            "access": client_options(self.connection, [where]),
        }

    def _recorded(self, known: KnownInputs, own: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], ...]:
        """Return the golden sample's requests if the options ask for them, or if random requests would mean nothing.

        Raises:
            UsageError: the options ask for them, but the version has none or other data is given.
        """
        if self.data.golden and self.data.data is not None:
            raise UsageError("both --golden and --input-data are given", hint="Give one of them.")
        if self.data.golden and not known.golden:
            raise UsageError(
                "--golden: no golden sample of the model is known here",
                hint="The version's repository keeps it: name the repository with -r. Or give --input-data.",
            )
        is_left_open = self.data.data is None and not self.data.shape and (own or {}).get("sequence_length") is None
        if not self.data.golden and (not known.why_golden or not is_left_open):
            return ()
        if not self.data.golden:
            self.terminal.note(
                f"The requests are the version's golden sample: {known.why_golden} (--input-data changes it)"
            )
        return known.golden

    def _shapes(self, known: KnownInputs) -> dict[str, tuple[int, ...]]:
        """Return the sizes given, and for a model of our own repository those of its golden sample for the rest."""
        given = parse_shapes(self.data.shape)
        taken = {name: shape for name, shape in known.shapes.items() if name not in given}
        if taken:
            listed = ", ".join(f"{name}:{','.join(map(str, shape))}" for name, shape in taken.items())
            self.terminal.note(
                f"Sizes of dynamic axes as in the version's golden sample: {listed} (--shape changes them)"
            )
        return {**taken, **given}


@contextlib.contextmanager
def advice_for(place: RepositoryFlag, *named_versions: str) -> Iterator[None]:
    """Advise to deploy a model not served only where the repository has it.

    Args:
        place: the repository. The server may serve another one.
        named_versions: NAME or NAME:VERSION of each model asked for.
    """
    try:
        yield
    except ServerRefusedError as exc:
        if not (exc.hint or "").startswith(DEPLOY_FIRST):
            raise
        try:
            root = place.root()
            there = {entry.name for entry in scan(root, deep=False)}
        except RepositoryError:
            raise exc from None
        lacking = [
            name for name in dict.fromkeys(each.partition(":")[0] for each in named_versions) if name not in there
        ]
        if not lacking:
            raise
        what = next_command("list", repository=place.repository)
        raise ServerRefusedError(
            exc.message, hint=f"{root} has no model {' or '.join(map(repr, lacking))}. What it has: {what}"
        ) from exc


def _server_of(url: str | None, repository: str | None, protocol: str | None) -> tuple[str, str | None]:
    """Return the URL to load, and the metrics' URL when it is a server of ours."""
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


# Options and output shared by `loadtest` and `loadtest merge`: gates, files, the result, its exit code.


@dataclasses.dataclass(frozen=True)
class GateFlags:
    """Gates of the exit code, and files of the report."""

    PANEL: ClassVar[str] = "Gates and reports"
    slo: list[str] | None = option(
        "--slo", metavar="GATE", help='"p99<20ms", "throughput>500", "errors<0.1%" (may be given often).'
    )
    over: Over = option(
        "--slo-over",
        sets=(judge, "over"),
        help="every: all levels must pass. some: one level that passes every gate is enough.",
    )
    report: list[Path] | None = option(
        "--report", metavar="FILE", help="Also .html, .json, .md, .xml (JUnit) or .prom (may be given often)."
    )

    def gates(self) -> tuple[Gate, ...]:
        """Return the gates. Several may be in one text, separated by commas.

        Raises:
            UsageError: one cannot be read.
        """
        parts = (part.strip() for text in self.slo or [] for part in text.split(","))
        return tuple(parse_slo(part) for part in parts if part)

    def files(self) -> tuple[Path, ...]:
        """Return the files of the report.

        Raises:
            UsageError: an ending is none of a report.
        """
        return tuple(check_report_path(path) for path in self.report or ())

    def judge(self, report: LoadTestReport) -> Verdict:
        """Judge a report by the gates."""
        return judge(report, self.gates(), **settings_of(judge, self))


def show_report(terminal: Terminal, report: LoadTestReport, verdict: Verdict | None, files: tuple[Path, ...]) -> None:
    """Write the report's files and print it, each with the verdict.

    Args:
        terminal: the terminal to print the report.
        report: result of a load test, with a point per level.
        verdict: the outcome of its gates. `None`: no gate was given.
        files: files to write. Each file's ending chooses its format.
    """
    for path in files:
        with writing(path):
            write_atomic(path, report_text(path, report, verdict).encode())
        terminal.note(f"Report: {path}")
    views = [] if verdict is None else verdict_view(verdict)
    terminal.result({**as_json(report), "verdict": as_json(verdict)}, *load_view(report), *views)


def raise_for(report: LoadTestReport, verdict: Verdict | None) -> None:
    """Turn the shown result into an exit code: the server's failure first, then the gates.

    Args:
        report: result of a load test, with a point per level.
        verdict: the outcome of its gates. `None`: no gate was given.

    Raises:
        ServerRefusedError: a level failed.
        GateError: a gate failed.
        InconclusiveError: a gate is neither passed nor failed.
    """
    failed = [point.label for point in report.points if point.outcome == "failed"]
    if len(failed) == len(report.points):
        raise ServerRefusedError("No load level could be measured", hint="See the reasons above.", is_shown=True)
    if failed:
        raise ServerRefusedError(
            f"{len(failed)} of {len(report.points)} load levels failed: {', '.join(failed)}",
            hint="See the reasons above.",
            is_shown=True,
        )
    outcome = None if verdict is None else str(verdict.outcome)
    if outcome == "fail":
        raise GateError("A gate failed", hint="The gates in the result say which, and why.", is_shown=True)
    if outcome == "inconclusive":
        raise InconclusiveError(
            "The measurement does not decide",
            hint="The result says why: measure longer (--duration), or on a quieter machine.",
            is_shown=True,
        )
