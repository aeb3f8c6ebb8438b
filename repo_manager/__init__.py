"""From a sparse (2:4) ONNX model to a proven, load-tested, reversible NVIDIA Triton deployment.

The whole path from Python, one plain function a stage:

    from pathlib import Path
    import repo_manager as rm

    rm.inspect_model(Path("model.onnx")).sparsity.not_valid
    added = rm.add(Path("model.onnx"), "resnet", Path("models"), rm.AddOptions(precision=rm.Precision.FP16))
    with rm.EmbeddedServer(rm.ServerOptions("models")) as server, rm.TritonClient.connect(server.grpc_url) as client:
        rm.deploy(Path("models"), "resnet", added.version, client)
        options = rm.LoadTestOptions(server.grpc_url, "resnet", concurrency=(1, 8))
        rm.judge(rm.run_load_test(options), [rm.parse_slo("p99<20ms")]).outcome

Results are frozen; `as_json` turns each into plain JSON types. Errors derive from `RepoManagerError`. A
stage is imported when it is first used, so that `import repo_manager` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repo_manager.client import VersionedClient
    from repo_manager.declared import Servers, read_declaration
    from repo_manager.errors import RepoManagerError
    from repo_manager.loadtest.compare import compare
    from repo_manager.loadtest.judge import judge, parse_slo
    from repo_manager.loadtest.options import LoadTestOptions
    from repo_manager.loadtest.run import run_load_test
    from repo_manager.onnx_model.model import load_model
    from repo_manager.onnx_model.write import save_model
    from repo_manager.pipeline.adding import AddOptions, SparsityMode, add
    from repo_manager.pipeline.apply import ApplyOptions, apply
    from repo_manager.pipeline.deploying import deploy, rollback
    from repo_manager.pipeline.inspect import inspect_model
    from repo_manager.pipeline.snapshot import snapshot
    from repo_manager.pipeline.status import status
    from repo_manager.precision import ConvertOptions, convert, load_calibration
    from repo_manager.pruning import PruneOptions, prune_with_data
    from repo_manager.repository import check_signature, find_model, gc, remove, scan, sign_version, verify
    from repo_manager.rollout.options import Amount, RolloutOptions, ShadowOptions, TrialOptions
    from repo_manager.server import EmbeddedServer, ServerOptions, TritonClient
    from repo_manager.sparsity import prune, sparsity_report
    from repo_manager.types import Backend, Precision, as_json

__version__ = "0.1.0"

__all__ = [
    "AddOptions",
    "Amount",
    "ApplyOptions",
    "Backend",
    "ConvertOptions",
    "EmbeddedServer",
    "LoadTestOptions",
    "Precision",
    "PruneOptions",
    "RepoManagerError",
    "RolloutOptions",
    "ServerOptions",
    "Servers",
    "ShadowOptions",
    "SparsityMode",
    "TrialOptions",
    "TritonClient",
    "VersionedClient",
    "add",
    "apply",
    "as_json",
    "check_signature",
    "compare",
    "convert",
    "deploy",
    "find_model",
    "gc",
    "inspect_model",
    "judge",
    "load_calibration",
    "load_model",
    "parse_slo",
    "prune",
    "prune_with_data",
    "read_declaration",
    "remove",
    "rollback",
    "run_load_test",
    "save_model",
    "scan",
    "sign_version",
    "snapshot",
    "sparsity_report",
    "status",
    "verify",
]

_MODULES = {
    "client": ("VersionedClient",),
    "declared": ("Servers", "read_declaration"),
    "errors": ("RepoManagerError",),
    "loadtest.compare": ("compare",),
    "loadtest.options": ("LoadTestOptions",),
    "loadtest.run": ("run_load_test",),
    "loadtest.judge": ("judge", "parse_slo"),
    "onnx_model.model": ("load_model",),
    "onnx_model.write": ("save_model",),
    "pipeline.adding": ("AddOptions", "SparsityMode", "add"),
    "pipeline.apply": ("ApplyOptions", "apply"),
    "pipeline.inspect": ("inspect_model",),
    "precision": ("ConvertOptions", "convert", "load_calibration"),
    "pruning": ("PruneOptions", "prune_with_data"),
    "repository": ("check_signature", "find_model", "gc", "remove", "scan", "sign_version", "verify"),
    "pipeline.deploying": ("deploy", "rollback"),
    "rollout.options": ("Amount", "RolloutOptions", "ShadowOptions", "TrialOptions"),
    "pipeline.snapshot": ("snapshot",),
    "pipeline.status": ("status",),
    "server": ("EmbeddedServer", "ServerOptions", "TritonClient"),
    "sparsity": ("prune", "sparsity_report"),
    "types": ("Backend", "Precision", "as_json"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'repo_manager' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"repo_manager.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
