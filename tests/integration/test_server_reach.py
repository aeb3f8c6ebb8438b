"""Who may change the embedded server: its own user alone, not another user of the machine, not a web page."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import tritonclient.grpc as triton
from support.fault_proxy import FaultProxy
from support.serving import SCALING_CONFIG, scaling_model, write_model
from tritonclient.utils import InferenceServerException

from repo_manager.errors import RepositoryError
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.run import run_load_test
from repo_manager.pipeline.infer import InferOptions, infer
from repo_manager.repository.location import parse_location
from repo_manager.rollout.deploy import deploy
from repo_manager.rollout.status import status
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions, ServerSecurity
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.server.paths import cache_directory
from repo_manager.server.records import running_server

pytestmark = pytest.mark.integration
StartServer = Callable[[ServerOptions], EmbeddedServer]
NOBODY = 65534
OVERRIDE = {"parameters": {"config": '{"backend":"python"}', "file:1/model.py": "aW1wb3J0IG9z"}}
REGION = {"key": "/repo-manager-test", "offset": 0, "byte_size": 64}

# Every HTTP request to change a server or to reveal its files.
CONTROL = {
    "index": ("POST", "/v2/repository/index", {}),
    "load": ("POST", "/v2/repository/models/scaling/load", {}),
    "load with a file": ("POST", "/v2/repository/models/stranger/load", OVERRIDE),
    "load with a configuration": ("POST", "/v2/repository/models/scaling/load", {"parameters": {"config": "{}"}}),
    "unload": ("POST", "/v2/repository/models/scaling/unload", {}),
    "unload dependents": ("POST", "/v2/repository/models/scaling/unload", {"parameters": {"unload_dependents": True}}),
    "map shared memory": ("POST", "/v2/systemsharedmemory/region/a/register", REGION),
    "regions of shared memory": ("GET", "/v2/systemsharedmemory/status", None),
    "drop shared memory": ("POST", "/v2/systemsharedmemory/unregister", {}),
    "map CUDA memory": ("POST", "/v2/cudasharedmemory/region/a/register", {**REGION, "raw_handle": {"b64": ""}}),
    "regions of CUDA memory": ("GET", "/v2/cudasharedmemory/status", None),
    "drop CUDA memory": ("POST", "/v2/cudasharedmemory/unregister", {}),
    "trace": ("POST", "/v2/trace/setting", {"trace_level": ["TIMESTAMPS"], "trace_file": "/tmp/trace"}),
    "log": ("POST", "/v2/logging", {"log_file": "/tmp/log"}),
}
# Headers of another site's page, or of somebody who knows the name of the key's header.
HEADERS: dict[str, dict[str, str]] = {
    "nothing": {},
    "a page's form": {"Origin": "https://evil.example", "Content-Type": "text/plain"},
    "an empty key": {"repo-manager-key": ""},
    "what the process list shows": {"repo-manager-key": "(hidden)"},
    "a guess over gRPC's name": {"triton-grpc-protocol-repo-manager-key": "0" * 64},
}
WATCH = """
print("ready", flush=True)
seen = set()
while os.getppid() == int(sys.argv[1]):
    for entry in os.listdir("/proc"):
        try:
            line = open(f"/proc/{entry}/cmdline", "rb").read() if entry.isdecimal() else b""
        except OSError:
            continue
        if sys.argv[2].encode() in line and line not in seen:
            seen.add(line)
            print("saw", line, flush=True)
    for entry in os.listdir("/dev/shm"):
        if f"_{sys.argv[1]}_" in entry:
            print("region", entry, flush=True) if entry not in seen else None
            seen.add(entry)
            try:
                os.close(os.open(f"/dev/shm/{entry}", os.O_RDONLY))
                print("opened", entry, flush=True)
            except OSError:
                pass
"""
PROBE = """
for path in sys.argv[2:]:
    for read in (os.listdir, lambda path: os.open(path, os.O_RDONLY), lambda path: os.open(path, os.O_RDWR)):
        try:
            read(path)
            print("opened", path)
        except OSError:
            continue
try:
    os.kill(int(sys.argv[1]), signal.SIGTERM)
    print("killed")
except PermissionError:
    pass
print("tried", len(sys.argv) - 2)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    root.mkdir()
    write_model(root, "scaling", SCALING_CONFIG, {1: scaling_model(2.0)})
    return root


def ask(url: str, method: str, path: str, body: object, headers: dict[str, str]) -> tuple[int, bytes]:
    address = urlsplit(url)
    with contextlib.closing(http.client.HTTPConnection(address.hostname or "", address.port, timeout=10)) as connection:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_nobody_without_the_key_changes_a_server(start_server: StartServer, repository: Path) -> None:
    server = start_server(ServerOptions(str(repository), load=("scaling",), auto_complete=False))
    succeeded = []
    for what, (method, path, body) in CONTROL.items():
        for sent, headers in HEADERS.items():
            code, answer = ask(server.http_url, method, path, body, headers)
            if code == 200 or b"restricted" not in answer:
                succeeded.append((what, sent, code, answer))
    assert not succeeded
    key = server.client_options.headers["repo-manager-key"]
    assert len(key) >= 32
    # The same request with the key is served, so the key alone made the difference.
    assert ask(server.http_url, *CONTROL["index"], {"repo-manager-key": key})[0] == 200


def test_grpc_needs_the_key_too(start_server: StartServer, repository: Path) -> None:
    server = start_server(ServerOptions(str(repository), load=("scaling",), auto_complete=False))
    stranger = triton.InferenceServerClient(server.grpc_url.removeprefix("grpc://"))
    calls: list[Callable[[dict[str, str]], object]] = [
        lambda headers: stranger.get_model_repository_index(headers=headers),
        lambda headers: stranger.load_model("scaling", headers=headers),
        lambda headers: stranger.load_model(
            "stranger", config='{"backend":"python"}', files={"file:1/model.py": b"import os"}, headers=headers
        ),
        lambda headers: stranger.unload_model("scaling", headers=headers),
        lambda headers: stranger.register_system_shared_memory("a", "/repo-manager-test", 64, headers=headers),
        lambda headers: stranger.get_system_shared_memory_status(headers=headers),
        lambda headers: stranger.unregister_system_shared_memory(headers=headers),
        lambda headers: stranger.get_cuda_shared_memory_status(headers=headers),
        lambda headers: stranger.update_trace_settings(settings={"trace_rate": "1"}, headers=headers),
        lambda headers: stranger.update_log_settings({"log_verbose_level": 1}, headers=headers),
    ]
    for call in calls:
        for headers in ({}, {"triton-grpc-protocol-repo-manager-key": "(hidden)"}, {"repo-manager-key": "0" * 64}):
            with pytest.raises(InferenceServerException, match="restricted"):
                call(headers)
    # Inference, health and metadata are open on the loopback, as in Triton itself.
    assert stranger.is_model_ready("scaling")
    with TritonClient.connect(server.grpc_url) as client:
        assert client.versions("scaling")[1].state == "READY"
        client.load("scaling")
        (answer,) = client.infer("scaling", None, {"x": np.ones((1, 4), np.float32)}).values()
    assert (answer == 2.0).all()


@pytest.fixture
def as_nobody() -> Callable[..., subprocess.Popen[str]]:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")

    def start(script: str, *arguments: object) -> subprocess.Popen[str]:
        become = (
            "import os, signal, sys, time\n"
            f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"  # the interpreter may be root's alone
        )
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", become + script, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
        )

    return start


def test_another_user_reads_neither_key_nor_tensors(
    start_server: StartServer, repository: Path, as_nobody: Callable[..., subprocess.Popen[str]]
) -> None:
    watcher = as_nobody(WATCH, os.getpid(), repository)
    try:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "ready\n"
        server = start_server(ServerOptions(str(repository), load=("scaling",), auto_complete=False))
        (key,) = server.client_options.headers.values()
        with TritonClient.connect(server.grpc_url) as client:
            client.infer("scaling", None, {"x": np.ones((1, 4), np.float32)})
        regions = [str(path) for path in Path("/dev/shm").glob(f"repo_manager_*_{os.getpid()}_*")]
        assert regions
        proc = [f"/proc/{server.pid}/{name}" for name in ("environ", "mem", "maps", "fd", "auxv", "stack", "syscall")]
        record = next(cache_directory().glob(f"servers/*-{server.pid}.json"))
        assert record.stat().st_mode & 0o777 == 0o600
        files = [record, record.parent, server.log_path, cache_directory()]
        probe = as_nobody(PROBE, server.pid, *regions, *proc, *files)
        assert probe.communicate(timeout=60)[0] == f"tried {len(regions) + len(proc) + len(files)}\n"
        assert server.is_alive()
    finally:
        watcher.kill()
        said = watcher.communicate(timeout=60)[0].splitlines()
    # The watcher saw the server's command line and its regions from the start, and neither key nor tensors.
    assert any(line.startswith("saw") and "(hidden)" in line for line in said)
    assert any(line.startswith("region") for line in said)
    assert not [line for line in said if key in line or line.startswith("opened") or "restricted" in line]


def test_the_key_is_in_no_process_that_models_run_in(start_server: StartServer, repository: Path) -> None:
    server = start_server(ServerOptions(str(repository), load=("scaling",), auto_complete=False))
    (key,) = server.client_options.headers.values()
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    stubs = [pid for pid in _descendants(server.pid) if pid != server.pid] or [int(pid) for pid in children]
    assert stubs
    for pid in stubs:
        for name in ("environ", "cmdline"):
            assert key.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
    assert not server.shows_key


def _descendants(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _descendants(int(child))


def test_commands_find_the_key_and_it_goes_with_the_server(start_server: StartServer, repository: Path) -> None:
    server = start_server(ServerOptions(str(repository), auto_complete=False))
    record = running_server(parse_location(str(repository)))
    assert record is not None
    assert record.headers == server.client_options.headers
    assert "repo-manager-key" not in repr(record) + repr(server.client_options)
    for url in (server.grpc_url, server.http_url, server.http_url.replace("127.0.0.1", "localhost")):
        with TritonClient.connect(url) as client:
            client.load("scaling")
    server.stop()
    with TritonClient.connect(server.http_url) as client:
        assert not client._options.headers


def test_control_can_be_open(start_server: StartServer, repository: Path) -> None:
    security = ServerSecurity(open_control=True)
    server = start_server(ServerOptions(str(repository), auto_complete=False, security=security))
    assert ask(server.http_url, *CONTROL["load"], {})[0] == 200


def test_behind_the_path_of_a_gateway_everything_reaches_the_server(
    start_server: StartServer, repository: Path
) -> None:
    security = ServerSecurity(open_control=True)
    server = start_server(ServerOptions(str(repository), auto_complete=False, security=security))
    address = urlsplit(server.http_url)
    gateway = FaultProxy((address.hostname or "", address.port or 0), "/triton")
    gateway.start()
    try:
        url, place = f"http://127.0.0.1:{gateway.port}/triton/", parse_location(str(repository))
        deploy(place, "scaling", 1, url)
        (served,) = status(place, url).models
        assert (served.url, served.ready) == (url.rstrip("/"), (1,))
        (answer,) = infer(place, "scaling", None, url, InferOptions(data='{"x": [1, 2, 3, 4]}')).answers
        assert answer.outputs["y"].tolist() == [[2, 4, 6, 8]]
        load = LoadTestOptions(url, "scaling", concurrency=(1,), request_count=20, warmup_s=0.0)
        (point,) = run_load_test(load).points
        assert (point.errors, point.requests >= 20) == (0, True)
        assert all(request.path.startswith("/triton/v2") for request in gateway.requests)
    finally:
        gateway.stop()


def test_status_names_what_is_not_of_the_repository(start_server: StartServer, repository: Path) -> None:
    server = start_server(ServerOptions(str(repository), load=("scaling",), auto_complete=False))
    config = (
        '{"backend":"onnxruntime","max_batch_size":8,"input":[{"name":"x","data_type":"TYPE_FP32","dims":[4]}],'
        '"output":[{"name":"y","data_type":"TYPE_FP32","dims":[4]}]}'
    )
    other = triton.InferenceServerClient(server.grpc_url.removeprefix("grpc://"))
    headers = {f"triton-grpc-protocol-{name}": value for name, value in server.client_options.headers.items()}
    content = (repository / "scaling" / "1" / "model.onnx").read_bytes()
    other.load_model("stranger", config=config, files={"file:1/model.onnx": content}, headers=headers)
    found = status(parse_location(str(repository)), server.grpc_url)
    assert found.strangers == {server.grpc_url: ("stranger:1",)}


def test_the_cache_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache" / "repo-manager"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent))
    assert cache_directory().stat().st_mode & 0o777 == 0o700
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    if mine == 0:
        os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(RepositoryError, match="belongs to another user"):
        cache_directory()
