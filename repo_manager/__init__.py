"""From a sparse (2:4) ONNX model to a proven, load-tested, reversible NVIDIA Triton deployment.

The whole path from Python, one plain function a stage:

    import repo_manager as rm

    rm.inspect_model("model.onnx").sparsity.not_valid
    added = rm.add("model.onnx", "resnet", "models", rm.AddOptions(precision=rm.Precision.FP16))
    with rm.EmbeddedServer(rm.ServerOptions("models")) as server:
        rm.deploy("models", "resnet", added.version, server.grpc_url)
        options = rm.LoadTestOptions(server.grpc_url, "resnet", concurrency=(1, 8))
        rm.judge(rm.run_load_test(options), [rm.parse_slo("p99<20ms")]).outcome

Files are `str` or `os.PathLike`; a repository may also be a URL (`s3://bucket/path`). Options are frozen dataclasses
that check their fields. Results are frozen, show a summary in a notebook, and `as_json` turns each into plain JSON
types. Errors derive from `RepoManagerError`. A stage is imported when it is first used, so `import repo_manager` costs
nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repo_manager.accuracy import AccuracyGate, AccuracyOptions, Evaluator, load_evaluator
    from repo_manager.client import VersionedClient
    from repo_manager.declared import Declaration, Servers, plan_declaration, read_declaration
    from repo_manager.declared.export import document_text, export_document
    from repo_manager.engine.fit import FitTarget
    from repo_manager.engine.fit_check import fit_target_of
    from repo_manager.engine.options import EngineOptions
    from repo_manager.errors import RepoManagerError
    from repo_manager.gates import Gate, Verdict
    from repo_manager.loadtest.compare import ComparePlan, Comparison, compare, compare_all
    from repo_manager.loadtest.judge import LoadComparison, compare_load_tests, judge, judge_against, parse_slo
    from repo_manager.loadtest.merge import merge_reports, read_report
    from repo_manager.loadtest.options import LoadTestOptions
    from repo_manager.loadtest.result import LoadTestReport
    from repo_manager.loadtest.run import run_load_test
    from repo_manager.onnx_model.model import Model, load_model
    from repo_manager.onnx_model.runtime import RuntimeLimits, runtime_limits
    from repo_manager.onnx_model.signature import signature_of
    from repo_manager.onnx_model.write import save_model
    from repo_manager.pipeline.adding import Added, AddOptions, SparsityMode, add
    from repo_manager.pipeline.adding_files import AddedFiles, FilesOptions, add_files
    from repo_manager.pipeline.adopting import write_configs
    from repo_manager.pipeline.apply import ApplyOptions, apply
    from repo_manager.pipeline.background import follow_log, log_of, start_detached, stop_running
    from repo_manager.pipeline.calibrating import CalibrationOptions, MadeCalibration, make_calibration
    from repo_manager.pipeline.cards import version_cards
    from repo_manager.pipeline.deploying import deploy, rollback, undeploy
    from repo_manager.pipeline.doctor import examine_engines, examine_machine
    from repo_manager.pipeline.ensembling import EnsembleOptions, MadeEnsemble, make_ensemble
    from repo_manager.pipeline.infer import InferOptions, infer
    from repo_manager.pipeline.inference import Inference, write_answers
    from repo_manager.pipeline.inspect import Inspection, inspect_model
    from repo_manager.pipeline.load_records import keep_load_test, kept_load_tests
    from repo_manager.pipeline.preprocessing import AddedWithImages, add_with_images
    from repo_manager.pipeline.quickstart import quickstart
    from repo_manager.pipeline.serve_options import ServeOptions
    from repo_manager.pipeline.snapshot import fetch, snapshot
    from repo_manager.pipeline.status import status
    from repo_manager.precision import Conversion, ConvertOptions, convert, load_calibration
    from repo_manager.pruning import PruneOptions, prune_with_data
    from repo_manager.report.card import Card, card_html, card_markdown, index_html
    from repo_manager.report.load_files import report_text
    from repo_manager.report.load_html import compare_page, load_page
    from repo_manager.report.sparsity_html import sparsity_page
    from repo_manager.report.tune_view import tune_page
    from repo_manager.repository.adopt import adopt
    from repo_manager.repository.configuration import change_config, edit_config
    from repo_manager.repository.difference import compare_versions
    from repo_manager.repository.relabel import read_labels, set_labels
    from repo_manager.repository.remove import gc, remove
    from repo_manager.repository.repair import repair
    from repo_manager.repository.scan import ModelEntry, find_model, scan
    from repo_manager.repository.signing import SigningKey, check_signature, sign_version
    from repo_manager.repository.tags import model_state, remove_tag, resolve_version, set_tag
    from repo_manager.repository.transfer import CopyOptions, copy_needed, copy_version, version_files
    from repo_manager.repository.verify import verify
    from repo_manager.rollout.options import Amount, RolloutOptions, ShadowOptions, TrialOptions
    from repo_manager.rollout.result import Rollout
    from repo_manager.rollout.traffic import Traffic, shift_traffic
    from repo_manager.server.client import TritonClient
    from repo_manager.server.command import ServerOptions, ServerSecurity
    from repo_manager.server.embedded import EmbeddedServer
    from repo_manager.server.transport import ClientOptions
    from repo_manager.sources import Source, open_source
    from repo_manager.sparsity import SparsityReport, prune, sparsity_report
    from repo_manager.triton_config.options import ConfigOptions
    from repo_manager.tuning.result import TuneOptions, Tuning
    from repo_manager.tuning.run import tune
    from repo_manager.types import Backend, Precision, as_json

__version__ = "0.1.0"

__all__ = [
    "AccuracyGate",
    "AccuracyOptions",
    "AddOptions",
    "Added",
    "AddedFiles",
    "AddedWithImages",
    "Amount",
    "ApplyOptions",
    "Backend",
    "CalibrationOptions",
    "Card",
    "ClientOptions",
    "ComparePlan",
    "Comparison",
    "ConfigOptions",
    "Conversion",
    "ConvertOptions",
    "CopyOptions",
    "Declaration",
    "EmbeddedServer",
    "EngineOptions",
    "EnsembleOptions",
    "Evaluator",
    "FilesOptions",
    "FitTarget",
    "Gate",
    "InferOptions",
    "Inference",
    "Inspection",
    "LoadComparison",
    "LoadTestOptions",
    "LoadTestReport",
    "MadeCalibration",
    "MadeEnsemble",
    "Model",
    "ModelEntry",
    "Precision",
    "PruneOptions",
    "RepoManagerError",
    "Rollout",
    "RolloutOptions",
    "RuntimeLimits",
    "ServeOptions",
    "ServerOptions",
    "ServerSecurity",
    "Servers",
    "ShadowOptions",
    "SigningKey",
    "Source",
    "SparsityMode",
    "SparsityReport",
    "Traffic",
    "TrialOptions",
    "TritonClient",
    "TuneOptions",
    "Tuning",
    "Verdict",
    "VersionedClient",
    "add",
    "add_files",
    "add_with_images",
    "adopt",
    "apply",
    "as_json",
    "card_html",
    "card_markdown",
    "change_config",
    "check_signature",
    "compare",
    "compare_all",
    "compare_load_tests",
    "compare_page",
    "compare_versions",
    "convert",
    "copy_needed",
    "copy_version",
    "deploy",
    "document_text",
    "edit_config",
    "examine_engines",
    "examine_machine",
    "export_document",
    "fetch",
    "find_model",
    "fit_target_of",
    "follow_log",
    "gc",
    "index_html",
    "infer",
    "inspect_model",
    "judge",
    "judge_against",
    "keep_load_test",
    "kept_load_tests",
    "load_calibration",
    "load_evaluator",
    "load_model",
    "load_page",
    "log_of",
    "make_calibration",
    "make_ensemble",
    "merge_reports",
    "model_state",
    "open_source",
    "parse_slo",
    "plan_declaration",
    "prune",
    "prune_with_data",
    "quickstart",
    "read_declaration",
    "read_labels",
    "read_report",
    "remove",
    "remove_tag",
    "repair",
    "report_text",
    "resolve_version",
    "rollback",
    "run_load_test",
    "runtime_limits",
    "save_model",
    "scan",
    "set_labels",
    "set_tag",
    "shift_traffic",
    "sign_version",
    "signature_of",
    "snapshot",
    "sparsity_page",
    "sparsity_report",
    "start_detached",
    "status",
    "stop_running",
    "tune",
    "tune_page",
    "undeploy",
    "verify",
    "version_cards",
    "version_files",
    "write_answers",
    "write_configs",
]

_MODULES = {
    "pipeline.cards": ("version_cards",),
    "report.card": ("Card", "card_html", "card_markdown", "index_html"),
    "pipeline.background": ("follow_log", "log_of", "start_detached", "stop_running"),
    "pipeline.calibrating": ("CalibrationOptions", "MadeCalibration", "make_calibration"),
    "accuracy": ("AccuracyGate", "AccuracyOptions", "Evaluator", "load_evaluator"),
    "client": ("VersionedClient",),
    "declared": ("Declaration", "Servers", "plan_declaration", "read_declaration"),
    "declared.export": ("document_text", "export_document"),
    "engine.fit": ("FitTarget",),
    "engine.fit_check": ("fit_target_of",),
    "engine.options": ("EngineOptions",),
    "errors": ("RepoManagerError",),
    "gates": ("Gate", "Verdict"),
    "loadtest.compare": ("ComparePlan", "Comparison", "compare", "compare_all"),
    "loadtest.judge": ("LoadComparison", "compare_load_tests", "judge", "judge_against", "parse_slo"),
    "loadtest.merge": ("merge_reports", "read_report"),
    "loadtest.options": ("LoadTestOptions",),
    "loadtest.result": ("LoadTestReport",),
    "loadtest.run": ("run_load_test",),
    "onnx_model.model": ("Model", "load_model"),
    "onnx_model.runtime": ("RuntimeLimits", "runtime_limits"),
    "onnx_model.signature": ("signature_of",),
    "onnx_model.write": ("save_model",),
    "pipeline.adding": ("AddOptions", "Added", "SparsityMode", "add"),
    "pipeline.adding_files": ("AddedFiles", "FilesOptions", "add_files"),
    "pipeline.adopting": ("write_configs",),
    "pipeline.apply": ("ApplyOptions", "apply"),
    "pipeline.deploying": ("deploy", "rollback", "undeploy"),
    "pipeline.doctor": ("examine_engines", "examine_machine"),
    "pipeline.ensembling": ("EnsembleOptions", "MadeEnsemble", "make_ensemble"),
    "pipeline.infer": (
        "InferOptions",
        "infer",
    ),
    "pipeline.inference": (
        "Inference",
        "write_answers",
    ),
    "pipeline.inspect": ("Inspection", "inspect_model"),
    "pipeline.load_records": ("keep_load_test", "kept_load_tests"),
    "pipeline.preprocessing": ("AddedWithImages", "add_with_images"),
    "pipeline.quickstart": ("quickstart",),
    "pipeline.serve_options": ("ServeOptions",),
    "pipeline.snapshot": ("fetch", "snapshot"),
    "pipeline.status": ("status",),
    "precision": ("Conversion", "ConvertOptions", "convert", "load_calibration"),
    "pruning": ("PruneOptions", "prune_with_data"),
    "report.load_files": ("report_text",),
    "report.load_html": ("compare_page", "load_page"),
    "report.sparsity_html": ("sparsity_page",),
    "report.tune_view": ("tune_page",),
    "repository.adopt": ("adopt",),
    "repository.configuration": (
        "change_config",
        "edit_config",
    ),
    "repository.difference": ("compare_versions",),
    "repository.relabel": (
        "read_labels",
        "set_labels",
    ),
    "repository.remove": (
        "gc",
        "remove",
    ),
    "repository.repair": ("repair",),
    "repository.scan": (
        "ModelEntry",
        "find_model",
        "scan",
    ),
    "repository.signing": (
        "SigningKey",
        "check_signature",
        "sign_version",
    ),
    "repository.tags": (
        "model_state",
        "remove_tag",
        "resolve_version",
        "set_tag",
    ),
    "repository.transfer": (
        "CopyOptions",
        "copy_needed",
        "copy_version",
        "version_files",
    ),
    "repository.verify": ("verify",),
    "rollout.options": ("Amount", "RolloutOptions", "ShadowOptions", "TrialOptions"),
    "rollout.result": ("Rollout",),
    "rollout.traffic": ("Traffic", "shift_traffic"),
    "server.client": ("TritonClient",),
    "server.command": (
        "ServerOptions",
        "ServerSecurity",
    ),
    "server.embedded": ("EmbeddedServer",),
    "server.transport": ("ClientOptions",),
    "sources": ("Source", "open_source"),
    "sparsity": ("SparsityReport", "prune", "sparsity_report"),
    "triton_config.options": ("ConfigOptions",),
    "tuning.result": ("TuneOptions", "Tuning"),
    "tuning.run": ("tune",),
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
    """Return the public names only: no module imported, no helper."""
    return [*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"]
