"""The embedded server: serve."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from repo_manager.cli.option_groups import grouped
from repo_manager.cli.options import JsonOutput, Quiet, Repository, resolve_repository
from repo_manager.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from repo_manager.report.terminal import Terminal
    from repo_manager.server import EmbeddedServer, ServerSecurity

__all__ = ["register"]

Load = Annotated[
    list[str] | None,
    typer.Option("--load", metavar="NAME", help="Models to load: names, or all, deployed or none [default: deployed]."),
]


Restart = Literal["no", "on-failure"]


@dataclasses.dataclass(frozen=True)
class _Security:
    """Who may talk to the server."""

    tls_cert: Annotated[
        Path | None,
        typer.Option("--tls-cert", metavar="FILE.pem", help="gRPC speaks TLS; HTTP then stays on the loopback."),
    ] = None
    tls_key: Annotated[Path | None, typer.Option("--tls-key", metavar="FILE.pem", help="The key of --tls-cert.")] = None
    tls_client_ca: Annotated[
        Path | None,
        typer.Option("--tls-client-ca", metavar="FILE.pem", help="Clients show a certificate of this authority."),
    ] = None
    restrict_file: Annotated[
        Path | None,
        typer.Option(
            "--restrict-file",
            metavar="FILE",
            help="A file with one `Name: value`: the header without which nobody loads, unloads or changes anything.",
        ),
    ] = None

    def read(self) -> ServerSecurity:
        """Return it with the file's content."""
        from repo_manager.server import ServerSecurity
        from repo_manager.server.credentials import read_headers

        headers = {} if self.restrict_file is None else read_headers(self.restrict_file)
        if self.restrict_file is not None and len(headers) != 1:
            raise UsageError(f"{self.restrict_file}: expected one header, found {len(headers)}")
        restricted = next(iter(headers.items()), None)
        return ServerSecurity(self.tls_cert, self.tls_key, self.tls_client_ca, restricted)


def _warn_if_open(terminal: Terminal, host: str, security: ServerSecurity) -> None:
    """Warn of a server that others reach and can change."""
    if host in ("127.0.0.1", "localhost", "::1"):
        return
    if not security.tls and security.restricted is None:
        terminal.warn(f"the server listens on {host} without TLS or restricted APIs: anyone can load models.")
    elif security.restricted is None and security.client_authority is None:
        terminal.note(f"The server listens on {host} with TLS, and lets every client load models (--tls-client-ca).")
    elif not security.tls:
        terminal.note(f"The server listens on {host} without TLS: the header of --restrict-file travels in the clear.")


def _warn_of_failures(terminal: Terminal, failures: Mapping[str, str]) -> None:
    for name, reason in failures.items():
        terminal.warn(
            f"{name} did not load: {reason}\nThe other models are served. Look at it: repo-manager verify {name}"
        )


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("serve")(grouped(serve))


def _port(option: str) -> object:
    return typer.Option(option, min=0, max=65535, help="0 takes a free port.")


def serve(
    repository: Repository = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to bind; anything but the loopback is open to others.")
    ] = "127.0.0.1",
    http_port: Annotated[int, _port("--http-port")] = 0,
    grpc_port: Annotated[int, _port("--grpc-port")] = 0,
    metrics_port: Annotated[int, _port("--metrics-port")] = 0,
    load: Load = None,
    detach: Annotated[bool, typer.Option("--detach", help="Run in the background; return when it is ready.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the running serve of the repository.")] = False,
    auto_complete: Annotated[
        bool | None,
        typer.Option(
            "--auto-complete/--no-auto-complete",
            help="Let Triton fill in incomplete config.pbtxt files, at a second a load [default: where one needs it].",
            show_default=False,
        ),
    ] = None,
    restart: Annotated[
        Restart, typer.Option("--restart", help="Whether to start a server again that ended by itself with a failure.")
    ] = "no",
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds until it has to be ready.")] = 120.0,
    json: JsonOutput = False,
    quiet: Quiet = False,
    *,
    security: _Security,
) -> None:
    """Run the embedded Triton on a repository until interrupted, in explicit model-control mode.

    The server's log goes to stderr. Loaded at the start: the models that were deployed before.
    """
    from repo_manager.pipeline.serving import ServeOptions, serve_until_ended, start_detached, stop_running
    from repo_manager.report.machine_tables import running_server_view
    from repo_manager.report.terminal import Terminal

    terminal = Terminal(as_json=json, quiet=quiet)
    root = resolve_repository(repository)
    if stop:
        stopped = stop_running(root, timeout_s=timeout)
        text = f"No server runs on {root}." if stopped is None else f"Stopped the server of {root} (pid {stopped.pid})."
        terminal.result({"stopped": stopped}, text)
        return
    options = ServeOptions(
        repository=root,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        load=tuple(load or ()),
        timeout_s=timeout,
        auto_complete=auto_complete,
        restart=restart == "on-failure",
        security=security.read(),
        restrict_file=security.restrict_file,
    )
    _warn_if_open(terminal, host, options.security)
    if detach:
        running = start_detached(options)
        _warn_of_failures(terminal, running.failures)
        terminal.result(running, running_server_view(running))
        return

    def on_ready(server: EmbeddedServer) -> None:
        urls = {"http_url": server.http_url, "grpc_url": server.grpc_url, "metrics_url": server.metrics_url}
        _warn_of_failures(terminal, server.failures)
        if json:
            terminal.result({**urls, "pid": server.pid, "log": server.log_path, "failures": server.failures})
        if not load and not server.options.load:
            terminal.note(
                "No model was deployed yet, so none is loaded: repo-manager deploy NAME, or serve --load all."
            )
        terminal.note(f"Ready: {server.http_url}  {server.grpc_url}  {server.metrics_url} (Ctrl-C stops it)")

    log_output = None if quiet else sys.stderr
    serve_until_ended(options, on_ready=on_ready, report=terminal.note, log_output=log_output)
