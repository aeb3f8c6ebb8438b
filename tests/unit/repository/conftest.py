"""A tiny model's files and configuration, and a repository to put them in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from repo_manager.onnx_model import BatchAxis, Signature
from repo_manager.repository import PublishedVersion, publish
from repo_manager.triton_config import ConfigOptions, ModelConfig, derive_config
from repo_manager.types import Backend, TensorSpec

Publish = Callable[..., PublishedVersion]


@pytest.fixture
def config() -> ModelConfig:
    return make_config()


def make_config(name: str = "m", size: int = 3, **options: object) -> ModelConfig:
    signature = Signature(
        (TensorSpec("x", "float32", ("N", size)),), (TensorSpec("y", "float32", ("N", 2)),), 17, 8, {"": 17}
    )
    return derive_config(
        name,
        signature,
        BatchAxis("batched", ""),
        Backend.ONNXRUNTIME,
        ConfigOptions(**options),  # type: ignore[arg-type]
    )


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


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder: a file's content, `None` for a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
