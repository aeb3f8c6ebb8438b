"""Models kept by MLflow: fetched by its own client, and the part of a folder with an MLmodel file Triton can serve."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from repo_manager.errors import InputError, RepoManagerError
from repo_manager.files import reason_of
from repo_manager.optional import require
from repo_manager.repository.stores.objects.retry import readable
from repo_manager.sources.fetching import MOST_FILES, Fetched, Receiver, check_name

__all__ = ["fetch_from_mlflow", "model_file"]

_MLMODEL = "MLmodel"
_MOST_BYTES = 4 << 20
_MODEL = re.compile(r"models:/{1,2}(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/]+))")
_KEPT = ("run_id", "model_id", "model_uuid", "mlflow_version", "utc_time_created")
_HINT = "Export it to ONNX, and log it by mlflow.onnx.log_model; or give --backend, --config and the file itself."


def fetch_from_mlflow(url: str, receiver: Receiver) -> Fetched:
    """Fetch a registered model's version, or a run's logged model, from the tracking server of the environment.

    MLFLOW_TRACKING_URI, MLFLOW_REGISTRY_URI and the credentials of both are read by MLflow itself.

    Args:
        url: models:/NAME/VERSION, models:/NAME@ALIAS, runs:/RUN/PATH or mlflow-artifacts:/PATH.
        receiver: folder and progress of the download.

    Raises:
        MissingDependencyError: the [mlflow] extra is not installed.
        InputError: MLflow does not know it, or cannot fetch it.
    """
    mlflow = require("mlflow")
    exceptions = require("mlflow.exceptions")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        pinned, facts = _pinned(mlflow, url)
        sizes = _sizes(mlflow, pinned)
        receiver.expects(url, sum(sizes.values()), max(len(sizes), 1))
        for name in sizes:
            check_name(name, url)
        target = receiver.folder("")  # empty: MLflow cannot resume a download
        path = Path(mlflow.artifacts.download_artifacts(artifact_uri=pinned, dst_path=str(target)))
        return Fetched(path, {"tracking": _tracking(mlflow), **facts})
    except RepoManagerError:
        raise
    except (exceptions.MlflowException, OSError, ValueError) as exc:
        raise InputError(
            f"{url}: MLflow cannot fetch it: {readable(str(exc))}",
            hint=f"It asks {_tracking(mlflow)}: is MLFLOW_TRACKING_URI the right one?",
        ) from exc


def _pinned(mlflow: Any, url: str) -> tuple[str, dict[str, Any]]:
    """Return the URL of a version by its number, also where a movable alias names it, and its facts."""
    match = _MODEL.fullmatch(url)
    if match is None:
        return url, {}
    client, name = mlflow.MlflowClient(), match["name"]
    if match["alias"]:
        found = client.get_model_version_by_alias(name, match["alias"])
    else:
        found = client.get_model_version(name, match["version"])
    return f"models:/{name}/{found.version}", {
        "registered": {"name": name, "version": str(found.version)},
        **({"run_id": found.run_id} if found.run_id else {}),
    }


def _sizes(mlflow: Any, url: str) -> dict[str, int]:
    """Return the files of an artifact's folder: path -> size in bytes. Of a single file nothing.

    Raises:
        InputError: there are more than any model has.
    """
    found: dict[str, int] = {}
    waiting = [""]
    while waiting:
        below = waiting.pop()
        for each in mlflow.artifacts.list_artifacts(artifact_uri=f"{url}/{below}".rstrip("/")):
            name = f"{below}{str(each.path).rpartition('/')[2]}"
            if each.is_dir:
                waiting.append(f"{name}/")
            else:
                found[name] = int(each.file_size or 0)
        if len(found) + len(waiting) > MOST_FILES:
            raise InputError(f"{url} has more than {MOST_FILES:,} files", hint="Name the folder of one model.")
    return found


def _tracking(mlflow: Any) -> str:
    """Return the address of the tracking server without credentials."""
    text = str(mlflow.get_tracking_uri())
    scheme, mark, rest = text.partition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}"


def model_file(path: Path) -> tuple[Path, Mapping[str, Any]]:
    """Return the part of a folder with an MLmodel file Triton serves, and the manifest's entries for it.

    Args:
        path: any path. One without an MLmodel file is returned as it is.

    Raises:
        InputError: the file is broken, or none of the model's flavors can be served as it is.
    """
    file = path / _MLMODEL
    if not path.is_dir() or not file.is_file():
        return path, {}
    document = _read(file)
    flavors = document.get("flavors")
    flavors = flavors if isinstance(flavors, Mapping) else {}
    known = {key: str(document[key]) for key in _KEPT if document.get(key)}
    facts = {"mlflow": {**known, "flavors": sorted(map(str, flavors))}}
    for flavor, find in _FLAVORS.items():
        entry = flavors.get(flavor)
        found = find(path, entry) if isinstance(entry, Mapping) else None
        if found is not None:
            return found, facts
    names = ", ".join(sorted(map(str, flavors))) or "none"
    raise InputError(f"{path}: no flavor of this MLflow model is served as it is: it has {names}", hint=_HINT)


def _read(file: Path) -> Mapping[str, Any]:
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise InputError(f"{file} is larger than {_MOST_BYTES >> 20} MiB, and so is no MLmodel file")
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as exc:
        raise InputError(f"{file} cannot be read: {readable(reason_of(exc))}") from exc
    if not isinstance(document, Mapping):
        raise InputError(f"{file} is no MLmodel file: it holds no mapping")
    return document


def _inside(folder: Path, name: Any) -> Path | None:
    """Return an entry of the folder, or `None` when it is not there or leads out of the folder."""
    if not isinstance(name, str) or not name:
        return None
    place = (folder / name).resolve()
    return place if place.is_relative_to(folder.resolve()) and place.exists() else None


def _onnx(folder: Path, entry: Mapping[str, Any]) -> Path | None:
    data = _inside(folder, entry.get("data"))
    if data is not None and data.is_dir():
        data = _inside(data, "model.onnx")
    return data


def _triton(folder: Path, entry: Mapping[str, Any]) -> Path | None:
    """Return the folder logged by NVIDIA's plugin for MLflow: a model's, as Triton has it."""
    return _inside(folder, entry.get("data"))


def _torchscript(folder: Path, entry: Mapping[str, Any]) -> Path | None:
    """Return the file of a PyTorch model in TorchScript. A pickled module can only be loaded by its own code."""
    data = _inside(folder, entry.get("model_data"))
    file = None if data is None else _inside(data, "model.pth")
    if file is None or not zipfile.is_zipfile(file):
        return None
    with zipfile.ZipFile(file) as archive:
        scripted = any("/code/" in name for name in archive.namelist())
    return file if scripted else None


def _saved_model(folder: Path, entry: Mapping[str, Any]) -> Path | None:
    for name in (entry.get("saved_model_dir"), "tfmodel", "tf2model", "data/model"):
        found = _inside(folder, name)
        if found is not None and (found / "saved_model.pb").is_file():
            return found
    return None


_FLAVORS = {
    "triton": _triton,
    "onnx": _onnx,
    "pytorch": _torchscript,
    "tensorflow": _saved_model,
    "keras": _saved_model,
}
