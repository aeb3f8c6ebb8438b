"""Endless, crashing and memory-hungry models: a signal, a deadline and limits end them, without remains."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.bad_peers import AnsweringPeer, triton_answers

from repo_manager.errors import InputError, ModelError
from repo_manager.onnx_model.runtime import RuntimeLimits, end_runtime, runtime_limits, runtime_process
from repo_manager.onnx_model.session import Session

_RUN = """
import sys
import numpy as np
from repo_manager.onnx_model.session import Session
session = Session(sys.argv[1])
print("runs", flush=True)
session.run({"x": np.zeros(1, np.float32)})
"""


def _endless(path: Path) -> None:
    body = onnx.parser.parse_graph(
        "body (int64 i, bool c, float[1] a) => (bool d, float[1] b) { d = Identity(c) b = Add(a, a) }"
    )
    often = onnx.numpy_helper.from_array(np.array(2**62), "often")
    true = onnx.numpy_helper.from_array(np.array(True), "true")
    node = onnx.helper.make_node("Loop", ["often", "true", "x"], ["y"], body=body)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [1])], [value("y", 1, [1])], initializer=[often, true])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_model_that_never_ends(number: signal.Signals, tmp_path: Path) -> None:
    _endless(tmp_path / "model.onnx")
    begin = "import signal; signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
    command = [sys.executable, "-c", begin + _RUN, str(tmp_path / "model.onnx")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "runs\n"
        with pytest.raises(subprocess.TimeoutExpired):  # the run does not end by itself
            process.wait(0.5)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors


_LOAD = """
import sys
from repo_manager.onnx_model.runtime import runtime_process
from repo_manager.onnx_model.session import Session
print(runtime_process()._process.pid, flush=True)
Session(sys.argv[1])
"""


def _endless_load(path: Path) -> None:
    """Save a model whose constants take minutes to fold: a matrix product of made-up ones, at load."""
    lines = ["big = ConstantOfShape<value = float[1] {1.0}>(size)", "p0 = MatMul(big, big)"]
    lines += [f"p{number} = MatMul(p{number - 1}, big)" for number in range(1, 60)]
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[3000, 3000] x) => (float[3000, 3000] y) '
        "<int64[2] size = {3000, 3000}> {" + "\n".join(lines) + "\ny = Add(x, p59) }"
    )
    onnx.save(onnx.parser.parse_model(text), path)


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while not _is_gone(pid):
        assert time.monotonic() < deadline, "the process of the model is left over"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_a_load_and_its_process(number: signal.Signals, tmp_path: Path) -> None:
    _endless_load(tmp_path / "model.onnx")
    command = [sys.executable, "-c", _LOAD, str(tmp_path / "model.onnx")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        assert not _is_gone(child)
        process.send_signal(number)
        process.wait(60)
    _wait_until_gone(child)


def test_a_deadline_ends_a_run_and_a_load(tmp_path: Path) -> None:
    _endless(tmp_path / "run.onnx")
    _endless_load(tmp_path / "load.onnx")
    session = Session(tmp_path / "run.onnx")
    child = runtime_process()._process.pid
    with runtime_limits(RuntimeLimits(timeout_s=1.0)):
        begun = time.monotonic()
        with pytest.raises(InputError, match="running it took ONNX Runtime more than 1 s"):
            session.run({"x": np.zeros(1, np.float32)})
        assert _is_gone(child)
        with pytest.raises(InputError, match=r"load\.onnx: loading it took ONNX Runtime more than 1 s"):
            Session(tmp_path / "load.onnx")
        assert time.monotonic() - begun < 60


def test_a_run_that_takes_too_much_memory_fails_and_the_next_model_runs(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (int64[1] n) => (float[k] y) { y = ConstantOfShape(n) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    try:
        with runtime_limits(RuntimeLimits(memory_bytes=1 << 30)):
            session = Session(tmp_path / "m.onnx")
            with pytest.raises(ModelError, match="running it failed"):
                session.run({"n": np.array([1 << 30])})
            assert session.run({"n": np.array([5])})["y"].tolist() == [0.0] * 5
    finally:
        end_runtime()


def test_a_model_that_crashes_onnx_runtime_is_an_error_and_can_be_loaded_again(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (int64[k] a, int64[k] b) => (int64[k] y) { y = Div(a, b) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    session, one = Session(tmp_path / "m.onnx"), np.array([-(2**63)])  # INT64_MIN / -1 overflows
    with pytest.raises(ModelError, match="crashed by SIGFPE"):
        session.run({"a": one, "b": np.array([-1])})
    assert session.run({"a": one, "b": np.array([2])})["y"].tolist() == [-(2**62)]


def test_the_process_knows_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPO_MANAGER_TOKEN", "hush")
    end_runtime()
    environment = Path(f"/proc/{runtime_process()._process.pid}/environ").read_bytes()
    end_runtime()
    assert b"PATH=" in environment
    assert b"hush" not in environment


_CONFIG = """name: "m"
backend: "onnxruntime"
input { name: "x" data_type: TYPE_FP32 dims: DIMS }
output { name: "y" data_type: TYPE_FP32 dims: DIMS }
"""


def _version(root: Path, dims: str) -> Path:
    """Write a model without a manifest, as people do by hand; return where its file goes."""
    (root / "m" / "1").mkdir(parents=True)
    (root / "m" / "config.pbtxt").write_text(_CONFIG.replace("DIMS", dims))
    return root / "m" / "1" / "model.onnx"


def _command(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "repo_manager", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_verify_names_a_model_that_takes_too_long(tmp_path: Path) -> None:
    _endless_load(_version(tmp_path, "[3000, 3000]"))
    done = _command("verify", "-r", tmp_path, "--timeout", "1", "--wide", "--json")
    found = json.loads(done.stdout)["problems"]
    assert any("loading it took ONNX Runtime more than 1 s" in each["what"] for each in found), done.stdout
    assert any("no manifest" in each["what"] for each in found), "it goes on with the rest"


@pytest.mark.parametrize(("save", "dims", "code"), [(_endless_load, "[3000, 3000]", 3), (_endless, "1", 5)])
def test_a_deploy_ends_at_its_deadline(save: Callable[[Path], None], dims: str, code: int, tmp_path: Path) -> None:
    """The model is loaded here to check its configuration, and run for a reference to the server's answer."""
    save(_version(tmp_path, dims))
    tensor = {"datatype": "FP32", "shape": json.loads(f"[{dims}]")}
    config = {"name": "m", "backend": "onnxruntime"}
    told = triton_answers("m", [{"name": "x", **tensor}], [{"name": "y", **tensor}], config)
    with AnsweringPeer(told) as peer:
        done = _command("deploy", "m:1", "-r", tmp_path, "--timeout", "3", "--to", f"http://127.0.0.1:{peer.port}")
    assert done.returncode == code, done.stderr
    assert "took ONNX Runtime more than" in done.stderr


def test_add_ends_at_its_deadline_and_publishes_nothing(tmp_path: Path) -> None:
    _endless(tmp_path / "model.onnx")
    root = tmp_path / "models"
    command = ["add", str(tmp_path / "model.onnx"), "-n", "m", "-r", str(root), "--timeout", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "repo_manager", *command], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 3
    assert "took ONNX Runtime more than 2 s" in done.stderr
    assert not root.exists() or not list(root.iterdir())
