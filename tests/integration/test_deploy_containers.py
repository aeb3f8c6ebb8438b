"""The container files, built and run by podman on a base made here.

REPO_MANAGER_TEST_CONTAINERS=1 makes it once, in the cache, within minutes. Without the variable and without a base the
tests are skipped.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.podman import Podman, build_context, podman

from repo_manager.samples import sample_model
from repo_manager.server.installation import find_triton

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.container, pytest.mark.timeout(1500)]

_HARDENED = ("--rm", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "all", "--network", "host")


@pytest.fixture(scope="module")
def engine() -> Podman:
    return podman()


@pytest.fixture(scope="module")
def cli(engine: Podman, tmp_path_factory: pytest.TempPathFactory) -> str:
    context = build_context(
        tmp_path_factory.mktemp("context"), "repo_manager", "pyproject.toml", "README.md", "LICENSE", "deploy/docker"
    )
    tag = "localhost/repo-manager-test-cli"
    engine.build(context / "deploy" / "docker" / "Dockerfile.cli", context, tag, base=engine.base())
    return tag


def test_the_command_line_runs_without_root_on_a_root_that_cannot_be_written(
    engine: Podman, cli: str, tmp_path: Path
) -> None:
    assert engine.run("run", *_HARDENED, "--entrypoint", "id", cli, "-u").stdout.strip() == "10001"
    done = engine.run("run", *_HARDENED, cli, "--version")
    assert done.stdout.startswith("repo-manager "), done.stderr
    assert engine.run("run", *_HARDENED, "--entrypoint", "sh", cli, "-c", "touch /opt/x").returncode != 0

    work = tmp_path / "work"
    work.mkdir(mode=0o777)
    work.chmod(0o777)
    shutil.copy2(sample_model(), work / "model.onnx")
    mount = ("--volume", f"{work}:/work")
    added = engine.run(
        *("run", *_HARDENED, *mount, cli, "add", "model.onnx", "--name", "digits", "--precision", "fp16"),
        *("--backend", "onnxruntime", "--repository", "models", "--json"),
        timeout_s=120,
    )
    assert added.returncode == 0, added.stderr
    assert json.loads(added.stdout)["version"] == 1
    verified = engine.run("run", *_HARDENED, *mount, cli, "verify", "--repository", "models", timeout_s=120)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    extras = "import lightkube, obstore, model_signing"
    done = engine.run("run", *_HARDENED, "--entrypoint", "python3", cli, "-c", extras)
    assert done.returncode == 0, done.stderr


_TRITON_BASE = """
ARG BASE
FROM ${BASE}
COPY tritonserver /opt/tritonserver
COPY libs /opt/libs
ENV LD_LIBRARY_PATH=/opt/libs PATH=/opt/tritonserver/bin:$PATH
"""
_CONFIG = 'name: "m" backend: "tensorrt_rtx" input { name: "x" data_type: TYPE_FP32 dims: 4 }' + (
    ' output { name: "y" data_type: TYPE_FP32 dims: 4 } instance_group { kind: KIND_CPU }'
)


def test_triton_finds_our_backend(engine: Podman, tmp_path: Path) -> None:
    """Without a GPU no engine can be loaded: the refusal comes from our model.py, so Triton found and ran it."""
    triton = find_triton()
    base = tmp_path / "base"
    shutil.copytree(triton.binary.parent.parent, base / "tritonserver", symlinks=True)
    (base / "libs").mkdir()
    for folder in triton.libraries:
        shutil.copytree(folder, base / "libs", dirs_exist_ok=True)
    stubs = base / "tritonserver" / "python_backend_stubs" / "3.11" / "triton_python_backend_stub"
    stub = Path(shutil.copy2(stubs, base / "tritonserver" / "backends" / "python"))
    stub.chmod(0o755)
    (base / "Dockerfile").write_text(_TRITON_BASE)
    engine.build(base / "Dockerfile", base, "localhost/repo-manager-test-tritonserver", base=engine.base())
    context = build_context(tmp_path / "context", "repo_manager/server/backends", "deploy/docker")
    tag = "localhost/repo-manager-test-triton"
    dockerfile = context / "deploy" / "docker" / "Dockerfile.triton"
    engine.build(dockerfile, context, tag, base="localhost/repo-manager-test-tritonserver")

    assert engine.run("run", *_HARDENED, "--entrypoint", "id", tag, "-u").stdout.strip() == "1000"
    models = tmp_path / "models"
    (models / "m" / "1").mkdir(parents=True)
    (models / "m" / "config.pbtxt").write_text(_CONFIG)
    (models / "m" / "1" / "model.engine").write_bytes(b"no engine")
    ports = ("--http-port=0", "--allow-http=false", "--allow-grpc=false", "--allow-metrics=false")
    done = engine.run(
        *("run", *_HARDENED, "--shm-size", "256m", "--volume", f"{models}:/models:ro", tag, "tritonserver"),
        *("--model-repository=/models", "--backend-directory=/opt/tritonserver/backends", "--model-control-mode=none"),
        *ports,
        timeout_s=120,
    )
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "the tensorrt_rtx backend needs an NVIDIA GPU" in said, said
    # It asks for the GPU before it imports the library.
    imported = engine.run("run", *_HARDENED, "--entrypoint", "python3", tag, "-c", "import numpy, tensorrt_rtx")
    assert imported.returncode == 0, imported.stderr
