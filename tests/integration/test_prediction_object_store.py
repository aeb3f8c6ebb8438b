"""How Triton sees changes in an object store, on the real server and a real S3 protocol (moto)."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator

import pytest
from support.object_stores import BUCKET, moto_server, s3_environment
from support.serving import SCALING_CONFIG, running_server, scaling_model

from repo_manager.rollout.observe import observe
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions

pytestmark = pytest.mark.integration
LATEST = "version_policy { latest { num_versions: 1 } }\n"


class Bucket:
    """The models' part of the bucket."""

    def __init__(self, port: int) -> None:
        obstore = pytest.importorskip("obstore")
        endpoint = f"http://127.0.0.1:{port}"
        self.location = f"s3://{endpoint}/{BUCKET}/models"
        secrets = s3_environment()
        self._store = obstore.store.S3Store(
            BUCKET,
            prefix="models",
            endpoint=endpoint,
            access_key_id=secrets["AWS_ACCESS_KEY_ID"],
            secret_access_key=secrets["AWS_SECRET_ACCESS_KEY"],
            region=secrets["AWS_DEFAULT_REGION"],
            client_options={"allow_http": True},
        )

    def put(self, path: str, data: bytes) -> None:
        self._store.put(path, data)

    def delete(self, path: str) -> None:
        self._store.delete(path)

    def modified(self, path: str) -> datetime.datetime:
        """Return the object's time as the protocol tells it: whole seconds."""
        found: datetime.datetime = self._store.head(path)["last_modified"]
        return found

    def put_later_than(self, path: str, data: bytes, moment: datetime.datetime) -> None:
        """Put an object again and again until its time differs from the given one."""
        while True:
            self.put(path, data)
            if self.modified(path) != moment:
                return
            time.sleep(0.05)


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with moto_server() as (_, port):
        yield Bucket(port)


@pytest.fixture(scope="module")
def s3_client(bucket: Bucket) -> Iterator[TritonClient]:
    config = 'name: "m"\n' + SCALING_CONFIG + LATEST
    for version in (1, 2):
        bucket.put(f"m/{version}/model.onnx", scaling_model(float(version)).SerializeToString())
    bucket.put("m/config.pbtxt", config.encode())
    options = ServerOptions(repository=bucket.location, auto_complete=False, environment=s3_environment())
    with running_server(options) as server, TritonClient.connect(server.grpc_url) as client:
        yield client


def test_a_deleted_version_is_overlooked_until_the_configuration_is_written_again(
    bucket: Bucket, s3_client: TritonClient
) -> None:
    s3_client.load("m")
    assert observe(s3_client, "m").ready == (2,)
    moment = bucket.modified("m/config.pbtxt")
    bucket.delete("m/2/model.onnx")
    s3_client.load("m")
    assert observe(s3_client, "m").ready == (2,)
    config = 'name: "m"\n' + SCALING_CONFIG + LATEST
    bucket.put_later_than("m/config.pbtxt", config.encode(), moment)
    s3_client.load("m")
    assert observe(s3_client, "m").ready == (1,)


def test_a_change_within_the_same_second_is_overlooked(bucket: Bucket, s3_client: TritonClient) -> None:
    both = ('name: "m"\n' + SCALING_CONFIG + "version_policy { all {} }\n").encode()
    latest = ('name: "m"\n' + SCALING_CONFIG + LATEST).encode()
    bucket.put("m/2/model.onnx", scaling_model(2.0).SerializeToString())
    for _ in range(5):
        bucket.put_later_than("m/config.pbtxt", latest, bucket.modified("m/config.pbtxt"))
        s3_client.load("m")
        moment = bucket.modified("m/config.pbtxt")
        bucket.put("m/config.pbtxt", both)
        if bucket.modified("m/config.pbtxt") == moment:
            break
    else:
        pytest.skip("no two writes fell into the same second")
    s3_client.load("m")
    assert observe(s3_client, "m").ready == (2,)
    bucket.put_later_than("m/config.pbtxt", both, moment)
    s3_client.load("m")
    assert observe(s3_client, "m").ready == (1, 2)
