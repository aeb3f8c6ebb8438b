"""With `signed_by`, a server loads the checked files, whatever is written to the repository afterwards."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.serving import running_server, scaling_model

from repo_manager.errors import RepositoryError, RolloutUndoneError
from repo_manager.pipeline.recording import EmbeddedRun, embedded_run
from repo_manager.pipeline.serve_options import ServeOptions
from repo_manager.pipeline.serving import sealed_options
from repo_manager.repository.publish import publish
from repo_manager.repository.sealed_repository import SealedRepository
from repo_manager.repository.signing import sign_version
from repo_manager.rollout import observe
from repo_manager.rollout.deploy import deploy
from repo_manager.rollout.options import RolloutOptions
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.guard import StubGuard, stubs_of
from repo_manager.triton_config.config import parse_config
from repo_manager.tuning.result import TuneOptions
from repo_manager.tuning.run import tuning_run
from repo_manager.tuning.scratch import CANDIDATE

pytestmark = [pytest.mark.integration, pytest.mark.slow]

CONFIG = """backend: "onnxruntime" max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }
"""
PYTHON = CONFIG.replace("onnxruntime", "python")
ENSEMBLE = """platform: "ensemble" max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }
ensemble_scheduling {
  step { model_name: "code" model_version: -1
    input_map { key: "x" value: "x" } output_map { key: "y" value: "z" } }
  step { model_name: "graph" model_version: -1
    input_map { key: "x" value: "z" } output_map { key: "y" value: "y" } }
}
"""
CODE = """
import os
import helper
import triton_python_backend_utils as utils
class TritonPythonModel:
    def initialize(self, args):
        folder = os.path.join(args["model_repository"], args["model_version"])
        self.factor = float(open(os.path.join(folder, "factor.txt")).read())
    def execute(self, requests):
        x = [utils.get_input_tensor_by_name(each, "x").as_numpy() for each in requests]
        return [utils.InferenceResponse([utils.Tensor("y", helper.scaled(each, self.factor))]) for each in x]
"""
HELPER = "def scaled(x, factor): return x * factor\n"


class Signed:
    """A repository with every version signed, its server, and the output of an attacker's code."""

    def __init__(self, base: Path) -> None:
        self.base, self.root, self.marker = base, base / "models", base / "marker"
        self.root.mkdir()
        made, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
        self.key = base / "key.pem"
        self.key.write_bytes(
            made.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        )
        public = made.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        self.key.with_suffix(".pub").write_bytes(public)
        self.evil = f"open({str(self.marker)!r}, 'a').write(__file__)\n"
        self.url = ""
        self.guard: StubGuard | None = None
        self.stubs: Callable[[], list[int]] = list

    def exchange_all(self) -> None:
        """Exchange the code of every version, and add code beside the versions."""
        for code in self.root.glob("*/[0-9]*/helper.py"):
            code.write_text(self.evil + HELPER)
        for config in self.root.glob("*/config.pbtxt"):
            (config.parent / "model.py").write_text(self.evil)

    def put_back(self) -> None:
        """Undo `exchange_all`."""
        for code in self.root.glob("*/[0-9]*/helper.py"):
            code.write_text(HELPER)
        for code in self.root.glob("*/model.py"):
            code.unlink()

    def publish(self, name: str, config: str, files: dict[str, bytes], *, sign: bool = True) -> int:
        source = self.base / "source"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        for file, content in files.items():
            (source / file).write_bytes(content)
        places = {file: source / file for file in files}
        made = publish(self.root, name, places, parse_config(config, where="config.pbtxt"), {"precision": "fp32"})
        if sign:
            sign_version(self.root, name, made.version, self.key)
        return made.version

    def code(self, name: str, factor: float, *, sign: bool = True) -> int:
        text = {"model.py": CODE, "helper.py": HELPER, "factor.txt": str(factor)}
        return self.publish(name, PYTHON, {file: each.encode() for file, each in text.items()}, sign=sign)

    def graph(self, name: str, factor: float) -> int:
        return self.publish(name, CONFIG, {"model.onnx": scaling_model(factor).SerializeToString()})

    @property
    def keys(self) -> tuple[Path, ...]:
        return (self.key.with_suffix(".pub"),)

    def deploy(self, name: str, version: int, *, keep_previous: bool = False, policy: bool = True) -> tuple[int, ...]:
        options = RolloutOptions(signed_by=self.keys if policy else (), keep_previous=keep_previous)
        return deploy(self.root, name, version, self.url, options=options).ready

    def answer(self, name: str, version: int | None = None) -> float:
        with TritonClient.connect(self.url) as client:
            answer = client.infer(name, version, {"x": np.ones((1, 4), np.float32)})
            return float(answer["y"][0, 0])


@pytest.fixture
def signed(tmp_path: Path) -> Iterator[Signed]:
    made = Signed(tmp_path)
    with running_server(ServerOptions(str(made.root), auto_complete=False)) as server:
        made.url = server.grpc_url
        yield made


def _other_backend(signed: Signed, folder: Path) -> None:
    config = folder / "config.pbtxt"
    config.write_text(config.read_text().replace("onnxruntime", "python"))
    (folder / "1" / "model.py").write_text(signed.evil + CODE)


def _renamed(signed: Signed, folder: Path) -> None:
    other = signed.base / "other"
    shutil.copytree(folder / "1", other)
    (other / "model.py").write_text(signed.evil + CODE)
    (folder / "1").rename(signed.base / "away")
    other.rename(folder / "1")


EXCHANGES: dict[str, tuple[str, Callable[[Signed, Path], object]]] = {
    "code written over": ("code", lambda s, f: (f / "1" / "model.py").write_text(s.evil + CODE)),
    "a module written over": ("code", lambda s, f: (f / "1" / "helper.py").write_text(s.evil + HELPER)),
    "a module added": ("code", lambda s, f: (f / "1" / "triton_python_backend_utils.py").write_text(s.evil)),
    "the folder exchanged": ("code", _renamed),
    "another backend for a graph": ("graph", _other_backend),
}


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Signed]:
    """A repository served under the policy: by its private copies. Everything is exchanged once they are made."""
    made = Signed(tmp_path)
    made.code("code", 2.0)
    made.graph("graph", 5.0)
    made.publish("both", ENSEMBLE, {"README.md": b"two steps"})
    made.code("unsigned", 2.0, sign=False)
    folder = tmp_path / "sealed"
    folder.mkdir(mode=0o700)
    sealed = SealedRepository.make(made.root, made.keys, folder)
    options = sealed_options(ServeOptions(made.root, load=("all",), signed_by=made.keys), sealed)
    assert set(options.load) == {"both", "code", "graph"}
    made.exchange_all()
    with running_server(options) as server:
        made.url = server.grpc_url
        made.guard = StubGuard(server.pid, server.http_url, server.client_options)
        made.stubs = lambda: [stub.pid for stub in stubs_of(server.pid)]
        yield made


@pytest.fixture
def exchange(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """Exchanges files just before the next load, after the data to send were read."""
    load, waiting = TritonClient.load, list[Callable[[], object]]()

    def load_late(client: TritonClient, name: str, *arguments: object, **options: object) -> None:
        if waiting:
            waiting.pop()()
        load(client, name, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(TritonClient, "load", load_late)
    return waiting


def test_what_is_exchanged_while_it_loads_never_runs(signed: Signed, exchange: list[Callable[[], object]]) -> None:
    for number, (kind, change) in enumerate(EXCHANGES.values()):
        name = f"m{number}"
        signed.code(name, 3.0) if kind == "code" else signed.graph(name, 3.0)
        exchange.append(functools.partial(change, signed, signed.root / name))
        with pytest.raises(RolloutUndoneError, match=r"does not hold|was changed between|by other code"):
            signed.deploy(name, 1)
        assert not exchange
        assert not signed.marker.exists()
    with TritonClient.connect(signed.url) as client:
        assert not client.statistics()
        client.load("m0")  # without the policy the exchanged code does run
    assert signed.marker.exists()


def test_signed_models_of_every_kind_are_deployed(signed: Signed) -> None:
    assert signed.deploy("code", signed.code("code", 2.0)) == (1,)
    assert signed.deploy("graph", signed.graph("graph", 5.0)) == (1,)
    assert (signed.answer("code"), signed.answer("graph")) == (2.0, 5.0)
    both = signed.publish("both", ENSEMBLE, {"README.md": b"two steps"})
    assert signed.deploy("both", both) == (1,)
    assert signed.answer("both") == 10.0
    # Both versions are served until the new one is proven, and here longer. Then one goes.
    assert signed.deploy("code", signed.code("code", 3.0), keep_previous=True) == (1, 2)
    assert (signed.answer("code", 1), signed.answer("code", 2), signed.answer("both")) == (2.0, 3.0, 15.0)
    config = signed.root / "code" / "config.pbtxt"
    config.write_text(config.read_text() + "instance_group { count: 2 kind: KIND_CPU }\n")
    assert signed.deploy("code", 2) == (2,)
    with TritonClient.connect(signed.url) as client:
        assert client.model_config("code").instance_group[0].count == 2
    assert (signed.answer("code"), signed.answer("both")) == (3.0, 15.0)


def test_an_unsigned_version_that_is_served_stays_as_it_is(
    signed: Signed, exchange: list[Callable[[], object]]
) -> None:
    signed.code("code", 2.0, sign=False)
    assert deploy(signed.root, "code", 1, signed.url).ready == (1,)
    code = signed.root / "code" / "1" / "model.py"
    exchange.append(lambda: code.write_text(signed.evil + CODE))
    assert signed.deploy("code", signed.code("code", 3.0), keep_previous=True) == (1, 2)
    assert not exchange
    assert (signed.answer("code", 1), signed.answer("code", 2)) == (2.0, 3.0)
    with pytest.raises(RepositoryError, match="is not signed"):
        signed.deploy("code", 1)
    assert not signed.marker.exists()


def test_large_versions_are_loaded_from_the_folder_only_as_data(
    signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "_MOST_SENT_BYTES", 200)
    assert signed.deploy("graph", signed.graph("graph", 5.0)) == (1,)
    assert signed.answer("graph") == 5.0
    with pytest.raises(RolloutUndoneError, match="the most that a load can bring along"):
        signed.deploy("code", signed.code("code", 2.0))


def test_external_data_goes_along(signed: Signed) -> None:
    model = scaling_model(4.0)
    source = signed.base / "external"
    source.mkdir()
    onnx.save(model, source / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    assert "weights.bin" in files
    assert signed.deploy("graph", signed.publish("graph", CONFIG, files)) == (1,)
    assert signed.answer("graph") == 4.0


def test_a_server_under_the_policy_never_reads_the_repository(
    sealed: Signed, exchange: list[Callable[[], object]]
) -> None:
    assert (sealed.answer("code"), sealed.answer("graph"), sealed.answer("both")) == (2.0, 5.0, 10.0)
    with pytest.raises(RepositoryError, match="was not confirmed, and nothing was changed"):
        sealed.deploy("code", 1)
    sealed.put_back()
    assert sealed.code("code", 3.0) == 2
    # An exchange after the copy has no effect, neither on the load nor when a dead process is replaced.
    exchange.append(sealed.exchange_all)
    with pytest.raises(RolloutUndoneError, match=r"does not hold|was changed between"):
        sealed.deploy("code", 2)
    assert (sealed.answer("code"), sealed.answer("both")) == (2.0, 10.0)
    assert sealed.guard is not None
    for pid in sealed.stubs():
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while "code" not in sealed.guard.check():
        assert time.monotonic() < deadline
    assert (sealed.answer("code"), sealed.answer("both")) == (2.0, 10.0)
    sealed.put_back()
    # The server's own policy applies to a command without one.
    with pytest.raises(RolloutUndoneError, match="is not signed"):
        sealed.deploy("unsigned", 1, policy=False)
    assert sealed.deploy("code", 2, policy=False, keep_previous=True) == (1, 2)
    assert (sealed.answer("code", 1), sealed.answer("code", 2), sealed.answer("both")) == (2.0, 3.0, 15.0)
    assert sealed.deploy("code", 2) == (2,)
    assert sealed.deploy("both", sealed.publish("both", ENSEMBLE, {"README.md": b"again"})) == (2,)
    assert sealed.answer("both") == 15.0
    assert not sealed.marker.exists()


def test_models_that_are_measured_or_tried_are_copied_first(
    tmp_path: Path, exchange: list[Callable[[], object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = Signed(tmp_path)
    signed.code("code", 2.0)
    signed.graph("graph", 5.0)
    exchange.append(signed.exchange_all)
    with tuning_run(signed.root, {"code": 1}, TuneOptions(rate=10.0, signed_by=signed.keys)) as run:
        run.loads.copies.load(CANDIDATE, {})
    assert not exchange
    signed.put_back()
    # The same for the parts of an ensemble tried before it is published.
    exchange.append(signed.exchange_all)
    monkeypatch.setenv("REPO_MANAGER_SIGNED_BY", str(signed.keys[0]))
    (tmp_path / "README.md").write_text("two steps")
    ensemble = ("both", {"README.md": tmp_path / "README.md"}, parse_config(ENSEMBLE, where="config.pbtxt"))
    needs = {"code": None, "graph": None}
    with embedded_run(*ensemble, repository=signed.root, needs=needs) as run:
        assert isinstance(run, EmbeddedRun)
    assert not exchange
    with (
        pytest.raises(RepositoryError, match="does not hold"),
        embedded_run(*ensemble, repository=signed.root, needs=needs),
    ):
        pass
    assert not signed.marker.exists()
