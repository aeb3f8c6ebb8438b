"""The contract of every store: each test runs on a folder and on a bucket."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.object_stores import tiny_config
from support.repository_suites.operations import CONTENT, build
from support.repository_suites.places import Place, place_in

from repo_manager.errors import LockHeldError, RepositoryError
from repo_manager.repository.adopt import adopt
from repo_manager.repository.configuration import set_served_versions
from repo_manager.repository.look import existing_model, walk, with_beside, with_versions
from repo_manager.repository.manifest import FileRecord
from repo_manager.repository.plan.publishing import check_model
from repo_manager.repository.remove import remove
from repo_manager.repository.scan import find_model
from repo_manager.repository.state import ModelState
from repo_manager.repository.stores import open_store
from repo_manager.repository.stores.base import ChangedMeanwhileError, Store, model_names
from repo_manager.repository.verify import verify
from repo_manager.repository.view import Entry
from repo_manager.types import Digest


@pytest.fixture(params=["disk", "objects"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    if request.param == "objects":
        pytest.importorskip("obstore")
    with place_in(request.param, tmp_path / "work", monkeypatch.setenv) as made:
        build(made)
        yield made


@pytest.fixture
def store(place: Place) -> Store:
    return open_store(place.root)


def test_a_level_has_names_and_sizes_and_hides_nothing(store: Store, place: Place) -> None:
    place.write(".hidden/file", b"x")
    root = store.list_level()
    assert root.folders == (".hidden", "m", "n")
    assert model_names(store) == ("m", "n")
    model = store.list_level("m")
    assert model.folders == ("1", "2", "3", "4")
    assert [(entry.name, entry.regular, entry.link) for entry in model.files] == [("config.pbtxt", True, None)]
    entries, modified_at = walk(store, "m/1")
    assert {entry.name: entry.size_bytes for entry in entries if entry.name != "manifest.json"} == {
        "model.onnx": len(CONTENT),
        "sub/more.bin": len(CONTENT),
    }
    assert modified_at > 1e9


def test_a_view_is_the_same_everywhere(store: Store) -> None:
    view = with_versions(store, with_beside(store, existing_model(store, "m", record=True)))
    assert (view.exists, view.versions, view.folders, view.work) == (True, (1, 2, 3, 4), ("1", "2", "3", "4"), ())
    assert (view.policy(), view.number_for(), view.state.tags) == ((1,), 5, {"best": 3})
    assert [entry.version for entry in view.state.deployments] == [2, 1]
    assert [version.manifest().version for version in view.contents.values()] == [1, 2, 3, 4]
    assert view.contents[1].holds("model.onnx")
    assert view.contents[1].holds("sub")
    assert not view.contents[1].holds("mod")
    config = dataclasses.replace(tiny_config("m"))
    with pytest.raises(RepositoryError, match="serves something else"):
        check_model(view, config, appears_at_once=not store.traits.remote)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "none"])
def test_what_is_no_model_is_none(store: Store, name: str) -> None:
    assert not store.look(name).exists
    with pytest.raises(RepositoryError, match="has no model"):
        existing_model(store, name)


def test_reading(store: Store) -> None:
    assert store.read("m/1/model.onnx") == CONTENT
    assert store.read("m/9/model.onnx") is None
    assert store.read("m/1/model.onnx", limit_bytes=len(CONTENT)) == CONTENT
    with pytest.raises(RepositoryError, match="bytes"):
        store.read("m/1/model.onnx", limit_bytes=len(CONTENT) - 1)
    (entry,) = [each for each in store.list_level("m/1").files if each.name == "model.onnx"]
    assert store.digest("m/1/model.onnx", entry).size_bytes == len(CONTENT)


def test_fetching_gives_what_was_asked_for(store: Store) -> None:
    with store.fetch("m", 2) as folder:
        assert (folder / "model.onnx").read_bytes() == CONTENT
        assert (folder / "sub/more.bin").read_bytes() == CONTENT
    with store.fetch("m", 2, ["sub/more.bin", "absent"]) as folder:
        assert (folder / "sub/more.bin").read_bytes() == CONTENT
        assert (folder / "manifest.json").is_file()


def test_a_file_is_replaced_only_if_config_is_what_was_seen(store: Store, place: Place) -> None:
    view = store.look("m")
    assert view.config is not None
    store.replace_if(view, {"labels.txt": b"cat\n", "config.pbtxt": view.config + b"# first\n"})
    assert place.read("m/labels.txt") == b"cat\n"
    with pytest.raises(ChangedMeanwhileError):
        store.replace_if(view, {"config.pbtxt": view.config + b"# second\n"})
    assert place.read("m/config.pbtxt") == view.config + b"# first\n"
    now = store.look("m")
    store.replace_if(now, {"config.pbtxt": None})
    assert place.read("m/config.pbtxt") is None


def test_the_same_content_written_again_is_newer(store: Store) -> None:
    before = store.list_level("m")
    view = store.look("m")
    store.replace_if(view, {"config.pbtxt": view.config})
    assert store.read("m/config.pbtxt") == view.config
    assert store.list_level("m").modified_at > before.modified_at


def test_a_new_file_is_written_once(store: Store, place: Place) -> None:
    store.put("m/1/note", b"one", new=True)
    with pytest.raises(ChangedMeanwhileError):
        store.put("m/1/note", b"two", new=True)
    assert place.read("m/1/note") == b"one"
    store.put("m/1/note", b"three")
    assert place.read("m/1/note") == b"three"


def test_a_file_is_put_back_only_as_it_should_be(store: Store, place: Place, tmp_path: Path) -> None:
    manifest = existing_model(store, "m")
    record = with_versions(store, manifest).contents[1].manifest().files["sub/more.bin"]
    (tmp_path / "whole").write_bytes(CONTENT)
    place.delete("m/1/sub/more.bin")
    with pytest.raises(RepositoryError, match="was changed at the same time"):
        store.put("m/1/sub/more.bin", tmp_path / "whole", record=FileRecord(Digest("sha256:0"), record.size_bytes))
    assert place.read("m/1/sub/more.bin") is None
    store.put("m/1/sub/more.bin", tmp_path / "whole", record=record)
    assert verify(place.root, models=False) == ()


def test_state_is_changed_by_what_is_there_at_that_moment(store: Store, place: Place) -> None:
    def tag(state: ModelState) -> ModelState:
        return dataclasses.replace(state, tags={**state.tags, "t": 4})

    assert store.change_state("m", tag, needs=4).tags == {"best": 3, "t": 4}
    assert store.states()["m"].tags == store.states(("m",))["m"].tags == {"best": 3, "t": 4}
    if not store.traits.remote:  # In a bucket only a removal under way is seen here. The caller has looked before.
        remove(place.root, "m", 4, force=True)
        with pytest.raises(RepositoryError, match="no version 4 any more"):
            store.change_state("m", tag, needs=4)


def test_a_lease_has_one_holder_for_each_model(store: Store, place: Place) -> None:
    with store.lease("m", timeout_s=0.0), open_store(place.root).lease("n", timeout_s=0.0):
        again = open_store(place.root).lease("m", timeout_s=0.0)
        with pytest.raises(LockHeldError, match="another roll-out of m") as held, again:
            pass
        assert held.value.exit_code == 5  # The same command succeeds later.
    with store.lease("m", timeout_s=0.0):
        pass


def test_a_removed_number_is_never_given_out_again(store: Store, place: Place) -> None:
    remove(place.root, "m", 4)
    assert store.look("m", record=True).number_for() == 5
    remove(place.root, "m", force=True)
    assert "m" not in store.list_level().folders
    assert store.look("m", record=True).number_for() == 5
    assert store.states(("m",))["m"].tags == {}


def test_a_version_that_goes_while_it_is_verified_is_no_finding(
    place: Place, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_served_versions(place.root, "m", (1,))
    real, gone = type(store).fetch, []

    def fetch(self: Store, name: str, version: int, *args: object, **options: object) -> object:
        if version == 4 and not gone:
            gone.append(remove(place.root, "m", 4))
        return real(self, name, version, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(store), "fetch", fetch)
    assert verify(place.root, models=False) == ()
    assert gone
    assert [entry.version for entry in find_model(place.root, "m").versions] == [1, 2, 3]


@pytest.mark.parametrize("change", ["more", "less", "gone", "adopted"])
def test_a_version_that_changes_while_it_is_adopted_is_not_recorded(place: Place, store: Store, change: str) -> None:
    """The record describes the content read, although somebody is still copying the version, removes or adopts it."""
    place.write("m/7/model.onnx", CONTENT)
    place.write("m/7/labels.txt", CONTENT)
    real, digests = type(store).digest, list[str]()

    def meanwhile(self: Store, key: str, entry: Entry) -> FileRecord:
        record = real(self, key, entry)
        digests.append(key)
        if len(digests) == 2:  # the last one
            if change == "more":
                place.write("m/7/weights.bin", CONTENT)
            elif change == "less":
                place.write("m/7/labels.txt", b"short")
            elif change == "gone":
                remove(place.root, "m", 7)
            else:
                adopt(place.root, "m")
        return record

    said = {"more": "weights.bin", "less": "labels.txt", "gone": "it is gone", "adopted": "manifest.json"}[change]
    lost = pytest.raises(RepositoryError, match=rf"m:7 was changed by somebody else at the same time: {said}")
    with pytest.MonkeyPatch.context() as patch, lost:
        patch.setattr(type(store), "digest", meanwhile)
        adopt(place.root, "m")
    assert [each.version for each in adopt(place.root, "m")] == ([7] if change in ("more", "less") else [])
    assert not [problem for problem in verify(place.root, "m") if "m/7" in str(problem)]


def test_a_folder_is_erased_and_its_neighbours_stay(store: Store, place: Place) -> None:
    for name in ("one/a", "one/sub/b", "one/mark", "other/mark"):
        place.write(name, b"x")
    store.erase("one", "mark")
    assert "one" not in store.list_level().folders
    assert store.read("other/mark") == b"x"
    assert model_names(store)[:2] == ("m", "n")
