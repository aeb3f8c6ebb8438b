from __future__ import annotations

from pathlib import Path

import pytest

from repo_manager.engine.fit import read_plan_header
from repo_manager.errors import EngineError
from repo_manager.types import Backend


def plan(path: Path, tag: bytes = b"ftrt", layout: int = 0, version: tuple[int, ...] = (10, 13, 3, 9)) -> Path:
    path.write_bytes(tag + layout.to_bytes(4, "little") + bytes(16) + bytes(version) + bytes(100))
    return path


def test_a_tensorrt_plan_tells_its_version(tmp_path: Path) -> None:
    header = read_plan_header(plan(tmp_path / "p"))
    assert (header.backend, header.version) == (Backend.TENSORRT, "10.13.3.9")
    assert header.compute_capabilities == ()


@pytest.mark.parametrize("content", [b"", b"ftrt", b"\x08\x07onnx" * 20, b"ptrt" + bytes(100)])
def test_another_file_is_no_plan(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(EngineError, match="not a TensorRT plan"):
        read_plan_header(tmp_path / "p")


def test_an_unknown_layout_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="serialization version 1"):
        read_plan_header(plan(tmp_path / "p", layout=1))
