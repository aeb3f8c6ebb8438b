"""A repository on Azure's blob storage: Azurite over HTTP. Skipped, with the reason, without node and npm."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.object_stores import AZURE_ACCOUNT, AZURE_KEY, BUCKET, azurite, tiny_config, tiny_files

from repo_manager.errors import RepositoryError
from repo_manager.repository.configuration import change_config, set_served_versions
from repo_manager.repository.location import ObjectRepository, parse_location
from repo_manager.repository.publish import publish
from repo_manager.repository.remove import gc, remove
from repo_manager.repository.scan import find_model, scan
from repo_manager.repository.stores import open_store
from repo_manager.repository.stores.objects import client as client_module
from repo_manager.repository.stores.objects.client import StoreOptions, open_client
from repo_manager.repository.stores.objects.ledger import read_ledger
from repo_manager.repository.tags import record_deployment, set_tag
from repo_manager.repository.transfer import CopyOptions, copy_version
from repo_manager.repository.verify import verify

pytestmark = pytest.mark.integration
MIB = 1 << 20


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    pytest.importorskip("obstore")
    with azurite() as running:
        yield running


@pytest.fixture
def root(endpoint: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ObjectRepository:
    monkeypatch.setenv("AZURE_STORAGE_KEY", AZURE_KEY)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", endpoint)
    monkeypatch.setattr(client_module, "DEFAULT_OPTIONS", StoreOptions(part_bytes=MIB))
    place = parse_location(f"as://{AZURE_ACCOUNT}/{BUCKET}/{request.node.name}/models")
    assert isinstance(place, ObjectRepository)
    return place


def test_the_life_of_a_model(root: ObjectRepository, tmp_path: Path) -> None:
    assert scan(root) == ()
    for number in (1, 2, 3):
        files = tiny_files(tmp_path / str(number), f"text {number}")
        assert publish(root, "m", files, tiny_config(labels={"y": ("a", "b")}), {}).version == number
    assert set_served_versions(root, "m", [2]) == (1,)
    record_deployment(root, "m", 2)
    set_tag(root, "m", "stable", 1)
    with pytest.raises(RepositoryError, match="tag 'stable'"):
        remove(root, "m", 1)
    assert remove(root, "m", 3).versions == (3,)
    assert change_config(root, "m", {"instance_group.count": "3"}).applied
    assert copy_version(root, "m", 2, tmp_path / "local").version == 2
    assert copy_version(tmp_path / "local", "m", 2, root, CopyOptions(target_name="n")).version == 2
    assert gc(root).removals == ()
    entry = find_model(root, "m")
    assert ([v.version for v in entry.versions], entry.selected) == ([1, 2], (2,))
    assert verify(root, models=False) == ()
    assert verify(tmp_path / "local", models=False) == ()
    assert remove(root, "m", force=True).whole_model
    assert [model.name for model in scan(root)] == ["n"]


def test_a_file_in_parts_is_read_back_and_compared(root: ObjectRepository, tmp_path: Path) -> None:
    content = os.urandom(5 * MIB + 7)
    (tmp_path / "large").write_bytes(content)
    publish(root, "m", {"model.onnx": tmp_path / "large"}, tiny_config(), {})
    copy_version(root, "m", 1, tmp_path / "local")
    assert (tmp_path / "local" / "m" / "1" / "model.onnx").read_bytes() == content


def test_16_writers_lose_nothing_and_double_nothing(root: ObjectRepository, tmp_path: Path) -> None:
    def one(number: int) -> int:
        files = tiny_files(tmp_path / str(number), f"content {number}")
        return publish(root, "m", files, tiny_config(), {}).version

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        numbers = sorted(pool.map(one, range(16)))
    assert numbers == list(range(1, 17))
    entry = find_model(root, "m")
    assert len({v.manifest.digest for v in entry.versions if v.manifest is not None}) == 16
    assert read_ledger(open_client(root), "m").pending == {}


def test_triton_never_sees_a_change_there(root: ObjectRepository, tmp_path: Path) -> None:
    assert not open_store(root).traits.changes_visible
    assert open_store(tmp_path).traits.changes_visible
    assert open_store(parse_location("s3://bucket/models")).traits.changes_visible
