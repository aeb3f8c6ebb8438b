"""The embedded server: serve."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from repo_manager.cli.options import JsonOutput, Quiet, Repository, resolve_repository

if TYPE_CHECKING:
    from repo_manager.server import EmbeddedServer

__all__ = ["register"]

Load = Annotated[
    list[str] | None,
    typer.Option("--load", metavar="NAME", help="Models to load: names, or all, deployed or none [default: deployed]."),
]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("serve")(serve)


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
    restart: Annotated[bool, typer.Option("--restart", help="Start a server that ended by itself again.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds until it has to be ready.")] = 120.0,
    json: JsonOutput = False,
    quiet: Quiet = False,
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
        root, host, http_port, grpc_port, metrics_port, tuple(load or ()), timeout, auto_complete, restart
    )
    if host not in ("127.0.0.1", "localhost", "::1"):
        terminal.warn(f"the server listens on {host} without TLS or restricted APIs: anyone can load models.")
    if detach:
        running = start_detached(options)
        terminal.result(running, running_server_view(running))
        return

    def on_ready(server: EmbeddedServer) -> None:
        urls = {"http_url": server.http_url, "grpc_url": server.grpc_url, "metrics_url": server.metrics_url}
        for name, reason in server.failures.items():
            terminal.warn(f"{name} did not load: {reason}")
        if json:
            terminal.result({**urls, "pid": server.pid, "log": server.log_path, "failures": server.failures})
        if not load and not server.options.load:
            terminal.note(
                "No model was deployed yet, so none is loaded: repo-manager deploy NAME, or serve --load all."
            )
        terminal.note(f"Ready: {server.http_url}  {server.grpc_url}  {server.metrics_url} (Ctrl-C stops it)")

    log_output = None if quiet else sys.stderr
    serve_until_ended(options, on_ready=on_ready, report=terminal.note, log_output=log_output)
