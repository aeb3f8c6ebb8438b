"""Documents nested deeper than a parser goes are an error with the file's name, never a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from repo_manager.client import read_weights
from repo_manager.declared.schema import Config
from repo_manager.declared.steps import config_changes
from repo_manager.errors import InputError, RepoManagerError, RepositoryError
from repo_manager.repository.location import ObjectRepository
from repo_manager.repository.stores.objects.credentials import store_config
from repo_manager.rollout.targets.snapshot_files import read_snapshot
from repo_manager.rollout.targets.template import HISTORY, history_of, parse_models
from repo_manager.sources.mlflow import model_file

DEEP = "[" * 100_000


def _tuning(file: Path) -> object:
    config = Config.model_validate({"tuned": file.name})
    return config_changes("m", config, "", file.parent, where="repository.yaml")


def _credentials(file: Path) -> object:
    return store_config(ObjectRepository("s3", "bucket"), {"TRITON_CLOUD_CREDENTIAL_PATH": str(file)})


READERS: dict[str, tuple[str, Callable[[Path], object], type[RepoManagerError], str]] = {
    "weights": ("weights.json", lambda file: read_weights(file, "m"), InputError, r"weights\.json"),
    "MLmodel": ("MLmodel", lambda file: model_file(file.parent), InputError, "MLmodel cannot be read"),
    "tuning": ("tuning.json", _tuning, InputError, r"tuning\.json is no result of a tuning"),
    "snapshot": (
        "snapshot.json",
        lambda file: read_snapshot(file.parents[1], file.parent.name),
        RepositoryError,
        "is damaged",
    ),
    "credentials": (
        "credentials.json",
        _credentials,
        RepositoryError,
        "TRITON_CLOUD_CREDENTIAL_PATH names cannot be read",
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_deep_document_is_refused_by_name(reader: str, tmp_path: Path) -> None:
    name, read, error, text = READERS[reader]
    file = tmp_path / name
    file.write_text(DEEP)
    with pytest.raises(error, match=text):
        read(file)


def test_a_deep_annotation_counts_as_none() -> None:
    assert history_of({"metadata": {"annotations": {HISTORY: DEEP}}}) == []
    assert parse_models(DEEP) is None
