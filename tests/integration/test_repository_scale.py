"""Large repositories: listing them has to stay cheap. CPU time is measured, so a busy machine changes nothing."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest

from repo_manager.onnx_model.batch_axis import BatchAxis
from repo_manager.repository.publish import publish
from repo_manager.repository.scan import find_model, scan
from repo_manager.triton_config.derive import derive_config
from repo_manager.triton_config.options import ConfigOptions
from repo_manager.triton_config.served_signature import ServedSignature
from repo_manager.types import Backend, TensorSpec

pytestmark = [pytest.mark.integration, pytest.mark.slow]

MODELS, VERSIONS = 1000, 10  # A tenth of what the limits (2 s, 200 MB) are for.


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    root, source = folder / "models", folder / "source"
    source.write_bytes(b"x")
    signature = ServedSignature((TensorSpec("x", "float32", ("N", 3)),), (TensorSpec("y", "float32", ("N", 2)),))
    config = derive_config("m", signature, BatchAxis("batched", ""), Backend.ONNXRUNTIME, ConfigOptions())
    details = {"sparsity": {"layers": [{"node": str(number)} for number in range(50)]}}
    first = publish(root, "m", {"model.onnx": source}, config, details).path
    text, manifest = (root / "m/config.pbtxt").read_text(), (first / "manifest.json").read_text()
    for number in range(MODELS - 1):
        model = root / f"m{number}"
        for version in range(1, VERSIONS + 1):
            (model / str(version)).mkdir(parents=True)
            (model / str(version) / "model.onnx").write_bytes(b"x")
            own = manifest.replace('"model": "m"', f'"model": "{model.name}"')
            (model / str(version) / "manifest.json").write_text(own.replace('"version": 1', f'"version": {version}'))
        (model / "config.pbtxt").write_text(text.replace('name: "m"', f'name: "{model.name}"'))
    return root


def test_listing_ten_thousand_versions_takes_a_fifth_of_a_second(large: Path) -> None:
    scan(large, deep=False)
    start = time.process_time()
    found = scan(large, deep=False)
    seconds = time.process_time() - start
    assert (len(found), sum(len(entry.versions) for entry in found)) == (MODELS, (MODELS - 1) * VERSIONS + 1)
    assert seconds < 0.2


def test_listing_needs_little_memory(large: Path) -> None:
    tracemalloc.start()
    found = scan(large, deep=False)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == MODELS
    assert peak_bytes < 15e6  # 150 MB for ten times as many; the interpreter and its packages take 60.


def test_showing_one_model_does_not_look_at_the_others(large: Path) -> None:
    start = time.process_time()
    model = find_model(large, "m500")
    seconds = time.process_time() - start
    assert [entry.manifest.version for entry in model.versions if entry.manifest] == list(range(1, VERSIONS + 1))
    assert seconds < 0.3
