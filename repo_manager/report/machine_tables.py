"""A machine's equipment, and running servers, as rich renderables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.layout import key_values, make_table
from repo_manager.report.tables import format_bytes

if TYPE_CHECKING:
    from repo_manager.server.records import RunningServer

__all__ = ["machine_view", "running_server_view"]


def machine_view(machine: Any, server: str = "") -> list[RenderableType]:
    """Show a `pipeline.doctor.Machine`.

    Args:
        machine: the result of `pipeline.doctor.examine_machine`. Its `engines` are shown only with `server`.
        server: server its engines were checked against, in words. Empty: they were not.
    """
    gpus = "; ".join(
        f"{gpu.name} (compute capability {gpu.compute_capability}, driver {gpu.driver_version}, "
        f"{format_bytes(gpu.memory_bytes)}{'' if gpu.has_sparse_tensor_cores else ', no Sparse Tensor Cores'})"
        for gpu in machine.gpus
    )
    facts = key_values(
        [
            ("system", machine.system),
            ("Python", machine.python),
            ("processors", machine.cpus),
            ("memory", format_bytes(machine.memory_bytes)),
            ("GPU", gpus or "none found (no NVIDIA driver or card): models run on the CPU"),
            ("tritonserver", machine.tritonserver or "none: install it as shown below, or use --to"),
            ("perf_analyzer", machine.perf_analyzer or "none: repo-manager doctor --install-perf-analyzer"),
        ]
    )
    rows = [
        [
            package.name,
            Text("not installed", style="dim") if package.version is None else Text(package.version, style="green"),
            package.purpose,
        ]
        for package in machine.packages
    ]
    views: list[RenderableType] = [facts, make_table("Packages", ["package", "version", "for"], rows)]
    views += [Text(f"{package.purpose}: {package.install}") for package in machine.packages if package.install]
    if server:
        views.append(_engines(machine.engines, server))
    return views


def _engines(engines: Sequence[Any], server: str) -> RenderableType:
    """Say of each engine whether it will load."""
    if not engines:
        return Text("The repository holds no engine.")
    rows = []
    for engine in engines:
        kinds = ", ".join(engine.compute_capabilities) or "not known"
        blocks = any(problem.blocks for problem in engine.problems)
        verdict = Text("will not load", style="red") if blocks else Text("mind", style="yellow")
        said = "; ".join(f"{problem.message}. {problem.hint}" for problem in engine.problems)
        rows.append(
            [
                engine.model,
                f"{engine.backend} {engine.built_with or '(version not on record)'}",
                kinds,
                verdict if engine.problems else Text("nothing known against it", style="green"),
                said,
            ]
        )
    columns = ["version", "built with", "compute capability", "verdict", "reason and remedy"]
    return make_table(f"Engines on {server}", columns, rows)


def running_server_view(server: RunningServer) -> Any:
    """Show where a server of ours listens."""
    return key_values(
        [
            ("HTTP", server.http_url),
            ("gRPC", server.grpc_url),
            ("metrics", server.metrics_url),
            ("pid", server.pid),
            ("log", server.log),
        ]
    )
