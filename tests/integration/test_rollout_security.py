"""Servers behind TLS, client certificates, restricted APIs and tokens, from the shell; no secret is shown anywhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.certificates import make_certificates
from support.proxies import tls_terminating
from support.serving import SCALING_CONFIG, scaling_model, write_model

from repo_manager.server.command import ServerOptions, ServerSecurity
from repo_manager.server.embedded import EmbeddedServer

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with openssl"),
]
Run = Callable[..., subprocess.CompletedProcess[str]]
SECRETS = ("hush-key-value", "hush-bearer-token")
POLICY = "version_policy { specific { versions: [1] } }\n"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Certificates, and the two files with secrets."""
    files = make_certificates(tmp_path / "tls")
    for name, content in (("headers", f"admin-key: {SECRETS[0]}\n"), ("token", f"{SECRETS[1]}\n")):
        files[name] = tmp_path / name
        files[name].write_text(content)
    return files


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    root.mkdir()
    write_model(root, "m", SCALING_CONFIG + POLICY, {1: scaling_model(2.0), 2: scaling_model(3.0)})
    return root


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a command as a user does, watch its process list, and check that no secret shows."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_CONFIG_HOME": str(tmp_path / "config")}

    def run(*arguments: object, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "repo_manager", *map(str, arguments)]
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env={**environment, **more}, cwd=tmp_path
        )
        assert ended.returncode == code, f"{arguments}: {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        for secret in SECRETS:
            assert secret not in ended.stdout + ended.stderr
        return ended

    run.environment = environment  # type: ignore[attr-defined]
    return run


@pytest.fixture
def guarded(repository: Path, files: dict[str, Path], run: Run) -> Iterator[str]:
    """The gRPC URL of a `serve` with mutual TLS and a restricted API."""
    command = [sys.executable, "-m", "repo_manager", "serve", "-r", str(repository), "--json", "--quiet"]
    command += ["--host", "0.0.0.0", "--load", "none", "--restrict-file", str(files["headers"])]
    command += ["--tls-cert", str(files["server.pem"]), "--tls-key", str(files["server.key"])]
    command += ["--tls-client-ca", str(files["ca.pem"])]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=run.environment,  # type: ignore[attr-defined]
    )
    assert process.stdout is not None
    text = ""
    while not text.rstrip().endswith("}") or text.count("{") != text.count("}"):
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        text += line
    ready = json.loads(text)
    assert not any(secret in text for secret in SECRETS)
    assert ready["grpc_url"].startswith("grpcs://127.0.0.1:")
    # Triton's HTTP has no TLS, so it stays on the loopback even with another host.
    assert listens_on(ready["http_url"]) == listens_on(ready["metrics_url"]) == {"127.0.0.1"}
    assert listens_on(ready["grpc_url"]) == {"0.0.0.0"}
    yield ready["grpc_url"]
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "anyone can load models" not in errors


def listens_on(url: str) -> set[str]:
    port = int(re.findall(r":(\d+)", url)[0])
    found = set()
    for table, loopbacks in (("tcp", {"0100007F"}), ("tcp6", {"0000000000000000FFFF00000100007F"})):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, _, number = line.split()[1].partition(":")
            if line.split()[3] == "0A" and int(number, 16) == port:
                found.add("127.0.0.1" if address in loopbacks else "0.0.0.0")
    return found


def test_mutual_tls_and_a_restricted_api_from_the_shell(
    run: Run, guarded: str, repository: Path, files: dict[str, Path]
) -> None:
    certificate = ("--tls-cert", files["client.pem"], "--tls-key", files["client.key"])
    named = ("--tls-ca", files["ca.pem"], "--tls-server-name", "triton.test")
    header = ("--header-file", files["headers"])
    deploy = ("deploy", "m:1", "-r", repository, "--to", guarded, "--retries", "0", "--json")
    done = json.loads(run(*deploy, *certificate, *named, *header).stdout)
    assert done["rollout"]["servers"][0]["ready"] == [1]
    another_user = {"XDG_CACHE_HOME": str(repository.parent / "another")}
    # Each option is needed: without one nothing is changed, and the message says why.
    for options, reason in (
        ((*certificate, *named), "restricted"),
        ((*named, *header), "cannot be reached"),
        ((*certificate, *named[2:], *header), "cannot be reached"),
        ((*certificate, *named[:2], *header), "cannot be reached"),
    ):
        refused = run("deploy", "m:2", *deploy[2:], *options, code=5, **another_user)
        assert reason in json.loads(refused.stdout)["error"]["message"]
    assert "--header-file" in run("status", *deploy[2:6], *certificate, *named, code=5, **another_user).stderr
    environment = {"REPO_MANAGER_HEADER_FILE": str(files["headers"])}
    run("status", *deploy[2:6], *certificate, *named, **environment, **another_user)
    # On this machine its own user reaches it over HTTP without certificates, and the record has the header.
    run("deploy", "m:2", "-r", repository)
    (model,) = json.loads(run("status", "-r", repository, "--json").stdout)["models"]
    assert (model["ready"], model["restarted"]) == ([2], False)


def test_https_behind_a_proxy_with_a_token(
    run: Run,
    repository: Path,
    files: dict[str, Path],
    start_server: Callable[[ServerOptions], EmbeddedServer],
) -> None:
    security = ServerSecurity(restricted=("admin-key", SECRETS[0]))
    server = start_server(ServerOptions(repository=str(repository), auto_complete=False, security=security))
    port = int(server.http_url.rpartition(":")[2])
    header = ("--header-file", files["headers"])
    own = ("--tls-ca", files["ca.pem"], "--tls-server-name", "triton.test", *header)
    certificate = ("--tls-cert", files["client.pem"], "--tls-key", files["client.key"])
    with tls_terminating(port, files, mutual=True) as proxy:
        url = f"https://127.0.0.1:{proxy.port}"
        deploy = ("deploy", "m:1", "-r", repository, "--to", url, "--retries", "0", "--json")
        run(*deploy, *own, "--token-file", files["token"], code=5)
        assert f"Bearer {SECRETS[1]}".encode() not in bytes(proxy.received)
        run(*deploy, *own, *certificate, "--token-file", files["token"])
        assert f"Bearer {SECRETS[1]}".encode() in bytes(proxy.received)
        proxy.received.clear()
        run("status", "-r", repository, "--to", url, *own, *certificate, REPO_MANAGER_TOKEN=SECRETS[1])
        assert f"Bearer {SECRETS[1]}".encode() in bytes(proxy.received)
        unknown = run(*deploy, *own[2:4], *certificate, code=5)
        assert "certificate" in json.loads(unknown.stdout)["error"]["message"]


def test_no_secret_is_on_a_command_line_of_ours(run: Run, repository: Path, files: dict[str, Path]) -> None:
    seen: list[bytes] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.append(path.read_bytes())
                except OSError:
                    continue
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        options = ("--header-file", files["headers"], "--token-file", files["token"])
        run("serve", "--detach", "-r", repository, "--restrict-file", files["headers"])
        run("deploy", "m:1", "-r", repository, *options)
        run("serve", "--stop", "-r", repository)
    finally:
        stop.set()
        watcher.join()
    assert any(b"tritonserver" in line and str(repository).encode() in line for line in seen)
    ours = [line for line in seen if str(repository).encode() in line]
    assert not any(secret.encode() in line for line in ours for secret in SECRETS)
