"""A tiny model's files and configuration, and a repository to put them in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repo_manager.repository.publish import PublishedVersion, publish
from repo_manager.triton_config.config import ModelConfig
from repo_manager.triton_config.derive import derive_config
from repo_manager.triton_config.options import ConfigOptions
from repo_manager.triton_config.served_signature import ServedSignature
from repo_manager.types import Backend, TensorSpec

Publish = Callable[..., PublishedVersion]


@pytest.fixture
def config() -> ModelConfig:
    return make_config()


@dataclasses.dataclass(frozen=True)
class Batched:
    """As `onnx_model.BatchAxis`, without importing onnx: the crash and writer scripts start many times."""

    kind: str = "batched"
    reason: str = ""


def make_config(name: str = "m", size: int = 3, **options: Any) -> ModelConfig:
    signature = ServedSignature((TensorSpec("x", "float32", ("N", size)),), (TensorSpec("y", "float32", ("N", 2)),))
    batched: Any = Batched()
    return derive_config(name, signature, batched, Backend.ONNXRUNTIME, ConfigOptions(**options))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(b"model " * 100)
    (source / "b").write_bytes(b"weights " * 1000)
    return {"model.onnx": source / "a", "model.onnx.data": source / "b"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "place" / "models"


@pytest.fixture
def put(root: Path, files: dict[str, Path]) -> Publish:
    """Publish one more version of a model."""

    def put_one(name: str = "m", **options: object) -> PublishedVersion:
        return publish(root, name, files, make_config(name, **options), {"precision": "fp16", "source": {"name": "s"}})

    return put_one
