"""What a load test learns from a version's record: sizes of dynamic axes and ranges of integers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from support import onnx_models

from repo_manager.pipeline.adding import AddOptions, add
from repo_manager.pipeline.load_inputs import KnownInputs, known_inputs
from repo_manager.types import Backend


def published(tmp_path: Path, **options: object) -> Path:
    model = onnx_models.save(onnx_models.bert_like(), tmp_path / "bert.onnx")
    add(model, "bert", tmp_path / "repository", AddOptions(backend=str(Backend.ONNXRUNTIME), **options))
    return tmp_path / "repository"


def test_limits_come_from_the_manifest_and_the_rest_from_the_sample(tmp_path: Path) -> None:
    root = published(tmp_path)
    known = known_inputs(root, "bert", 1)
    assert known.ranges == {
        "input_ids": (0, 500),
        "token_type_ids": (0, 2),
        "position_ids": (0, 40),
        "attention_mask": (0, 2),
    }
    assert known.shapes["input_ids"] == known.shapes["attention_mask"]


def test_a_version_without_recorded_limits_offers_what_its_sample_holds(tmp_path: Path) -> None:
    root = published(tmp_path)
    manifest = root / "bert" / "1" / "manifest.json"
    document = json.loads(manifest.read_text())
    del document["golden"]["index_limits"]
    manifest.write_text(json.dumps(document))
    with np.load(root / "bert" / "1" / "golden.npz") as archive:
        ids = archive["input:input_ids"]
    assert known_inputs(root, "bert", 1).ranges["input_ids"] == (ids.min(), ids.max() + 1)


def test_nothing_is_known_of_what_is_not_here(tmp_path: Path) -> None:
    root = published(tmp_path)
    assert known_inputs(root, "other") == KnownInputs()
    assert known_inputs(root, "bert", 7) == KnownInputs()
    assert known_inputs(tmp_path / "nowhere", "bert", 1) == KnownInputs()
    (root / "bert" / "1" / "golden.npz").unlink()
    assert known_inputs(root, "bert", 1) == KnownInputs()
