"""With `signed_by`, nothing runs without a trusted signature, whichever way into service is tried."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.serving import running_server, scaling_model

from repo_manager.errors import ConfigError, RepositoryError, RolloutUndoneError, UsageError
from repo_manager.pipeline.serve_options import ServeOptions, server_options
from repo_manager.repository.publish import publish
from repo_manager.repository.signing import sign_version
from repo_manager.repository.signing_files import signature_name
from repo_manager.repository.tags import record_deployment
from repo_manager.rollout.deploy import deploy
from repo_manager.rollout.options import RolloutOptions, TrialOptions
from repo_manager.rollout.targets.snapshot_files import SnapshotModel, write_snapshot
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.triton_config.config import parse_config
from repo_manager.tuning.result import TuneOptions
from repo_manager.tuning.run import tune

pytestmark = [pytest.mark.integration, pytest.mark.slow]

CONFIG = """backend: "onnxruntime" max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }
"""
PYTHON = CONFIG.replace("onnxruntime", "python")
PAYLOAD = """
open({marker!r}, "a").write(__file__)
class TritonPythonModel:
    def execute(self, requests):
        return []
"""
SCALING_CODE = """
import triton_python_backend_utils as utils
class TritonPythonModel:
    def execute(self, requests):
        x = [utils.get_input_tensor_by_name(each, "x").as_numpy() for each in requests]
        return [utils.InferenceResponse([utils.Tensor("y", each * 2)]) for each in x]
"""


class Attacker:
    """Somebody who may write to the repository, and has no key."""

    def __init__(self, root: Path, marker: Path) -> None:
        self.root, self.code = root, PAYLOAD.format(marker=str(marker))

    def write(self, place: str, text: str | None = None) -> None:
        file = self.root / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.code if text is None else text)

    def append(self, name: str, text: str) -> None:
        with (self.root / name / "config.pbtxt").open("a") as file:
            file.write(text + "\n")

    def replace(self, name: str, old: str, new: str) -> None:
        file = self.root / name / "config.pbtxt"
        file.write_text(file.read_text().replace(old, new))


ATTACKS: dict[str, Callable[[Attacker, str], object]] = {
    "another backend, code in the version": lambda a, m: (
        a.replace(m, '"onnxruntime"', '"python"'),
        a.write(f"{m}/1/model.py"),
    ),
    "another backend, code beside the versions": lambda a, m: (
        a.replace(m, '"onnxruntime"', '"python"'),
        a.write(f"{m}/model.py"),
    ),
    "code as the model's file": lambda a, m: (
        a.replace(m, '"onnxruntime"', '"python"'),
        a.append(m, 'default_model_filename: "model.onnx"'),
        a.write(f"{m}/1/model.onnx"),
    ),
    "no config.pbtxt, code in the version": lambda a, m: (
        (a.root / m / "config.pbtxt").unlink(),
        a.write(f"{m}/1/model.py"),
    ),
    "the whole model exchanged, the signature kept": lambda a, m: (
        shutil.rmtree(a.root / m),
        a.write(f"{m}/config.pbtxt", PYTHON),
        a.write(f"{m}/1/model.py"),
    ),
    "exchanged without a signature": lambda a, m: (
        shutil.rmtree(a.root / m),
        a.write(f"{m}/config.pbtxt", PYTHON),
        a.write(f"{m}/1/model.py"),
        (a.root / signature_name(m, 1)).unlink(),
    ),
    "a backend's library beside the versions": lambda a, m: a.write(f"{m}/libtriton_onnxruntime.so"),
    "a backend of its own in the model's folder": lambda a, m: a.write(f"{m}/onnxruntime/model.py"),
    "an environment": lambda a, m: a.append(
        m, 'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "$$TRITON_MODEL_DIRECTORY/env" } }'
    ),
    "a runtime": lambda a, m: (a.append(m, 'runtime: "model.py"'), a.write(f"{m}/1/model.py")),
    "custom operators": lambda a, m: a.append(m, 'model_operations { op_library_filename: "evil.so" }'),
    "an ensemble of an unsigned model": lambda a, m: (
        a.write(f"{m}_part/config.pbtxt", PYTHON),
        a.write(f"{m}_part/1/model.py"),
        a.replace(m, 'backend: "onnxruntime"', ""),
        a.append(
            m,
            f'ensemble_scheduling {{ step {{ model_name: "{m}_part" model_version: -1 '
            'input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } } }',
        ),
    ),
}


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private key; its public one lies beside it."""
    private = tmp_path_factory.mktemp("keys") / "key.pem"
    made, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    form = serialization.PrivateFormat.PKCS8
    private.write_bytes(made.private_bytes(pem, form, serialization.NoEncryption()))
    public = made.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    private.with_suffix(".pub").write_bytes(public)
    return private


@pytest.fixture
def attacked(tmp_path: Path, key: Path) -> tuple[Path, dict[str, str], Path]:
    """A repository of signed models with one attack each but the first: attack -> model, and the payload's file."""
    root, marker, source = tmp_path / "models", tmp_path / "marker", tmp_path / "model.onnx"
    root.mkdir()
    onnx.save(scaling_model(2.0), source)
    models = {what: f"m{number}" for number, what in enumerate(ATTACKS)}
    for name in ("good", *models.values()):
        publish(root, name, {"model.onnx": source}, parse_config(CONFIG, where="config.pbtxt"), {"precision": "fp32"})
        sign_version(root, name, 1, key)
        record_deployment(root, name, 1)
    attacker = Attacker(root, marker)
    for what, name in models.items():
        ATTACKS[what](attacker, name)
    return root, models, marker


@pytest.fixture
def servers(attacked: tuple[Path, dict[str, str], Path]) -> Iterator[tuple[EmbeddedServer, EmbeddedServer]]:
    options = ServerOptions(str(attacked[0]), auto_complete=False)
    with running_server(options) as first, running_server(options) as second:
        yield first, second


def test_nothing_unsigned_runs_in_sixty_attempts(
    attacked: tuple[Path, dict[str, str], Path],
    servers: tuple[EmbeddedServer, EmbeddedServer],
    key: Path,
    tmp_path: Path,
) -> None:
    root, models, marker = attacked
    keys = (key.with_suffix(".pub"),)
    urls = [server.grpc_url for server in servers]
    policy = RolloutOptions(signed_by=keys)
    entrances: dict[str, Callable[[str], object]] = {
        "deploy": lambda name: deploy(root, name, 1, urls[0], options=policy),
        "a fleet": lambda name: deploy(root, name, 1, urls, options=policy),
        "a canary": lambda name: deploy(root, name, 1, urls[0], options=policy, trial=TrialOptions(steps=(0.5, 1.0))),
        "serve --load": lambda name: server_options(ServeOptions(root, load=(name,), signed_by=keys)),
        "a snapshot": lambda name: write_snapshot(
            tmp_path / "snapshots", [SnapshotModel(name, (1,), root)], signed_by=keys
        ),
        "tune": lambda name: tune(root, {name: 1}, TuneOptions(rate=10.0, signed_by=keys)),
    }
    went_in, refused = [], []
    for what, name in models.items():
        for entrance, enter in entrances.items():
            try:
                enter(name)
            except (RepositoryError, ConfigError, UsageError) as exc:
                refused.append(str(exc))
            else:
                went_in.append((what, entrance))
    assert not went_in
    assert len(refused) >= 60
    assert not marker.exists()
    for load in (("all",), ("deployed",), ()):
        options = server_options(ServeOptions(root, load=load, signed_by=keys))
        assert options.load == ("good",)
        assert set(models.values()) <= set(options.refused)
    with running_server(options) as server, TritonClient.connect(server.grpc_url) as client:
        assert {each.name for each in client.statistics()} == {"good"}
        assert set(server.failures) == set(options.refused)
    assert not marker.exists()
    # The signed file is loaded. The payload would have run: without the policy it does.
    deploy(root, "good", 1, urls[0], options=policy)
    with TritonClient.connect(urls[0]) as client:
        client.load(models["exchanged without a signature"])
    assert marker.exists()


def test_what_is_exchanged_between_the_check_and_the_load_is_put_back(
    attacked: tuple[Path, dict[str, str], Path],
    servers: tuple[EmbeddedServer, EmbeddedServer],
    key: Path,
) -> None:
    root, _, _ = attacked
    file = root / "good" / "1" / "model.onnx"
    right, wrong = file.read_bytes(), scaling_model(7.0).SerializeToString()
    begun = threading.Event()

    def report(event: str) -> None:
        """Exchange the file before the load, and put it back right after it, with its times."""
        if event.startswith("serving version") and not begun.is_set():
            begun.set()
            file.write_bytes(wrong)

    options = RolloutOptions(signed_by=(key.with_suffix(".pub"),))
    with pytest.raises(RolloutUndoneError, match=r"does not hold|was changed between"):
        deploy(root, "good", 1, servers[0].grpc_url, options=options, report=report)
    assert begun.is_set()
    file.write_bytes(right)
    with TritonClient.connect(servers[0].grpc_url) as client:
        assert not client.statistics()


def test_signed_python_code_stays_signed_while_it_is_served(tmp_path: Path, key: Path) -> None:
    """The server's interpreter writes no bytecode into the version, as nobody would have signed it."""
    root = tmp_path / "models"
    root.mkdir()
    sources = {"model.py": tmp_path / "model.py", "helper.py": tmp_path / "helper.py"}
    sources["model.py"].write_text("import helper\n" + SCALING_CODE)
    sources["helper.py"].write_text("")
    publish(root, "code", sources, parse_config(PYTHON, where="config.pbtxt"), {"precision": "fp32"})
    sign_version(root, "code", 1, key)
    policy = RolloutOptions(signed_by=(key.with_suffix(".pub"),))
    with running_server(ServerOptions(str(root), auto_complete=False)) as server:
        for _ in range(2):
            assert deploy(root, "code", 1, server.grpc_url, options=policy).ready == (1,)
    assert server_options(ServeOptions(root, signed_by=policy.signed_by)).load == ("code",)


def test_serve_refuses_a_model_by_name_that_nobody_signed(
    attacked: tuple[Path, dict[str, str], Path], key: Path
) -> None:
    root, models, _ = attacked
    with pytest.raises(RepositoryError, match="is not signed"):
        server_options(
            ServeOptions(root, load=(models["exchanged without a signature"],), signed_by=(key.with_suffix(".pub"),))
        )
