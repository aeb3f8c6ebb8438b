"""The commands to begin with: this machine's equipment (doctor), and the whole path on the shipped model
(quickstart)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import typer

from repo_manager.cli.connection import ConnectionFlags, client_options
from repo_manager.cli.durations import seconds_option
from repo_manager.cli.engine_options import parse_server
from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import Output
from repo_manager.cli.repository_options import RepositoryFlag
from repo_manager.engine.fit import FitTarget
from repo_manager.engine.fit_check import fit_target_of
from repo_manager.errors import UsageError
from repo_manager.files import write_atomic
from repo_manager.loadtest.perf_analyzer.install import install_perf_analyzer
from repo_manager.pipeline.doctor import examine_engines, examine_machine
from repo_manager.pipeline.quickstart import quickstart
from repo_manager.report.machine_tables import machine_view
from repo_manager.report.quickstart import quickstart_page, quickstart_view
from repo_manager.server.client import TritonClient
from repo_manager.server.installation import install_tritonserver

__all__ = ["app"]


# The `doctor` command: report the tools of this machine.

app = typer.Typer()


def _version_of(url: str, connection: ConnectionFlags, timeout_s: float = 10.0) -> str:
    client = TritonClient.connect(url, client_options(connection, [url]))
    return client.metadata(timeout_s=timeout_s).version


@dataclasses.dataclass(frozen=True)
class EngineServerFlags:
    """The server to check the repository's engines against."""

    to: str | None = option("--to", metavar="URL", help="Check the repository's engines against this running server.")
    for_server: str | None = option(
        "--for-server", metavar="26.07[:9.0]", help="Check them against this Triton release (and GPU)."
    )
    timeout: float = seconds_option("--timeout", sets=(_version_of, "timeout_s"), help="How long to wait for --to.")

    def target(self, connection: ConnectionFlags) -> tuple[str, FitTarget]:
        """Return the server in words, and its known properties.

        Raises:
            UsageError: two are named, or the release is unknown.
        """
        if self.for_server is not None:
            if self.to is not None:
                raise UsageError("--to and --for-server both name a server", hint="Give one of them.")
            return f"Triton {self.for_server}", parse_server(self.for_server)
        if self.to is None:
            return "the embedded server of this machine", fit_target_of("", embedded=True)
        version = _version_of(self.to, connection, self.timeout)
        return f"{self.to} (Triton {version})", fit_target_of(version)


@dataclasses.dataclass(frozen=True)
class InstallFlags:
    """Packages to fetch first."""

    PANEL: ClassVar[str] = "Install"
    perf_analyzer: bool = option(
        "--install-perf-analyzer", default=False, help="Fetch NVIDIA's perf_analyzer by pip into the user's cache."
    )
    tritonserver: bool = option(
        "--install-tritonserver",
        default=False,
        help="Fetch the embedded tritonserver by pip into the user's cache (for Python 3.13).",
    )


@app.command("doctor")
@grouped
def doctor_command(
    place: RepositoryFlag,
    server: EngineServerFlags,
    *,
    install: InstallFlags,
    connection: ConnectionFlags,
    output: Output,
) -> None:
    """Show the parts this machine has or lacks, their use, and whether engines will load."""
    terminal = output.terminal()
    if install.perf_analyzer:
        terminal.note(f"perf_analyzer: {install_perf_analyzer().binary}")
    if install.tritonserver:
        terminal.note(f"tritonserver: {install_tritonserver()}")
    machine = examine_machine()
    where = ""
    if place.repository is not None or server.to is not None or server.for_server is not None:
        where, target = server.target(connection)
        machine = dataclasses.replace(machine, engines=examine_engines(place.root(), target))
    terminal.result(machine, *machine_view(machine, where))


# The `quickstart` command: the whole workflow on the bundled model.


@dataclasses.dataclass(frozen=True)
class QuickstartFlags:
    """Where, and how long."""

    directory: Path | None = option(
        "--directory",
        "-d",
        metavar="DIR",
        sets=(quickstart, "folder"),
        help="Folder to work in [default: ./repo-manager-quickstart].",
    )
    seconds: float = option(
        "--seconds", sets=(quickstart, "seconds_per_level"), min=0.2, help="How long each load level is measured."
    )
    tritonserver: bool = option(
        "--install-tritonserver",
        default=False,
        help="Fetch the embedded tritonserver first, as `doctor` does (for Python 3.13).",
    )


@app.command("quickstart")
@grouped
def quickstart_command(flags: QuickstartFlags, output: Output) -> None:
    """Run every step with the sparse sample model on this machine, and show the result.

    Inspect, FP16 and INT8, add, a real tritonserver, deploy, load test, report. No process keeps running.
    """
    terminal = output.terminal()
    if flags.tritonserver:
        terminal.note(f"tritonserver: {install_tritonserver()}")
    result = quickstart(**settings_of(quickstart, flags), report=terminal.reporter())
    page = result.folder / "report.html"
    write_atomic(page, quickstart_page(result).encode())
    terminal.result({"result": result, "report": page}, *quickstart_view(result, page))
