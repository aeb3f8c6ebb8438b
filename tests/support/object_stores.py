"""Real object stores over HTTP for tests: moto for S3, Azurite for Azure."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import hmac
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from repo_manager.files import file_lock
from repo_manager.triton_config.config import ModelConfig
from repo_manager.triton_config.derive import derive_config
from repo_manager.triton_config.options import ConfigOptions
from repo_manager.triton_config.served_signature import ServedSignature
from repo_manager.types import Backend, TensorSpec

BUCKET = "bucket"
AZURE_ACCOUNT = "devstoreaccount1"
# Azurite's well-known key of its only account; it is in its documentation.
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

# S3 checks the condition of a write and writes in one step. Moto compares, then writes, in one thread per request:
# two writers with the same ETag could both pass, and one change was lost.
_MOTO = """
import logging, sys, threading
logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer

def in_one_step(method):
    def locked(*arguments, **named):
        with changing:
            return method(*arguments, **named)
    return locked

changing = threading.RLock()
for name in ("put_object", "delete_object"):
    if hasattr(S3Response, name):
        setattr(S3Response, name, in_one_step(getattr(S3Response, name)))
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def moto_server() -> Iterator[tuple[str, int]]:
    """An S3 store with one bucket; it ends with the block, or with this process."""
    pytest.importorskip("moto")
    pytest.importorskip("flask_cors")
    pytest.importorskip("obstore")
    process = subprocess.Popen(
        [sys.executable, "-c", _MOTO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        while line and not line.strip().isdecimal():  # moto says something of its own first
            line = process.stdout.readline()
        port = int(line)
        url = f"http://127.0.0.1:{port}/{BUCKET}"
        urllib.request.urlopen(urllib.request.Request(url, method="PUT")).close()
        yield ("127.0.0.1", port)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def s3_environment() -> dict[str, str]:
    """The variables read by Triton and repo-manager, and nothing else of AWS."""
    return {
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret-never-shown",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def azurite_command() -> list[str]:
    """The command for Azurite's blob service, installed by npm once, into the cache.

    Skips the test, with the reason, where npm cannot install it.
    """
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("Azurite needs node and npm, which are not installed")
    base = Path(
        os.environ.get("REPO_MANAGER_TEST_CACHE") or Path(tempfile.gettempdir()) / f"repo-manager-tests-{os.getuid()}"
    )
    folder = base / "azurite"
    script = folder / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
    complete = folder / "complete"  # written last: an interrupted installation is made again
    base.mkdir(parents=True, exist_ok=True)
    with file_lock(base / "azurite.lock", timeout_s=300):
        if not complete.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _install_azurite(npm, folder, script)
            complete.touch()
    return [node, str(script)]


def _install_azurite(npm: str, folder: Path, script: Path) -> None:
    command = [npm, "install", "azurite@3", "--no-audit", "--no-fund", "--loglevel=error", "--prefix", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("npm did not install azurite within 240 s")
    if done.returncode != 0 or not script.is_file():
        pytest.skip(f"npm could not install azurite: {done.stderr.strip()[-300:]}")


@contextlib.contextmanager
def azurite() -> Iterator[str]:
    """Azurite with one container; gives its endpoint. It ends with the block."""
    command = azurite_command()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command += ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"]
    command += ["--disableTelemetry", "--skipApiVersionCheck", "--silent"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, "azurite ended"
                assert time.monotonic() < deadline, "azurite does not listen"
                time.sleep(0.05)
        endpoint = f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"
        _make_container(endpoint)
        yield endpoint
    finally:
        process.kill()
        process.wait()


def _make_container(endpoint: str) -> None:
    """No library of ours makes containers: one request, signed as Azure's documentation of Shared Key says."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    named = "".join(f"{name}:{value}\n" for name, value in headers.items())
    text = "PUT" + "\n" * 12 + named + f"/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/{BUCKET}\nrestype:container"
    digest = hmac.new(base64.b64decode(AZURE_KEY), text.encode(), hashlib.sha256).digest()
    headers["authorization"] = f"SharedKey {AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}"
    url = f"{endpoint}/{BUCKET}?restype=container"
    urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers)).close()


@dataclasses.dataclass(frozen=True)
class _Batched:
    """As `onnx_model.BatchAxis`, without importing onnx."""

    kind: str = "batched"
    reason: str = ""


def tiny_config(name: str = "m", **options: Any) -> ModelConfig:
    """A configuration of a model with one input and one output."""
    signature = ServedSignature((TensorSpec("x", "float32", ("N", 3)),), (TensorSpec("y", "float32", ("N", 2)),))
    batched: Any = _Batched()
    return derive_config(name, signature, batched, Backend.ONNXRUNTIME, ConfigOptions(**options))


def tiny_files(folder: Path, text: str = "model", size_bytes: int = 600) -> dict[str, Path]:
    """Two files of a version, made of a text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a").write_bytes((text.encode() * size_bytes)[:size_bytes])
    (folder / "b").write_bytes(b"weights of " + text.encode())
    return {"model.onnx": folder / "a", "sub/model.data": folder / "b"}
