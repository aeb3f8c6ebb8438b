"""`ensemble` on the embedded server: joined, run, recorded, deployed, asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.python_models import write_python_model

from repo_manager.errors import InputError, RepositoryError
from repo_manager.pipeline.adding_files import FilesOptions, add_files
from repo_manager.pipeline.ensembling import EnsembleOptions, make_ensemble
from repo_manager.pipeline.infer import InferOptions, infer
from repo_manager.repository.configuration import read_config_bytes
from repo_manager.repository.golden import read_golden
from repo_manager.repository.manifest import read_manifest
from repo_manager.repository.verify import verify
from repo_manager.rollout.deploy import deploy
from repo_manager.server.client import TritonClient
from repo_manager.server.embedded import EmbeddedServer

pytestmark = [pytest.mark.integration, pytest.mark.slow]
AUTO_COMPLETE = False


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """`scale`, whose second version doubles, and `opt`, which doubles. Version 1 of `scale` is served."""
    source = tmp_path_factory.mktemp("source")
    sample = source / "rows.npz"
    np.savez(sample, X=np.array([[1, 2], [3, 4]], np.float32))
    folder = write_python_model(source, "scale", versions=(1, 2))
    for version in ("1", "2"):
        options = FilesOptions(sample=sample, config=folder / "config.pbtxt")
        add_files(folder / version, "scale", repository, options)
    add_files(write_python_model(source, "opt"), "opt", repository)
    return repository


def test_models_become_one_that_is_recorded_deployed_and_asked(models: Path, server: EmbeddedServer) -> None:
    made = make_ensemble(models, "ens", ["scale", "opt"])
    assert made.left_out == ("opt.B",)
    assert (made.added.backend, made.added.golden, made.added.requests) == ("ensemble", "embedded server", 2)
    golden = read_golden(models / "ens" / "1" / "golden.npz")
    np.testing.assert_array_equal(golden.exchanges[1].responses[0]["Y"], [[2, 4], [6, 8]])
    manifest = read_manifest(models / "ens" / "1")
    assert manifest.source["models"] == ["scale", "opt"]
    assert manifest.golden["parts"] == {"opt": 1, "scale": 1}
    assert verify(models, "ens") == ()

    with TritonClient.connect(server.grpc_url) as client:
        deployed = deploy(models, "ens", 1, client).servers[0]
    assert deployed.smoke is not None
    assert (deployed.smoke.reference, deployed.smoke.requests) == ("golden", 2)
    answered = infer(models, "ens", to=server.grpc_url, options=InferOptions(golden=True))
    assert all(each.passed for each in answered.comparisons)


def test_a_version_that_is_not_served_can_be_pinned(models: Path, server: EmbeddedServer) -> None:
    before = read_config_bytes(models, "scale")
    made = make_ensemble(models, "pinned", ["scale:2", "opt"], EnsembleOptions(pin=True))
    assert made.models == ("scale:2", "opt:1")
    (exchange, _) = read_golden(models / "pinned" / "1" / "golden.npz").exchanges
    np.testing.assert_array_equal(exchange.responses[0]["Y"], [[4, 8]])
    assert read_config_bytes(models, "scale") == before
    with TritonClient.connect(server.grpc_url) as client:
        deploy(models, "pinned", 1, client)
        answer = client.infer("pinned", None, {"X": np.ones((1, 2), np.float32)})
    np.testing.assert_array_equal(answer["Y"], [[4, 4]])


def test_an_ensemble_within_an_ensemble_is_run_with_all_it_needs(models: Path) -> None:
    make_ensemble(models, "inner", ["scale"])
    made = make_ensemble(models, "outer", ["inner", "opt"])
    assert made.added.golden == "embedded server"


def test_what_cannot_be_joined_leaves_nothing(models: Path, tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="'scale' exists and is another one"):
        make_ensemble(models, "scale", ["opt"])
    with pytest.raises(RepositoryError, match="'absent'"):
        make_ensemble(models, "no", ["scale", "absent"])
    np.savez(tmp_path / "wrong.npz", X=np.ones((1, 3), np.float32))
    with pytest.raises(InputError, match="input X: the shape is"):
        make_ensemble(models, "no", ["scale", "opt"], EnsembleOptions(sample=tmp_path / "wrong.npz"))
    assert not (models / "no").exists()
