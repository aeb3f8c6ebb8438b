"""MLflow's deployments plugin: `mlflow deployments create -t repo-manager ...` calls `add` and `deploy`, no more.

MLflow finds this module by the entry point `mlflow.deployments`, and asks for one client class, `run_local` and
`target_help`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.deployments import BaseDeploymentClient, PredictionsResponse
from mlflow.exceptions import MlflowException

from repo_manager.errors import RepoManagerError, UsageError
from repo_manager.files import work_folder
from repo_manager.pipeline.adding import Added, AddOptions, add
from repo_manager.pipeline.adding_files import AddedFiles, FilesOptions, add_files
from repo_manager.pipeline.deploying import deploy, undeploy
from repo_manager.pipeline.given_files import is_converted
from repo_manager.pipeline.infer import InferOptions, infer
from repo_manager.repository.location import Location, as_location
from repo_manager.repository.scan import find_model, scan
from repo_manager.repository.tags import model_state
from repo_manager.settings import load_settings
from repo_manager.sources import open_source

__all__ = ["RepoManagerDeploymentClient", "run_local", "target_help"]

_SCHEME = "repo-manager"
_FLAVOR = "triton"
_ADD = ("precision", "backend", "sparsity", "calibration")
_FILES = ("backend", "config", "sample")
_KEYS = ("to", *dict.fromkeys((*_ADD, *_FILES)))


class RepoManagerDeploymentClient(BaseDeploymentClient):  # type: ignore[misc]  # MLflow may be absent, or untyped
    """Deployments are models of one repository.

    Args:
        target_uri: `repo-manager`, or `repo-manager:REPOSITORY` with a folder or a URL as `--repository` takes it.
    """

    def __init__(self, target_uri: str) -> None:
        super().__init__(target_uri)
        place = target_uri.removeprefix(_SCHEME).removeprefix(":")
        self._place = place.removeprefix("//") if place.startswith("///") else place

    def create_deployment(
        self, name: str, model_uri: str, flavor: str | None = None, config: Any = None, endpoint: str | None = None
    ) -> dict[str, Any]:
        """Publish the model as the next version of `name`, and deploy it.

        Args:
            name: the model's name in Triton.
            model_uri: source as for `add`: models:/, runs:/, s3://, a path, ...
            flavor: must be `triton`. `None`: `triton`.
            config: options of the target, as in `target_help`. `None`: the defaults.
            endpoint: must be `None`: MLflow's endpoints are not supported.

        Raises:
            MlflowException: as `add` and `deploy`, with their words.
        """
        with _in_words_of_mlflow():
            _refuse(flavor, endpoint)
            given = _checked(config)
            added = _add(model_uri, name, self._repository(), given)
            done = deploy(self._repository(), name, added.version, given.get("to"))
        return {"name": name, "flavor": _FLAVOR, "version": added.version, "target": done.target}

    def update_deployment(
        self,
        name: str,
        model_uri: str | None = None,
        flavor: str | None = None,
        config: Any = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Publish and deploy another version. Without a model URI the newest version is deployed.

        Args:
            name: the model's name in Triton. Without `model_uri` the repository must have it.
            model_uri: MLflow's URI of the model. `None`: deploy the newest version.
            flavor: must be `triton`. `None`: `triton`.
            config: options of the target, as in `target_help`. `None`: the defaults.
            endpoint: must be `None`: MLflow's endpoints are not supported.

        Raises:
            MlflowException: as `create_deployment`.
        """
        if model_uri is not None:
            return self.create_deployment(name, model_uri, flavor, config, endpoint)
        with _in_words_of_mlflow():
            _refuse(flavor, endpoint)
            done = deploy(self._repository(), name, None, _checked(config).get("to"))
        return {"name": name, "flavor": _FLAVOR, "version": done.version, "target": done.target}

    def delete_deployment(self, name: str, config: Any = None, endpoint: str | None = None) -> None:
        """Take the model out of service. Its versions stay in the repository.

        Args:
            name: the model's name in Triton. The repository must have it.
            config: options of the target, as in `target_help`. `None`: the defaults.
            endpoint: must be `None`: MLflow's endpoints are not supported.

        Raises:
            MlflowException: as `undeploy`.
        """
        with _in_words_of_mlflow():
            _refuse(None, endpoint)
            undeploy(self._repository(), name, to=_checked(config).get("to"))

    def list_deployments(self, endpoint: str | None = None) -> list[dict[str, Any]]:
        """Return every model recorded as deployed.

        Args:
            endpoint: must be `None`: MLflow's endpoints are not supported.
        """
        with _in_words_of_mlflow():
            _refuse(None, endpoint)
            names = [entry.name for entry in scan(self._repository())]
            found = [self._described(name) for name in names]
        return [each for each in found if each["version"] is not None]

    def get_deployment(self, name: str, endpoint: str | None = None) -> dict[str, Any]:
        """Return one model.

        Args:
            name: name of the model in Triton.
            endpoint: must be `None`: MLflow's endpoints are not supported.

        Raises:
            MlflowException: there is none.
        """
        with _in_words_of_mlflow():
            _refuse(None, endpoint)
            find_model(self._repository(), name)
            return self._described(name)

    def predict(self, deployment_name: str | None = None, inputs: Any = None, endpoint: str | None = None) -> Any:
        """Send one request a row, and return the outputs of all.

        Args:
            deployment_name: name of the model. `None` is refused.
            inputs: a DataFrame whose columns are inputs, or a mapping of them to arrays whose first axis counts rows.
            endpoint: must be `None`: MLflow's endpoints are not supported.

        Raises:
            MlflowException: as `infer`.
        """
        with _in_words_of_mlflow(), work_folder("repo-manager-mlflow-") as folder:
            _refuse(None, endpoint)
            file = Path(folder) / "inputs.npz"
            np.savez(file, **{str(key): np.stack([np.asarray(row) for row in inputs[key]]) for key in inputs})
            answers = infer(self._repository(), str(deployment_name), options=InferOptions(data=str(file))).answers
        rows = [{name: output.data for name, output in each.document().outputs.items()} for each in answers]
        return PredictionsResponse({"predictions": rows})

    def _repository(self) -> Location:
        return as_location(self._place or load_settings().repository)

    def _described(self, name: str) -> dict[str, Any]:
        deployments = model_state(self._repository(), name).deployments
        return {"name": name, "flavor": _FLAVOR, "version": deployments[-1].version if deployments else None}


def run_local(target: str, name: str, model_uri: str, flavor: str | None = None, config: Any = None) -> Any:
    """Deploy on the embedded server of this machine, as happens without `to` in any case.

    Args:
        target: name of the MLflow target, with the repository.
        name: the model's name in Triton. A new version is added if the repository has the model.
        model_uri: MLflow's URI of the model.
        flavor: must be `triton`. `None`: `triton`.
        config: options of the target, as in `target_help`. `None`: the defaults.
    """
    return RepoManagerDeploymentClient(target).create_deployment(name, model_uri, flavor, config)


def target_help() -> str:
    """Return the text of `mlflow deployments help -t repo-manager`."""
    return (
        f"Target: {_SCHEME}, or {_SCHEME}:REPOSITORY with the model repository: a folder, or s3://, gs://, as://.\n"
        "A deployment is a model of that repository: create and update call `repo-manager add` and `deploy`, delete "
        "calls `undeploy`.\n"
        f"-C KEY=VALUE takes {', '.join(_KEYS)}: the options of the same names of `add` and `deploy`. "
        "Without `to` the embedded tritonserver of this machine is used, and started where none runs.\n"
    )


def _add(model_uri: str, name: str, repository: Location, given: Mapping[str, str]) -> Added | AddedFiles:
    with open_source(model_uri) as source:
        if not {"config", "sample"} & given.keys() and is_converted(source.path, given.get("backend")):
            return add(source, name, repository, AddOptions(**_typed(AddOptions, _ADD, given)))
        if unused := sorted(given.keys() - {"to", *_FILES}):
            raise UsageError(f"{', '.join(unused)}: {source} is published as it is, so there is nothing to convert")
        return add_files(source, name, repository, FilesOptions(**_typed(FilesOptions, _FILES, given)))


def _typed(options: Any, names: tuple[str, ...], given: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields as their dataclass has them: members of an enumeration, paths, texts."""
    made: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        if field.name in names and field.name in given:
            value = given[field.name]
            if isinstance(field.default, enum.Enum):
                made[field.name] = _member(type(field.default), field.name, value)
            else:
                made[field.name] = Path(value) if field.name in ("config", "sample") else value
    return made


def _member(kind: type[enum.Enum], key: str, value: str) -> enum.Enum:
    try:
        return kind(value)
    except ValueError as exc:
        raise UsageError(f"{key}={value}: expected one of {', '.join(str(each.value) for each in kind)}") from exc


def _checked(config: Any) -> dict[str, str]:
    given = {str(key): str(value) for key, value in dict(config or {}).items()}
    if unknown := sorted(given.keys() - set(_KEYS)):
        raise UsageError(f"{', '.join(unknown)} is no option of this target", hint=f"Expected {', '.join(_KEYS)}.")
    return given


def _refuse(flavor: str | None, endpoint: str | None) -> None:
    if flavor not in (None, _FLAVOR):
        raise UsageError(f"the flavor {flavor!r} cannot be chosen: what Triton can serve of the model is taken")
    if endpoint is not None:
        raise UsageError("this target has no endpoints: leave --endpoint out")


@contextlib.contextmanager
def _in_words_of_mlflow() -> Iterator[None]:
    """Raise our errors as MLflow's command line shows them."""
    try:
        yield
    except RepoManagerError as exc:
        raise MlflowException(str(exc)) from exc
