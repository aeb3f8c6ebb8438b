from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.onnx_models import mlp

import repo_manager
from repo_manager.cli.commands import COMMANDS
from repo_manager.errors import RepositoryError, UsageError

ENTRIES = {name: entry.module for group in COMMANDS.values() for name, entry in group.items()}
FROM_PYTHON = {
    "quickstart": "quickstart",
    "doctor": "examine_machine examine_engines",
    "inspect": "inspect_model sparsity_page",
    "prune": "prune prune_with_data load_calibration save_model",
    "calibrate": "make_calibration",
    "convert": "convert load_model load_calibration",
    "add": "add add_files",
    "ensemble": "make_ensemble",
    "list": "scan",
    "show": "find_model model_state",
    "history": "model_state",
    "verify": "verify repair",
    "diff": "compare_versions resolve_version",
    "config": "change_config edit_config",
    "labels": "read_labels set_labels",
    "tag": "set_tag remove_tag",
    "copy": "copy_version copy_needed",
    "promote": "copy_version copy_needed",
    "remove": "remove",
    "report": "version_cards card_html card_markdown index_html read_report",
    "gc": "gc",
    "adopt": "adopt write_configs",
    "sign": "sign_version",
    "apply": "read_declaration plan_declaration",
    "export": "export_document document_text",
    "serve": "start_detached stop_running EmbeddedServer",
    "deploy": "deploy",
    "rollback": "rollback",
    "undeploy": "undeploy",
    "traffic": "shift_traffic",
    "snapshot": "snapshot",
    "fetch": "fetch",
    "status": "status",
    "infer": "infer write_answers",
    "logs": "log_of follow_log",
    "loadtest": "run_load_test judge_against read_report merge_reports keep_load_test",
    "compare": "compare_all compare_page",
    "tune": "tune tune_page",
}
"""Command -> the public names behind it."""


@pytest.mark.parametrize("name", repo_manager.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(repo_manager, name).__doc__
    assert name in dir(repo_manager)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = repo_manager.nothing


def test_importing_the_package_imports_no_stage() -> None:
    code = (
        "import sys, repo_manager; print([m for m in sys.modules if m.startswith(('repo_manager.', 'numpy', 'onnx'))])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"


def test_dir_has_the_public_names_and_nothing_else() -> None:
    """Modules imported already, here by the other tests, and helpers are not listed."""
    assert {name for name in dir(repo_manager) if not name.startswith("__")} == set(repo_manager.__all__)
    tree = ast.parse(Path(repo_manager.__file__).read_text(encoding="utf-8"))
    typed = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed - {"annotations", "TYPE_CHECKING", "Any"} == set(repo_manager.__all__), "type checkers see the same"


@pytest.mark.parametrize("command", ENTRIES)
def test_what_a_command_does_python_can_do(command: str) -> None:
    assert command in FROM_PYTHON, f"name the public functions that do what `{command}` does"
    source = Path(repo_manager.__file__).parent / "cli" / f"{ENTRIES[command]}.py"
    used = {node.id for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)}
    for name in FROM_PYTHON[command].split():
        assert name in repo_manager.__all__
        assert name in used, f"{source.name} does not use {name}"


def test_public_functions_take_paths_as_text() -> None:
    """No parameter insists on a `Path`, or on a place made by a private function only."""
    functions = [getattr(repo_manager, name) for name in repo_manager.__all__]
    insisting = [
        f"{function.__name__}({parameter})"
        for function in functions
        if inspect.isfunction(function)
        for parameter in inspect.signature(function).parameters.values()
        if re.search(r"\b(Path|Location)\b", str(parameter.annotation))
    ]
    assert not insisting


class Somewhere(os.PathLike[str]):
    def __init__(self, place: Path) -> None:
        self.place = place

    def __fspath__(self) -> str:
        return str(self.place)


@pytest.mark.parametrize("kind", [str, Somewhere, Path])
def test_the_whole_way_with_paths_of_each_kind(kind: type, tmp_path: Path) -> None:
    def at(name: str) -> str:
        return kind(tmp_path / name)  # type: ignore[no-any-return]

    onnx.save(mlp(), tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(8, 32)).astype(np.float32))
    model = repo_manager.load_model(at("model.onnx"))
    data = repo_manager.load_calibration(at("data.npz"), repo_manager.signature_of(model))
    converted = repo_manager.convert(model, "fp16", at("low.onnx"), calibration=data)
    assert converted.precision is repo_manager.Precision.FP16
    assert repo_manager.inspect_model(at("low.onnx")).digest == converted.digest
    options = repo_manager.AddOptions(precision="fp16", calibration=at("data.npz"))  # type: ignore[arg-type]
    added = repo_manager.add(at("model.onnx"), "m", at("models"), options)
    root = at("models")
    assert repo_manager.set_tag(root, "m", "stable", added.version) is None
    assert repo_manager.resolve_version(root, "m:stable") == ("m", 1)
    assert repo_manager.copy_version(root, "m", 1, at("other")).version == 1
    assert [entry.name for entry in repo_manager.scan(at("other"))] == ["m"]
    assert not [found for found in repo_manager.verify(root) if found.severity == "error"]
    document, _ = repo_manager.export_document(root)
    assert "m" in repo_manager.document_text(document)
    planned = repo_manager.deploy(root, "m", "stable", options=repo_manager.RolloutOptions(dry_run=True))
    assert planned.version == 1


def test_a_text_may_be_the_url_of_a_repository() -> None:
    with pytest.raises(RepositoryError, match="https:// is no repository"):
        repo_manager.scan("https://host/models")


WRONG = [
    ("AddOptions", {"backend": "nope"}, "AddOptions.backend is 'nope', expected one of auto, onnxruntime, tensorrt"),
    ("AddOptions", {"precision": "fp61"}, "AddOptions.precision is 'fp61', expected one of fp32, fp16, bf16, int8"),
    ("AddOptions", {"sparsity": "often"}, "expected one of require, report, prune"),
    ("AddOptions", {"config": {"max_batch_size": 4}}, "AddOptions.config is .*, expected a ConfigOptions"),
    ("ConvertOptions", {"calibration_method": "max"}, "expected one of minmax, percentile"),
    ("ConvertOptions", {"keep_fp32": "conv*"}, "expected a list or a tuple"),
    ("ConvertOptions", {"max_drift": -0.1}, "max_drift is -0.1, expected 0 or more"),
    ("ConvertOptions", {"max_drift": float("nan")}, "max_drift is nan"),
    ("ConvertOptions", {"min_top1": 98}, "min_top1 is 98, expected 0 to 1"),
    ("ConvertOptions", {"auto_keep": 1.5}, "auto_keep is 1.5, expected a whole number"),
    ("EngineOptions", {"plan_detail": "all"}, "expected one of"),
    ("PruneOptions", {"layers": "conv1"}, "PruneOptions.layers is 'conv1', expected a list or a tuple"),
    ("RolloutOptions", {"proof": "hope"}, "expected one of inference, readiness"),
    ("RolloutOptions", {"batch": 2}, "expected an Amount"),
    ("RolloutOptions", {"load_timeout_s": "10"}, "load_timeout_s is '10', expected a number"),
    ("RolloutOptions", {"load_timeout_s": -1}, "load_timeout_s is -1, expected 0 or more"),
    ("ServeOptions", {"repository": "models", "http_port": 70000}, "the port is 70000, expected 0 to 65535"),
    ("ServerOptions", {"repository": "models", "auto_complete": "yes"}, "auto_complete is 'yes', expected True or"),
    ("LoadTestOptions", {"url": "grpc://a:1", "model": "m", "concurrency": 8}, "concurrency is 8, expected a list"),
    ("InferOptions", {"top": True}, "InferOptions.top is True, expected a whole number"),
    ("FilesOptions", {"sample": 3}, "FilesOptions.sample is 3, expected a path or None"),
]


@pytest.mark.parametrize(("kind", "fields", "said"), WRONG)
def test_options_refuse_what_they_cannot_be(kind: str, fields: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        getattr(repo_manager, kind)(**fields)


def test_a_precision_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    onnx.save(mlp(), tmp_path / "model.onnx")
    model = repo_manager.load_model(tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="precision is 'fp61', expected one of fp32, fp16, bf16, int8, int8"):
        repo_manager.convert(model, "fp61", tmp_path / "out.onnx")


def test_options_take_what_means_the_same() -> None:
    options = repo_manager.PruneOptions(layers=["a"], work="solved", threads=np.int64(2), damping=1)  # type: ignore[arg-type]
    assert (options.work, options.threads, options.damping) == (Path("solved"), 2, 1)
    assert type(options.threads) is int
    assert repo_manager.RolloutOptions(signed_by=["a.pub"]).signed_by == (Path("a.pub"),)  # type: ignore[arg-type]


OPTIONS = [name for name in repo_manager.__all__ if name.endswith(("Options", "Plan")) or name == "ServerSecurity"]


def test_a_secret_of_the_wrong_type_is_not_shown() -> None:
    with pytest.raises(UsageError, match=r"^ClientOptions.token is a bytes, expected a text or None$"):
        repo_manager.ClientOptions(token=b"secret")


@pytest.mark.parametrize("name", OPTIONS)
def test_every_options_class_checks_its_fields(name: str) -> None:
    kind = getattr(repo_manager, name)
    field = dataclasses.fields(kind)[0].name
    given = {each.name: "x" for each in dataclasses.fields(kind) if each.default is each.default_factory}
    with pytest.raises(UsageError, match=re.escape(f"{name}.{field} is")):
        kind(**{**given, field: object()})


def test_results_show_a_summary(tmp_path: Path) -> None:
    onnx.save(mlp(), tmp_path / "<b>.onnx")
    found = repo_manager.inspect_model(tmp_path / "<b>.onnx")
    added = repo_manager.add(tmp_path / "<b>.onnx", "m", tmp_path / "models")
    (entry,) = repo_manager.scan(tmp_path / "models")
    results = [found, found.sparsity, added, added.conversion, entry]
    for result in results:
        assert len(repr(result)) < 600, "a notebook's line, not every field"
        assert result._repr_html_().startswith("<table>")
    assert "m:1" in repr(added)
    assert "<b>.onnx" not in found._repr_html_()
    assert "&lt;b&gt;.onnx" in found._repr_html_()
    assert json.dumps(repo_manager.as_json(added))
