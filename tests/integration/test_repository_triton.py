"""A real tritonserver loads, serves and switches between published versions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from support import onnx_models
from support.waiting import eventually

from repo_manager.errors import ServerError
from repo_manager.onnx_model.batch_axis import find_batch_axis
from repo_manager.onnx_model.inputs import natural_inputs
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import signature_of
from repo_manager.repository.configuration import change_config, set_served_versions
from repo_manager.repository.publish import PublishedVersion, publish
from repo_manager.repository.remove import remove
from repo_manager.repository.verify import verify
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.triton_config.compare import ReloadEffect
from repo_manager.triton_config.derive import derive_config
from repo_manager.triton_config.options import ConfigOptions
from repo_manager.triton_config.served_signature import served_signature
from repo_manager.types import Backend

pytestmark = pytest.mark.integration

Arrays = dict[str, NDArray[Any]]
FLOAT, INT64, BOOL, STRING, HALF = (
    TensorProto.FLOAT,
    TensorProto.INT64,
    TensorProto.BOOL,
    TensorProto.STRING,
    TensorProto.FLOAT16,
)


def value(name: str, dtype: int, shape: tuple[Any, ...] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    initializers: tuple[onnx.TensorProto, ...] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], **attributes)


W = numpy_helper.from_array(np.arange(20, dtype=np.float32).reshape(4, 5) / 10, "w")

MODELS: dict[str, onnx.ModelProto] = {
    "batched": model(
        [node("Relu", ["x"], "y")], [value("x", FLOAT, ("N", 3, None))], [value("y", FLOAT, ("N", 3, None))]
    ),
    "narrowed": model(
        [node("MatMul", ["x", "w"], "y")], [value("x", FLOAT, ("N", 4))], [value("y", FLOAT, ("N", None))], (W,)
    ),
    "fixed": model([node("Relu", ["x"], "y")], [value("x", FLOAT, (1, 3))], [value("y", FLOAT, (1, 3))]),
    "per_sample_scalar": model([node("Neg", ["x"], "y")], [value("x", FLOAT, ("N",))], [value("y", FLOAT, ("N",))]),
    "scalar": model([node("Neg", ["x"], "y")], [value("x", FLOAT, ())], [value("y", FLOAT, ())]),
    "half": model([node("Neg", ["x"], "y")], [value("x", HALF, ("N", 2))], [value("y", HALF, ("N", 2))]),
    "flags": model([node("Not", ["x"], "y")], [value("x", BOOL, ("N", 2))], [value("y", BOOL, ("N", 2))]),
    "strings": model([node("Identity", ["x"], "y")], [value("x", STRING, ("N", 2))], [value("y", STRING, ("N", 2))]),
    "two_types": model(
        [node("Cast", ["i"], "c", to=FLOAT), node("Add", ["c", "x"], "y"), node("Abs", ["i"], "j")],
        [value("x", FLOAT, ("N", 4)), value("i", INT64, ("N", 4))],
        [value("y", FLOAT, ("N", 4)), value("j", INT64, ("N", 4))],
    ),
    "odd.names-1": model(
        [node("Neg", ['in:0 "q"/é'], "out:0")],
        [value('in:0 "q"/é', FLOAT, ("N", 2))],
        [value("out:0", FLOAT, ("N", 2))],
    ),
    **{f"folded_{name}": proto for name, proto in onnx_models.folded().items()},
}


def put(repository: Path, name: str, proto: onnx.ModelProto, work: Path, **options: Any) -> PublishedVersion:
    path = work / f"{name}.onnx"
    onnx.save(proto, path)
    loaded = load_model(path)
    signature = served_signature(signature_of(loaded), path)
    config = derive_config(
        name, signature, find_batch_axis(loaded, signature), Backend.ONNXRUNTIME, ConfigOptions(**options)
    )
    return publish(repository, name, {config.model_filename: path}, config, {"precision": "fp32"})


def as_sent(inputs: Arrays) -> Arrays:
    """A scalar travels as [1]."""
    return {name: array.reshape(1) if array.ndim == 0 else array for name, array in inputs.items()}


@pytest.fixture(scope="module")
def published(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PublishedVersion]:
    work = tmp_path_factory.mktemp("work")
    shapes = {"batched": {"x": (3, 5)}, "folded_reshape": {"x": (3, 8)}, "folded_lstm_state": {"x": (5, 4)}}
    return {
        name: put(repository, name, proto, work, warmup=True, warmup_shapes=shapes.get(name, {}))
        for name, proto in MODELS.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_loads_warms_up_and_answers(
    name: str, published: dict[str, PublishedVersion], client: TritonClient
) -> None:
    version = published[name]
    assert verify(version.repository, name) == ()
    client.load(name)
    model_file = version.path / "model.onnx"
    batch = 2 if "max_batch_size: 8" in version.manifest.config else None
    inputs = natural_inputs(signature_of(load_model(model_file)), batch=batch, seed=3)
    expected = Session(model_file).run(inputs)
    sent = as_sent(inputs)
    if name == "per_sample_scalar":
        sent = {"x": sent["x"].reshape(-1, 1)}
    found = client.infer(name, 1, sent)
    assert set(found) == set(expected)
    for output, array in expected.items():
        got = found[output]
        if array.dtype == object:
            assert [v.decode() if isinstance(v, bytes) else v for v in got.ravel()] == list(array.ravel())
        else:
            np.testing.assert_array_equal(got.reshape(array.shape), array)
            assert got.dtype == array.dtype


def test_a_new_version_is_not_served_until_the_policy_says_so(
    repository: Path, client: TritonClient, tmp_path: Path
) -> None:
    def affine(factor: float) -> onnx.ModelProto:
        factors = (numpy_helper.from_array(np.array([factor], np.float32), "f"),)
        return model(
            [node("Mul", ["x", "f"], "y")], [value("x", FLOAT, ("N", 2))], [value("y", FLOAT, ("N", 2))], factors
        )

    def ready() -> list[int]:
        return sorted(number for number, entry in client.versions("switch").items() if entry.state == "READY")

    x = np.ones((1, 2), np.float32)
    put(repository, "switch", affine(1), tmp_path)
    client.load("switch")
    assert put(repository, "switch", affine(2), tmp_path).version == 2
    client.load("switch")
    assert ready() == [1]
    assert set_served_versions(repository, "switch", (1, 2)) == (1,)
    client.load("switch")
    assert ready() == [1, 2]
    np.testing.assert_array_equal(client.infer("switch", 2, {"x": x})["y"], 2 * x)
    assert set_served_versions(repository, "switch", (1,)) == (1, 2)
    client.load("switch")
    assert ready() == [1]
    np.testing.assert_array_equal(client.infer("switch", 1, {"x": x})["y"], x)


@pytest.mark.parametrize(
    ("field", "value", "effect"),
    [
        ("version_policy.specific.versions", "[1, 2]", ReloadEffect.KEEP),
        ("instance_group.count", "2", ReloadEffect.KEEP),
        ("max_batch_size", "8", ReloadEffect.NOTHING),
        ("dynamic_batching.max_queue_delay_microseconds", "100", ReloadEffect.RELOAD),
        ("parameters.intra_op_thread_count", "1", ReloadEffect.RELOAD),
    ],
)
def test_a_configuration_change_has_the_effect_that_was_predicted(
    field: str, value: str, effect: ReloadEffect, repository: Path, client: TritonClient, tmp_path: Path
) -> None:
    name = f"change_{field.partition('.')[0]}"
    for _ in range(2):
        put(repository, name, MODELS["batched"], tmp_path)
    client.load(name)
    client.infer(name, 1, {"x": np.ones((1, 3, 2), np.float32)})
    assert eventually(lambda: client.statistics(name, 1)[0].inference_count == 1)
    change = change_config(repository, name, {field: value})
    assert change.effect == effect
    client.load(name)
    kept = client.statistics(name, 1)[0].inference_count  # A version loaded again counts from 0.
    assert kept == (0 if effect == ReloadEffect.RELOAD else 1)


def test_publishing_and_removing_beside_a_served_version_does_not_reload_it(
    repository: Path, client: TritonClient, tmp_path: Path
) -> None:
    put(repository, "steady", MODELS["batched"], tmp_path)
    client.load("steady")
    client.infer("steady", 1, {"x": np.ones((1, 3, 2), np.float32)})
    assert eventually(lambda: client.statistics("steady", 1)[0].inference_count == 1)
    put(repository, "steady", MODELS["batched"], tmp_path)
    client.load("steady")
    remove(repository, "steady", 2)
    client.load("steady")
    assert client.statistics("steady", 1)[0].inference_count == 1


def test_labels_reach_the_server(repository: Path, client: TritonClient, tmp_path: Path) -> None:
    put(repository, "labelled", MODELS["narrowed"], tmp_path, labels={"y": tuple("abcde")}, threads=1)
    client.load("labelled")
    config: Any = client.model_config("labelled")
    assert "labels_0_y.txt" in str(config)
    assert "intra_op_thread_count" in str(config)


def test_our_files_in_the_root_do_not_disturb_a_start_with_all_models(
    tmp_path: Path, start_server: Callable[[ServerOptions], EmbeddedServer]
) -> None:
    root = tmp_path / "models"
    put(root, "fixed", MODELS["fixed"], tmp_path)
    server = start_server(ServerOptions(repository=str(root), load=("*",)))
    with TritonClient.connect(server.grpc_url) as client:
        assert [entry.name for entry in client.repository_index()] == ["fixed"]


@pytest.mark.parametrize(
    ("folder", "loads"), [("2.tmp", False), ("02", True), (".old", True), ("+2", False), ("9" * 20, False)]
)
def test_triton_reads_version_folders_as_verify_says(
    folder: str,
    loads: bool,
    tmp_path: Path,
    start_server: Callable[[ServerOptions], EmbeddedServer],
) -> None:
    root = tmp_path / "models"
    put(root, "fixed", MODELS["fixed"], tmp_path)
    config = root / "fixed/config.pbtxt"
    config.write_text(config.read_text().replace("specific {\n    versions: [1]\n  }", "all {\n  }"))
    (root / "fixed" / folder).mkdir()
    errors = [problem for problem in verify(root) if problem.severity == "error"]
    assert bool(errors) != loads
    server = start_server(ServerOptions(repository=str(root)))
    with TritonClient.connect(server.grpc_url) as client:
        if loads:
            client.load("fixed")
        else:
            with pytest.raises(ServerError):
                client.load("fixed")
