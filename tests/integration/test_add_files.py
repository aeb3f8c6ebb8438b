"""`add` without conversion: any backend's files, run on the embedded server before they are published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.python_models import KINDS, write_python_model
from support.serving import SCALING_CONFIG, scaling_model

from repo_manager.errors import ConfigError, GateError, InputError, UsageError
from repo_manager.pipeline.adding_files import FilesOptions, add_files
from repo_manager.repository.golden import Exchange, Golden, read_golden, write_golden
from repo_manager.repository.manifest import read_manifest
from repo_manager.repository.scan import find_model
from repo_manager.repository.verify import verify
from repo_manager.rollout.deploy import deploy, rollback
from repo_manager.server.client import TritonClient
from repo_manager.server.embedded import EmbeddedServer

pytestmark = pytest.mark.integration
AUTO_COMPLETE = False
LIBTORCH = """backend: "pytorch"
max_batch_size: 0
input { name: "INPUT__0" data_type: TYPE_FP32 dims: 2 }
output { name: "OUTPUT__0" data_type: TYPE_FP32 dims: 2 }
"""


def save(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


def test_a_sequence_is_recorded_and_proven_by_every_deploy(
    tmp_path: Path, source: Path, repository: Path, server: EmbeddedServer
) -> None:
    folder = write_python_model(source, "acc", versions=(1, 2))
    (folder / "2" / "__pycache__").mkdir()
    (folder / "2" / "__pycache__" / "model.pyc").write_bytes(b"")
    sample = save(tmp_path / "steps.npz", X=np.array([[2], [3], [4]], np.int32))
    for version in ("1", "2"):  # the second is given as a folder of files with the configuration apart
        config = folder / "config.pbtxt"
        added = add_files(folder / version, "acc", repository, FilesOptions(config=config, sample=sample))
    assert (added.version, added.golden, added.requests) == (2, "embedded server", 3)
    golden = read_golden(repository / "acc" / "2" / "golden.npz")
    assert [int(each.responses[0]["SUM"][0, 0]) for each in golden.exchanges] == [4, 10, 18]
    assert added.files == ("model.py", "golden.npz")
    assert verify(repository, "acc") == ()

    with TritonClient.connect(server.grpc_url) as client:
        for version in (1, 2):
            smoke = deploy(repository, "acc", version, client).servers[0].smoke
            assert smoke is not None
            assert (smoke.reference, smoke.requests) == ("golden", 3)
        assert rollback(repository, "acc", client).ready == (1,)


def test_a_model_folder_gives_its_newest_version_and_batches_are_recorded(
    tmp_path: Path, source: Path, repository: Path
) -> None:
    folder = write_python_model(source, "scale", versions=(1, 3))
    sample = save(tmp_path / "rows.npz", X=np.array([[1, 2], [3, 4], [5, 6]], np.float32))
    add_files(folder, "scale", repository, FilesOptions(sample=sample))
    golden = read_golden(repository / "scale" / "1" / "golden.npz")
    assert [each.inputs["X"].shape for each in golden.exchanges] == [(1, 2), (3, 2)]
    np.testing.assert_array_equal(golden.exchanges[1].responses[0]["Y"], [[3, 6], [9, 12], [15, 18]])
    assert read_manifest(repository / "scale" / "1").golden["recorded_by"] == "embedded server"


def test_code_that_asks_another_model_finds_it(tmp_path: Path, source: Path, repository: Path) -> None:
    if not (repository / "scale").exists():
        write_python_model(repository, "scale", versions=(1, 3))
    folder = write_python_model(source, "bls")
    config = folder / "config.pbtxt"
    config.write_text(config.read_text().partition("parameters")[0])
    sample = save(tmp_path / "one.npz", X=np.array([[1, 2]], np.float32))
    added = add_files(folder, "bls", repository, FilesOptions(sample=sample, uses=("scale",)))
    assert 'key: "uses"' in (repository / "bls" / "config.pbtxt").read_text()
    assert added.requests == 1
    with pytest.raises(InputError, match="bls needs missing"):
        add_files(folder, "bls", tmp_path / "other", FilesOptions(sample=sample, uses=("missing",)))
    assert not (tmp_path / "other").exists()


def test_a_stream_is_recorded_whole(tmp_path: Path, source: Path, repository: Path) -> None:
    folder = write_python_model(source, "repeat")
    sample = save(tmp_path / "one.npz", IN=np.array([7, 8, 9], np.int32))
    add_files(folder, "repeat", repository, FilesOptions(sample=sample))
    (exchange,) = read_golden(repository / "repeat" / "1" / "golden.npz").exchanges
    assert [int(each["OUT"][0]) for each in exchange.responses] == [7, 8, 9]


def test_answers_that_come_with_the_sample_are_held_against_the_run(
    tmp_path: Path, source: Path, repository: Path
) -> None:
    folder = write_python_model(source, "opt")
    exchange = Exchange({"A": np.ones((1, 2), np.float32)}, ({"Y": np.full((1, 2), 2, np.float32)},))
    write_golden(tmp_path / "right.npz", Golden.of([exchange]))
    added = add_files(folder, "opt", repository, FilesOptions(sample=tmp_path / "right.npz"))
    assert added.golden == "given"
    wrong = Exchange(exchange.inputs, ({"Y": np.full((1, 2), 3, np.float32)},))
    write_golden(tmp_path / "wrong.npz", Golden.of([wrong]))
    with pytest.raises(GateError, match=r"Y is off by 0\.333"):
        add_files(folder, "opt", repository, FilesOptions(sample=tmp_path / "wrong.npz"))
    assert [each.version for each in find_model(repository, "opt").versions] == [1]


def test_what_cannot_run_here_keeps_its_inputs(tmp_path: Path, source: Path, repository: Path) -> None:
    source.mkdir()
    (source / "net.pt").write_bytes(b"weights")
    (source / "config.pbtxt").write_text(LIBTORCH)
    sample = save(tmp_path / "one.npz", INPUT__0=np.ones(2, np.float32))
    options = FilesOptions(config=source / "config.pbtxt", sample=sample)
    added = add_files(source / "net.pt", "torch", repository, options)
    assert added.golden == "nobody"
    assert added.files == ("model.pt", "golden.npz")
    assert "it was not run here" in added.notes[0]


def test_a_configuration_is_completed_by_the_model_itself(tmp_path: Path, source: Path, repository: Path) -> None:
    folder = write_python_model(source, "auto", kind="opt")
    (folder / "config.pbtxt").unlink()
    code = folder / "1" / "model.py"
    complete = """
    @staticmethod
    def auto_complete_config(config):
        config.add_input({"name": "A", "data_type": "TYPE_FP32", "dims": [2]})
        config.add_output({"name": "Y", "data_type": "TYPE_FP32", "dims": [2]})
        config.set_max_batch_size(4)
        return config
"""
    code.write_text(code.read_text() + complete)
    added = add_files(folder / "1", "auto", repository)
    config = find_model(repository, "auto").config()
    assert config is not None
    assert (config.backend, config.max_batch_size, config.message().input[0].name) == ("python", 4, "A")
    assert added.golden == ""


def test_what_is_wrong_is_refused_and_leaves_nothing(tmp_path: Path, source: Path) -> None:
    repository = tmp_path / "repository"
    folder = write_python_model(source, "broken", kind="opt")
    (folder / "1" / "model.py").write_text("class TritonPythonModel:\n    def initialize(self, args): 1 / 0\n")
    sample = save(tmp_path / "one.npz", A=np.ones((1, 2), np.float32))
    with pytest.raises(GateError, match=r"does not load.*division by zero"):
        add_files(folder, "broken", repository, FilesOptions(sample=sample))
    (folder / "config.pbtxt").write_text(KINDS["opt"].config.replace("size: 8", "size: -8"))
    with pytest.raises(ConfigError, match="max_batch_size"):
        add_files(folder, "broken", repository)
    (source / "weights.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="nothing says which backend"):
        add_files(source / "weights.bin", "unknown", repository)
    assert not repository.exists()


def test_an_onnx_file_with_a_configuration_is_published_as_it_is(tmp_path: Path, repository: Path) -> None:
    path, config = tmp_path / "net.onnx", tmp_path / "config.pbtxt"
    path.write_bytes(scaling_model(2.0).SerializeToString())
    config.write_text(SCALING_CONFIG + "# by hand\n")
    sample = save(tmp_path / "rows.npz", x=np.ones((1, 4), np.float32))
    add_files(path, "plain", repository, FilesOptions(config=config, sample=sample))
    assert (repository / "plain" / "1" / "model.onnx").read_bytes() == path.read_bytes()
    assert "# by hand" in (repository / "plain" / "config.pbtxt").read_text()
