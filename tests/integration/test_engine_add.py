"""`add` from the shell, interrupted by a person, and its files for several GPU kinds: real builder, real server."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.serving import running_server

from repo_manager import samples
from repo_manager.engine.fit import read_plan_header
from repo_manager.engine.options import EngineOptions
from repo_manager.optional import is_installed
from repo_manager.pipeline.adding import AddOptions, add
from repo_manager.repository.verify import verify
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions

pytestmark = pytest.mark.integration

needs_rtx = pytest.mark.skipif(not is_installed("tensorrt_rtx"), reason="pip install 'triton-repo-manager[rtx]'")


def tree(root: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with a file's content."""
    paths = sorted(root.rglob("*")) if root.exists() else []
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of 120 small convolutions, whose build takes a second or more and whose runs take nothing."""
    random, nodes, weights, x = np.random.default_rng(0), [], [], "x"
    for index in range(120):
        scale = np.float32((2 / (16 * 9)) ** 0.5)
        weights.append(numpy_helper.from_array(random.standard_normal((16, 16, 3, 3), np.float32) * scale, f"w{index}"))
        nodes.append(helper.make_node("Conv", [x, f"w{index}"], [f"c{index}"], name=f"conv{index}", pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"], name=f"relu{index}"))
        x = f"r{index}"
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "deep",
        [info("x", TensorProto.FLOAT, ["N", 16, 8, 8])],
        [info(x, TensorProto.FLOAT, ["N", 16, 8, 8])],
        weights,
    )
    path = tmp_path_factory.mktemp("model") / "deep.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def run_on_a_terminal(
    arguments: list[object], environment: dict[str, str], act: Callable[[str, subprocess.Popen[bytes]], bool]
) -> tuple[int, str]:
    """Run the command with a terminal as stderr. `act` sees the output so far until it returns true."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "repo_manager", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=follower, env=environment)
    os.close(follower)
    shown, done, deadline = b"", False, time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([leader], [], [], 0.05)[0]:
            try:
                shown += os.read(leader, 1 << 16)
            except OSError:  # the other end is closed: the command has ended
                break
        done = done or act(shown.decode(errors="replace"), process)
    os.close(leader)
    return process.wait(timeout=30), shown.decode(errors="replace")


@needs_rtx
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_build_stopped_from_the_shell_leaves_the_repository_as_it_was(
    number: signal.Signals, deep: Path, tmp_path: Path
) -> None:
    repository, scratch = tmp_path / "models", tmp_path / "scratch"
    scratch.mkdir()
    add(samples.sample_model(), "deep", repository, AddOptions(backend="onnxruntime"))
    before = tree(repository)
    environment = {**os.environ, "TMPDIR": str(scratch), "TERM": "xterm", "COLUMNS": "120"}

    def stop(shown: str, process: subprocess.Popen[bytes]) -> bool:
        if "Building engine" not in shown:
            return False
        process.send_signal(number)
        return True

    arguments = ["add", deep, "-n", "other", "-r", repository, "--backend", "tensorrt_rtx"]
    code, shown = run_on_a_terminal(arguments, environment, stop)
    assert "Building engine" in shown, shown
    assert code == (-9 if number is signal.SIGKILL else 130), shown
    assert tree(repository) == before
    assert verify(repository) == ()
    if number is not signal.SIGKILL:
        assert list(scratch.glob("repo-manager*")) == [], "it cleans up behind itself"
        assert "Traceback" not in shown


@needs_rtx
def test_a_terminal_shows_the_builders_steps(deep: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    arguments = ["add", deep, "-n", "deep", "-r", tmp_path / "models", "--backend", "tensorrt_rtx"]
    code, shown = run_on_a_terminal(arguments, environment, lambda *_: True)
    assert code == 0, shown
    assert "Building engine" in shown
    assert "/6" in shown, "steps done of steps in all"
    assert (tmp_path / "models" / "deep" / "1" / "model.engine").is_file()


@needs_rtx
def test_an_engine_is_built_for_each_gpu_kind(tmp_path: Path) -> None:
    root = tmp_path / "models"
    engine = EngineOptions(plans={"8.6": None, "8.9": None})
    built = add(samples.sample_model(), "m", root, AddOptions(backend="tensorrt_rtx", engine=engine, control=True))
    for capability in ("8.6", "8.9"):
        header = read_plan_header(root / "m" / "1" / f"model_sm{capability.replace('.', '')}.engine")
        assert header.compute_capabilities == (capability,)
    section = json.loads((root / "m" / "1" / "manifest.json").read_text())["engine"]
    assert {plan["built"] for plan in section["plans"].values()} == {"here"}
    assert section["plans"]["8.9"]["build"]["options"]["compute_capabilities"] == ["8.9"]
    assert {control.name for control in built.controls} == {"m__dense", "m__noflag"}
    noflag = json.loads((root / "m__noflag" / "1" / "manifest.json").read_text())["engine"]
    assert noflag["plans"]["8.6"]["build"]["options"]["sparse"] is False
    given = {"8.6": root / "m" / "1" / "model_sm86.engine", "8.9": None}
    mixed = add(
        samples.sample_model(), "mixed", root, AddOptions(backend="tensorrt_rtx", engine=EngineOptions(plans=given))
    )
    section = json.loads((root / "mixed" / "1" / "manifest.json").read_text())["engine"]
    assert {key: plan["built"] for key, plan in section["plans"].items()} == {"8.6": "elsewhere", "8.9": "here"}
    assert mixed.engine["plan_version"] == read_plan_header(given["8.6"]).version
    assert verify(root) == ()


def test_tritonserver_takes_the_named_configuration(tmp_path: Path) -> None:
    overrides = tmp_path / "big.pbtxt"
    overrides.write_text("max_batch_size: 64")
    root = tmp_path / "models"
    add(
        samples.sample_model(),
        "digits",
        root,
        AddOptions(backend="onnxruntime", model_configs={"big": str(overrides)}),
    )
    for arguments, expected in (((), 8), (("--model-config-name=big",), 64)):
        with running_server(ServerOptions(repository=str(root), extra_args=arguments)) as server:
            server.wait_ready(60)
            client = TritonClient.connect(server.grpc_url)
            client.load("digits")
            assert client.model_config("digits").max_batch_size == expected
