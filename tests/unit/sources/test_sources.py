"""Sources of models: kinds of URLs, MLmodel files, and a plugin of another package."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from repo_manager import samples
from repo_manager.errors import InputError, RepoManagerError, RepositoryError, UsageError
from repo_manager.pipeline.adding import add
from repo_manager.repository.location import parse_object_url
from repo_manager.sources import open_source
from repo_manager.sources.mlflow import model_file

_DIGITS = Path(samples.__file__).parent / "digits_sparse.onnx"
_PLUGIN = """
from pathlib import Path
import shutil
from repo_manager.sources import Fetched

def fetch(url, receiver):
    told = receiver.expects(url, {size})
    path = receiver.folder("1") / "model.onnx"
    shutil.copy({path!r}, path)
    told({size})
    return Fetched(path, {{"revision": "1"}})

def large(url, receiver):
    receiver.expects(url, 1 << 60)

def broken(url, receiver):
    raise RuntimeError
"""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _downloads(tmp_path: Path) -> list[str]:
    folder = tmp_path / "cache" / "repo-manager" / "downloads"
    return [path.name for path in folder.iterdir() if path.is_dir()]


def test_a_path_is_given_as_it_is(tmp_path: Path) -> None:
    for text in (str(_DIGITS), "no/such/model.onnx", "odd:name.onnx", "models/resnet.onnx"):
        with open_source(text) as source:
            assert (source.path, source.origin, source.record()) == (Path(text), {}, {})
            with open_source(source) as again:
                assert again is source


@pytest.mark.parametrize("text", ["ftp://host/model.onnx", "s3x://bucket/model.onnx"])
def test_an_unknown_scheme_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(UsageError, match="is no source of a model") as caught, open_source(text):
        pass
    assert caught.value.hint is not None
    assert "https://" in caught.value.hint
    assert "models:/" in caught.value.hint


def test_the_path_of_an_object_may_hold_what_a_repository_cannot() -> None:
    place = parse_object_url("s3://http://127.0.0.1:9000/bucket/run=5/my model+1.onnx")
    assert (place.bucket, place.prefix, place.endpoint) == ("bucket", "run=5/my model+1.onnx", "http://127.0.0.1:9000")
    with pytest.raises(RepositoryError, match="as if there were credentials"):
        parse_object_url("s3://key:secret@bucket/model.onnx")
    with pytest.raises(RepositoryError, match="cannot be a bucket's name"):
        parse_object_url("gs://-b/model.onnx")


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with an entry point, installed as pip leaves one."""
    site = tmp_path / "site"
    info = site / "hub_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hub-plugin\nVersion: 1.0\n")
    points = "hub = hub_plugin:fetch\nbad = hub_plugin:missing\nlarge = hub_plugin:large\ns3 = hub_plugin:broken\n"
    (info / "entry_points.txt").write_text(f"[repo_manager.sources]\n{points}")
    (site / "hub_plugin.py").write_text(_PLUGIN.format(path=str(_DIGITS), size=_DIGITS.stat().st_size))
    monkeypatch.syspath_prepend(str(site))
    return site


def test_a_plugin_adds_a_scheme(plugin: Path, tmp_path: Path) -> None:
    said: list[str] = []
    added = add("hub://bert", "bert", tmp_path / "models", report=said.append)
    source = json.loads((tmp_path / "models" / "bert" / "1" / "manifest.json").read_text())["source"]
    assert added.version == 1
    assert source["origin"]["url"] == "hub://bert"
    assert source["origin"]["revision"] == "1"
    assert source["origin"]["digest"] == source["digest"]
    assert said[0].startswith("Fetching hub://bert (")
    assert "Reading hub://bert" in said
    assert _downloads(tmp_path) == []


def test_a_plugin_that_cannot_be_loaded_is_named(plugin: Path) -> None:
    with pytest.raises(UsageError, match="hub_plugin:missing for bad: cannot be loaded"), open_source("bad://x"):
        pass


def test_what_was_fetched_stays_for_the_next_attempt_and_errors_name_the_url(plugin: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hub://bert is odd"), open_source("hub://bert") as source:
        raise InputError(f"{source.path} is odd")
    assert len(_downloads(tmp_path)) == 1
    with open_source("hub://bert"):
        pass
    assert _downloads(tmp_path) == []


def test_a_source_that_does_not_fit_on_the_disk_is_refused(plugin: Path) -> None:
    with pytest.raises(InputError, match="has room for") as caught, open_source("large://x"):
        pass
    assert "XDG_CACHE_HOME" in str(caught.value)


def _mlmodel(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "MLmodel").write_text(text)
    return folder


def test_the_file_of_an_mlmodel_folder_is_found(tmp_path: Path) -> None:
    onnx = _mlmodel(tmp_path / "onnx", "flavors:\n  python_function: {}\n  onnx: {data: model.onnx}\nrun_id: r1\n")
    (onnx / "model.onnx").touch()
    path, facts = model_file(onnx)
    assert path.name == "model.onnx"
    assert facts == {"mlflow": {"run_id": "r1", "flavors": ["onnx", "python_function"]}}

    triton = _mlmodel(tmp_path / "triton", "flavors:\n  triton: {data: resnet}\n")
    (triton / "resnet" / "1").mkdir(parents=True)
    assert model_file(triton)[0] == (triton / "resnet").resolve()

    torch = _mlmodel(tmp_path / "torch", "flavors:\n  pytorch: {model_data: data}\n")
    (torch / "data").mkdir()
    with zipfile.ZipFile(torch / "data" / "model.pth", "w") as archive:
        archive.writestr("model/code/__torch__.py", "")
    assert model_file(torch)[0].name == "model.pth"

    saved = _mlmodel(tmp_path / "saved", "flavors:\n  tensorflow: {saved_model_dir: tf2model}\n")
    (saved / "tf2model").mkdir()
    (saved / "tf2model" / "saved_model.pb").touch()
    assert model_file(saved)[0].name == "tf2model"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flavors:\n  sklearn: {pickled_model: model.pkl}\n", "it has sklearn"),
        ("flavors:\n  onnx: {data: ../outside.onnx}\n", "it has onnx"),
        ("flavors:\n  pytorch: {model_data: data}\n", "it has pytorch"),
        ("- a list\n", "holds no mapping"),
        ("flavors: [}\n", "cannot be read"),
    ],
)
def test_an_mlmodel_that_cannot_be_served_is_refused_by_its_flavors(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "outside.onnx").touch()
    folder = _mlmodel(tmp_path / "model", text)
    (folder / "data").mkdir()
    with zipfile.ZipFile(folder / "data" / "model.pth", "w") as archive:
        archive.writestr("model/data.pkl", "")
    with pytest.raises(RepoManagerError, match=message):
        model_file(folder)
