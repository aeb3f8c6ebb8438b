"""Commands against misbehaving servers: no traceback, no overrun of the deadline, bounded memory."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bad_peers import ANSWERS, HANGS, MANNERS, AnsweringPeer, BadPeer, triton_answers
from support.forked_commands import Command, findings, run_commands

from repo_manager.repository.tags import record_deployment

pytestmark = [pytest.mark.integration, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2] / "model_repository"
DEADLINE_S = 1.0
REFUSES = "http://127.0.0.1:9"

_INPUT = {"name": "image", "datatype": "FP32", "shape": [-1, 1, 8, 8]}
_OUTPUT = {"name": "logits", "datatype": "FP32", "shape": [-1, 10]}
_CONFIG = {
    "name": "digits",
    "max_batch_size": 8,
    "backend": "onnxruntime",
    "input": [{"name": "image", "dims": [1, 8, 8], "data_type": "TYPE_FP32"}],
    "output": [{"name": "logits", "dims": [10], "data_type": "TYPE_FP32"}],
}
GOOD = triton_answers("digits", [_INPUT], [_OUTPUT], _CONFIG)
WORDS = {
    "status": ("status", "--timeout", "1"),
    "deploy": ("deploy", "digits:1", "--timeout", "1"),
    "rollback": ("rollback", "digits", "--timeout", "1"),
    "infer": ("infer", "digits", "--timeout", "1"),
    "loadtest": ("loadtest", "digits", "--timeout", "1", "--duration", "0.3", "--concurrency", "2", "--warmup", "0"),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample repository, with two deployments to go back through."""
    root = tmp_path_factory.mktemp("repository") / "models"
    shutil.copytree(REPOSITORY, root)
    for version in (1, 2):
        record_deployment(root, "digits", version)
    return root


@pytest.fixture(scope="module")
def peers() -> Iterator[dict[str, str]]:
    """Every misbehaving peer: name -> URL."""
    with contextlib.ExitStack() as stack:
        urls = {}
        for name, manner in MANNERS.items():
            scheme = "grpc" if name.startswith("grpc-") else "http"
            urls[name] = f"{scheme}://127.0.0.1:{stack.enter_context(BadPeer(manner)).port}"
        for name in ("http-accepts-only", "http-garbage", "http-drips-headers", "http-endless-body"):
            urls[f"tls-{name}"] = urls[name].replace("http://", "https://")
            urls[f"tls-grpc-{name}"] = urls[name].replace("http://", "grpcs://")
        for name, answers in ANSWERS.items():
            told = answers if "" in answers else {**GOOD, **answers}
            urls[f"answers-{name}"] = f"http://127.0.0.1:{stack.enter_context(AnsweringPeer(told)).port}"
        yield urls


@pytest.mark.parametrize("command", list(WORDS))
def test_a_command_survives_every_peer(command: str, peers: dict[str, str], repository: Path, tmp_path: Path) -> None:
    commands = {}
    for number, (name, url) in enumerate(peers.items()):
        root = repository
        if command in ("deploy", "rollback"):  # they write, and hold the model's lease
            root = tmp_path / f"{number}"
            shutil.copytree(repository, root)
        commands[name] = Command((*WORDS[command], "--to", url, "--repository", str(root)), _homes(tmp_path))
    refused = Command((*WORDS[command], "--to", REFUSES, "--repository", str(repository)), _homes(tmp_path))
    found, _ = findings(commands, refused, tmp_path / "output", deadline_s=DEADLINE_S)
    assert found == []


def test_a_deployment_that_was_begun_is_undone_in_time(repository: Path, tmp_path: Path) -> None:
    """The server answers questions, and never a load; then it answers nothing any more."""
    for_ever = {**GOOD, "/load": HANGS, "/live": HANGS}
    with AnsweringPeer(for_ever) as peer:
        url = f"http://127.0.0.1:{peer.port}"
        words = ("deploy", "digits:2", "--timeout", "1", "--to", url, "--repository", str(repository))
        before = (repository / "digits/config.pbtxt").read_bytes()
        shutil.copytree(repository, tmp_path / "control")
        control = (*words[:5], REFUSES, "--repository", str(tmp_path / "control"))
        refused = Command(control, _homes(tmp_path))
        # Changes already made are put back. The server has half a second more for this, and at least 1.5 s.
        found, (outcome,) = findings(
            {"hangs": Command(words, _homes(tmp_path))}, refused, tmp_path / "output", deadline_s=DEADLINE_S + 1.5
        )
    assert found == []
    assert outcome.code == 5, outcome.output
    assert (repository / "digits/config.pbtxt").read_bytes() == before


def test_no_redirect_is_followed(repository: Path, tmp_path: Path) -> None:
    def redirect(line: object) -> None:
        line.read_request()  # type: ignore[attr-defined]
        head = f"HTTP/1.1 307 Go\r\nLocation: http://127.0.0.1:{other.port}/\r\nContent-Length: 0\r\n\r\n"
        line.send(head.encode())  # type: ignore[attr-defined]

    with AnsweringPeer(GOOD) as other, BadPeer(redirect) as peer:
        url = f"http://127.0.0.1:{peer.port}"
        commands = []
        for name, words in WORDS.items():
            shutil.copytree(repository, tmp_path / name)  # each holds the model's lease
            commands.append(Command((*words, "--to", url, "--repository", str(tmp_path / name)), _homes(tmp_path)))
        outcomes = run_commands(commands, tmp_path / "output")
        assert {outcome.code for outcome in outcomes} == {5}
        assert peer.connections > 0
        assert other.connections == 0


def _homes(folder: Path) -> dict[str, str]:
    """Return folders of the test's own in the place of the user's."""
    names = {"XDG_CACHE_HOME": "cache", "XDG_RUNTIME_DIR": "run", "XDG_CONFIG_HOME": "config"}
    return {variable: str(folder / name) for variable, name in names.items()}
