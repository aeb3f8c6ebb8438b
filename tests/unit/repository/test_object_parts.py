"""Computations of the object store's modules, without a store."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repo_manager.errors import RepositoryError, StoreUnreachableError
from repo_manager.report.progress import transfer_progress
from repo_manager.repository.location import ObjectRepository, parse_location
from repo_manager.repository.stores.base import Store, recorded_model
from repo_manager.repository.stores.disk import DiskStore
from repo_manager.repository.stores.objects.claim import is_abandoned
from repo_manager.repository.stores.objects.content import measure, part_bytes_for, read_part
from repo_manager.repository.stores.objects.credentials import own_endpoint, s3_keys, store_config, without_redirects
from repo_manager.repository.stores.objects.holder import LEASE_S, Holder, parse_holder
from repo_manager.repository.stores.objects.ledger import RECORD, Pending, ledger_key
from repo_manager.repository.stores.objects.retry import RetryOptions, TransientError, readable, retried
from repo_manager.repository.stores.objects.store import ObjectStore

S3 = parse_location("s3://http://127.0.0.1:9/bucket/models")
KEYS = {
    "AWS_ACCESS_KEY_ID": "id",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "eu-west-1",
    "HOME": "/none",
}


def objects(text: str) -> ObjectRepository:
    place = parse_location(text)
    assert isinstance(place, ObjectRepository)
    return place


def test_s3_reads_what_triton_reads(tmp_path: Path) -> None:
    config = store_config(objects(str(S3)), {**KEYS, "AWS_SESSION_TOKEN": "token"})
    assert config == {
        "access_key_id": "id",
        "secret_access_key": "secret",
        "session_token": "token",
        "region": "eu-west-1",
        "endpoint": "http://127.0.0.1:9",
    }
    assert s3_keys(objects("s3://bucket"), {"HOME": str(tmp_path)}) is None
    assert "secret" not in repr(s3_keys(objects("s3://bucket"), KEYS))


def test_a_profile_is_read_from_both_files(tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text("[p]\naws_access_key_id=a\naws_secret_access_key=b\n")
    (tmp_path / ".aws" / "config").write_text("[profile p]\nregion=eu-north-1\n")
    environment = {"HOME": str(tmp_path), "AWS_PROFILE": "p"}
    keys = s3_keys(objects("s3://bucket"), environment)
    assert keys is not None
    assert (keys.access, keys.secret, keys.region) == ("a", "b", "eu-north-1")
    with pytest.raises(RepositoryError, match="no such profile"):
        s3_keys(objects("s3://bucket"), {**environment, "AWS_PROFILE": "q"})


def test_tritons_credential_file_wins_by_the_longest_prefix(tmp_path: Path) -> None:
    file = tmp_path / "credentials.json"
    entries = {"": {"key_id": "all", "secret_key": "s"}, "s3://bucket/models": {"key_id": "here", "secret_key": "s"}}
    document = {"s3": entries, "gs": {"": "/key.json"}, "as": {"": {"account_str": "acc", "account_key": "k"}}}
    file.write_text(json.dumps(document))
    environment = {**KEYS, "TRITON_CLOUD_CREDENTIAL_PATH": str(file)}
    for place, access in (("s3://bucket/models/a", "here"), ("s3://bucket/models-b", "all"), ("s3://other", "all")):
        keys = s3_keys(objects(place), environment)
        assert keys is not None
        assert keys.access == access
    assert store_config(objects("gs://bucket"), environment) == {"google_application_credentials": "/key.json"}
    azure = store_config(objects("as://account/container"), environment)
    assert azure == {"azure_storage_account_name": "acc", "azure_storage_account_key": "k"}
    file.write_text("{secret-in-a-broken-file")
    with pytest.raises(RepositoryError) as refused:
        s3_keys(objects("s3://bucket"), environment)
    assert "secret-in" not in str(refused.value)


def test_azure_and_google_from_the_environment() -> None:
    azure = store_config(objects("as://account/container"), {"AZURE_STORAGE_KEY": "k"})
    assert azure == {"azure_storage_account_name": "account", "azure_storage_account_key": "k"}
    other = store_config(objects("as://account/container"), {"AZURE_STORAGE_ACCOUNT": "b"})
    assert other == {"azure_storage_account_name": "b"}
    google = store_config(objects("gs://bucket"), {"GOOGLE_APPLICATION_CREDENTIALS": "/f"})
    assert google == {"google_application_credentials": "/f"}
    assert store_config(objects("gs://bucket"), {}) == {}


def test_the_client_reaches_a_named_store_and_where_roles_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    keys = {"access_key_id": "a"}
    named = {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://creds:80/x", "AWS_ENDPOINT_URL": "https://minio:9000"}
    assert own_endpoint(objects("s3://bucket"), {}) == ""
    assert own_endpoint(objects("s3://http://h:1/bucket"), named) == "http://h:1"
    assert own_endpoint(objects("s3://bucket"), named) == "https://minio:9000"
    assert without_redirects("", keys, {}) == {}
    assert without_redirects("https://minio:9000", keys, {})["proxy_excludes"] == "minio"
    excludes = without_redirects("https://minio:9000", {}, named)["proxy_excludes"].split(",")
    assert {"minio", "creds", "169.254.169.254", "amazonaws.com"} <= set(excludes)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert without_redirects("https://minio:9000", keys, {}) == {}
    monkeypatch.setenv("NO_PROXY", "minio")
    assert without_redirects("https://minio:9000", keys, {})["proxy_excludes"] == "minio"
    assert without_redirects("https://minio:9000", {}, {}) == {}, "a role is asked for through the proxy"


@pytest.mark.parametrize(("size", "parts"), [(0, 1), (1, 1), (10, 1), (11, 2), (20, 2), (25, 3)])
def test_a_files_measure(tmp_path: Path, size: int, parts: int) -> None:
    data = bytes(range(size))
    (tmp_path / "f").write_bytes(data)
    measured = measure(tmp_path / "f", 10)
    assert measured.record.sha256 == "sha256:" + hashlib.sha256(data).hexdigest()
    assert (measured.record.size_bytes, len(measured.part_md5s), measured.whole) == (size, parts, parts == 1)
    assert b"".join(read_part(tmp_path / "f", measured, n + 1) for n in range(parts)) == data
    assert sum(measured.part_size(n + 1) for n in range(parts)) == size
    if parts == 1:
        assert measured.e_tag == f'"{hashlib.md5(data).hexdigest()}"'
    else:
        joined = b"".join(hashlib.md5(data[i : i + 10]).digest() for i in range(0, size, 10))
        assert measured.e_tag == f'"{hashlib.md5(joined).hexdigest()}-{parts}"'


def test_a_file_that_changes_while_it_is_sent_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"before")
    measured = measure(tmp_path / "f", 10)
    (tmp_path / "f").write_bytes(b"after!")
    with pytest.raises(RepositoryError, match="was changed while it was uploaded"):
        read_part(tmp_path / "f", measured, 1)


def test_no_file_has_more_parts_than_s3_takes() -> None:
    size = 5 * 10**12
    assert size / part_bytes_for(size, 8 << 20) <= 10_000
    assert part_bytes_for(1000, 8 << 20) == 8 << 20


def test_a_holder_is_alive_as_long_as_its_process_and_its_lease() -> None:
    me = Holder.me()
    assert me.alive
    assert parse_holder(dataclasses.asdict(me)) == me
    assert not me.released().alive
    assert not dataclasses.replace(me, started=me.started + 1).alive  # the same number, another process
    assert not dataclasses.replace(me, pid=2**22 + 1).alive
    for clock in (1.0, time.time() + 10 * LEASE_S):  # it has jumped since; the process is known to live
        assert dataclasses.replace(me, expires_at=clock).alive
    elsewhere = dataclasses.replace(me, machine="another", pid=2**22 + 1)
    assert elsewhere.alive
    assert not dataclasses.replace(elsewhere, expires_at=1.0).alive
    for wrong in (math.inf, math.nan, time.time() + 10 * LEASE_S):  # written by a wrong clock, or by an enemy
        assert not dataclasses.replace(elsewhere, expires_at=wrong).alive
    assert str(os.getpid()) in str(me)
    # This process lives, but works on no claim with that token any more.
    assert is_abandoned(Pending("publish", me))
    assert not is_abandoned(Pending("publish", elsewhere))


@pytest.mark.parametrize("name", ["m", "a.b", "a.1.sig", "a.state"])
def test_a_ledgers_key_leads_back_to_its_model(name: str) -> None:
    assert recorded_model(RECORD, ledger_key(name)) == name


@pytest.mark.parametrize("key", [".repo-manager.json", ".repo-manager.m.1.sig.json", ".repo-manager..state", "m.state"])
def test_other_keys_are_no_ledgers(key: str) -> None:
    assert recorded_model(RECORD, key) in (None, "")


def test_retries_end_with_the_deadline_and_say_why() -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise TransientError("503 by the test", slow_down=len(calls) == 1)

    options = RetryOptions(deadline_s=0.2, first_s=0.001, longest_s=0.01, slow_down_s=0.02)
    with pytest.raises(StoreUnreachableError, match=r"cannot do it: 503 by the test \(\d+ attempts in 0.2 s\)"):
        retried("do it", fail, options)
    assert len(calls) > 3


def test_messages_hold_no_signatures() -> None:
    text = readable("GET http://h/b?X-Amz-Signature=abc&sig=def%3D&x=1 failed\n\nDebug source:\nGeneric {}")
    assert text == "GET http://h/b?X-Amz-Signature=***&sig=***&x=1 failed"


def test_progress_is_said_now_and_then() -> None:
    now, said = [0.0], []
    told = transfer_progress(said.append, 1000, every_s=1.0, clock=lambda: now[0])
    told(100)
    now[0] = 2.0
    told(400)
    told(100)
    assert len(said) == 1
    assert "500 B of 1000 B (50%)" in said[0]


VERBS = sorted(name for name, verb in vars(Store).items() if inspect.isfunction(verb) and not name.startswith("_"))


@pytest.mark.parametrize("name", VERBS)
def test_both_stores_take_the_same_arguments(name: str) -> None:
    wanted = [(p.name, p.kind, p.default) for p in inspect.signature(vars(Store)[name]).parameters.values()]
    for store in (DiskStore, ObjectStore):
        found = inspect.signature(getattr(store, name)).parameters.values()
        assert [(p.name, p.kind, p.default) for p in found] == wanted


def test_a_repository_on_disk_does_not_wait_for_what_is_for_object_storage() -> None:
    code = "import sys, repo_manager.repository; print([m for m in sys.modules if 'stores.objects' in m])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"
    assert len(VERBS) == 15  # About a dozen: anything composed of them is a function.
