"""The embedded server: a real tritonserver that starts, answers, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
import pytest
from support.certificates import make_certificates
from support.serving import SCALING_CONFIG, scaling_model, write_model

from repo_manager.errors import ServerError, ServerRefusedError, ServerUnreachableError, UsageError
from repo_manager.server import embedded as embedded_module
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.server.guard import StubGuard, stubs_of
from repo_manager.server.process import start_ticks
from repo_manager.server.records import running_server
from repo_manager.server.transport import ClientOptions, CudaHandle

pytestmark = [pytest.mark.integration, pytest.mark.slow]
StartServer = Callable[[ServerOptions], EmbeddedServer]
X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture
def scaling(tmp_path: Path) -> Path:
    write_model(tmp_path, "scaling", SCALING_CONFIG, {1: scaling_model()})
    return tmp_path


def eventually(condition: Callable[[], bool], timeout_s: float = 15.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def children_of(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(folder.name))
    return found


def shared_memory_of(owner: int) -> list[str]:
    return [
        path.name for path in Path("/dev/shm").iterdir() if f"_{owner}_" in path.name and "repo_manager_" in path.name
    ]


def can_bind(url: str) -> bool:
    port = int(url.split(":")[2].split("/")[0])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def test_serves_over_both_protocols_and_leaves_nothing(scaling: Path) -> None:
    with EmbeddedServer(ServerOptions(repository=str(scaling), load=("scaling",))) as server:
        for url in (server.grpc_url, server.http_url):
            with TritonClient.connect(url) as client:
                assert client.ready()
                assert client.metadata().version.startswith("2.")
                np.testing.assert_array_equal(client.infer("scaling", 1, {"x": X})["y"], 2 * X)
        found = running_server(scaling)
        assert found is not None
        assert (found.grpc_url, found.pid) == (server.grpc_url, server.pid)
        stubs, pid = children_of(server.pid), server.pid
        assert stubs
        assert shared_memory_of(os.getpid())
    assert running_server(scaling) is None
    assert [each for each in [pid, *stubs] if start_ticks(each) is not None] == []
    assert shared_memory_of(os.getpid()) == []
    assert all(can_bind(url) for url in (server.http_url, server.grpc_url, server.metrics_url))


def test_listens_on_the_loopback_only(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(ServerOptions(repository=str(tmp_path)))
    urls = (server.http_url, server.grpc_url, server.metrics_url)
    wanted = {f"{int(url.split(':')[2].split('/')[0]):04X}" for url in urls}
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    lines = [line for table in tables for line in table.read_text().splitlines()[1:]]
    listening = [line.split()[1] for line in lines if line.split()[3] == "0A"]
    ours = [address for address in listening if address.split(":")[1] in wanted]
    assert len(ours) == 3
    assert {address.split(":")[0] for address in ours} <= {"0100007F", "0000000000000000FFFF00000100007F"}


def test_a_port_lost_between_choosing_and_binding_costs_another_attempt(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as thief:
        taken = thief.getsockname()[1]
        real = embedded_module.free_ports
        answers = [(taken, *real("127.0.0.1", 2)), (*real("127.0.0.1", 2), taken)]
        monkeypatch.setattr(
            embedded_module, "free_ports", lambda host, count: answers.pop(0) if answers else real(host, count)
        )
        server = start_server(ServerOptions(repository=str(tmp_path)))
        assert not answers
        assert str(taken) not in server.http_url + server.metrics_url


def test_a_given_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as thief:
        port = thief.getsockname()[1]
        with pytest.raises(ServerError, match=rf"gRPC port {port} .* cannot be used: Address already in use"):
            EmbeddedServer(ServerOptions(repository=str(tmp_path), grpc_port=port)).start()


def test_a_broken_model_is_refused_with_tritons_reason(tmp_path: Path) -> None:
    write_model(tmp_path, "broken", SCALING_CONFIG, {1: b"no model"})
    server = EmbeddedServer(ServerOptions(repository=str(tmp_path), load=("broken",)))
    with pytest.raises(ServerRefusedError, match=r"broken.*(?s:.*)Protobuf parsing failed"), server:
        pass
    assert not server.is_alive()


def test_with_all_models_the_good_ones_are_served(start_server: StartServer, scaling: Path) -> None:
    write_model(scaling, "broken", SCALING_CONFIG, {1: b"no model"})
    server = start_server(ServerOptions(repository=str(scaling), load=("*",)))
    assert list(server.failures) == ["broken"]
    with TritonClient.connect(server.grpc_url) as client:
        assert client.model_ready("scaling", 1)
        assert not client.model_ready("broken", 1)


def test_without_auto_completion_only_complete_configs_load(start_server: StartServer, scaling: Path) -> None:
    write_model(scaling, "bare", None, {1: scaling_model()})
    server = start_server(ServerOptions(repository=str(scaling), load=("scaling",), auto_complete=False))
    with TritonClient.connect(server.grpc_url) as client:
        np.testing.assert_array_equal(client.infer("scaling", 1, {"x": X})["y"], 2 * X)
        with pytest.raises(ServerRefusedError):
            client.load("bare")


def test_a_wrong_argument_is_explained_by_triton(tmp_path: Path) -> None:
    server = EmbeddedServer(ServerOptions(repository=str(tmp_path), extra_args=("--model-control-mode=nonsense",)))
    with pytest.raises(ServerError, match=r"did not start: .*invalid argument for --model-control-mode"):
        server.start()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_survives_the_owner(scaling: Path, number: int) -> None:
    """The owner is another Python process, killed while its server serves."""
    script = (
        "import sys, time\n"
        "from repo_manager import EmbeddedServer, ServerOptions\n"
        "with EmbeddedServer(ServerOptions(repository=sys.argv[1], load=('scaling',))) as server:\n"
        "    print(server.pid, server.http_url, flush=True)\n"
        "    time.sleep(60)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(scaling)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert owner.stdout is not None
    assert owner.stderr is not None
    pid, url = owner.stdout.readline().decode().split()
    processes = [int(pid), *children_of(int(pid))]
    assert len(processes) == 2
    owner.send_signal(number)
    owner.communicate(timeout=30)
    assert eventually(lambda: all(start_ticks(each) is None for each in processes))
    assert eventually(lambda: shared_memory_of(owner.pid) == [])
    assert can_bind(url)
    assert running_server(scaling) is None


def test_a_killed_server_leaves_no_stub(start_server: StartServer, scaling: Path) -> None:
    server = start_server(ServerOptions(repository=str(scaling), load=("scaling",)))
    stubs = children_of(server.pid)
    os.kill(server.pid, signal.SIGKILL)
    assert server.wait(10.0) == -9
    server.stop()
    with server.successor() as again, TritonClient.connect(server.grpc_url) as client:
        assert again.grpc_url == server.grpc_url
        assert client.model_ready("scaling", 1)
    assert all(start_ticks(each) is None for each in stubs)
    assert shared_memory_of(os.getpid()) == []
    assert running_server(scaling) is None


def test_a_killed_stub_is_noticed_and_its_model_loaded_again(start_server: StartServer, scaling: Path) -> None:
    write_model(scaling, "other", SCALING_CONFIG, {1: scaling_model(7.0)})
    server = start_server(ServerOptions(repository=str(scaling), load=("scaling", "other")))
    guard = StubGuard(server.pid, server.grpc_url)
    assert guard.check() == ()
    victim, bystander = (
        next(stub.pid for stub in stubs_of(server.pid) if stub.model == name) for name in ("scaling", "other")
    )
    os.kill(victim, signal.SIGKILL)
    mended: list[str] = []
    assert eventually(lambda: bool(mended.extend(guard.check()) or mended))
    assert mended == ["scaling"]
    with TritonClient.connect(server.grpc_url) as client:
        np.testing.assert_array_equal(client.infer("scaling", 1, {"x": X})["y"], 2 * X)
        client.unload("other")  # an orderly end of a stub is no reason to load anything
        assert eventually(lambda: start_ticks(bystander) is None)
        began = time.monotonic()
        while time.monotonic() - began < 4.0:
            assert guard.check() == ()
            time.sleep(0.5)


def test_killed_together_with_its_supervisor_the_next_start_sweeps(start_server: StartServer, scaling: Path) -> None:
    script = (
        "import os, signal, sys, time\n"
        "from repo_manager import EmbeddedServer, ServerOptions\n"
        "server = EmbeddedServer(ServerOptions(repository=sys.argv[1], load=('scaling',)))\n"
        "server.start(); server.wait_ready()\n"
        "print(server.pid, server._process._supervisor.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(scaling)], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        pid, supervisor = (int(word) for word in owner.stdout.readline().split())
        stubs = children_of(pid)
        for each in (supervisor, pid, *stubs, owner.pid):
            os.kill(each, signal.SIGKILL)
    assert shared_memory_of(owner.pid)
    start_server(ServerOptions(repository=str(scaling)))
    assert shared_memory_of(owner.pid) == []


def test_two_servers_on_one_repository_do_not_collide(start_server: StartServer, scaling: Path) -> None:
    servers = [start_server(ServerOptions(repository=str(scaling), load=("scaling",))) for _ in range(2)]
    servers[0].stop()
    with TritonClient.connect(servers[1].grpc_url) as client:
        np.testing.assert_array_equal(client.infer("scaling", 1, {"x": X})["y"], 2 * X)


def test_many_starts_at_once(scaling: Path) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with (
                EmbeddedServer(ServerOptions(repository=str(scaling))) as server,
                TritonClient.connect(server.grpc_url) as client,
            ):
                assert client.ready()
        except BaseException as exc:  # noqa: BLE001 - told to the test's own thread
            errors.append(exc)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_refusals_carry_tritons_reason(any_client: TritonClient) -> None:
    with pytest.raises(ServerRefusedError, match="nowhere"):
        any_client.load("nowhere")
    with pytest.raises(ServerRefusedError, match="nowhere"):
        any_client.model_config("nowhere")
    with pytest.raises(ServerRefusedError, match="nowhere"):
        any_client.infer("nowhere", 1, {"x": X})
    assert not any_client.model_ready("nowhere", 1)


def test_index_config_and_statistics(repository: Path, any_client: TritonClient) -> None:
    write_model(repository, "scaling", SCALING_CONFIG, {1: scaling_model(), 2: scaling_model(3.0)})
    any_client.load("scaling")
    assert {version: entry.state for version, entry in any_client.versions("scaling").items()} == {2: "READY"}
    before = any_client.statistics("scaling", 2)[0]
    np.testing.assert_array_equal(any_client.infer("scaling", None, {"x": X})["y"], 3 * X)
    # Triton counts an inference after it has answered it.
    assert eventually(lambda: any_client.statistics("scaling", 2)[0].inference_count == before.inference_count + 2)
    after = any_client.statistics("scaling", 2)[0]
    assert after.compute_infer_ns > before.compute_infer_ns
    assert sum(size * count for size, count in after.batches.items()) == after.inference_count
    assert after.cache_hit_count == 0
    assert any_client.model_config("scaling").max_batch_size == 8
    described = any_client.model_metadata("scaling")
    assert (described.name, described.versions) == ("scaling", ("2",))
    assert [(tensor.name, tensor.datatype, tensor.shape[0]) for tensor in described.inputs] == [("x", "FP32", -1)]
    assert [tensor.name for tensor in described.outputs] == ["y"]
    any_client.unload("scaling")
    assert eventually(lambda: any_client.versions("scaling")[2].state == "UNAVAILABLE")


def test_shared_memory_is_registered_listed_and_forgotten(any_client: TritonClient) -> None:
    memory = shared_memory.SharedMemory(create=True, size=64)
    try:
        any_client.register_memory("region", f"/{memory.name.lstrip('/')}", 64)
        assert any_client.registered_memory() == ("region",)
        any_client.unregister_memory("region")
        assert any_client.registered_memory() == ()
        with pytest.raises(ServerRefusedError, match="register shared memory region"):
            any_client.register_memory("region", "/there-is-no-such-memory", 64)
    finally:
        memory.close()
        memory.unlink()


def test_memory_of_a_gpu_is_registered_by_the_servers_own_api(any_client: TritonClient) -> None:
    with pytest.raises(ServerRefusedError, match="register shared memory region"):  # no process has such a handle
        any_client.register_memory("region", CudaHandle(bytes(64), 0), 64)
    assert any_client.registered_memory("cuda") == ()
    any_client.unregister_memory("region", "cuda")


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_no_server_is_unreachable(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with (
        TritonClient.connect(f"{scheme}://127.0.0.1:{port}") as client,
        pytest.raises(ServerUnreachableError, match=str(port)),
    ):
        client.ready(timeout_s=3.0)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_silent_server_is_unreachable_after_the_deadline(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with TritonClient.connect(f"{scheme}://127.0.0.1:{port}") as client:
            began = time.monotonic()
            with pytest.raises(ServerUnreachableError):
                client.metadata(timeout_s=1.0)
            assert time.monotonic() - began < 5.0


def test_restricted_apis_need_their_header(start_server: StartServer, scaling: Path) -> None:
    restricted = ("--grpc-restricted-protocol=model-repository:admin-key=hush",)
    server = start_server(ServerOptions(repository=str(scaling), extra_args=restricted))
    with (
        TritonClient.connect(server.grpc_url) as client,
        pytest.raises(ServerRefusedError, match="restricted") as caught,
    ):
        client.load("scaling")
    assert "hush" not in str(caught.value)
    options = ClientOptions(headers={"triton-grpc-protocol-admin-key": "hush"})
    with TritonClient.connect(server.grpc_url, options) as client:
        client.load("scaling")
        assert client.model_ready("scaling", 1)


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, Path]:
    """A self-made authority and, signed by it, a server's and a client's certificate."""
    return make_certificates(tmp_path / "tls")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with openssl")
def test_mutual_tls(start_server: StartServer, scaling: Path, certificates: dict[str, Path]) -> None:
    arguments = (
        "--grpc-use-ssl=true",
        "--grpc-use-ssl-mutual=true",
        f"--grpc-server-cert={certificates['server.pem']}",
        f"--grpc-server-key={certificates['server.key']}",
        f"--grpc-root-cert={certificates['ca.pem']}",
    )
    server = start_server(ServerOptions(repository=str(scaling), load=("scaling",), extra_args=arguments))
    url = server.grpc_url.replace("grpc://", "grpcs://")
    full = ClientOptions(
        root_certificates=certificates["ca.pem"],
        client_certificate=certificates["client.pem"],
        client_key=certificates["client.key"],
        server_name="triton.test",
    )
    with TritonClient.connect(url, full) as client:
        np.testing.assert_array_equal(client.infer("scaling", 1, {"x": X})["y"], 2 * X)
    for options in (
        dataclasses.replace(full, client_certificate=None, client_key=None),
        dataclasses.replace(full, root_certificates=None),
        dataclasses.replace(full, server_name=None),
    ):
        with TritonClient.connect(url, options) as client, pytest.raises(ServerUnreachableError):
            client.metadata(timeout_s=3.0)
    with TritonClient.connect(server.grpc_url) as client, pytest.raises(ServerUnreachableError):
        client.metadata(timeout_s=3.0)
    with pytest.raises(UsageError, match="certificate"):
        TritonClient.connect(url, dataclasses.replace(full, root_certificates=scaling / "none.pem"))
