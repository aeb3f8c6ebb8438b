"""Commands against misbehaving stores and clusters: no traceback, no overrun, bounded memory."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.bad_peers import API_ANSWERS, HTTP_MANNERS, STORE_ANSWERS, AnsweringPeer, BadPeer
from support.forked_commands import Command, findings, run_commands
from support.tiny_s3 import tiny_s3

from repo_manager.repository.tags import record_deployment

pytestmark = [pytest.mark.integration, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2] / "model_repository"
DEADLINE_S = 1.0
REFUSES = 9  # a port without a listener
_OPTIONS = "repo_manager.repository.stores.objects.client:DEFAULT_OPTIONS"
SHORT = {f"{_OPTIONS}.first_contact_s": DEADLINE_S, f"{_OPTIONS}.retry.deadline_s": DEADLINE_S}
PATIENT_S = 30.0  # a store does answer there, and a busy machine takes its time
PATIENT = dict.fromkeys(SHORT, PATIENT_S)


@pytest.fixture(scope="module")
def stores() -> Iterator[dict[str, str]]:
    """Every misbehaving store: name -> endpoint."""
    with contextlib.ExitStack() as stack:
        peers = {name: stack.enter_context(BadPeer(manner)) for name, manner in HTTP_MANNERS.items()}
        peers |= {name: stack.enter_context(AnsweringPeer({"": text})) for name, text in STORE_ANSWERS.items()}
        yield {name: f"http://127.0.0.1:{peer.port}" for name, peer in peers.items()}


@pytest.mark.parametrize("words", [("list",), ("show", "digits"), ("add",)], ids=" ".join)
def test_a_command_survives_every_store(
    words: tuple[str, ...], stores: dict[str, str], model: Path, tmp_path: Path
) -> None:
    if words == ("add",):
        words = ("add", str(model), "--name", "m", "--precision", "fp32")

    def command(endpoint: str) -> Command:
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        location = endpoint.replace("http://", "s3://http://") + "/bucket/models"
        return Command((*words, "--repository", location), {**_homes(tmp_path), **keys}, presets=SHORT)

    commands = {name: command(endpoint) for name, endpoint in stores.items()}
    refused = command(f"http://127.0.0.1:{REFUSES}")
    found, outcomes = findings(commands, refused, tmp_path / "output", deadline_s=DEADLINE_S)
    assert found == []
    # Some answer as an empty repository does: nothing is there.
    assert {outcome.code for outcome in outcomes} <= {0, 3, 5}


def test_a_store_that_turns_bad_ends_no_process(model: Path, tmp_path: Path) -> None:
    """It announces more bytes than there is memory, in the middle of a publication, and its client aborts."""
    with contextlib.ExitStack() as stack:

        def command(good_for: int | None, status: int) -> Command:
            store = stack.enter_context(tiny_s3())
            store.good_for, store.bad_status = good_for, status
            keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
            words = ("add", str(model), "--name", "m", "--precision", "fp32")
            location = f"s3://http://127.0.0.1:{store.port}/bucket/models"
            return Command((*words, "--repository", location), {**_homes(tmp_path), **keys}, presets=PATIENT)

        commands = {
            f"{status} after {good_for}": command(good_for, status)
            for status in (200, 404)
            for good_for in (0, 3, 6, 9, 12, 15)
        }
        found, outcomes = findings(commands, command(None, 200), tmp_path / "output", deadline_s=PATIENT_S)
        assert found == []
        assert {outcome.code for outcome in outcomes} <= {0, 3, 5}, [outcome.output for outcome in outcomes]
        assert sum("larger than the memory" in outcome.output for outcome in outcomes) >= 4


@pytest.mark.parametrize("status", [301, 307])
def test_a_store_that_redirects_to_another_host_gets_nothing_there(status: int, model: Path, tmp_path: Path) -> None:
    """No session token and no published file leaves the store. The store's own redirects are still followed."""

    def redirect(line: object) -> None:
        line.read_request()  # type: ignore[attr-defined]
        head = f"HTTP/1.1 {status} Go\r\nLocation: http://127.0.0.1:{other.port}/x\r\nContent-Length: 0\r\n\r\n"
        line.send(head.encode())  # type: ignore[attr-defined]

    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_SESSION_TOKEN": "c", "AWS_DEFAULT_REGION": "d"}
    publish = ("add", str(model), "--name", "m", "--precision", "fp32")
    with AnsweringPeer({"": b""}) as other, BadPeer(redirect) as store:
        location = f"s3://http://localhost:{store.port}/bucket/models"
        commands = [
            Command((*words, "--repository", location), {**_homes(tmp_path), **keys}, presets=SHORT)
            for words in (("list",), ("show", "m"), publish)
        ]
        outcomes = run_commands(commands, tmp_path / "output")
        assert {outcome.code for outcome in outcomes} == {3}, [outcome.output for outcome in outcomes]
        assert all("redirects to another host" in outcome.output for outcome in outcomes)
        assert store.connections > 0
        assert other.connections == 0


@pytest.mark.parametrize("target", ["k8s://models/triton", "kserve://models/digits"])
@pytest.mark.parametrize("command", ["deploy", "rollback"])
def test_a_roll_out_survives_every_api_server(command: str, target: str, tmp_path: Path) -> None:
    def told(name: str, port: int) -> Command:
        models = tmp_path / name  # each holds the model's lease
        shutil.copytree(REPOSITORY, models)
        for version in (1, 2):
            record_deployment(models, "digits", version)
        what = "digits:1" if command == "deploy" else "digits"
        words = (command, what, "--to", target, "--timeout", f"{DEADLINE_S:g}", "--repository", str(models))
        return Command(words, {**_homes(tmp_path), "KUBECONFIG": str(_kubeconfig(tmp_path, port))})

    with contextlib.ExitStack() as stack:
        peers: dict[str, BadPeer] = {name: BadPeer(manner) for name, manner in HTTP_MANNERS.items()}
        peers |= {name: AnsweringPeer({"": answer}) for name, answer in API_ANSWERS.items()}
        commands = {name: told(name, stack.enter_context(peer).port) for name, peer in peers.items()}
        refused = told("control", REFUSES)
        found, outcomes = findings(commands, refused, tmp_path / "output", deadline_s=DEADLINE_S)
    assert found == []
    assert {outcome.code for outcome in outcomes} <= {3, 5}


def _kubeconfig(folder: Path, port: int) -> Path:
    told = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }
    path = folder / f"kubeconfig-{port}"
    path.write_text(yaml.safe_dump(told))
    return path


@pytest.fixture(scope="module")
def model() -> Path:
    return Path(__file__).parents[2] / "model_repository/digits/1/model.onnx"


def _homes(folder: Path) -> dict[str, str]:
    """Return folders of the test's own in the place of the user's."""
    names = {"XDG_CACHE_HOME": "cache", "XDG_RUNTIME_DIR": "run", "XDG_CONFIG_HOME": "config", "HOME": "home"}
    return {variable: str(folder / name) for variable, name in names.items()}
