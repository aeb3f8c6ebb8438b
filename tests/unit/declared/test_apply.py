"""apply, plan and export on real conversions, without a server."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from support import onnx_models
from support.python_models import write_python_model

from repo_manager.declared import ModelPlan, Servers, StepAction, parse_declaration, plan_declaration
from repo_manager.declared.export import document_text, export_document
from repo_manager.declared.request import source_digest
from repo_manager.errors import RepositoryError
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.session import Session
from repo_manager.pipeline.adding import AddOptions, add
from repo_manager.pipeline.apply import ApplyOptions, apply
from repo_manager.precision import ConvertOptions
from repo_manager.repository.adopt import adopt
from repo_manager.repository.configuration import change_config, set_served_versions
from repo_manager.repository.publish import publish
from repo_manager.repository.relabel import read_labels
from repo_manager.repository.scan import find_model, scan
from repo_manager.repository.tags import model_state, set_tag
from repo_manager.repository.verify import verify
from repo_manager.triton_config.config import parse_config, read_config

Bring = Callable[..., "object"]


Run = Callable[..., Any]


class Place:
    """A folder with sources, a YAML file and its declared repository."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "models"
        self.file = folder / "repository.yaml"

    def write(self, models: dict, **more: object) -> None:
        self.file.write_text(yaml.safe_dump({"models": models, **more}))

    @property
    def declaration(self):
        return parse_declaration(self.file.read_text(), name="repository.yaml")

    def plan(self, *, prune: bool = False):
        with Servers(self.root, self.folder) as servers:
            return plan_declaration(self.declaration, self.folder, self.root, servers, prune=prune)

    def apply(self, *, prune: bool = False, **options: object):
        with Servers(self.root, self.folder) as servers:
            chosen = ApplyOptions(prune=prune, **options)  # type: ignore[arg-type]
            return apply(self.declaration, self.folder, self.root, servers, options=chosen)

    def settle(self, *, prune: bool = False) -> None:
        """Apply, and check that a second run would do nothing."""
        result = self.apply(prune=prune)
        assert [model.error for model in result.failed] == []
        assert [plan.steps for plan in self.plan(prune=prune) if plan.steps or plan.error] == []


@pytest.fixture
def place(tmp_path: Path) -> Place:
    onnx_models.save(onnx_models.mlp(), tmp_path / "a.onnx")
    onnx_models.save(onnx_models.mlp(sparse=False), tmp_path / "dense.onnx")
    return Place(tmp_path)


FULL = {
    "source": "a.onnx",
    "precision": "fp16",
    "backend": "onnxruntime",
    "sparsity": "require",
    "convert": {"keep_fp32": ["fc2"], "max_drift": 0.5},
    "config": {
        "max_batch_size": 16,
        "instance_group": {"count": 2, "kind": "cpu"},
        "dynamic_batching": {"max_queue_delay_us": 100, "preferred_batch_sizes": [4, 8]},
        "set": {"parameters.intra_op_thread_count": 1, "response_cache.enable": True},
    },
    "tags": {"stable": "newest"},
    "serve": "stable",
}


def test_everything_declared_is_brought_about_and_stays(place: Place) -> None:
    output = onnx.load(place.folder / "a.onnx").graph.output[0].name
    names = [f"class {number}" for number in range(8)]
    place.write({"m": {**FULL, "labels": {output: names}}})
    place.settle()
    config = read_config(place.root / "m").message()
    assert (config.max_batch_size, config.instance_group[0].count, config.instance_group[0].kind) == (16, 2, 2)
    assert config.dynamic_batching.max_queue_delay_microseconds == 100
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.parameters["intra_op_thread_count"].string_value == "1"
    assert config.response_cache.enable
    assert read_labels(place.root, "m") == {output: tuple(names)}
    manifest = find_model(place.root, "m").versions[0].manifest
    assert manifest is not None
    assert manifest.precision == "fp16"
    assert manifest.extra["request"]["convert"] == {"keep_fp32": ["fc2"], "max_drift": 0.5}
    assert model_state(place.root, "m").tags == {"stable": 1}
    assert verify(place.root) == ()


def test_a_file_runs_no_code_unless_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = place.folder / "ran"
    (place.folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\ndef data(): return []\n")
    monkeypatch.chdir(place.folder)
    place.write({"m": {"source": "a.onnx", "precision": "int8", "calibration": "evil:data"}})
    (model,) = place.apply().failed
    assert "runs no code" in (model.error or "")
    assert model.exit_code == 2
    assert not marker.exists()
    place.apply(allow_code=True)
    assert marker.exists()


def test_a_version_below_the_declared_accuracy_is_not_published(place: Place) -> None:
    x = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    labels = Session(place.folder / "a.onnx").run({"x": x})["y"].argmax(axis=1)
    labels[::4] = (labels[::4] + 1) % 8  # right on 75 %
    np.savez(place.folder / "held.npz", x=x, labels=labels)
    model = {"source": "a.onnx", "precision": "fp16", "backend": "onnxruntime"}
    place.write({"m": {**model, "eval": {"data": "held.npz:labels", "min_accuracy": 0.9}}})
    (failed,) = place.apply().failed
    assert (failed.exit_code, "0.75" in (failed.error or "")) == (4, True)
    assert not place.root.exists()
    place.write({"m": {**model, "eval": {"data": "held.npz:labels", "min_accuracy": 0.7, "max_accuracy_drop": 0.1}}})
    place.settle()
    manifest = find_model(place.root, "m").versions[0].manifest
    assert manifest is not None
    assert (manifest.conversion or {})["accuracy"]["value"] == 0.75
    place.write({"m": {**model, "eval": "held.npz:labels"}})
    place.settle()
    place.write({"m": {**model, "eval": {"data": "held.npz:labels", "min_accuracy": 0.9}}})
    (plan,) = place.plan()
    assert (plan.exit_code, plan.steps) == (4, ())
    assert "m:1 has 0.75" in (plan.error or "")


def test_a_function_of_eval_runs_no_code_unless_told(place: Place) -> None:
    place.write({"m": {"source": "a.onnx", "eval": "evil:score"}})
    (failed,) = place.apply().failed
    assert (failed.exit_code, "runs no code" in (failed.error or "")) == (2, True)


def test_an_allowed_module_is_imported_from_the_environment_only(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    marker, installed = place.folder / "ran", place.folder / "installed"
    (installed / "company").mkdir(parents=True)
    (place.folder / "company.py").write_text(f"import os\nos.mkdir({str(marker)!r})\ndef data(): return []\n")
    monkeypatch.chdir(place.folder)
    monkeypatch.syspath_prepend(place.folder)
    place.write({"m": {"source": "a.onnx", "precision": "int8", "calibration": "company.inputs:data"}})
    (model,) = place.apply(code_modules=("comp", "other")).failed
    assert "runs no code" in (model.error or "")
    (model,) = place.apply(code_modules=("company",)).failed
    assert "current folder is not looked at" in (model.error or "")
    assert not marker.exists()
    (installed / "company" / "__init__.py").touch()
    (installed / "company" / "inputs.py").write_text("def data(): return [{'none': 1}]\n")
    sys.path.append(str(installed))
    (model,) = place.apply(code_modules=("company",)).failed
    assert "company.inputs:data" in (model.error or "")
    assert "none" in (model.error or "")
    assert not marker.exists()


def test_a_second_run_touches_no_file(place: Place) -> None:
    place.write({"m": FULL})
    place.apply()
    before = {path: path.stat().st_ctime_ns for path in place.root.rglob("*") if "apply.lock" not in path.name}
    assert place.apply().models == ()
    assert before == {path: path.stat().st_ctime_ns for path in place.root.rglob("*") if path in before}


@pytest.mark.parametrize(
    ("change", "actions"),
    [
        ({"precision": "fp32"}, ["build", "tag", "serve"]),
        ({"convert": {"keep_fp32": ["fc2"], "max_drift": 0.4}}, ["build", "tag", "serve"]),
        ({"sparsity": "report"}, []),
        ({"sparsity": "prune"}, ["build", "tag", "serve"]),
        ({"config": {"max_batch_size": 32}}, ["config"]),
        ({"config": {"instance_group": {"count": 3, "kind": "cpu"}}}, ["config"]),
        ({"config": {"dynamic_batching": False}}, ["config"]),
        ({"config": {"dynamic_batching": True}}, []),
        ({"config": {"dynamic_batching": {}}}, ["config"]),
        ({"config": {"set": {"parameters.intra_op_thread_count": None}}}, ["config"]),
        ({"tags": {"stable": 1, "best": 1}}, ["tag"]),
        ({"serve": 1}, []),
        ({"backend": "auto"}, []),
    ],
)
def test_each_change_is_seen_and_done(change: dict, actions: list[str], place: Place) -> None:
    place.write({"m": FULL})
    place.apply()
    place.write({"m": {**FULL, **change}})
    assert [step.action for step in place.plan()[0].steps] == actions
    place.settle()


def test_a_changed_source_is_converted_and_the_old_one_found_again(place: Place) -> None:
    place.write({"m": FULL})
    place.apply()
    (place.folder / "a.onnx").rename(place.folder / "old.onnx")
    onnx_models.save(onnx_models.mlp(width=96), place.folder / "a.onnx")
    place.write({"m": {**FULL, "source": "a.onnx"}, "n": {"source": "a.onnx"}})
    result = place.apply()
    assert [(model.name, model.version, model.error is None) for model in result.models][1] == ("n", 1, True)
    shutil.copy(place.folder / "old.onnx", place.folder / "a.onnx")
    onnx_models.save(onnx_models.mlp(classes=8), place.folder / "other.onnx")
    place.write({"m": {**FULL, "source": "old.onnx"}})
    assert [step.action for step in place.plan()[0].steps if step.action is StepAction.BUILD] == []


def test_what_add_made_is_recognised(place: Place) -> None:
    options = AddOptions(convert=ConvertOptions(max_drift=0.25))
    add(place.folder / "a.onnx", "m", place.root, options)
    place.write({"m": {"source": "a.onnx", "convert": {"max_drift": 0.25}}})
    assert place.plan()[0].steps == ()
    place.write({"m": {"source": "a.onnx"}})
    assert [step.action for step in place.plan()[0].steps] == ["build"]


def test_changed_calibration_data_is_seen(place: Place) -> None:
    name = onnx.load(place.folder / "a.onnx").graph.input[0].name
    data = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    np.savez(place.folder / "c.npz", **{name: data})
    place.write({"m": {"source": "a.onnx", "calibration": "c.npz"}})
    place.settle()
    np.savez(place.folder / "c.npz", **{name: data[:4]})
    assert [step.action for step in place.plan()[0].steps] == ["build"]
    place.write({"m": {"source": "a.onnx"}})
    assert [step.action for step in place.plan()[0].steps] == ["build"]


def test_external_data_belongs_to_the_source(place: Place) -> None:
    proto = onnx_models.mlp(sparse=False, width=128)
    onnx.save(proto, place.folder / "e.onnx", save_as_external_data=True, location="e.bin", size_threshold=0)
    model = load_model(place.folder / "e.onnx")
    assert source_digest(place.folder / "e.onnx", ("e.bin",)) == model.digest
    place.write({"m": {"source": "e.onnx"}})
    place.settle()
    content = bytearray((place.folder / "e.bin").read_bytes())
    content[0] ^= 1
    (place.folder / "e.bin").write_bytes(content)
    assert [step.action for step in place.plan()[0].steps] == ["build"]


def test_a_failing_model_leaves_itself_and_the_others_consistent(place: Place) -> None:
    place.write({"a": {"source": "a.onnx"}, "b": {"source": "a.onnx"}})
    place.apply()
    broken = {"source": "dense.onnx", "sparsity": "require", "serve": "newest"}
    place.write(
        {
            "a": broken,
            "gone": {"source": "missing.onnx"},
            "b": {"source": "a.onnx", "precision": "fp16", "serve": "newest"},
            "c": {"config": {"max_batch_size": 3}},
            "d": {"source": "a.onnx", "serve": 7},
            "e": {"source": "a.onnx", "serve": "nowhere"},
            "f": {"source": "a.onnx", "config": {"set": {"no_such.field": 1}}},
        }
    )
    result = place.apply()
    codes = {model.name: model.exit_code for model in result.models}
    assert codes == {"a": 4, "gone": 3, "b": 0, "c": 3, "d": 3, "e": 3, "f": 3}
    assert find_model(place.root, "a").selected == (1,)
    assert find_model(place.root, "b").selected == (2,)
    assert {entry.name for entry in scan(place.root)} == {"a", "b", "f"}
    assert verify(place.root) == ()


def test_a_version_that_an_ensemble_pins_stays_served(place: Place) -> None:
    for name in ("scale", "ens"):
        write_python_model(place.root, name, versions=(1, 2))
        adopt(place.root, name)
    config = place.root / "ens" / "config.pbtxt"
    config.write_text(config.read_text().replace('"scale" model_version: -1', '"scale" model_version: 1'))
    set_served_versions(place.root, "scale", [1])
    before = (place.root / "scale" / "config.pbtxt").read_bytes()
    place.write({"scale": {"serve": 2, "versions": [1, 2]}})
    (planned,) = place.plan()
    assert "version 1 would not be served any more, and ens needs it" in str(planned.error)
    assert planned.exit_code == 3
    assert [each.name for each in place.apply().failed] == ["scale"]
    assert (place.root / "scale" / "config.pbtxt").read_bytes() == before
    place.write({"scale": {"serve": [1, 2], "versions": [1, 2]}})
    assert [step.versions for step in place.plan()[0].steps] == [(1, 2)]


def test_prune_removes_what_is_not_declared_and_nothing_that_is_used(place: Place) -> None:
    for precision in ("fp32", "fp16", "fp32"):
        place.write({"m": {"source": "a.onnx", "precision": precision, "serve": "newest"}, "n": {"source": "a.onnx"}})
        place.apply()
    add(place.folder / "a.onnx", "m", place.root, AddOptions(convert=ConvertOptions(max_drift=0.3)))
    add(place.folder / "a.onnx", "m", place.root, AddOptions(convert=ConvertOptions(max_drift=0.4)))
    set_tag(place.root, "m", "kept", 3)
    place.write({"m": {"source": "a.onnx", "serve": "newest", "versions": [4]}})
    assert [plan.steps for plan in place.plan() if plan.steps] == []
    steps = {plan.name: [step.what for step in plan.steps] for plan in place.plan(prune=True)}
    assert steps == {"m": ["version 2"], "n": ["the whole undeclared model"]}
    place.settle(prune=True)
    assert [entry.version for entry in find_model(place.root, "m").versions] == [1, 3, 4]
    assert {entry.name for entry in scan(place.root)} == {"m"}


def test_a_failure_keeps_what_is_not_declared(place: Place) -> None:
    place.write({"n": {"source": "a.onnx"}})
    place.apply()
    place.write({"m": {"source": "missing.onnx"}})
    result = place.apply(prune=True)
    assert [model.error is not None for model in result.models] == [True, True]
    assert {entry.name for entry in scan(place.root)} == {"n"}


def test_an_exported_repository_needs_no_change(place: Place) -> None:
    place.write({"m": FULL, "plain": {"source": "a.onnx"}})
    place.apply()
    set_tag(place.root, "plain", "best", 1)
    document, notes = export_document(place.root)
    text = document_text(document)
    assert notes == ()
    for folder in (place.folder, place.folder / "elsewhere"):  # With the sources beside it, and without.
        folder.mkdir(exist_ok=True)
        other = Place(folder)
        other.root = place.root
        other.file.write_text(text)
        assert [(plan.name, plan.error, plan.steps) for plan in other.plan(prune=True)] == [
            ("m", None, ()),
            ("plain", None, ()),
        ]
    assert yaml.safe_load(text)["models"]["m"]["config"]["instance_group"] == {"count": 2, "kind": "cpu"}


def test_an_exported_repository_can_be_built_again(place: Place) -> None:
    place.write({"m": FULL})
    place.apply()
    text = document_text(export_document(place.root)[0])
    place.file.write_text(text)
    shutil.rmtree(place.root)
    place.settle()
    assert find_model(place.root, "m").selected == (1,)


def test_the_served_version_is_exported_and_built_again(place: Place) -> None:
    """`serve: 1` says nothing in a repository built anew: the file has the source of the served version."""
    for precision in ("fp32", "fp16"):
        place.write({"m": {"source": "a.onnx", "precision": precision, "backend": "onnxruntime"}})
        place.settle()
    place.write({"m": {"source": "a.onnx", "backend": "onnxruntime", "serve": 1}})
    place.settle()
    set_tag(place.root, "m", "next", 2)
    document, notes = export_document(place.root, base=place.folder)
    model = document["models"]["m"]
    assert (model["precision"], model["serve"], model["tags"]) == ("fp32", "newest", {"next": 2})
    assert "elsewhere these fail: tag next (2);" in " ".join(notes)
    place.write(document["models"])
    assert place.plan()[0].steps == ()
    del model["tags"]
    place.write(document["models"])
    shutil.rmtree(place.root)
    place.settle()
    (version,) = find_model(place.root, "m").versions
    assert version.manifest is not None
    assert version.manifest.precision == "fp32"


def test_the_accuracy_gate_is_exported(place: Place) -> None:
    x = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)
    held = place.folder / "data" / "held.npz"
    held.parent.mkdir()
    np.savez(held, x=x, labels=Session(place.folder / "a.onnx").run({"x": x})["y"].argmax(axis=1))
    gate = {"data": "data/held.npz:labels:y", "min_accuracy": 0.5, "max_accuracy_drop": 0.25}
    place.write({"m": {"source": "a.onnx", "backend": "onnxruntime", "eval": gate}})
    place.settle()
    document, notes = export_document(place.root, base=place.folder, sources=[held.parent])
    assert (document["models"]["m"]["eval"], notes) == (gate, ())
    place.write(document["models"])
    assert place.plan()[0].steps == ()
    held.unlink()
    assert "held.npz" in " ".join(export_document(place.root, base=place.folder)[1])


RICH = {
    "several groups": {"instance_group": "[{ kind: KIND_CPU }, { name: 'b' count: 2 kind: KIND_CPU }]"},
    "a group without a count": {"instance_group": "[{ kind: KIND_CPU }]"},
    "queue policies": {
        "dynamic_batching": "{ priority_levels: 2 default_priority_level: 1 "
        "priority_queue_policy { key: 2 value { max_queue_size: 4 } } }"
    },
    "plain batching": {"dynamic_batching": "{}"},
    "no batching, no groups": {"dynamic_batching": None, "instance_group": None},
    "others": {
        "parameters.yes": "no",
        "parameters.count": "010",
        "metric_tags": '[{ key: "team" value: "a \\"b\\" é" }]',
        "optimization.graph.level": "1",
        "input[0].format": "FORMAT_NONE",
        "output[0].reshape": "{ shape: [8] }",
    },
}


@pytest.mark.parametrize("changes", RICH.values(), ids=RICH)
def test_no_field_of_a_configuration_is_lost_when_it_is_exported_and_built_again(
    place: Place, changes: dict[str, str | None]
) -> None:
    place.write({"m": {"source": "a.onnx", "config": FULL["config"]}})
    place.apply()
    change_config(place.root, "m", changes)
    before = read_config(place.root / "m").message()
    place.file.write_text(document_text(export_document(place.root)[0]))
    assert [plan.steps for plan in place.plan()] == [()]
    shutil.rmtree(place.root)
    place.settle()
    assert read_config(place.root / "m").message() == before


def test_changed_dims_and_another_file_name_are_exported(place: Place) -> None:
    tensors = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", "a", "b"]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", tensors[:1], tensors[1:])
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), place.folder / "free.onnx")
    named = {"config": {"set": {"default_model_filename": "net.onnx"}}}
    place.write({"m": {"source": "free.onnx", **named}, "plain": {"source": "free.onnx"}})
    place.settle()
    assert (place.root / "m" / "1" / "net.onnx").is_file()
    change_config(place.root, "m", {"input[0].dims": "[4, -1]"})
    assert verify(place.root) == ()  # the model accepts them
    before = read_config(place.root / "m").message()
    text = document_text(export_document(place.root)[0])
    assert "default_model_filename: net.onnx" in text
    assert "dims" not in yaml.safe_load(text)["models"]["plain"]["config"].get("set", {})
    place.file.write_text(text)
    assert [plan.steps for plan in place.plan()] == [(), ()]
    shutil.rmtree(place.root)
    place.settle()
    assert read_config(place.root / "m").message() == before


def test_sources_are_found_by_their_content_and_what_is_missing_is_named(place: Place, run: Run) -> None:
    place.write({"m": {**FULL, "source": "a.onnx"}, "plain": {"source": "dense.onnx"}})
    place.apply()
    shutil.rmtree(place.root / "plain")
    (place.folder / "deep" / "er").mkdir(parents=True)
    (place.folder / "a.onnx").rename(place.folder / "deep" / "er" / "renamed.onnx")
    out = place.folder / "elsewhere"
    out.mkdir()
    unknown = run("export", "-r", place.root, "-o", out / "unknown.yaml")
    assert (unknown.code, "its source a.onnx (sha256:" in unknown.err, "--sources" in unknown.err) == (0, True, True)
    assert run("export", "-r", place.root, "-o", out / "e.yaml", "--sources", place.folder / "nope").code == 2
    found = run("export", "-r", place.root, "-o", out / "e.yaml", "--sources", place.folder / "deep")
    assert (found.code, "was not found" in found.err) == (0, False)
    source = yaml.safe_load((out / "e.yaml").read_text())["models"]["m"]["source"]
    assert source["path"] == "../deep/er/renamed.onnx"
    shutil.rmtree(place.root)
    assert run("apply", out / "e.yaml", "-r", place.root).code == 0
    assert find_model(place.root, "m").selected == (1,)
    assert run("apply", out / "e.yaml", "-r", place.root, "--check").code == 0


def test_what_was_published_as_files_is_said_to_need_a_copy(place: Place, run: Run) -> None:
    code = place.folder / "model.py"
    code.write_text("class TritonPythonModel: ...")
    io = 'input { name: "x" data_type: TYPE_FP32 dims: [1] } output { name: "y" data_type: TYPE_FP32 dims: [1] }'
    config = parse_config(f'name: "code" backend: "python" default_model_filename: "model.py" {io}')
    publish(place.root, "code", {"model.py": code}, config, {"source": {"path": "code"}})
    change_config(place.root, "code", RICH["a group without a count"])
    exported = run("export", "-r", place.root, "-o", place.folder / "e.yaml")
    assert "code: version 1 cannot be built by apply" in exported.err
    assert "repo-manager copy code:VERSION" in exported.err
    assert run("apply", place.folder / "e.yaml", "-r", place.root, "--check").code == 0


def test_a_pinned_source_must_be_what_it_is_pinned_to(place: Place) -> None:
    digest = load_model(place.folder / "a.onnx").digest
    place.write({"m": {"source": {"path": "a.onnx", "digest": digest}}})
    place.settle()
    place.write({"n": {"source": {"path": "dense.onnx", "digest": digest}}})
    (failed,) = place.apply().failed
    assert "differs from its pinned digest" in (failed.error or "")
    assert not (place.root / "n").exists()


def test_two_at_once_are_refused(place: Place) -> None:
    place.write({"m": {"source": "a.onnx"}})
    place.apply()

    def second(_: object) -> None:
        with pytest.raises(RepositoryError, match=r"apply\.lock is locked by another process"):
            place.apply()

    with Servers(place.root, place.folder) as servers:
        apply(place.declaration, place.folder, place.root, servers, show=second)


def test_what_is_done_is_the_plan_that_was_shown(place: Place) -> None:
    place.write({"m": FULL, "n": {"source": "dense.onnx", "labels": {}}})
    shown: list[str] = []

    def show(plans: tuple[ModelPlan, ...]) -> None:
        shown.extend(f"{plan.name} {step.action}" for plan in plans for step in plan.steps)
        # Declared anew in between: the plan shown is the plan executed.
        place.write({"m": {**FULL, "tags": {"other": "newest"}}})

    with Servers(place.root, place.folder) as servers:
        result = apply(place.declaration, place.folder, place.root, servers, show=show)
    done = [f"{model.name} {what.split()[0].strip(':')}" for model in result.models for what in model.done]
    assert done == [line.replace(" build", " built") for line in shown]
    assert "m config" in shown  # the first version's config.pbtxt, too
    assert set(model_state(place.root, "m").tags) == {"stable"}


def test_the_command_plans_once(place: Place, run: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    place.write({"m": {"source": "a.onnx", "serve": "newest"}})
    plans = []

    def counted(*arguments: object, **options: object) -> tuple[ModelPlan, ...]:
        plans.append(plan_declaration(*arguments, **options))  # type: ignore[arg-type]
        return plans[-1]

    monkeypatch.setattr("repo_manager.declared.plan.plan_declaration", counted)
    assert run("apply", place.file, "--repository", place.root, "--quiet").code == 0  # type: ignore[attr-defined]
    assert len(plans) == 1


def test_the_command_line(place: Place, run: Callable[..., object]) -> None:
    place.write({"m": {"source": "a.onnx", "serve": "newest"}})
    arguments = ("apply", place.file, "--repository", place.root)
    assert run(*arguments, "--check").code == 8  # type: ignore[attr-defined]
    planned = run(*arguments, "--dry-run", "--json")
    assert (planned.code, json.loads(planned.out)["changes"]) == (0, True)  # type: ignore[attr-defined]
    assert not place.root.exists()
    assert run(*arguments, "--quiet").code == 0  # type: ignore[attr-defined]
    again = run(*arguments, "--check", "--json")
    assert (again.code, json.loads(again.out)["changes"]) == (0, False)  # type: ignore[attr-defined]
    nothing = run(*arguments)
    assert (nothing.code, "1 model as declared already" in nothing.out) == (0, True)  # type: ignore[attr-defined]
    place.write({"m": {"source": "a.onnx"}, "n": {"source": "missing.onnx"}})
    assert run(*arguments).code == 3  # type: ignore[attr-defined]
    assert run(*arguments, "--check").code == 3  # type: ignore[attr-defined]
    assert run("export", "--repository", place.root, "--output", place.folder / "e.yaml").code == 0  # type: ignore[attr-defined]
    assert run("apply", place.folder / "e.yaml", "-r", place.root, "--prune", "--check").code == 0  # type: ignore[attr-defined]
    assert run("export", "--repository", place.root, "-o", place.folder / "e.yaml").code == 2  # type: ignore[attr-defined]
    exported = run("export", "--repository", place.root, "--json")
    assert json.loads(exported.out)["models"]["m"]["serve"] == "newest"  # type: ignore[attr-defined]
    assert yaml.safe_load(run("export", "-r", place.root).out) == json.loads(exported.out)  # type: ignore[attr-defined]
    place.file.write_text("models: {m: {surce: x}}")
    wrong = run(*arguments)
    assert wrong.code == 3  # type: ignore[attr-defined]
    assert "did you mean 'source'" in wrong.err  # type: ignore[attr-defined]


def test_the_result_of_a_tuning_is_declared_by_name(place: Place) -> None:
    """The tuning's changes are applied, a field declared beside them wins, and a second run changes nothing."""
    place.write({"m": {"source": "a.onnx"}})
    place.settle()
    changes = {"instance_group.count": "2", "dynamic_batching.max_queue_delay_microseconds": "300"}
    document = {"versions": {"m": 1}, "changes": {"m": changes}}
    (place.folder / "tuned.json").write_text(json.dumps(document))
    place.write({"m": {"source": "a.onnx", "config": {"tuned": "tuned.json", "instance_group": {"count": 3}}}})
    place.settle()
    config = read_config(place.root / "m" / "config.pbtxt").message()
    assert (config.instance_group[0].count, config.dynamic_batching.max_queue_delay_microseconds) == (3, 300)


@pytest.mark.parametrize(
    ("content", "reference", "says"),
    [
        ('{"versions": {"other": 1}, "changes": {}}', "tuned.json", "is a tuning of other, not of m"),
        ("[]", "tuned.json", "is no result of a tuning"),
        ("{}", "missing.json", "the tuning cannot be read"),
        (
            '{"versions": {"m": 1}, "changes": {}}',
            {"path": "tuned.json", "digest": "sha256:" + 64 * "0"},
            "differs from its pinned digest",
        ),
    ],
)
def test_a_tuning_that_does_not_fit_is_named(place: Place, content: str, reference: object, says: str) -> None:
    place.write({"m": {"source": "a.onnx"}})
    place.settle()
    (place.folder / "tuned.json").write_text(content)
    place.write({"m": {"source": "a.onnx", "config": {"tuned": reference}}})
    (plan,) = place.plan()
    assert plan.error is not None
    assert says in plan.error
