from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from repo_manager.errors import RepositoryError
from repo_manager.files import copy_folder, file_lock, fsync_tree, sha256_bytes, sha256_file, write_atomic


def test_digests_agree_and_name_their_algorithm(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 3_000_000)
    assert sha256_file(path) == sha256_bytes(path.read_bytes())
    assert sha256_bytes(b"") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_write_replaces_the_content_and_keeps_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    path.chmod(0o640)
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_the_temporary_file_lies_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = tmp_path / "staging"
    staging.mkdir()
    seen: list[str] = []
    replace = Path.replace

    def spy(self: Path, target: Path) -> Path:
        seen.append(str(self.parent))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", spy)
    write_atomic(tmp_path / "f", b"", staging=staging)
    assert seen == [str(staging)]


def test_fsync_tree_takes_nested_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "f").write_bytes(b"1")
    fsync_tree(tmp_path)
    leaves_first = [tmp_path / "a" / "b" / "f", tmp_path / "a" / "b", tmp_path / "a", tmp_path]
    assert synced == [path.stat().st_ino for path in leaves_first]


def test_a_held_lock_is_waited_for_and_then_reported(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with (
        file_lock(lock),
        pytest.raises(RepositoryError, match="locked by another process"),
        file_lock(lock, timeout_s=0.05),
    ):
        pass
    with file_lock(lock, timeout_s=0):
        pass


def _hold(path: Path, held: multiprocessing.synchronize.Event) -> None:  # type: ignore[name-defined]
    with file_lock(path):
        held.set()
        signal.pause()


def _child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    code = """if True:
        import os, pathlib, signal, sys
        from repo_manager.files import write_atomic
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        write_atomic(pathlib.Path(sys.argv[1]), b"part")
    """
    path, others = tmp_path / "report.html", [tmp_path / ".report.html.notes", tmp_path / ".other.html.4194305.1.tmp"]
    for other in others:
        other.touch()
    alive = tmp_path / f".report.html.{os.getpid()}.1.tmp"
    alive.touch()
    assert _child(code, path).returncode == -9
    assert len(list(tmp_path.iterdir())) == 4
    write_atomic(path, b"whole")
    assert sorted(tmp_path.iterdir()) == sorted([path, alive, *others])


def test_a_write_that_fails_names_its_file(tmp_path: Path) -> None:
    code = """if True:
        import pathlib, resource, sys
        from repo_manager.files import write_atomic
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        write_atomic(pathlib.Path(sys.argv[1]), bytes(8192))
    """
    failed = _child(code, tmp_path / "report.html")
    assert failed.stderr.strip().endswith(f"OSError: [Errno 27] File too large: '{tmp_path / 'report.html'}'")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_copied_until_something_fails(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "in" / "it").mkdir(parents=True)
    (source / "in" / "it" / "file").write_bytes(b"x")
    copy_folder(source, tmp_path / "made" / "target")
    assert (tmp_path / "made" / "target" / "in" / "it" / "file").read_bytes() == b"x"
    (source / "in" / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="gone") as failed:
        copy_folder(source, tmp_path / "other")
    assert failed.value.errno == errno.ENOENT


def test_a_dead_holders_lock_is_free(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "lock", held))
    holder.start()
    assert held.wait(30)
    holder.kill()
    holder.join()
    with file_lock(tmp_path / "lock", timeout_s=5):
        pass


def test_a_work_folder_that_a_killed_process_left_is_removed_by_the_next_process(tmp_path: Path) -> None:
    code = """if True:
        import os, pathlib, sys
        from repo_manager.files import work_folder
        with work_folder(".m.onnx.", pathlib.Path(sys.argv[1])) as folder:
            (folder / "part").touch()
            print(folder, flush=True)
            exec(sys.argv[2])
    """

    def command(then: str) -> list[str]:
        return [sys.executable, "-c", code, str(tmp_path), then]

    def folder_of(then: str) -> Path:
        return Path(subprocess.run(command(then), stdout=subprocess.PIPE, text=True, check=False).stdout.strip())

    pipe = subprocess.PIPE
    with subprocess.Popen(command("sys.stdin.read()"), stdin=pipe, stdout=pipe, text=True) as lives:
        assert lives.stdout is not None
        held = Path(lives.stdout.readline().strip())
        others = [tmp_path / ".m.onnx.notes", tmp_path / ".other.onnx.abcdefgh.work"]
        for folder in others:
            folder.mkdir()
        left = folder_of("os.kill(os.getpid(), 9)")
        assert (left / "part").exists()
        assert not folder_of("pass").exists()
        assert not left.exists()
        assert (held / "part").exists(), "its owner lives"
        assert all(folder.exists() for folder in others)
        lives.communicate("")
    assert not held.exists()
