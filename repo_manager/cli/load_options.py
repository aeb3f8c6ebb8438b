"""Options of load on a server, for `loadtest` and `compare`: the server, the data, the model's sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from repo_manager.cli.connection import Connection, client_options
from repo_manager.cli.option_groups import option, settings_of
from repo_manager.cli.options import parse_shapes, parse_target
from repo_manager.cli.repository_options import RepositoryFlag, resolve_repository
from repo_manager.errors import ServerUnreachableError
from repo_manager.loadtest.options import LoadTestOptions, Protocol, SharedMemory
from repo_manager.pipeline.load_inputs import KnownInputs, known_inputs
from repo_manager.report.terminal import Terminal
from repo_manager.server import running_server
from repo_manager.settings import load_settings

__all__ = ["DataFlags", "Load", "ServerFlags"]


@dataclasses.dataclass(frozen=True)
class ServerFlags:
    """The server under load."""

    url: str | None = option(
        "--url", "--to", metavar="URL", help="grpc(s):// or http(s)://host:port [default: the running serve]."
    )
    protocol: Protocol | None = option(
        "--protocol", sets=(LoadTestOptions, "protocol"), help="What it speaks [default: the URL's]."
    )


@dataclasses.dataclass(frozen=True)
class DataFlags:
    """What the requests hold."""

    PANEL: ClassVar[str] = "Data"
    shape: list[str] | None = option(
        "--shape", metavar="NAME:SIZES", help="Sizes of dynamic axes, without the batch (may be given often)."
    )
    data: Path | None = option(
        "--input-data",
        sets=(LoadTestOptions, "data"),
        help=".npz, .npy, perf_analyzer JSON, an image or a folder [default: random].",
    )
    shared_memory: SharedMemory = option(
        "--shared-memory",
        sets=(LoadTestOptions, "shared_memory"),
        help="system: inputs in POSIX shared memory; the server is local.",
    )
    seed: int = option(
        "--seed", sets=(LoadTestOptions, "seed"), help="Of everything that is drawn: inputs, arrivals, order."
    )


@dataclasses.dataclass(frozen=True)
class Load:
    """A command's options of load, together."""

    terminal: Terminal
    place: RepositoryFlag
    server: ServerFlags
    data: DataFlags
    connection: Connection

    def settings(self, target: str, url: str | None) -> dict[str, Any]:
        """Return the settings of `LoadTestOptions` for a model on a server.

        Args:
            target: `NAME` or `NAME:VERSION`.
            url: the server; `None`: the settings' one, else the running `serve`.

        Raises:
            UsageError: a text has another form.
            ServerUnreachableError: there is no server.
        """
        name, version = parse_target(target)
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
            "access": client_options(self.connection, [where]),
        }

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
