"""Snapshots kept on a node: checked by digest and signature, shared by processes, removed when nobody serves them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.certificates import make_key_pair
from support.triton_deployment import publish_scaling
from support.waiting import eventually

from repo_manager.errors import RepositoryError, UsageError
from repo_manager.files import sha256_bytes
from repo_manager.pipeline.snapshot import fetch, snapshot
from repo_manager.repository.signing import SigningKey, sign_version
from repo_manager.rollout import snapshot_cache


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    publish_scaling(folder / "repository", "scale", [2.0, 3.0, 4.0, 5.0], folder)
    return folder / "repository"


@pytest.fixture
def snapshots(tmp_path: Path, published: Path) -> list[Path]:
    """Four snapshots, a version in each."""
    shutil.copytree(published, tmp_path / "repository")
    made = [snapshot(tmp_path / "repository", (f"scale:{version}",)).pin for version in (1, 2, 3, 4)]
    return [Path(each.url) for each in made]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_an_edit_in_the_cache_reaches_neither_the_snapshot_nor_the_repository(
    snapshots: list[Path], cache: Path, tmp_path: Path
) -> None:
    (file,) = (snapshots[0] / "scale" / "1").glob("model.*")
    sources = [file, tmp_path / "repository" / "scale" / "1" / file.name]
    before = [source.read_bytes() for source in sources]
    with fetch(snapshots[0], cache) as fetched, (fetched.folder / "scale" / "1" / file.name).open("ab") as edited:
        edited.write(b"more")
    assert [source.read_bytes() for source in sources] == before


def ids_in(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.is_dir()}


def test_a_snapshot_is_fetched_once_and_checked_each_time(snapshots: list[Path], cache: Path, tmp_path: Path) -> None:
    with fetch(snapshots[0], cache, link=tmp_path / "link") as first:
        assert (first.fetched, first.models) == (True, {"scale": (1,)})
        assert (tmp_path / "link").resolve() == first.folder.resolve() == cache / first.id
    shutil.rmtree(snapshots[0])
    with fetch(snapshots[0], cache) as again:
        assert not again.fetched, "its source is not asked, and need not be there"
    with fetch(snapshots[1], cache, link=tmp_path / "link") as other:
        assert (tmp_path / "link").resolve() == other.folder.resolve()


@pytest.mark.parametrize("damage", ["changed", "missing", "added", "config", "manifest", "record"])
def test_what_is_damaged_is_fetched_again(snapshots: list[Path], cache: Path, damage: str) -> None:
    fetch(snapshots[0], cache).close()
    version = cache / snapshots[0].name / "scale" / "1"
    if damage == "changed":
        data = bytearray((version / "model.onnx").read_bytes())
        data[-1] ^= 1
        (version / "model.onnx").write_bytes(data)
    elif damage == "missing":
        (version / "model.onnx").unlink()
    elif damage == "added":
        (version / "model.py").write_text("import os")
    elif damage == "config":
        with (version.parent / "config.pbtxt").open("a") as file:
            file.write("parameters { key: 'x' value { string_value: 'y' } }")
    elif damage == "manifest":
        manifest = json.loads((version / "manifest.json").read_text())
        (version / "model.onnx").write_bytes(b"other")
        manifest["files"]["model.onnx"] = {"sha256": sha256_bytes(b"other"), "size_bytes": 5}
        (version / "manifest.json").write_text(json.dumps(manifest))
    else:
        (version.parent.parent / "snapshot.json").write_text("{")
    events: list[str] = []
    with fetch(snapshots[0], cache, report=events.append) as mended:
        assert mended.fetched
    assert snapshot_cache._fault_of(cache, snapshots[0].name) is None
    assert len(events) == 1, "it says why"


def test_a_source_that_is_not_what_its_name_says_never_gets_into_the_cache(snapshots: list[Path], cache: Path) -> None:
    (snapshots[0] / "scale" / "1" / "model.onnx").write_bytes(b"other")
    with pytest.raises(RepositoryError, match=r"scale/1/model\.onnx is not as it was published"):
        fetch(snapshots[0], cache)
    shutil.rmtree(snapshots[1])
    shutil.copytree(snapshots[2], snapshots[1])
    with pytest.raises(RepositoryError, match=f"holds the content of snapshot {snapshots[2].name}"):
        fetch(snapshots[1], cache)
    with pytest.raises(RepositoryError, match="is no complete snapshot"):
        fetch(snapshots[0].parent / "0123456789abcdef", cache)
    assert ids_in(cache) == set()


def test_only_a_snapshot_can_be_kept(tmp_path: Path, snapshots: list[Path], cache: Path) -> None:
    with pytest.raises(UsageError, match="is no snapshot"):
        fetch(tmp_path / "repository", cache)


def test_signatures_are_checked_where_it_is_served(
    snapshots: list[Path], cache: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    pytest.importorskip("model_signing", reason="needs the extra [sign]")
    private, public = keys
    with pytest.raises(RepositoryError, match="scale:1 is not signed"):
        fetch(snapshots[0], cache, signed_by=[public])
    sign_version(tmp_path / "repository", "scale", 1, SigningKey(private))
    assert snapshot(tmp_path / "repository", ("scale:1",)).pin.id == snapshots[0].name, "the same version"
    with fetch(snapshots[0], cache, signed_by=[public]) as signed:
        assert not signed.fetched, "the signature alone was lacking"
    (cache / snapshots[0].name / ".repo-manager.scale.1.sig.json").write_bytes(b"{}")
    (snapshots[0] / ".repo-manager.scale.1.sig.json").write_bytes(b"{}")
    with pytest.raises(RepositoryError, match="the signature of scale:1 does not hold"):
        fetch(snapshots[0], cache, signed_by=[public])


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_key_pair(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def holder(snapshots: list[Path], cache: Path) -> Iterator[subprocess.Popen[str]]:
    """A sidecar with the first snapshot."""
    command = [sys.executable, "-m", "repo_manager.cli", "fetch", str(snapshots[0]), str(cache), "--hold"]
    process = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def test_what_a_process_serves_stays_and_the_longest_unused_goes(
    snapshots: list[Path], cache: Path, holder: subprocess.Popen[str]
) -> None:
    assert eventually(lambda: b"sigwait" in Path(f"/proc/{holder.pid}/cmdline").read_bytes(), timeout_s=60.0)
    for age, each in ((50, snapshots[1]), (100, snapshots[2])):
        fetch(each, cache).close()
        os.utime(cache / f"{each.name}.use", (1e9 - age, 1e9 - age))
    os.utime(cache / f"{snapshots[0].name}.use", (0, 0))
    with fetch(snapshots[3], cache, keep=1) as made:
        assert made.removed == (snapshots[2].name,), "the first one is older, and is served"
    assert ids_in(cache) == {each.name for each in (snapshots[0], snapshots[1], snapshots[3])}
    holder.send_signal(signal.SIGTERM)
    assert holder.wait(timeout=60) == 0
    with fetch(snapshots[3], cache, keep=0) as made:
        assert set(made.removed) == {snapshots[0].name, snapshots[1].name}


def test_unused_snapshots_make_room(snapshots: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, each in ((20, snapshots[0]), (10, snapshots[1])):
        fetch(each, cache).close()
        os.utime(cache / f"{each.name}.use", (1e9 - age, 1e9 - age))

    def usage(_: object) -> shutil._ntuple_diskusage:
        return shutil._ntuple_diskusage(10**9, 0, 0 if snapshots[0].name in ids_in(cache) else 10**9)

    monkeypatch.setattr(snapshot_cache.shutil, "disk_usage", usage)
    with fetch(snapshots[2], cache, keep=5) as made:
        assert made.removed == (snapshots[0].name,), "no more than is needed"
    monkeypatch.setattr(snapshot_cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(RepositoryError, match=r"has 0\.0 GB free, and snapshot"):
        fetch(snapshots[3], cache)
