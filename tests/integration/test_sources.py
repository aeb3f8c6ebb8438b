"""`add` from object storage and from MLflow, and MLflow's deployments plugin, each with the real thing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import convert_model_to_external_data
from support.object_stores import AZURE_ACCOUNT, AZURE_KEY, BUCKET, azurite, moto_server, s3_environment
from support.python_models import write_python_model

from repo_manager import samples
from repo_manager.declared import Servers, parse_declaration
from repo_manager.errors import InputError
from repo_manager.optional import require
from repo_manager.pipeline.adding import add
from repo_manager.pipeline.adding_files import add_files
from repo_manager.pipeline.apply import apply
from repo_manager.pipeline.background import stop_running
from repo_manager.repository.location import parse_object_url
from repo_manager.repository.stores.objects import client as client_module
from repo_manager.repository.stores.objects.client import ObjectClient, StoreOptions, open_client
from repo_manager.sources import open_source

pytestmark = pytest.mark.integration
_DIGITS = Path(samples.__file__).parent / "digits_sparse.onnx"
_MIB = 1 << 20


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with moto_server() as (host, port):
        yield f"http://{host}:{port}"


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in s3_environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """A folder with a Python backend model, and an ONNX file with external data, by their keys."""
    folder = tmp_path / "given"
    write_python_model(folder, "square", kind="scale")
    proto = onnx.load(_DIGITS)
    convert_model_to_external_data(proto, location="w/weights.bin", size_threshold=0)
    (folder / "onnx" / "w").mkdir(parents=True)
    onnx.save(proto, folder / "onnx" / "digits.onnx")
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def _source_of(version: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((version / "manifest.json").read_text())["source"]
    return found


def _adds(base: str, tmp_path: Path) -> None:
    """Add the file and the folder below a URL; the manifest says where from."""
    added = add(f"{base}/onnx/digits.onnx", "digits", tmp_path / "models")
    assert isinstance(added.path, Path)
    source = _source_of(added.path)
    assert source["origin"]["url"] == f"{base}/onnx/digits.onnx"
    assert source["origin"]["e_tag"]
    assert source["external"] == ["w/weights.bin"]
    made = add_files(f"{base}/square", "square", tmp_path / "models")
    assert isinstance(made.path, Path)
    assert "model.py" in made.files
    assert _source_of(made.path)["origin"]["digest"].startswith("sha256:")
    with pytest.raises(InputError, match="there is no object and no folder"), open_source(f"{base}/squar"):
        pass


def test_files_and_folders_of_s3(moto: str, files: dict[str, bytes], tmp_path: Path) -> None:
    base = f"s3://{moto}/{BUCKET}/run=5/a b"
    store = open_client(parse_object_url(base))
    for key, data in files.items():
        store.put(key, data)
    _adds(base, tmp_path)
    with pytest.raises(InputError, match="is a whole bucket"), open_source(f"s3://{moto}/{BUCKET}"):
        pass


def test_files_and_folders_of_google_storage(
    moto: str, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rsa = require("cryptography.hazmat.primitives.asymmetric.rsa")
    forms = require("cryptography.hazmat.primitives.serialization")
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption()
    )
    account = {"type": "service_account", "client_email": "a@b", "private_key": key.decode(), "private_key_id": "1"}
    account |= {"gcs_base_url": moto, "disable_oauth": True}
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    for name, data in files.items():
        request = urllib.request.Request(f"{moto}/{BUCKET}/google/{name}", data, method="PUT")
        request.add_header("x-amz-acl", "public-read")
        request.add_header("Content-Type", "application/octet-stream")  # anything else would be read as a form
        urllib.request.urlopen(request, timeout=60).close()
    _adds(f"gs://{BUCKET}/google", tmp_path)


def test_files_and_folders_of_azure(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setenv("AZURE_STORAGE_KEY", AZURE_KEY)
    with azurite() as endpoint:
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", endpoint)
        base = f"as://{AZURE_ACCOUNT}/{BUCKET}/models"
        store = open_client(parse_object_url(base))
        for key, data in files.items():
            store.put(key, data)
        _adds(base, tmp_path)


def test_an_interrupted_fetch_goes_on_and_a_changed_object_begins_anew(
    moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "DEFAULT_OPTIONS", StoreOptions(part_bytes=_MIB, workers=1))
    url = f"s3://{moto}/{BUCKET}/{tmp_path.name}/model.plan"
    first, second = os.urandom(4 * _MIB), os.urandom(4 * _MIB)
    asked: list[int] = []
    limit = [2 * _MIB]
    read_range = ObjectClient.read_range

    def counted(self: ObjectClient, key: str, start: int, *rest: Any) -> bytes:
        asked.append(start)
        if start >= limit[0]:
            raise KeyboardInterrupt
        return read_range(self, key, start, *rest)

    monkeypatch.setattr(ObjectClient, "read_range", counted)
    for content, expected in ((first, [2 * _MIB, 3 * _MIB]), (second, [_MIB * each for each in range(4)])):
        store = open_client(parse_object_url(url).parent)
        store.put("model.plan", first)
        limit[0] = 2 * _MIB
        with pytest.raises(KeyboardInterrupt), open_source(url):
            pass
        if content is not first:  # a second write of the same bytes may fall into another second: another object
            store.put("model.plan", content)
        asked.clear()
        limit[0] = 1 << 40
        with open_source(url) as source:
            assert source.path.read_bytes() == content
        assert asked == expected


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The files of a tracking server with a registered model and an alias, and the environment for it."""
    mlflow = pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("mlflow")
    environment = {"MLFLOW_TRACKING_URI": (folder / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    (folder / "logged").mkdir()
    (folder / "logged" / "MLmodel").write_text("flavors:\n  onnx: {data: model.onnx}\n  python_function: {}\n")
    (folder / "logged" / "model.onnx").write_bytes(_DIGITS.read_bytes())
    with pytest.MonkeyPatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        client = mlflow.MlflowClient()
        run = client.create_run("0").info.run_id
        client.log_artifacts(run, str(folder / "logged"), "model")
        client.create_registered_model("digits")
        version = client.create_model_version("digits", f"runs:/{run}/model", run)
        client.set_registered_model_alias("digits", "champion", version.version)
        yield {"run": run, "logged": str(folder / "logged")}


def test_add_from_a_registry_of_mlflow(registry: dict[str, str], tmp_path: Path) -> None:
    models, run = tmp_path / "models", registry["run"]
    for url in ("models:/digits@champion", "models:/digits/1", f"runs:/{run}/model", registry["logged"]):
        add(url, "digits", models)
    by_alias, by_number, by_run, local = (_source_of(models / "digits" / str(n))["origin"] for n in (1, 2, 3, 4))
    assert by_alias["url"] == "models:/digits@champion"
    assert by_alias["registered"] == by_number["registered"] == {"name": "digits", "version": "1"}
    assert by_alias["run_id"] == run
    assert by_run["url"] == f"runs:/{run}/model"
    assert by_run["mlflow"]["flavors"] == ["onnx", "python_function"]
    assert "url" not in local
    with pytest.raises(InputError, match="nobody") as caught, open_source("models:/nobody/1"):
        pass
    assert "MLFLOW_TRACKING_URI" in str(caught.value)


def test_apply_takes_a_registered_model(registry: dict[str, str], tmp_path: Path) -> None:
    assert registry
    declaration = parse_declaration("models: {b: {source: 'models:/digits/1'}}", name="repository.yaml")
    for changed in (1, 0):
        with Servers(tmp_path / "models", tmp_path) as servers:
            result = apply(declaration, tmp_path, tmp_path / "models", servers)
        assert ([model.error for model in result.models], len(result.models)) == ([None] * changed, changed)
    assert _source_of(tmp_path / "models" / "b" / "1")["origin"]["registered"] == {"name": "digits", "version": "1"}


def test_apply_takes_sources_by_url(moto: str, tmp_path: Path) -> None:
    key, content = f"s3://{moto}/{BUCKET}/apply", _DIGITS.read_bytes()
    store = open_client(parse_object_url(key))
    store.put("digits.onnx", content)
    file, models = tmp_path / "repository.yaml", tmp_path / "models"

    def applied(*options: str, code: int = 0) -> Any:
        command = [sys.executable, "-m", "repo_manager", "apply", str(file), "-r", str(models), "--json", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr + done.stdout
        return json.loads(done.stdout)

    def declare(**sources: object) -> None:
        file.write_text(json.dumps({"models": {name: {"source": source} for name, source in sources.items()}}))

    declare(a=f"{key}/digits.onnx")
    (plan,) = applied("--check", code=8)["models"]
    assert plan["steps"][0]["what"] == f"a version of {key}/digits.onnx in fp32"
    applied()
    assert _source_of(models / "a" / "1")["origin"]["url"] == f"{key}/digits.onnx"
    assert not applied("--check")["changes"]

    other = onnx.load(_DIGITS)
    other.doc_string = "another content"
    store.put("digits.onnx", other.SerializeToString())
    assert applied("--check", code=8)["changes"]
    digest = _source_of(models / "a" / "1")["digest"]
    declare(a={"path": f"{key}/digits.onnx", "digest": digest})
    assert not applied("--check")["changes"]  # a version of it is there: nothing is fetched
    declare(c={"path": f"{key}/digits.onnx", "digest": digest})
    (failed,) = applied(code=3)["models"]
    assert failed["error"].startswith(f"{key}/digits.onnx differs from its pinned digest")
    declare(d=f"{key}/none.onnx", e="ftp://host/model.onnx")
    missing, unknown = applied("--check", code=3)["models"]
    assert "there is no object and no folder of that name" in missing["error"]
    assert "ftp:// is no source of a model" in unknown["error"]


def test_the_deployments_plugin_adds_and_deploys(
    registry: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pytriton")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    models = tmp_path / "models"
    client = require("mlflow.deployments").get_deploy_client(f"repo-manager:{models}")
    words = f"create -t repo-manager:{models} -m models:/digits/1 --name mine -C precision=fp16"
    try:
        command = [str(Path(sys.executable).parent / "mlflow"), "deployments", *words.split()]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
        assert "triton deployment mine is created" in made.stdout
        assert _source_of(models / "mine" / "1")["origin"]["url"] == "models:/digits/1"
        assert client.list_deployments() == [{"name": "mine", "flavor": "triton", "version": 1}]
        answer = client.predict("mine", {"image": np.zeros((2, 1, 8, 8), np.float32)})
        assert np.shape([row["logits"] for row in answer["predictions"]]) == (2, 1, 10)
        with pytest.raises(require("mlflow.exceptions").MlflowException, match="precison is no option of this target"):
            client.update_deployment("mine", "models:/digits/1", config={"precison": "fp16"})
        client.delete_deployment("mine")
        assert client.list_deployments() == []
    finally:
        stop_running(models)
