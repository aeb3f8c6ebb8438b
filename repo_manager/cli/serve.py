"""The embedded server: serve, logs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import typer

from repo_manager.cli.durations import seconds_option
from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import Output
from repo_manager.cli.repository_options import RepositoryFlag, model_names
from repo_manager.errors import UsageError
from repo_manager.optional import deferred
from repo_manager.pipeline.background import follow_log, handed_over, log_of, start_detached, stop_running
from repo_manager.pipeline.serve_options import ServeOptions, check_models
from repo_manager.pipeline.serving import serve_until_ended
from repo_manager.report.terminal import Terminal
from repo_manager.repository.location import Location
from repo_manager.repository.scan import scan
from repo_manager.server.command import ServerSecurity
from repo_manager.server.credentials import read_headers
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.settings import load_settings

if TYPE_CHECKING:
    from repo_manager.report import machine_tables
else:
    machine_tables = deferred("repo_manager.report.machine_tables")  # imports rich: deferred until the server starts

__all__ = ["app"]

app = typer.Typer()


# The `--json` output of commands without a result of their own.


@dataclasses.dataclass(frozen=True)
class ReadyServer:
    """A ready server in the foreground.

    Attributes:
        http_url: `http://host:port`, with the port taken if none was chosen.
        grpc_url: `grpc://host:port`, with TLS `grpcs://host:port`.
        metrics_url: `http://host:port/metrics`, without TLS in any case.
        pid: the process ID of tritonserver.
        log: file with tritonserver's log, from its start on.
        failures: model not loaded at the start -> Triton's reason.
    """

    http_url: str
    grpc_url: str
    metrics_url: str
    pid: int
    log: Path
    failures: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class ShownLog:
    """The end of a server's log.

    Attributes:
        log: file with the log: of the running server, else of the last one.
        lines: its last lines, oldest first.
    """

    log: Path
    lines: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ListenFlags:
    """Where the server listens."""

    PANEL: ClassVar[str] = "Listen"
    host: str = option(
        "--host",
        sets=(ServeOptions, "host"),
        help="Address to bind. Any address but the loopback is open to other machines.",
    )
    http_port: int = option(
        "--http-port", sets=(ServeOptions, "http_port"), min=0, max=65535, help="0 takes a free port."
    )
    grpc_port: int = option(
        "--grpc-port", sets=(ServeOptions, "grpc_port"), min=0, max=65535, help="0 takes a free port."
    )
    metrics_port: int = option(
        "--metrics-port", sets=(ServeOptions, "metrics_port"), min=0, max=65535, help="0 takes a free port."
    )


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """The models to load, and the way the server runs."""

    load: list[str] | None = option(
        "--load",
        metavar="NAME",
        sets=(ServeOptions, "load"),
        help="Models to load: names, or all, deployed or none (may be given often) [default: deployed].",
        autocompletion=model_names,
    )
    detach: bool = option("--detach", default=False, help="Run in the background, and return when the server is ready.")
    stop: bool = option("--stop", default=False, help="Stop the running serve of the repository.")
    auto_complete: bool | None = option(
        "--auto-complete/--no-auto-complete",
        metavar="",
        sets=(ServeOptions, "auto_complete"),
        help="Let Triton complete config.pbtxt files, which takes a second per load [default: if one needs it].",
        show_default=False,
    )
    restart: Literal["no", "on-failure"] = option(
        "--restart",
        sets=(ServeOptions, "restart"),
        read=lambda text: text == "on-failure",
        show=lambda restart: "on-failure" if restart else "no",
        help="Restart a failed server.",
    )
    timeout: float = seconds_option(
        "--timeout",
        sets=(ServeOptions, "timeout_s"),
        help="Time until the server must be ready. With --stop: time until it must be gone; it is killed shortly "
        "before.",
    )
    rate_limiter: bool = option(
        "--rate-limiter",
        sets=(ServeOptions, "rate_limiter"),
        help="Apply the rate_limiter of configurations. Triton ignores it by default.",
    )
    cache_bytes: int = option(
        "--cache-bytes",
        metavar="BYTES",
        sets=(ServeOptions, "cache_bytes"),
        min=0,
        help="Size of the response cache, for models that use it. 0: no cache.",
    )
    verbosity: int = option(
        "--verbosity",
        sets=(ServeOptions, "verbosity"),
        min=0,
        max=9,
        help="How much Triton logs of each request.",
    )
    options_from_stdin: bool = option("--options-from-stdin", default=False, hidden=True, help="For --detach.")


@dataclasses.dataclass(frozen=True)
class SecurityFlags:
    """Who may talk to the server."""

    PANEL: ClassVar[str] = "Security"
    tls_cert: Path | None = option(
        "--tls-cert",
        metavar="FILE.pem",
        sets=(ServerSecurity, "certificate"),
        help="Certificate for gRPC over TLS. HTTP then stays on the loopback.",
    )
    tls_key: Path | None = option(
        "--tls-key", metavar="FILE.pem", sets=(ServerSecurity, "key"), help="The key of --tls-cert."
    )
    tls_client_ca: Path | None = option(
        "--tls-client-ca",
        metavar="FILE.pem",
        sets=(ServerSecurity, "client_authority"),
        help="Require client certificates of this authority.",
    )
    restrict_file: Path | None = option(
        "--restrict-file",
        default=None,
        metavar="FILE",
        help="A file with one `Name: value`: the server refuses to load, unload or change models without this header.",
    )

    pass_env: list[str] | None = option(
        "--pass-env",
        metavar="NAME",
        sets=(ServeOptions, "pass_env"),
        help="An environment variable to pass to the models' code (may be given often).",
    )
    open_control: bool = option(
        "--open-control",
        sets=(ServerSecurity, "open_control"),
        help="Let everyone who can reach the server load, unload and change models, without a key.",
    )

    def security(self) -> ServerSecurity:
        """Return it with the file's content.

        Raises:
            UsageError: the file does not hold one header.
        """
        headers = {} if self.restrict_file is None else read_headers(self.restrict_file)
        if self.restrict_file is not None and len(headers) != 1:
            raise UsageError(f"{self.restrict_file}: expected one header, found {len(headers)}")
        restricted = next(iter(headers.items()), None)
        return ServerSecurity(**settings_of(ServerSecurity, self), restricted=restricted)


@app.command("serve")
@grouped
def serve_command(
    *, place: RepositoryFlag, flags: RunFlags, listen: ListenFlags, security: SecurityFlags, output: Output
) -> None:
    """Run the embedded Triton on a repository until interrupted, in explicit model-control mode.

    The server's log after it is ready goes to stderr. `repo-manager logs` shows all. Loaded at the start: the models
    deployed before.
    """
    terminal = output.terminal()
    root = place.root()
    if flags.stop:
        stopped = stop_running(root, timeout_s=flags.timeout, report=terminal.note)
        text = f"No server runs on {root}." if stopped is None else f"Stopped the server of {root} (pid {stopped.pid})."
        terminal.result({"stopped": stopped}, text)
        return
    options = handed_over() if flags.options_from_stdin else _options(root, flags, listen, security)
    check_models(options)
    _warn_if_open(terminal, options.host, options.security)
    if flags.detach:
        running = start_detached(options)
        _warn_of_failures(terminal, root, running.failures)
        terminal.result(running, machine_tables.running_server_view(running))
        return

    def on_ready(server: EmbeddedServer) -> None:
        _show(terminal, options, server)

    log_output = None if output.quiet else sys.stderr
    try:
        serve_until_ended(options, on_ready=on_ready, report=terminal.note, log_output=log_output)
    except KeyboardInterrupt:
        terminal.note(f"Stopped the server of {root}.")
        raise


@dataclasses.dataclass(frozen=True)
class LogFlags:
    """How much of a log is shown."""

    lines: int = option(
        "--lines",
        "-n",
        metavar="N",
        sets=(follow_log, "lines"),
        min=0,
        help="Number of last lines to show; 0: all.",
    )
    follow: bool = option("--follow", "-f", default=False, help="Follow the log until the server ends.")


@app.command("logs")
@grouped
def logs_command(*, place: RepositoryFlag, flags: LogFlags, output: Output) -> None:
    """Show the log of the repository's embedded server: of the running one, else of the last one.

    A model's own prints and errors are in it.
    """
    terminal = output.terminal()
    root = place.root()
    log = log_of(root)
    if not flags.follow:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-flags.lines :]
        if terminal.json:
            terminal.result(ShownLog(log, tuple(lines)))
        else:
            terminal.lines("\n".join(lines))
        return
    if terminal.json:
        raise UsageError("--follow shows a log as it grows, which is no JSON document", hint="Leave --json out.")
    for text in follow_log(root, log, flags.lines):
        terminal.lines(text.rstrip("\n"))


def _options(root: Location, flags: RunFlags, listen: ListenFlags, security: SecurityFlags) -> ServeOptions:
    settings = settings_of(ServeOptions, flags, listen, security)
    ports = [settings[name] for name in ("http_port", "grpc_port", "metrics_port") if settings.get(name)]
    if len(set(ports)) < len(ports):
        raise UsageError(
            f"--http-port, --grpc-port and --metrics-port must differ; found {', '.join(map(str, ports))}",
            hint="Leave one out, and a free port is chosen.",
        )
    signed_by = load_settings().signed_by
    return ServeOptions(repository=root, security=security.security(), signed_by=signed_by, **settings)


def _warn_if_open(terminal: Terminal, host: str, security: ServerSecurity) -> None:
    """Warn of a server others can reach and change."""
    if host in ("127.0.0.1", "localhost", "::1"):
        return
    if security.open_control and not security.tls:
        terminal.warn(f"the server listens on {host} without TLS or restricted APIs: anyone can load models.")
    elif security.open_control and security.client_authority is None:
        terminal.note(f"The server listens on {host} with TLS, and lets every client load models (--tls-client-ca).")
    elif not security.tls and not security.open_control:
        terminal.note(f"The server listens on {host} without TLS: a key for loading models travels in the clear.")


def _warn_of_failures(terminal: Terminal, root: Location, failures: Mapping[str, str]) -> None:
    for name, reason in failures.items():
        terminal.warn(
            f"{name} did not load: {reason}\n"
            f"The other models are served. Look at it: repo-manager verify {name} -r {root}"
        )


def _show(terminal: Terminal, options: ServeOptions, server: EmbeddedServer) -> None:
    """Say that the server is ready, where, and name the models not loaded."""
    urls = {"http_url": server.http_url, "grpc_url": server.grpc_url, "metrics_url": server.metrics_url}
    _warn_of_failures(terminal, options.repository, server.failures)
    if server.shows_key:
        terminal.warn(
            "this system does not allow tracing a child (ptrace), so other users of this machine can read the key that "
            "loads models in the process list."
        )
    if terminal.json:
        terminal.result(ReadyServer(**urls, pid=server.pid, log=server.log_path, failures=server.failures))
    if not options.load and not server.options.load:
        terminal.note("No model was deployed yet, so none is loaded: repo-manager deploy NAME, or serve --load all.")
    names = server.options.load
    if names == ("*",):
        names = tuple(entry.name for entry in scan(options.repository, deep=False))
    loaded = [name for name in names if name not in server.failures]
    if loaded:
        terminal.note(f"Loaded at the start: {', '.join(loaded)}")
    terminal.note(f"Log: {server.log_path} (new lines follow here)")
    terminal.note(f"Ready: {server.http_url}  {server.grpc_url}  {server.metrics_url} (Ctrl-C stops it)")
