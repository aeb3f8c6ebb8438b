"""The command line as its users meet it: exit codes, stdout and stderr, and nothing lost."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repo_manager import samples
from repo_manager.cli.main import _with_place
from repo_manager.repository.state import record_of
from repo_manager.repository.tags import record_deployment, record_rollout
from repo_manager.server.records import running_server

Run = Callable[..., Any]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "repository"


def snapshot(folder: Path) -> dict[str, str]:
    """Path -> digest of everything below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# Rich draws the help. The command in use imports everything else.
HEAVY = ("numpy", "onnx", "onnxruntime", "tritonclient", "google.protobuf", "pydantic", "grpc", "jinja2")


def test_help_imports_nothing_heavy() -> None:
    """The causes of a fast --help. Its time is measured in benchmarks/."""
    code = (
        "import sys; sys.argv = ['repo-manager', '--help']\n"
        "from repo_manager.cli.main import main\n"
        "try: main()\n"
        f"except SystemExit: print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "HEAVY []" in ended.stdout
    for command in ("inspect", "add", "deploy", "rollback", "loadtest", "serve", "quickstart"):
        assert command in ended.stdout


def test_texts_lists_and_choices_are_taken_without_a_converter(tmp_path: Path) -> None:
    given = ["serve", "-r", str(tmp_path / "none"), "--load", "a", "--load", "b", "--restart", "on-failure"]
    code = (
        f"import sys; sys.argv = ['repo-manager', *{given!r}]\n"
        "from repo_manager.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as ended: print('CODE', ended.code, 'pydantic' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "CODE 3 False" in ended.stdout
    assert str(tmp_path / "none") in ended.stderr


def test_inspect_shows_the_state_of_every_weight(run: Run) -> None:
    table = run("inspect", samples.sample_model())
    assert table.code == 0
    assert "image: float32[batch, 1, 8, 8]" in table.out
    assert "2:4 sparsity" in table.out
    ended = run("inspect", samples.sample_model(), "--json")
    document = json.loads(ended.out)
    assert document["signature"]["outputs"][0]["name"] == "logits"
    assert {layer["op_type"] for layer in document["sparsity"]["layers"]} <= {"Conv", "Gemm", "MatMul"}
    assert sum(layer["verdict"] == "valid" for layer in document["sparsity"]["layers"]) >= 3


def test_add_publishes_numbered_versions_and_never_touches_an_old_one(run: Run, repository: Path) -> None:
    first = run("add", samples.sample_model(), "--name", "digits", "-r", repository, "--json")
    assert (first.code, json.loads(first.out)["version"]) == (0, 1)
    before = snapshot(repository / "digits")
    second = run("add", samples.sample_model(), "--name", "digits", "-r", repository, "--precision", "fp16", "--json")
    assert (second.code, json.loads(second.out)["version"]) == (0, 2)
    after = snapshot(repository / "digits")
    assert {path: after[path] for path in before} == before
    manifest = json.loads((repository / "digits" / "2" / "manifest.json").read_text())
    assert manifest["precision"] == "fp16"
    assert manifest["source"]["digest"].startswith("sha256:")


def test_add_dry_run_writes_nothing_and_shows_the_config(run: Run, repository: Path) -> None:
    ended = run("add", samples.sample_model(), "--name", "digits", "-r", repository, "--dry-run")
    assert ended.code == 0
    assert 'backend: "onnxruntime"' in ended.out
    assert not repository.exists()


def test_int8_needs_calibration_and_says_how(run: Run, repository: Path) -> None:
    ended = run("add", samples.sample_model(), "--name", "digits", "-r", repository, "--precision", "int8")
    assert ended.code == 3
    assert "--calibration" in ended.err
    assert not repository.exists()


def test_require_lists_the_layers_that_are_not_sparse(run: Run, repository: Path) -> None:
    ended = run("add", samples.dense_twin(), "--name", "d", "-r", repository, "--sparsity", "require")
    assert ended.code == 4
    assert "not 2:4" in ended.err
    assert not repository.exists()
    assert run("add", samples.sample_model(), "--name", "d", "-r", repository, "--sparsity", "require").code == 0


def test_prune_on_the_way_makes_every_eligible_layer_valid(run: Run, repository: Path) -> None:
    ended = run("add", samples.dense_twin(), "--name", "d", "-r", repository, "--sparsity", "prune", "--json")
    assert ended.code == 0
    layers = json.loads(ended.out)["sparsity"]["layers"]
    assert not [layer for layer in layers if layer["verdict"] != "valid" and layer["asp_eligible"]]


@pytest.mark.parametrize(
    "content", [b"", b"not an onnx file", b"\x08\x07\x12", b"\x00" * 4096], ids=["empty", "text", "cut", "zeros"]
)
@pytest.mark.parametrize("command", ["inspect", "add"])
def test_a_broken_file_gets_one_message_and_changes_nothing(
    run: Run, repository: Path, tmp_path: Path, command: str, content: bytes
) -> None:
    assert run("add", samples.sample_model(), "--name", "digits", "-r", repository).code == 0
    before = snapshot(repository)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(content)
    more = ["--name", "digits", "-r", repository] if command == "add" else []
    ended = run(command, broken, *more)
    assert ended.code == 3
    assert ended.err.count("Error:") == 1
    assert "broken.onnx" in ended.err
    assert "Traceback" not in ended.err
    assert snapshot(repository) == before


def test_errors_are_json_too_when_asked(run: Run, tmp_path: Path) -> None:
    ended = run("inspect", tmp_path / "none.onnx", "--json")
    error = json.loads(ended.out)["error"]
    assert (ended.code, error["exit_code"], error["type"]) == (3, 3, "ModelError")


def test_list_show_and_verify_agree_with_what_was_added(run: Run, repository: Path) -> None:
    for precision in ("fp32", "fp16"):
        assert run("add", samples.sample_model(), "-n", "digits", "-r", repository, "-p", precision).code == 0
    listed = json.loads(run("list", "-r", repository, "--json").out)
    assert listed["repository"] == str(repository)
    (model,) = listed["models"]
    assert [version["version"] for version in model["versions"]] == [1, 2]
    assert model["selected"] == [1]
    shown = run("show", "digits", "-r", repository)
    assert "fp16" in shown.out
    assert run("verify", "-r", repository).code == 0


def test_one_version_and_the_roll_outs_of_a_model_are_shown(run: Run, repository: Path) -> None:
    assert run("add", samples.sample_model(), "-n", "digits", "-r", repository).code == 0
    assert run("tag", "digits:1", "stable", "-r", repository).code == 0
    assert json.loads(run("list", "-r", repository, "--json").out)["models"][0]["tags"] == {"stable": 1}
    assert "stable:1" in run("list", "-r", repository).out
    document = json.loads(run("show", "digits:stable", "-r", repository, "--json").out)
    facts = [document[key] for key in ("name", "version", "tags", "selected", "deployed")]
    assert facts == ["digits", 1, ["stable"], True, False]
    assert document["manifest"]["source"]["path"] == "digits_sparse.onnx"
    shown = run("show", "digits:1", "-r", repository).out
    assert all(word in shown for word in ("digits_sparse.onnx", "2:4 kept", "model.onnx", "selected by the version"))
    assert run("show", "digits:7", "-r", repository).code == 3

    assert "was never deployed" in run("history", "digits", "-r", repository).out
    assert "there is nothing to do" in run("undeploy", "digits", "-r", repository, "--dry-run").out
    record_deployment(repository, "digits", 1)  # as releases without a history did
    record_deployment(repository, "digits", 1, record_of("deploy", 1, [], "grpc://a:1"))
    failed = record_of("undeploy", None, [1], "grpc://a:1", outcome="undone", reason="a:1 does not answer")
    record_rollout(repository, "digits", failed)
    records = json.loads(run("history", "digits", "-r", repository, "--json").out)["rollouts"]
    assert [(each["action"], each["version"], each["outcome"]) for each in records] == [
        ("deploy", 1, "done"),
        ("deploy", 1, "done"),
        ("undeploy", None, "undone"),
    ]
    table = run("history", "digits", "-r", repository).out
    assert "a:1 does not answer" in table
    assert table.index("undone") < table.index("not recorded"), "the latest comes first"
    assert run("history", "nope", "-r", repository).code == 3

    planned = run("undeploy", "digits", "-r", repository, "--dry-run")
    assert "would not load it any more" in planned.out
    assert run("undeploy", "digits", "-r", repository).code == 0
    assert json.loads(run("list", "-r", repository, "--json").out)["models"][0]["deployed"] is None
    assert run("tag", "digits", "stable", "--delete", "-r", repository).code == 0
    assert run("remove", "digits", "-r", repository).code == 0, "nobody serves it"
    missing = run("status", "-r", repository / "nowhere")
    assert (missing.code, "nowhere does not exist" in missing.err) == (3, True)


def test_verify_finds_a_changed_byte(run: Run, repository: Path) -> None:
    assert run("add", samples.sample_model(), "-n", "digits", "-r", repository).code == 0
    path = repository / "digits" / "1" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(data))
    ended = run("verify", "-r", repository)
    assert ended.code == 3
    assert "model.onnx" in ended.out


@pytest.mark.parametrize("name", ["../out", "a/b", "", ".hidden", "a b", "a\nb"])
def test_a_name_that_would_be_misread_is_refused(run: Run, repository: Path, name: str) -> None:
    ended = run("add", samples.sample_model(), "--name", name, "-r", repository)
    assert ended.code in (2, 3)
    assert not repository.exists()


def test_convert_writes_only_what_passes(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    refused = run("convert", samples.sample_model(), "-o", output, "-p", "fp16", "--max-drift", "0")
    assert refused.code == 4
    assert not output.exists()
    assert run("convert", samples.sample_model(), "-o", output, "-p", "fp16").code == 0
    assert output.exists()


def test_prune_writes_a_sparse_model_and_warns(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    dry = run("prune", samples.dense_twin(), "-o", output, "--dry-run")
    assert dry.code == 0
    assert not output.exists()
    ended = run("prune", samples.dense_twin(), "-o", output)
    assert ended.code == 0
    assert "retrain" in ended.err
    assert "valid" in run("inspect", output).out


def test_labels_and_warmup_reach_the_config(run: Run, repository: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"digit {number}\n" for number in range(10)))
    ended = run("add", samples.sample_model(), "-n", "d", "-r", repository, "--labels", f"logits={labels}", "--warmup")
    assert ended.code == 0
    config = (repository / "d" / "config.pbtxt").read_text()
    assert "label_filename" in config
    assert "model_warmup" in config


def test_the_repository_comes_from_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REPO_MANAGER_REPOSITORY", str(tmp_path / "elsewhere"))
    assert run("add", samples.sample_model(), "-n", "d").code == 0
    assert (tmp_path / "elsewhere" / "d" / "1" / "model.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "m.onnx", "--name", "a", "--sparsity", "maybe"], "'require', 'report', 'prune'"),
        (["inspect", "m.onnx", "--shape", "image"], "expected NAME:SIZE"),
        (["add", "m.onnx"], "--name"),
        (["loadtest", "digits:x"], "NAME:VERSION"),
        (["loadtest", "digits", "--slo", "p99"], "p99"),
    ],
)
def test_a_wrong_option_is_a_usage_error(run: Run, arguments: list[str], message: str) -> None:
    ended = run(*arguments)
    assert ended.code == 2
    assert message in ended.err


def test_loadtest_without_a_server_says_how_to_start_one(run: Run, repository: Path) -> None:
    repository.mkdir()
    ended = run("loadtest", "digits", "-r", repository)
    assert ended.code == 5
    assert f"repo-manager serve -r {repository}" in ended.err
    assert " -r " not in run("loadtest", "digits").err


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["show", "m", "-r", "a b"], " -r 'a b'"),
        (["show", "m", "--repository=d"], " -r d"),
        (["show", "m", "--context", "lab"], " --context lab"),
        (["show", "m"], ""),
    ],
)
def test_a_hint_names_the_place_that_the_user_named(words: list[str], place: str) -> None:
    expected = f"Run repo-manager verify{place}, or `repo-manager show{place} m`."
    assert _with_place("Run repo-manager verify, or `repo-manager show m`.", words) == expected
    for other in ("See: repo-manager show m -r x", "The other repo-manager command."):
        assert _with_place(other, words) == other


@pytest.mark.parametrize("command", ["deploy", "rollback"])
def test_a_dry_run_starts_no_server(run: Run, repository: Path, command: str) -> None:
    assert run("add", samples.sample_model(), "-n", "digits", "-r", repository).code == 0
    ended = run(command, "digits", "-r", repository, "--dry-run")
    if command == "rollback":
        assert (ended.code, "no earlier deployment" in ended.err) == (3, True)
    else:
        assert (ended.code, "a server to be started" in ended.out) == (0, True), ended.err
    assert running_server(repository) is None


def test_doctor_knows_what_is_here(run: Run) -> None:
    machine = json.loads(run("doctor", "--json").out)
    versions = {package["name"]: package["version"] for package in machine["packages"]}
    assert versions["onnx"] is not None
    assert machine["cpus"] >= 1


def test_int8_data_with_a_wrong_name_is_told(run: Run, repository: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, picture=np.zeros((8, 1, 8, 8), np.float32))
    ended = run("add", samples.sample_model(), "-n", "d", "-r", repository, "-p", "int8", "--calibration", data)
    assert ended.code == 3
    assert "image" in ended.err
    assert not repository.exists()


def test_prune_within_a_budget(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_metric.py").write_text(
        "import numpy as np\n"
        "from repo_manager import samples\n"
        "def accuracy(run):\n"
        "    with np.load(samples.calibration_data()) as data:\n"
        "        name = data.files[0]\n"
        "        return -float(np.mean([run({name: x[None]})['logits'].std() < 0 for x in data[name][:8]]))\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    given = [samples.dense_twin(), "-o", "out.onnx", "--calibration", samples.calibration_data()]
    ended = run("prune", *given, "--metric", "own_metric:accuracy", "--json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert document["evidence"]["budget"]["dense_metric"] == 0
    assert len(document["pruned"]) == 3
    ended = run("prune", *given, "--max-drift", "0.1")
    assert "The front" in ended.out
    assert "solved one behind the other" in ended.out
    assert run("prune", given[0], "-o", "x.onnx", "--max-drift", "0.1").code == 2
    assert run("prune", *given, "--metric", "own_metric:nothing").code == 3
    assert run("prune", *given, "--max-drift", "0.1", "--html", "page.html").code == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Compute able to run sparse against its cost" in page
    assert "limit 0.1" in page
    assert "/conv2/Conv" in page


def test_a_signal_that_an_import_turns_into_its_own_error_still_ends_with_130() -> None:
    """C modules turn an interrupt during their import into an ImportError."""
    code = (
        "import os, signal\n"
        "import repo_manager.cli.main as cli\n"
        "def app(*_words, **_options):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        signal.pause()\n"
        "    except KeyboardInterrupt:\n"
        "        raise ImportError('numpy.core.multiarray failed to import') from None\n"
        "cli.app = app\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (130, "")
