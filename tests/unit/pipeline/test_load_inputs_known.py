"""A load test's knowledge from a version's record: sizes of dynamic axes and ranges of integers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import onnx_models

from repo_manager.pipeline.adding import AddOptions, add
from repo_manager.pipeline.load_inputs import KnownInputs, known_inputs
from repo_manager.repository.golden import Exchange, Golden, write_golden
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


SEQUENCE = """
backend: "python"
max_batch_size: 2
input [{ name: "x" data_type: TYPE_FP32 dims: [2] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [2] }]
sequence_batching { }
"""


@pytest.mark.parametrize(
    ("changed", "requests", "said"),
    [
        (("", ""), 3, "recorded sequence"),
        (("sequence_batching { }", "model_transaction_policy { decoupled: true }"), 1, "random request"),
        (("sequence_batching { }", ""), 1, ""),
    ],
)
def test_the_golden_sample_is_offered_where_random_inputs_mean_nothing(tmp_path, changed, requests, said):
    folder = tmp_path / "repository" / "m"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").touch()
    (folder / "config.pbtxt").write_text(SEQUENCE.replace(*changed))
    steps = [{"x": np.full((1, 2), number, np.float32)} for number in (1, 2, 3)]
    write_golden(folder / "1" / "golden.npz", Golden.of(Exchange(step, ({"y": step["x"]},)) for step in steps))
    known = known_inputs(tmp_path / "repository", "m", 1)
    assert [float(row["x"][0, 0]) for row in known.golden] == [1.0, 2.0, 3.0][:requests]
    assert said in known.why_golden if said else known.why_golden == ""


def test_random_words_mean_nothing_to_a_model_of_strings(tmp_path):
    folder = tmp_path / "repository" / "m"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").touch()
    (folder / "config.pbtxt").write_text(SEQUENCE.replace("sequence_batching { }", "").replace("FP32", "STRING"))
    words = {"x": np.array([[b"a", b"b"]], object)}
    write_golden(folder / "1" / "golden.npz", Golden.of([Exchange(words, (words,))]))
    assert "x: random words" in known_inputs(tmp_path / "repository", "m", 1).why_golden
