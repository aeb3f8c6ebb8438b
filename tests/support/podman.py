"""Containers without an engine and without a registry: podman, on a Debian base made here by debootstrap."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_PACKAGES = (
    "python3,python3-venv,python3-pip,ca-certificates,libgomp1,libcurl4,libnuma1,libb64-0d,libarchive13,libpython3.11"
)
_BASE = "localhost/repo-manager-test-base:3"
_OPT_IN = "REPO_MANAGER_TEST_CONTAINERS"
_CONF = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
"""
# pip in a build needs the same settings as pip on this machine.
_SHARED = ("/etc/pip.conf", "/etc/ssl/certs", "/usr/local/share/ca-certificates")


class Podman:
    """Builds and runs images, kept in a cache folder of the tests."""

    def __init__(self) -> None:
        cache = os.environ.get("REPO_MANAGER_TEST_TOOLS") or Path.home() / ".cache" / "repo-manager-test-tools"
        self._folder = Path(cache) / "podman"
        self._conf = self._folder / "containers.conf"

    def run(self, *arguments: str | Path, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        place = ["--root", str(self._folder / "store"), "--runroot", str(self._folder / "run")]
        command = ["podman", *place, *map(str, arguments)]
        environment = {**os.environ, "CONTAINERS_CONF": str(self._conf)}
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)

    def base(self) -> str:
        """Return the base image's name. The first call ever makes it, when asked to."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._conf.write_text(_CONF, encoding="utf-8")
        if self.run("image", "exists", _BASE).returncode == 0:
            return _BASE
        if not os.environ.get(_OPT_IN):
            pytest.skip(f"no base image in {self._folder}: {_OPT_IN}=1 makes one, and images on it, in five minutes")
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            root = Path(folder) / "root"
            made = subprocess.run(
                ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", str(root)],
                capture_output=True,
                text=True,
                timeout=900,
                check=False,
            )
            if made.returncode != 0:
                pytest.skip(f"debootstrap made no base image: {made.stdout[-300:]}{made.stderr[-300:]}")
            archive = Path(folder) / "root.tar"
            subprocess.run(["tar", "-C", str(root), "-cf", str(archive), "."], check=True, timeout=300)
            done = self.run("import", archive, _BASE, timeout_s=300)
            assert done.returncode == 0, done.stderr
        return _BASE

    def build(self, dockerfile: Path, context: Path, tag: str, *, base: str, timeout_s: float = 600.0) -> None:
        shared = [f"--volume={path}:{path}:ro" for path in _SHARED if Path(path).exists()]
        done = self.run(
            *("build", "--isolation", "chroot", "--network", "host", "--format", "docker", "--layers", *shared),
            *("--file", dockerfile, "--build-arg", f"BASE={base}", "--tag", tag, context),
            timeout_s=timeout_s,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def podman() -> Podman:
    """Return podman; the test is skipped, with the reason, where it cannot start."""
    missing = [name for name in ("podman", "runc", "debootstrap") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: no container can be built here")
    if os.geteuid() != 0:
        pytest.skip("debootstrap and podman's chroot builds need root")
    made = Podman()
    base = made.base()
    started = made.run("run", "--rm", "--network", "host", base, "true")
    if started.returncode != 0:
        pytest.skip(f"podman cannot start a container here: {started.stderr.strip()[-300:]}")
    return made


def build_context(folder: Path, *paths: str) -> Path:
    """Copy the files tracked by git below some paths, as in a clean checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", *paths],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(ROOT / name, target)
    return folder
