from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repo_manager.errors import RepositoryError
from repo_manager.repository.stores.staging import staged, sweep
from repo_manager.repository.verify import verify

Put = Callable[..., Any]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_area_is_beside_the_root_and_goes_away(tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    with staged(root) as entry:
        assert entry.parent == tmp_path / ".models.staging"
        (entry / "deep").mkdir()
        with staged(root) as other:
            assert other != entry
        assert entry.exists()
    assert names(tmp_path) == ["models"]
    assert names(root) == []


def test_what_a_dead_command_left_is_swept_and_a_live_ones_is_not(tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom repo_manager.repository.stores.staging import staged\n"
        "with staged(Path(sys.argv[1])) as entry:\n    (entry / 'x').write_text('x')\n    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(root)], check=False, timeout=60)
    area = tmp_path / ".models.staging"
    (area / "not-ours").mkdir()
    assert len(names(area)) == 3
    with staged(root) as entry:
        assert names(area) == sorted(["not-ours", entry.name, entry.name + ".lock"])
        assert sweep(root) == ()
        assert entry.exists()
    assert names(area) == ["not-ours"]


def test_what_was_left_in_the_root_is_swept_from_beside_it_too(tmp_path: Path) -> None:
    root = tmp_path / "models"
    (root / ".repo-manager.staging/stage-0123456789abcdef/deep").mkdir(parents=True)
    with staged(root) as entry:
        assert entry.parent == tmp_path / ".models.staging"
        assert names(root) == []


def test_a_link_in_the_areas_place_is_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / ".models.staging").symlink_to(elsewhere)
    with staged(root) as entry:
        assert entry.parent == root / ".repo-manager.staging"
    assert names(elsewhere) == []


# The rest needs file systems of our own: a mount namespace, open to an ordinary user too.
NAMESPACE = ["unshare", "-rm"]
HAS_NAMESPACE = (
    shutil.which("unshare") is not None
    and subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "x", "/mnt"], capture_output=True, check=False).returncode
    == 0
)
needs_namespace = pytest.mark.skipif(not HAS_NAMESPACE, reason="no mount namespaces here")

# Runs each argument: `publish ROOT FILE` itself, anything else by the shell. One process, because starting is slow.
STEPS = """
import os, subprocess, sys
from pathlib import Path
from tests_conftest import make_config
from repo_manager.errors import RepositoryError
from repo_manager.repository.publish import publish
for step in sys.argv[1:]:
    sys.stdout.flush()
    words = os.path.expandvars(step).split()
    if words[0] != "publish":
        subprocess.run(step, shell=True, check=True)
        continue
    try:
        print("version", publish(Path(words[1]), "m", {"model.onnx": Path(words[2])}, make_config(), {}).version)
    except RepositoryError as exc:
        print("error", exc)
"""


def in_namespace(tmp_path: Path, *steps: str) -> str:
    (tmp_path / "tests_conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "T": str(tmp_path)}
    done = subprocess.run(
        [*NAMESPACE, sys.executable, "-c", STEPS, *steps],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_namespace
def test_a_root_that_is_a_mount_point_stages_inside_and_cleans_up(tmp_path: Path) -> None:
    output = in_namespace(
        tmp_path,
        "mkdir $T/models; echo x > $T/model; mount -t tmpfs x $T/models",
        "publish $T/models $T/model",
        "publish $T/models $T/model",
        "find $T/models -type d; ls -A $T",
        # The same with two mounts of one file system: one device, and a rename is refused all the same.
        "mkdir $T/bound $T/disk; mount --bind $T/disk $T/bound",
        "publish $T/bound $T/model",
        "find $T/disk; ls -A $T",
    )
    assert output.startswith("version 1\nversion 2\n")
    assert output.count("version") == 3
    assert "staging" not in output


@needs_namespace
def test_full_and_read_only_disks_leave_everything_as_it_was(tmp_path: Path) -> None:
    output = in_namespace(
        tmp_path,
        "mkdir $T/disk; mount -t tmpfs -o size=400k x $T/disk; head -c 100000 /dev/zero > $T/model",
        "publish $T/disk/models $T/model",
        "cd $T/disk; find . -type f | xargs sha256sum | sort > $T/before; head -c 500000 /dev/zero > $T/big",
        "publish $T/disk/models $T/big",
        "mount -o remount,ro x $T/disk",
        "publish $T/disk/models $T/model",
        "mount -o remount,rw,size=400k x $T/disk",
        "cd $T/disk; find . -type f | xargs sha256sum | sort | diff $T/before -; find . -name '*staging*'",
        "publish $T/disk/models $T/model",
    )
    assert "error cannot publish m: No space left on device" in output
    assert "The disk is full" in output
    assert "Read-only file system" in output
    assert output.endswith("version 2\n")


def test_a_parent_that_cannot_be_written_stages_inside(put: Put, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.mkdir(parents=True)
    real_mkdir = Path.mkdir

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        if self == root.parent / ".models.staging":  # As root, permissions stop nothing: refuse in their place.
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        real_mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert put().version == 1
    assert names(root) == [".repo-manager.json", ".repo-manager.lock", "m"]
    assert verify(root, models=False) == ()


def test_where_nothing_can_be_staged_both_reasons_are_given(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="no staging folder") as caught, staged(Path("/proc/self")):
        pass
    assert "/proc/self/.repo-manager.staging" in str(caught.value) or "/proc/" in str(caught.value)
