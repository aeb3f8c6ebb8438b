"""A repository in object storage, over real HTTP: every operation, and many writers at once (moto speaks S3)."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.object_stores import BUCKET, moto_server, s3_environment, tiny_config, tiny_files
from support.python_models import write_python_model

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.pipeline.adding_files import add_files
from repo_manager.pipeline.ensembling import EnsembleOptions, make_ensemble
from repo_manager.repository.adopt import adopt
from repo_manager.repository.configuration import (
    change_config,
    edit_config,
    read_config_bytes,
    set_served_versions,
    touch_config,
    write_config_bytes,
)
from repo_manager.repository.location import ObjectRepository, parse_location
from repo_manager.repository.publish import PublishedVersion, plan_publish, publish
from repo_manager.repository.relabel import read_labels, set_labels
from repo_manager.repository.remove import gc, remove
from repo_manager.repository.repair import repair
from repo_manager.repository.scan import find_model, scan
from repo_manager.repository.stores import open_store
from repo_manager.repository.stores.objects import lease
from repo_manager.repository.stores.objects.client import ObjectClient, open_client
from repo_manager.repository.stores.objects.facts import Listing, Mark
from repo_manager.repository.stores.objects.holder import Holder
from repo_manager.repository.stores.objects.ledger import Pending, change_ledger, read_ledger
from repo_manager.repository.tags import (
    model_state,
    model_states,
    previous_deployment,
    record_deployment,
    remove_tag,
    resolve_version,
    set_tag,
)
from repo_manager.repository.transfer import CopyOptions, copy_version, version_files
from repo_manager.repository.verify import verify

pytestmark = [pytest.mark.integration, pytest.mark.slow]
Put = Callable[..., PublishedVersion]


@pytest.fixture(scope="module")
def moto() -> Iterator[tuple[str, int]]:
    with moto_server() as address:
        yield address


@pytest.fixture
def root(moto: tuple[str, int], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ObjectRepository:
    for name, value in s3_environment().items():
        monkeypatch.setenv(name, value)
    place = parse_location(f"s3://http://127.0.0.1:{moto[1]}/{BUCKET}/{abs(hash(request.node.nodeid))}/models")
    assert isinstance(place, ObjectRepository)
    return place


@pytest.fixture
def store(root: ObjectRepository) -> ObjectClient:
    return open_client(root)


@pytest.fixture
def put(root: ObjectRepository, tmp_path: Path) -> Put:
    """Publish one more version, each with a content of its own."""
    count = [0]

    def put_one(name: str = "m", **options: object) -> PublishedVersion:
        count[0] += 1
        files = tiny_files(tmp_path / f"source-{count[0]}", f"text {count[0]}")
        return publish(root, name, files, tiny_config(name, **options), {"precision": "fp16"})

    return put_one


def errors_of(root: ObjectRepository) -> list[str]:
    return [f"{p.where}: {p.what}" for p in verify(root, models=False) if p.severity.value == "error"]


def test_an_empty_prefix_is_an_empty_repository(root: ObjectRepository) -> None:
    assert scan(root) == ()
    assert model_states(root) == {}
    with pytest.raises(RepositoryError, match="has no model 'm'"):
        find_model(root, "m")


def mark_folders(root: ObjectRepository, *folders: str) -> None:
    """Write the empty objects a console leaves after "Create folder"."""
    for folder in folders:
        url = f"{root.endpoint}/{root.bucket}/{root.prefix}/{folder}/"
        urllib.request.urlopen(urllib.request.Request(url, data=b"", method="PUT")).close()


def test_a_folder_marker_is_a_folder_for_every_command(root: ObjectRepository, put: Put, store: ObjectClient) -> None:
    put("m")
    mark_folders(root, "empty", "m", "m/7", "m/1")
    assert [(entry.name, [v.version for v in entry.versions]) for entry in scan(root)] == [("empty", []), ("m", [1, 7])]
    assert find_model(root, "empty").problems[-1] == "has no version"
    expected = "empty: has no version, and Triton takes the folder for a model"
    assert expected in errors_of(root)
    assert [p.where for p in verify(root, "empty") if p.severity.value == "error"] == ["empty"]
    assert gc(root).removals == ()
    with pytest.raises(RepositoryError, match=r"marks it: \S+[^/]/m/7/\n"):
        remove(root, "m", 7)
    with pytest.raises(RepositoryError, match=r"marks it: \S+[^/]/empty/\n"):
        remove(root, "empty")
    assert put("empty").version == 1  # As into an empty folder on a disk.


def test_a_key_that_is_no_path_is_named_at_once(root: ObjectRepository) -> None:
    mark_folders(root, "e2/")
    began = time.monotonic()
    (entry,) = scan(root)
    assert "a key there is no path of a file" in entry.problems[0]
    assert time.monotonic() - began < 10  # Not retried: a retry lasts two minutes.


def test_the_folder_of_a_model_or_a_version_names_the_repository_above(
    root: ObjectRepository, put: Put, store: ObjectClient
) -> None:
    put("m")

    def first(place: ObjectRepository) -> str:
        return str(verify(place, digests=False)[0])

    assert f"name the repository above: -r {root}" in first(root / "m")
    assert f"name the repository above: -r {root}" in first(root / "m" / "1")
    store.delete(["m/config.pbtxt"])
    assert f"name the repository above: -r {root}" in first(root / "m")
    assert not any("repository above" in str(problem) for problem in verify(root, digests=False))


def test_versions_are_numbered_and_only_the_first_writes_the_configuration(root: ObjectRepository, put: Put) -> None:
    first, second = put(), put()
    assert [(v.version, v.first, v.served) for v in (first, second)] == [(1, True, True), (2, False, False)]
    assert str(first.path) == f"{root}/m/1"
    entry = find_model(root, "m")
    assert (entry.policy, entry.selected, [v.version for v in entry.versions]) == ((1,), (1,), [1, 2])
    assert entry.versions[0].manifest is not None
    assert entry.versions[0].manifest.precision == "fp16"
    assert entry.versions[0].size_bytes is not None
    assert entry.versions[0].size_bytes > 600
    assert verify(root, models=False) == ()
    assert [model.name for model in scan(root, deep=False)] == ["m"]


def test_nothing_of_ours_is_a_prefix_that_triton_would_take_for_a_model_or_a_version(
    root: ObjectRepository, store: ObjectClient, put: Put
) -> None:
    put()
    set_tag(root, "m", "stable", 1)
    assert store.list().folders == ("m",)
    assert [fact.key for fact in store.list().files] == [".repo-manager.m.state"]
    level = store.list("m")
    assert level.folders == ("1",)
    assert [fact.key for fact in level.files] == ["config.pbtxt"]


def test_a_plan_writes_nothing(root: ObjectRepository, store: ObjectClient, tmp_path: Path, put: Put) -> None:
    plan = plan_publish(root, "m", tiny_files(tmp_path), tiny_config())
    assert (plan.version, plan.first, plan.served) == (1, True, True)
    assert store.list() == Listing((), ())
    put()
    assert plan_publish(root, "m", tiny_files(tmp_path), tiny_config()).version == 2


def test_another_signature_under_the_same_name_is_refused_before_anything_is_sent(
    root: ObjectRepository, store: ObjectClient, put: Put, tmp_path: Path
) -> None:
    put()
    other = dataclasses.replace(tiny_config(), text=tiny_config().text.replace("dims: [3]", "dims: [4]"))
    with pytest.raises(RepositoryError, match="serves something else"):
        publish(root, "m", tiny_files(tmp_path), type(other).from_message(_parsed(other.text)), {})
    assert store.list("m").folders == ("1",)
    assert read_ledger(store, "m").state.highest_version == 1


def _parsed(text: str):  # type: ignore[no-untyped-def]
    from repo_manager.triton_config.config import parse_config

    return parse_config(text).message()


def test_a_policy_by_which_triton_would_load_half_a_version_is_refused(root: ObjectRepository, put: Put) -> None:
    put()
    change_config(root, "m", {"version_policy": "{latest {num_versions: 1}}"})
    with pytest.raises(RepositoryError, match="could load the new version while it is uploaded"):
        put()
    assert [v.version for v in find_model(root, "m").versions] == [1]


def test_a_number_is_never_given_out_twice(root: ObjectRepository, put: Put, store: ObjectClient) -> None:
    put(), put()
    remove(root, "m", 2)
    assert put().version == 3
    remove(root, "m", force=True)
    assert store.list().folders == ()
    assert scan(root) == ()
    assert put().version == 4


def test_what_is_in_use_is_not_removed(root: ObjectRepository, put: Put) -> None:
    for _ in range(4):
        put()
    set_tag(root, "m", "stable", 2)
    record_deployment(root, "m", 3)
    record_deployment(root, "m", 1)
    for version, reason in ((1, "is selected"), (2, "tag 'stable'"), (3, "roll-back")):
        with pytest.raises(RepositoryError, match=reason):
            remove(root, "m", version)
    assert remove(root, "m", 4, dry_run=True).applied is False
    assert remove(root, "m", 4).versions == (4,)
    assert remove(root, "m", 2, force=True).in_use == ("m:2 has the tag 'stable'",)
    assert model_state(root, "m").tags == {}
    assert [v.version for v in find_model(root, "m").versions] == [1, 3]
    with pytest.raises(RepositoryError, match="has no version 4"):
        remove(root, "m", 4)


def test_gc_keeps_what_is_needed(root: ObjectRepository, put: Put) -> None:
    for _ in range(5):
        put()
    set_tag(root, "m", "stable", 2)
    assert gc(root, keep=2, dry_run=True).removals[0].versions == (3,)
    assert gc(root, keep=2, older_than_s=3600).removals == ()
    assert gc(root, keep=2).removals[0].versions == (3,)
    assert [v.version for v in find_model(root, "m").versions] == [1, 2, 4, 5]
    with pytest.raises(RepositoryError, match="keep is 0"):
        gc(root, keep=0)


def test_an_ensemble_says_that_no_answers_were_recorded(root: ObjectRepository, tmp_path: Path) -> None:
    for part in ("scale", "opt"):
        add_files(write_python_model(tmp_path, part), part, root)
    made = make_ensemble(root, "bare", ["scale", "opt"])
    assert any(note.startswith("no sample was recorded") for note in made.added.notes)
    sample = tmp_path / "rows.npz"
    np.savez(sample, X=np.array([[1, 2]], np.float32))
    made = make_ensemble(root, "given", ["scale", "opt"], EnsembleOptions(sample=sample))
    assert made.added.golden == "nobody"
    why = "it was not run here, so no answers were recorded: it needs opt, scale, which are in object storage"
    assert any(note.startswith(why) for note in made.added.notes), made.added.notes


def test_deployments_tags_and_versions_by_name(root: ObjectRepository, put: Put) -> None:
    put(), put()
    assert set_served_versions(root, "m", [2]) == (1,)
    assert find_model(root, "m").selected == (2,)
    record_deployment(root, "m", 1)
    record_deployment(root, "m", 2)
    assert previous_deployment(root, "m") == 1
    assert set_tag(root, "m", "stable", 1) is None
    assert set_tag(root, "m", "stable", 2, dry_run=True) == 1
    assert resolve_version(root, "m:stable") == ("m", 1)
    assert resolve_version(root, "m") == ("m", 2)
    assert remove_tag(root, "m", "stable") == 1
    with pytest.raises(RepositoryError, match="no version 'stable'"):
        resolve_version(root, "m:stable")
    with pytest.raises(RepositoryError, match="no version 7"):
        set_served_versions(root, "m", [7])
    with pytest.raises(RepositoryError, match="no version 7 to tag"):
        set_tag(root, "m", "t", 7)


def test_each_write_of_the_configuration_is_newer_by_the_stores_clock(
    root: ObjectRepository, put: Put, store: ObjectClient
) -> None:
    """S3 keeps whole seconds, and Triton ignores a time it has seen, so a roll-back would have no effect."""
    put(), put()
    times = []
    for change in (lambda: set_served_versions(root, "m", [2]), lambda: touch_config(root, "m")):
        change()
        fact = store.head("m/config.pbtxt")
        assert fact is not None
        times.append(fact.modified)
    assert times[0] < times[1]
    text = read_config_bytes(root, "m")
    assert text is not None
    write_config_bytes(root, "m", text)  # says so already: not touched
    again = store.head("m/config.pbtxt")
    assert again is not None
    assert again.modified == times[1]
    write_config_bytes(root, "m", None)
    assert read_config_bytes(root, "m") is None
    write_config_bytes(root, "m", text)
    assert read_config_bytes(root, "m") == text


def test_the_configuration_is_checked_before_it_is_written(root: ObjectRepository, put: Put) -> None:
    put()
    before = read_config_bytes(root, "m")
    change = change_config(root, "m", {"instance_group.count": "3"}, dry_run=True)
    assert "count: 3" in change.diff
    assert read_config_bytes(root, "m") == before
    with pytest.raises(ConfigError, match="would not load"):
        change_config(root, "m", {"default_model_filename": "other.onnx"})
    with pytest.raises(ConfigError, match="'x'"):
        edit_config(root, "m", (before or b"").decode().replace("dims: [3]", "dims: [9]"))
    assert read_config_bytes(root, "m") == before
    assert change_config(root, "m", {"instance_group.count": "3"}).applied
    assert b"count: 3" in (read_config_bytes(root, "m") or b"")


def test_a_change_that_somebody_else_was_quicker_with_is_refused(
    root: ObjectRepository, put: Put, store: ObjectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    put()
    real = ObjectClient.replace

    def late(self: ObjectClient, key: str, data: bytes, mark: Mark) -> Mark:
        monkeypatch.undo()
        for name, value in s3_environment().items():
            monkeypatch.setenv(name, value)
        store.put(key, data + b"# by somebody else\n")
        return real(self, key, data, mark)

    monkeypatch.setattr(ObjectClient, "replace", late)
    with pytest.raises(RepositoryError, match="was changed at the same time"):
        change_config(root, "m", {"instance_group.count": "3"})
    assert b"somebody else" in (read_config_bytes(root, "m") or b"")


def test_labels(root: ObjectRepository, put: Put) -> None:
    put()
    assert read_labels(root, "m") == {}
    assert not set_labels(root, "m", "y", ("a", "b"), dry_run=True).applied
    change = set_labels(root, "m", "y", ("a", "b"))
    assert (change.applied, change.reloaded) == (True, (1,))
    assert read_labels(root, "m") == {"y": ("a", "b")}
    set_labels(root, "m", "y", ("c", "d"))
    assert read_labels(root, "m") == {"y": ("c", "d")}
    assert verify(root, models=False) == ()


def test_labels_that_come_with_the_first_version(root: ObjectRepository, tmp_path: Path) -> None:
    config = tiny_config(labels={"y": ("a", "b")})
    publish(root, "m", tiny_files(tmp_path), config, {})
    assert read_labels(root, "m") == {"y": ("a", "b")}
    publish(root, "m", tiny_files(tmp_path, "other"), config, {})
    with pytest.raises(RepositoryError, match="other labels"):
        publish(root, "m", tiny_files(tmp_path, "third"), tiny_config(labels={"y": ("a", "c")}), {})


@pytest.mark.parametrize("way", ["out", "in", "across"])
def test_copies_in_every_direction(root: ObjectRepository, put: Put, tmp_path: Path, way: str) -> None:
    put()
    local = tmp_path / "local"
    if way == "out":
        source, target = root, local
    elif way == "in":
        copy_version(root, "m", 1, local)
        source, target = local, root.parent / "production"
    else:
        source, target = root, root.parent / "production"
    planned = copy_version(source, "m", 1, target, CopyOptions(target_name="n"), dry_run=True)
    assert (planned.version, planned.published) == (1, None)
    seen: list[int] = []
    made = copy_version(source, "m", 1, target, CopyOptions(target_name="n"), progress=seen.append)
    assert (made.version, made.identical) == (1, False)
    assert sum(seen) >= 600
    assert copy_version(source, "m", 1, target, CopyOptions(target_name="n")).identical
    there = find_model(target, "n").versions[0].manifest
    assert there is not None
    assert there.extra["copied_from"]["model"] == "m"
    assert there.digest == find_model(root, "m").versions[0].manifest.digest  # type: ignore[union-attr]
    assert verify(target, models=False) == ()


def test_two_copies_at_a_time_bring_the_content_once(root: ObjectRepository, put: Put, tmp_path: Path) -> None:
    put()
    local, target = tmp_path / "local", root.parent / "production"
    copy_version(root, "m", 1, local)
    refused: list[str] = []

    def copy_meanwhile(_: int) -> None:
        with pytest.raises(RepositoryError) as no:
            copy_version(local, "m", 1, target, CopyOptions(keep_number=False))
        refused.append(no.value.message)

    assert copy_version(local, "m", 1, target, CopyOptions(keep_number=False), progress=copy_meanwhile).version == 1
    assert set(refused) == {"another command publishes the same content as m:1 right now"}
    assert [each.version for each in find_model(target, "m").versions] == [1]
    late = copy_version(local, "m", 1, target, CopyOptions(keep_number=False))
    assert (late.version, late.identical) == (1, True)


def test_a_damaged_object_is_found_not_copied_and_repaired(
    root: ObjectRepository, put: Put, store: ObjectClient, tmp_path: Path
) -> None:
    put()
    copy_version(root, "m", 1, tmp_path / "backup")
    copy_version(root, "m", 1, root.parent / "backup")
    for other in (tmp_path / "backup", root.parent / "backup"):
        whole = store.get("m/1/model.onnx")
        assert whole is not None
        store.put("m/1/model.onnx", bytes(len(whole[0])))
        assert any("was changed" in error for error in errors_of(root))
        assert not any("/tmp" in problem.what or str(tmp_path) in problem.what for problem in verify(root))
        with pytest.raises(RepositoryError, match="differs from its manifest"):
            copy_version(root, "m", 1, tmp_path / "elsewhere")
        with pytest.raises(RepositoryError, match="differs from its manifest"), version_files(root / "m" / "1"):
            pass
        assert repair(root, dry_run=True, copies=(other,))[0].applied is False
        assert errors_of(root)
        done = repair(root, copies=(other,))
        assert [step.where for step in done] == ["m/1/model.onnx"]
        assert errors_of(root) == []
    store.delete(["m/1/model.onnx"])
    assert any("is missing" in error for error in errors_of(root))
    store.put("m/1/stray", b"x")
    assert any("added after publishing" in error for error in errors_of(root))


def test_a_damaged_file_on_disk_is_restored_from_object_storage(
    root: ObjectRepository, put: Put, tmp_path: Path
) -> None:
    put()
    local = tmp_path / "local"
    copy_version(root, "m", 1, local)
    whole = (local / "m/1/model.onnx").read_bytes()
    (local / "m/1/model.onnx").write_bytes(bytes(len(whole)))
    (local / "m/1/sub/model.data").unlink()
    done = repair(local, copies=(root,))
    assert sorted(step.where for step in done) == ["m/1/model.onnx", "m/1/sub/model.data"]
    assert all(str(root) in step.action for step in done)
    assert (local / "m/1/model.onnx").read_bytes() == whole
    assert verify(local, models=False) == ()


def test_repair_of_configuration_and_record(root: ObjectRepository, put: Put, store: ObjectClient) -> None:
    put(), put()
    store.delete(["m/config.pbtxt"])
    assert "written from the manifest of version 2" in repair(root)[0].action
    store.put(".repo-manager.m.state", b"{broken")
    assert any("is damaged" in error for error in errors_of(root))
    repair(root)
    assert errors_of(root) == []
    assert put().version == 3


def test_others_versions_are_looked_at_and_adopted(root: ObjectRepository, put: Put, store: ObjectClient) -> None:
    store.put("theirs/1/model.onnx", b"whatever")
    store.put("theirs/3.tmp/model.onnx", b"whatever")
    store.put("theirs/config.pbtxt", tiny_config("theirs").text.encode())
    store.put(".hidden/file", b"x")
    found = {problem.where: problem.what for problem in verify(root, models=False)}
    assert "takes this folder for version 3" in found["theirs/3.tmp"]
    assert "hidden prefix" in found[".hidden"]
    assert adopt(root, dry_run=True)[0].applied is False
    (adopted,) = adopt(root)
    assert (adopted.name, adopted.version, adopted.applied) == ("theirs", 1, True)
    assert adopt(root) == ()
    manifest = find_model(root, "theirs").versions[0].manifest
    assert manifest is not None
    assert manifest.files["model.onnx"].size_bytes == 8


def test_a_record_that_came_from_a_disk_counts_until_there_is_an_own_one(
    root: ObjectRepository, put: Put, store: ObjectClient
) -> None:
    entry = {"highest_version": 7, "deployments": [], "tags": {"old": 1}}
    store.put(".repo-manager.json", json.dumps({"schema_version": 1, "models": {"m": entry}}).encode())
    assert put().version == 8
    assert model_state(root, "m").tags == {"old": 1}


def test_a_folder_of_a_version_for_what_reads_files(root: ObjectRepository, put: Put) -> None:
    path = put().path
    with version_files(path) as folder:
        assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
            "manifest.json",
            "model.onnx",
            "sub/model.data",
        ]
    with version_files(path, ["golden.npz"]) as folder:
        assert [p.name for p in folder.iterdir()] == ["manifest.json"]
    assert not folder.exists()


def test_an_abandoned_publication_is_no_version_is_told_and_swept(
    root: ObjectRepository, put: Put, store: ObjectClient
) -> None:
    put()
    gone = dataclasses.replace(Holder.me(), pid=2**22 + 1)
    entry = Pending("publish", gone, "another content", ("model.onnx",))
    change_ledger(
        store, "m", lambda ledger: dataclasses.replace(ledger, state=ledger.state.numbered(2)).with_pending(2, entry)
    )
    store.put("m/2/model.onnx", b"half")
    store.put("m/2/somebodys", b"not in the claim")
    assert [v.version for v in find_model(root, "m").versions] == [1]
    assert any("was begun and not ended" in problem.what for problem in verify(root, models=False))
    with pytest.raises(ConfigError, match="an incomplete version"):
        change_config(root, "m", {"version_policy": "{all {}}"})
    assert put().version == 3
    assert gc(root, keep=5).swept == ("m/2",)
    assert [fact.key for fact in store.walk("m/2")] == ["somebodys"]


def test_another_first_version_that_was_quicker_and_does_not_fit_wins(
    root: ObjectRepository, store: ObjectClient, tmp_path: Path
) -> None:
    theirs = tiny_config().text.replace("dims: [3]", "dims: [9]").encode()
    sent: list[int] = []

    def meanwhile(count: int) -> None:
        if not sent:
            store.put("m/config.pbtxt", theirs)
        sent.append(count)

    files = tiny_files(tmp_path)
    with pytest.raises(RepositoryError, match=r"serves something else|version policy"):
        publish(root, "m", files, tiny_config(), {}, progress=meanwhile)
    assert read_config_bytes(root, "m") == theirs
    assert gc(root).swept == ("m/1",)
    assert store.list("m").folders == ()


def test_a_publication_that_is_under_way_is_left_alone(root: ObjectRepository, put: Put, store: ObjectClient) -> None:
    put()
    elsewhere = dataclasses.replace(Holder.me(), machine="another", pid=1)
    change_ledger(store, "m", lambda ledger: ledger.with_pending(2, Pending("publish", elsewhere, "c", ("f",))))
    assert gc(root).swept == ()
    assert verify(root, models=False) == ()
    late = dataclasses.replace(elsewhere, expires_at=1.0)
    change_ledger(store, "m", lambda ledger: ledger.with_pending(2, Pending("publish", late, "c", ("f",))))
    assert gc(root).swept == ("m/2",)


def test_a_lease_has_one_holder_and_survives_a_dead_one(root: ObjectRepository, put: Put, store: ObjectClient) -> None:
    put()
    again = open_store(root).lease("m", timeout_s=0)
    with open_store(root).lease("m", timeout_s=0), pytest.raises(RepositoryError, match="another roll-out of m"), again:
        pass
    with open_store(root).lease("m", timeout_s=0):
        pass
    dead = dataclasses.replace(Holder.me(), pid=2**22 + 1)
    change_ledger(store, "m", lambda ledger: dataclasses.replace(ledger, lease=dead))
    with open_store(root).lease("m", timeout_s=0):
        assert (read_ledger(store, "m").lease or dead).pid != dead.pid
    assert read_ledger(store, "m").lease is None


def test_a_lease_tells_who_has_taken_it_since(root: ObjectRepository, put: Put, store: ObjectClient) -> None:
    put()
    elsewhere = dataclasses.replace(Holder.me(), machine="another", host="far", pid=1)
    with open_store(root).lease("m", timeout_s=0) as other:
        assert other() == ""
        change_ledger(store, "m", lambda ledger: dataclasses.replace(ledger, lease=elsewhere))
        assert other() == "process 1 on far"
    assert read_ledger(store, "m").lease == elsewhere, "theirs"


@pytest.mark.parametrize("ahead_s", [-3600.0, -40.0, 3600.0])
def test_no_clock_takes_a_lease_from_a_holder_that_renews_it(
    ahead_s: float, root: ObjectRepository, put: Put, store: ObjectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder's clock is behind or ahead of this machine's, and jumps two hours now and then."""
    put()
    elsewhere = dataclasses.replace(Holder.me(), machine="another", host="far", pid=1)
    clock, told = itertools.count(step=20.0), itertools.count()

    def renew(_: float = 0.0) -> None:
        holder = dataclasses.replace(elsewhere, expires_at=time.time() + 60.0 + ahead_s + next(told) % 2 * 7200.0)
        change_ledger(store, "m", lambda ledger: dataclasses.replace(ledger, lease=holder))

    renew()
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=renew))
    again = open_store(root).lease("m", timeout_s=600.0)
    with pytest.raises(RepositoryError, match="process 1 on far"), again:
        pass
    monkeypatch.setattr(lease.time, "sleep", lambda _: None)
    with open_store(root).lease("m", timeout_s=600.0):  # The holder is silent now, whatever its clock says.
        assert (read_ledger(store, "m").lease or elsewhere).token != elsewhere.token


def test_a_lease_of_another_machine_is_taken_when_it_is_over_and_silent(
    root: ObjectRepository, put: Put, store: ObjectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    put()
    dead = dataclasses.replace(Holder.me(), machine="another", pid=1, expires_at=time.time() - 1.0)
    change_ledger(store, "m", lambda ledger: dataclasses.replace(ledger, lease=dead))
    clock = itertools.count(step=20.0)
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda _: None))
    with open_store(root).lease("m", timeout_s=0.0):
        assert next(clock) >= 60.0


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from support.object_stores import tiny_config, tiny_files
from repo_manager.repository.location import parse_location
from repo_manager.repository.publish import publish
from repo_manager.repository.remove import gc
root, place, first, count = parse_location(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
import concurrent.futures
def one(number):
    return publish(root, "m", tiny_files(place / str(number), f"content {number}"), tiny_config(), {}).version
with concurrent.futures.ThreadPoolExecutor(count) as pool:
    print(*pool.map(one, range(first, first + count)))
"""


def test_64_writers_of_one_model_lose_nothing_and_double_nothing(
    root: ObjectRepository, store: ObjectClient, tmp_path: Path
) -> None:
    """Four processes of 16 writers each, all beginning with no model at all; `gc` runs in between."""
    tests = Path(__file__).parent.parent
    commands = [
        [sys.executable, "-c", WRITER, str(tests), str(root), str(tmp_path), str(first), "16"]
        for first in (0, 16, 32, 48)
    ]
    writers = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        cleaning = pool.submit(gc, root, keep=1000)
        ends = [writer.communicate(timeout=240) for writer in writers]
        assert cleaning.result().removals == ()
    assert [writer.returncode for writer in writers] == [0] * 4, [end[1] for end in ends]
    numbers = sorted(int(number) for end in ends for number in end[0].split())
    assert numbers == list(range(1, 65))
    entry = find_model(root, "m")
    assert [v.version for v in entry.versions] == numbers
    assert len({v.manifest.digest for v in entry.versions if v.manifest is not None}) == 64
    assert read_ledger(store, "m").pending == {}
    assert errors_of(root) == []
