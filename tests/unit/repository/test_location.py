from __future__ import annotations

from pathlib import Path

import pytest

from repo_manager.errors import RepositoryError
from repo_manager.repository.location import ObjectRepository, parse_location
from repo_manager.types import as_json


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("s3://bucket", ("s3", "bucket", "", "")),
        ("s3://bucket/a/b/", ("s3", "bucket", "a/b", "")),
        ("s3://http://127.0.0.1:9000/bucket/a", ("s3", "bucket", "a", "http://127.0.0.1:9000")),
        ("s3://https://minio.example/bucket/a", ("s3", "bucket", "a", "https://minio.example")),
        ("s3://host.example:9000/bucket/a", ("s3", "bucket", "a", "https://host.example:9000")),
        ("gs://bucket_1/a", ("gs", "bucket_1", "a", "")),
        ("as://account/container/a", ("as", "container", "a", "account")),
        ("as://account.blob.core.windows.net/container", ("as", "container", "", "account")),
    ],
)
def test_tritons_own_forms(text: str, parts: tuple[str, str, str, str]) -> None:
    place = parse_location(text)
    assert isinstance(place, ObjectRepository)
    assert (place.scheme, place.bucket, place.prefix, place.endpoint) == parts
    assert parse_location(str(place)) == place


@pytest.mark.parametrize(("text", "path"), [("models", "models"), ("/a b", "/a b"), ("file:///a%20b", "/a b")])
def test_folders(text: str, path: str) -> None:
    assert parse_location(text) == Path(path)


SECRET = "wJalrXUtnFEMI"


@pytest.mark.parametrize(
    "text",
    [
        f"s3://key:{SECRET}@bucket/a",
        f"s3://http://key:{SECRET}@host:9000/bucket",
        f"gs://bucket/a?X-Goog-Signature={SECRET}",
        f"as://account/container?sig={SECRET}",
        f"https://key:{SECRET}@host/bucket",
        f"ftp://user:{SECRET}@host/",
        f"file://{SECRET}/path",
    ],
)
def test_credentials_are_refused_and_never_repeated(text: str) -> None:
    with pytest.raises(RepositoryError) as refused:
        parse_location(text)
    assert SECRET not in str(refused.value)
    assert refused.value.hint is not None or "file://" in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "s3://",
            "s3:///a",
            "s3://B/a",
            "s3://bu..cket/a",
            "s3://bucket/../a",
            "s3://bucket/a//b",
            "s3://bucket/a b",
        ),
        *("s3://bucket/a%2e", "s3://bucket/a\n", "s3://http://host:0/bucket", "s3://http:///bucket", "s3:/bucket/a"),
        *(
            "gs:/b",
            "gs://-b/a",
            "as://account",
            "as://Account/container/a",
            "as://account/c/a",
            "s3://bucket/" + "a" * 800,
        ),
    ],
)
def test_what_a_store_or_triton_would_refuse(text: str) -> None:
    with pytest.raises(RepositoryError):
        parse_location(text)


def test_places_below_and_above() -> None:
    root = parse_location("s3://bucket/a/models")
    version = root / "m" / "3"
    assert (str(version), version.name, version.parent.name) == ("s3://bucket/a/models/m/3", "3", "m")
    assert version.parent.parent == root
    assert root.resolve() is root
    bucket = parse_location("gs://bucket")
    assert (bucket.name, bucket.parent, str(bucket / "m")) == ("bucket", bucket, "gs://bucket/m")
    assert as_json({"path": version}) == {"path": "s3://bucket/a/models/m/3"}
