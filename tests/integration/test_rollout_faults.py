"""Faults around a roll-out: the old version stays in service, and the cause is named."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.certificates import make_key_pair
from support.proxies import TcpProxy
from support.serving import SCALING_CONFIG, scaling_model, write_model
from support.waiting import PAUSE_S

from repo_manager.errors import RepoManagerError, RepositoryError
from repo_manager.errors import ServerUnreachableError as Unreachable
from repo_manager.rollout.deploy import deploy
from repo_manager.rollout.observe import observe
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.plan import VersionFate, plan_deploy
from repo_manager.rollout.status import status
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer

pytestmark = [pytest.mark.integration, pytest.mark.slow]
AUTO_COMPLETE = False
X = np.ones((1, 4), np.float32)
POLICY = "version_policy { specific { versions: [1] } }\n"


@pytest.fixture
def model(repository: Path, client: TritonClient, request: pytest.FixtureRequest) -> Iterator[str]:
    """A model whose versions answer 2, 3 and 4 times the input. Version 1 is deployed."""
    name = request.node.name.split("[")[0].removeprefix("test_")[:60]
    versions = {1: scaling_model(2.0), 2: scaling_model(3.0), 3: scaling_model(4.0)}
    write_model(repository, name, SCALING_CONFIG + POLICY, versions)
    deploy(repository, name, 1, client)
    yield name
    client.unload(name)


class Asking:
    """A client of one model on its own connection, always asking."""

    def __init__(self, url: str, name: str) -> None:
        self.errors: list[str] = []
        self.answers: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, args=(url, name))

    def _ask(self, url: str, name: str) -> None:
        with TritonClient.connect(url) as client:
            while not self._stop.is_set():
                try:
                    self.answers.append(answer(client, name))
                except RepoManagerError as exc:
                    self.errors.append(str(exc))
                self._stop.wait(PAUSE_S)

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def answer(client: TritonClient, name: str) -> float:
    return float(client.infer(name, None, {"x": X})["y"][0, 0])


def when(text: str, act: Callable[[], None]) -> Callable[[str], None]:
    """Make a report function that acts once, at the first event with this text."""
    left = [act]

    def report(event: str) -> None:
        if text in event and left:
            left.pop()()

    return report


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_network_that_is_cut_for_a_moment_is_only_a_retry(
    repository: Path, server: EmbeddedServer, client: TritonClient, model: str, scheme: str
) -> None:
    port = int((server.grpc_url if scheme == "grpc" else server.http_url).rpartition(":")[2])
    events: list[str] = []
    with (
        TcpProxy(port) as proxy,
        TritonClient.connect(f"{scheme}://127.0.0.1:{proxy.port}", server.client_options) as through,
    ):

        def report(event: str) -> None:
            events.append(event)
            if event.startswith("serving"):
                proxy.cut()
            if "asking again in" in event:
                proxy.heal()

        with Asking(server.grpc_url, model) as asking:
            result = deploy(repository, model, 2, through, options=RolloutOptions(retries=4), report=report)
        assert result.ready == (2,)
    assert asking.errors == []
    assert any("asking again in" in event for event in events)


def test_a_network_that_stays_cut_leaves_the_repository_as_it_was(
    repository: Path, server: EmbeddedServer, client: TritonClient, model: str
) -> None:
    before = (repository / model / "config.pbtxt").read_bytes()
    port = int(server.grpc_url.rpartition(":")[2])
    options = RolloutOptions(reconnect_timeout_s=2.0)
    with (
        TcpProxy(port) as proxy,
        TritonClient.connect(f"grpc://127.0.0.1:{proxy.port}", server.client_options) as through,
        Asking(server.grpc_url, model) as asking,
        pytest.raises(Unreachable, match="as it was before"),
    ):
        deploy(repository, model, 2, through, options=options, report=when("serving", proxy.cut))
    assert asking.errors == []
    assert (repository / model / "config.pbtxt").read_bytes() == before
    # The server may have loaded both. Run the same command again to go on.
    assert deploy(repository, model, 2, client).ready == (2,)


def test_a_stalled_network_ends_at_the_deadline(
    repository: Path, server: EmbeddedServer, client: TritonClient, model: str
) -> None:
    port = int(server.grpc_url.rpartition(":")[2])
    options = RolloutOptions(deadline_s=1.5, settle_timeout_s=1.0, reconnect_timeout_s=2.0)
    with (
        TcpProxy(port) as proxy,
        TritonClient.connect(f"grpc://127.0.0.1:{proxy.port}", server.client_options) as through,
    ):
        with pytest.raises((Unreachable, RepoManagerError), match=r"did not answer within|1\.5 s of --timeout"):
            deploy(repository, model, 2, through, options=options, report=when("serving", proxy.stall))
        assert answer(client, model) in (2.0, 3.0)
    assert deploy(repository, model, 1, client).ready == (1,)


def test_a_full_disk_changes_nothing(start_server: Callable[[ServerOptions], EmbeddedServer], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk takes root: {mounted.stderr.decode().strip()}")
    try:
        repository = disk / "models"
        repository.mkdir()
        write_model(repository, "m", SCALING_CONFIG + POLICY, {1: scaling_model(2.0), 2: scaling_model(3.0)})
        server = start_server(ServerOptions(repository=str(repository), auto_complete=False))
        with TritonClient.connect(server.grpc_url) as client:
            deploy(repository, "m", 1, client)
            before = (repository / "m" / "config.pbtxt").read_bytes()
            with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
                while filler.write(b"\0" * 4096):
                    pass
            with (
                Asking(server.grpc_url, "m") as asking,
                pytest.raises(RepoManagerError, match="No space left on device"),
            ):
                deploy(repository, "m", 2, client)
            assert asking.errors == []
            assert set(asking.answers) == {2.0}
            assert (repository / "m" / "config.pbtxt").read_bytes() == before
            assert observe(client, "m").ready == (1,)
            (disk / "filler").unlink()
            assert deploy(repository, "m", 2, client).ready == (2,)
        server.stop(deadline_s=2.0)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_config_that_does_not_fit_the_model_is_refused_before_the_server_sees_it(
    repository: Path, server: EmbeddedServer, client: TritonClient, model: str
) -> None:
    path = repository / model / "config.pbtxt"
    path.write_text(path.read_text().replace('name: "y"', 'name: "z"'))
    written = path.read_bytes()
    with Asking(server.grpc_url, model) as asking, pytest.raises(RepositoryError, match=r"'z' is not in the model"):
        deploy(repository, model, 2, client)
    assert asking.errors == []
    assert (path.read_bytes(), observe(client, model).ready) == (written, (1,))


def test_a_disk_that_lost_a_file_is_found_before_the_server_sees_it(
    repository: Path, client: TritonClient, model: str
) -> None:
    (repository / model / "2" / "model.onnx").unlink()
    with pytest.raises(RepositoryError, match=r"nothing was changed.*files: .*model\.onnx"):
        deploy(repository, model, 2, client)
    plan = deploy(repository, model, 2, client, options=RolloutOptions(dry_run=True))
    assert [
        (check.name, str(check.outcome)) for check in plan.servers[0].checks if str(check.outcome) == "refused"
    ] == [("files", "refused")]


def test_a_version_that_policy_wants_signed_and_nobody_signed_is_refused(
    repository: Path, client: TritonClient, model: str, tmp_path: Path
) -> None:
    _, key = make_key_pair(tmp_path)
    with pytest.raises(RepositoryError, match="signature: "):
        deploy(repository, model, 2, client, options=RolloutOptions(signed_by=(key,)))
    assert observe(client, model).ready == (1,)


def test_a_config_sent_with_a_load_is_told_and_dropped(repository: Path, client: TritonClient, model: str) -> None:
    override = json.dumps(
        {
            "backend": "onnxruntime",
            "max_batch_size": 4,
            "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}],
            "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [4]}],
            "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
            "version_policy": {"specific": {"versions": [1]}},
        }
    )
    client.load(model, override)
    assert client.model_config(model).max_batch_size == 4
    client.load(model)  # the load alone changes nothing, as the plan says
    assert client.model_config(model).max_batch_size == 4
    (seen,) = status(repository, client, (model,)).models
    assert "max_batch_size" in seen.overridden
    plan = plan_deploy(repository, model, 1, client)
    assert [(step.version, step.action) for step in plan.steps] == [(1, VersionFate.NOTHING)]
    assert "a configuration sent with a load is in the way" in plan.steps[0].reason
    assert deploy(repository, model, 1, client).changed
    assert client.model_config(model).max_batch_size == 8
    (after,) = status(repository, client, (model,)).models
    assert (after.overridden, after.differences) == ((), ())
