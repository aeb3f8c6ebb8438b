"""Sixteen real tritonserver processes go forward together, and back together."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.serving import SCALING_CONFIG, running_server

from repo_manager.errors import RolloutUndoneError, ServerUnreachableError
from repo_manager.repository.tags import model_state
from repo_manager.rollout.deploy import deploy, rollback
from repo_manager.rollout.observe import observe
from repo_manager.rollout.options import Amount, RolloutOptions
from repo_manager.rollout.targets.urls import resolve_targets
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer

pytestmark = [pytest.mark.integration, pytest.mark.slow]
SERVERS = 16
X = np.ones((1, 4), np.float32)
POLICY = "version_policy { specific { versions: [1] } }\n"
# Python without a package to import: the cheapest model for a real server.
CONFIG = SCALING_CONFIG.replace('backend: "onnxruntime"', 'backend: "python"') + POLICY
CODE = """
import numpy
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", x * numpy.float32({factor}))]))
        return answers
"""
BROKEN = "raise RuntimeError('this version is broken')\n"


def write_version(repository: Path, version: int, code: str) -> None:
    folder = repository / "m" / str(version)
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(code)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[EmbeddedServer]]]:
    """A repository of `m` (1, 2 good, 3 broken), and its servers, each with version 1 served."""
    repository = tmp_path_factory.mktemp("fleet")
    for version in (1, 2):
        write_version(repository, version, CODE.format(factor=version))
    write_version(repository, 3, BROKEN)
    (repository / "m" / "config.pbtxt").write_text(f'name: "m"\n{CONFIG}')
    options = ServerOptions(repository=str(repository), load=("m",), auto_complete=False)
    with contextlib.ExitStack() as stack:
        servers: list[EmbeddedServer] = []
        for _ in range(SERVERS // 4):  # a few at a time: the machine may be small
            group = [EmbeddedServer(options) for _ in range(4)]
            threads = [threading.Thread(target=server.start) for server in group]
            for server in group:
                stack.callback(server.stop, deadline_s=0.1)
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for server in group:
                server.wait_ready()
            servers += group
        yield repository, servers


@contextlib.contextmanager
def connected(servers: list[EmbeddedServer]) -> Iterator[list[TritonClient]]:
    """Clients of every server, gRPC and HTTP in turn."""
    with contextlib.ExitStack() as stack:
        urls = [server.http_url if index % 2 else server.grpc_url for index, server in enumerate(servers)]
        yield [stack.enter_context(TritonClient.connect(url)) for url in urls]


def answers(clients: list[TritonClient]) -> list[float]:
    return [float(client.infer("m", None, {"x": X})["y"][0, 0]) for client in clients]


def in_batches(batch: str, missing: str = "0") -> RolloutOptions:
    return RolloutOptions(
        batch=Amount.parse(batch, "batch"), max_unavailable=Amount.parse(missing, "missing"), reconnect_timeout_s=1.0
    )


def kill(server: EmbeddedServer) -> None:
    os.kill(server.pid, signal.SIGKILL)
    assert server.wait(10.0) is not None


def test_sixteen_servers_go_forward_and_back_and_survive_the_loss_of_some(
    fleet: tuple[Path, list[EmbeddedServer]],
) -> None:
    repository, servers = fleet
    events: list[str] = []
    with connected(servers) as clients:
        assert not deploy(repository, "m", 1, clients, options=in_batches("100%")).changed
        # Forward, a quarter at a time.
        done = deploy(repository, "m", 2, clients, options=in_batches("25%"), report=events.append)
        assert (done.batch, done.changed, len(done.servers)) == (4, True, SERVERS)
        assert answers(clients) == [2.0] * SERVERS
        assert sum("serves it too" in event for event in events) == SERVERS
        # A second deployment of the same version changes nothing.
        again = deploy(repository, "m", 2, clients, options=in_batches("100%"))
        assert not again.changed
        # A broken version stops at the first batch, so the other servers are never asked to load it.
        before = (repository / "m" / "config.pbtxt").read_bytes()
        events.clear()
        with pytest.raises(RolloutUndoneError, match=r"(?s)this version is broken.*put back"):
            deploy(repository, "m", 3, clients, options=in_batches("2"), report=events.append)
        touched = {event.split(": ")[0] for event in events if "serving version" in event}
        assert len(touched) <= 2
        assert answers(clients) == [2.0] * SERVERS
        assert (repository / "m" / "config.pbtxt").read_bytes() == before
        # Back, on all.
        back = rollback(repository, "m", clients, options=in_batches("50%"))
        assert (back.version, answers(clients)) == (1, [1.0] * SERVERS)

        check_loss(repository, servers, clients)
        check_refusal(repository, servers[:6], clients[:6])
        check_restart(repository, servers[15])


def check_loss(repository: Path, servers: list[EmbeddedServer], clients: list[TritonClient]) -> None:
    """Two servers die half-way: one more than allowed undoes it all, within the limit the others go on."""

    def kill_at(number: int, victim: EmbeddedServer) -> Callable[[str], None]:
        def report(event: str) -> None:
            if f"({number} of" in event and "serves it too" in event and victim.is_alive():
                kill(victim)

        return report

    with pytest.raises(RolloutUndoneError, match=r"1 of 16 servers do not answer, at most 0 may be missing"):
        deploy(repository, "m", 2, clients, options=in_batches("1"), report=kill_at(3, servers[15]))
    assert answers(clients[:15]) == [1.0] * 15
    with pytest.raises(ServerUnreachableError, match="at most 0 may be missing"):
        deploy(repository, "m", 2, clients, options=in_batches("4"))
    done = deploy(repository, "m", 2, clients, options=in_batches("1", "13%"), report=kill_at(5, servers[14]))
    assert set(done.unavailable) == {clients[14].url, clients[15].url}
    assert answers(clients[:14]) == [2.0] * 14


def check_refusal(repository: Path, servers: list[EmbeddedServer], clients: list[TritonClient]) -> None:
    """One refusing server stops everything: the others are put back."""
    with contextlib.ExitStack() as stack:
        restricted = ServerOptions(
            repository=str(repository),
            load=(),
            auto_complete=False,
            extra_args=("--grpc-restricted-protocol=model-repository:admin-key=hush",),
        )
        refusing = stack.enter_context(running_server(restricted))
        client = stack.enter_context(TritonClient.connect(refusing.grpc_url))
        with pytest.raises(Exception, match="restricted") as caught:
            deploy(repository, "m", 1, [*clients, client], options=in_batches("2"))
        assert "hush" not in str(caught.value)
    assert answers(clients) == [2.0] * len(clients)


def check_restart(repository: Path, dead: EmbeddedServer) -> None:
    """A server that was down all the time starts with the version deployed in the meantime."""
    assert model_state(repository, "m").deployments[-1].version == 2
    with dead.successor() as again, TritonClient.connect(again.grpc_url) as client:
        assert (observe(client, "m").ready, answers([client])) == ((2,), [2.0])


def test_a_name_leads_to_every_address_behind_it() -> None:
    targets = resolve_targets(["dns://pods.test:1"], resolver=lambda name, port: ["10.0.0.1", "fd00::2"])
    assert [target.url for target in targets] == ["grpc://10.0.0.1:1", "grpc://[fd00::2]:1"]
    assert {target.server_name for target in targets} == {"pods.test"}
