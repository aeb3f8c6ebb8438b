"""The Python-based onnxruntime backend, in a real tritonserver, against ONNX Runtime itself."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.serving import SCALING_CONFIG, onnx_model, scaling_model, write_model
from support.waiting import eventually

from repo_manager.errors import ServerRefusedError
from repo_manager.server.client import TritonClient
from repo_manager.server.embedded import EmbeddedServer

pytestmark = pytest.mark.integration
F32, I64 = TensorProto.FLOAT, TensorProto.INT64
BATCHING = 'backend: "onnxruntime"\nmax_batch_size: 8\ninstance_group { count: 1 kind: KIND_CPU }\n'
PLAIN = 'backend: "onnxruntime"\nmax_batch_size: 0\ninstance_group { count: 1 kind: KIND_CPU }\n'
# Long enough for requests sent at once to meet in one batch.
WAITING = "dynamic_batching { max_queue_delay_microseconds: 300000 preferred_batch_size: 8 }\n"


@pytest.fixture
def serve(repository: Path, client: TritonClient) -> Iterator[Callable[..., str]]:
    """Write a model, load it, return its name; unloaded afterwards."""
    names: list[str] = []

    def write_and_load(name: str, config: str | None, model: onnx.ModelProto | bytes) -> str:
        write_model(repository, name, config, {1: model})
        names.append(name)
        client.load(name)
        return name

    yield write_and_load
    for name in names:
        client.unload(name)


def at_once(server: EmbeddedServer, name: str, requests: list[dict[str, np.ndarray]]) -> list[Any]:
    """Send requests at the same time; return each one's outputs or its error."""
    with TritonClient.connect(server.grpc_url) as client:

        def one(inputs: dict[str, np.ndarray]) -> Any:
            try:
                return client.infer(name, 1, inputs)
            except ServerRefusedError as exc:
                return exc

        with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(one, requests))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (F32, np.float32),
        (TensorProto.DOUBLE, np.float64),
        (TensorProto.FLOAT16, np.float16),
        (TensorProto.INT8, np.int8),
        (TensorProto.UINT8, np.uint8),
        (TensorProto.INT16, np.int16),
        (TensorProto.UINT16, np.uint16),
        (TensorProto.INT32, np.int32),
        (TensorProto.UINT32, np.uint32),
        (I64, np.int64),
        (TensorProto.UINT64, np.uint64),
        (TensorProto.BOOL, np.bool_),
        (TensorProto.STRING, np.object_),
    ],
)
def test_every_type_passes_unchanged_and_needs_no_config(
    serve: Callable[..., str], both: Any, kind: int, dtype: type
) -> None:
    name = f"identity_{TensorProto.DataType.Name(kind).lower()}"
    graph = onnx_model([helper.make_node("Identity", ["x"], ["y"])], {"x": (kind, ["N", 3])}, {"y": (kind, ["N", 3])})
    serve(name, None, graph)
    if dtype is np.object_:
        values = np.array([["a", "", "ü€"], ["long " * 50, "c", "d"]], dtype=np.object_)
        got = both.infer(name, 1, {"x": values})["y"]
        assert [item.decode() for item in got.ravel()] == list(values.ravel())
        return
    values = np.array([[0, 1, 2], [3, 4, 100]]).astype(dtype)
    got = both.infer(name, 1, {"x": values})["y"]
    assert got.dtype == values.dtype
    np.testing.assert_array_equal(got, values)


def test_a_scalar_without_batches_is_served_with_one_axis(serve: Callable[..., str], both: Any) -> None:
    graph = onnx_model([helper.make_node("Add", ["x", "x"], ["y"])], {"x": (F32, [])}, {"y": (F32, [])})
    serve("scalar", None, graph)
    np.testing.assert_array_equal(both.infer("scalar", 1, {"x": np.array([4], np.float32)})["y"], [8])


def test_a_vector_of_scalars_is_batched_through_a_reshape(serve: Callable[..., str], both: Any) -> None:
    graph = onnx_model([helper.make_node("Add", ["x", "x"], ["y"])], {"x": (F32, ["N"])}, {"y": (F32, ["N"])})
    serve("vector", None, graph)
    got = both.infer("vector", 1, {"x": np.array([[1], [2]], np.float32)})["y"]
    np.testing.assert_array_equal(got, [[2], [4]])


def test_an_empty_axis(serve: Callable[..., str], both: Any) -> None:
    graph = onnx_model(
        [helper.make_node("Concat", ["x", "x"], ["y"], axis=1)], {"x": (F32, ["N", "M"])}, {"y": (F32, ["N", "K"])}
    )
    serve("empty", None, graph)
    assert both.infer("empty", 1, {"x": np.zeros((2, 0), np.float32)})["y"].shape == (2, 0)


def test_only_the_outputs_asked_for_are_returned(serve: Callable[..., str], both: Any) -> None:
    nodes = [helper.make_node("Neg", ["x"], ["a"]), helper.make_node("Abs", ["x"], ["b"])]
    graph = onnx_model(nodes, {"x": (F32, ["N", 2])}, {"a": (F32, ["N", 2]), "b": (F32, ["N", 2])})
    serve("two_outputs", None, graph)
    x = np.array([[-1, 2]], np.float32)
    assert list(both.infer("two_outputs", 1, {"x": x}, outputs=["b"])) == ["b"]
    both = both.infer("two_outputs", 1, {"x": x})
    np.testing.assert_array_equal(both["a"], -x)
    np.testing.assert_array_equal(both["b"], abs(x))


def test_an_optional_input_may_be_left_out(serve: Callable[..., str], both: Any) -> None:
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", F32, [2]), helper.make_tensor_value_info("w", F32, [2])],
        [helper.make_tensor_value_info("y", F32, [2])],
        [numpy_helper.from_array(np.array([2, 3], np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    config = (
        PLAIN + "input [{ name: 'x' data_type: TYPE_FP32 dims: 2 },"
        "{ name: 'w' data_type: TYPE_FP32 dims: 2 optional: true }]\n"
        "output { name: 'y' data_type: TYPE_FP32 dims: 2 }\n"
    )
    serve("optional", config, model)
    x = np.array([1, 1], np.float32)
    np.testing.assert_array_equal(both.infer("optional", 1, {"x": x})["y"], [2, 3])
    np.testing.assert_array_equal(both.infer("optional", 1, {"x": x, "w": x})["y"], [1, 1])


def test_requests_are_joined_into_one_run(
    serve: Callable[..., str], server: EmbeddedServer, client: TritonClient
) -> None:
    serve("joined", BATCHING + WAITING, scaling_model())
    requests = [{"x": np.full((rows, 4), rows, np.float32)} for rows in (1, 2, 1, 3, 1)]
    for request, outputs in zip(requests, at_once(server, "joined", requests), strict=True):
        np.testing.assert_array_equal(outputs["y"], 2 * request["x"])
    assert eventually(lambda: client.statistics("joined", 1)[0].inference_count >= 8)
    counters = client.statistics("joined", 1)[0]
    assert counters.inference_count == 8
    assert counters.execution_count == 1


def test_shapes_that_differ_in_one_batch_are_each_answered(serve: Callable[..., str], server: EmbeddedServer) -> None:
    graph = onnx_model([helper.make_node("Add", ["x", "x"], ["y"])], {"x": (F32, ["N", "M"])}, {"y": (F32, ["N", "M"])})
    ragged = "input { name: 'x' data_type: TYPE_FP32 dims: -1 }\noutput { name: 'y' data_type: TYPE_FP32 dims: -1 }\n"
    serve("shapes", BATCHING + WAITING + ragged, graph)
    requests = [{"x": np.full((1, width), width, np.float32)} for width in (2, 3, 2, 5, 3, 2, 1, 1)]
    for request, outputs in zip(requests, at_once(server, "shapes", requests), strict=True):
        np.testing.assert_array_equal(outputs["y"], 2 * request["x"])


def test_a_bad_request_fails_alone(serve: Callable[..., str], server: EmbeddedServer) -> None:
    table = np.arange(10, dtype=np.float32)
    graph = onnx_model(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        {"x": (I64, ["N", 1])},
        {"y": (F32, ["N", 1])},
        {"table": table},
    )
    serve("gather", BATCHING + WAITING, graph)
    indices = [1, 2, 99, 4, 5, 6, 7, 8]
    answers = at_once(server, "gather", [{"x": np.array([[index]])} for index in indices])
    for index, answer in zip(indices, answers, strict=True):
        if index == 99:
            assert isinstance(answer, ServerRefusedError)
            assert "indices element out of data bounds, idx=99" in str(answer)
        else:
            np.testing.assert_array_equal(answer["y"], [[index]])
    again = at_once(server, "gather", [{"x": np.array([[3]])}])
    np.testing.assert_array_equal(again[0]["y"], [[3]])


def test_answers_do_not_share_memory(serve: Callable[..., str], server: EmbeddedServer) -> None:
    """Buffers are kept between batches: an identity's output must not be a later batch's input."""
    graph = onnx_model([helper.make_node("Identity", ["x"], ["y"])], {"x": (F32, ["N", 4])}, {"y": (F32, ["N", 4])})
    serve("identity", BATCHING + "dynamic_batching { max_queue_delay_microseconds: 2000 }\n", graph)
    requests = [{"x": np.full((1, 4), number, np.float32)} for number in range(64)]
    for request, outputs in zip(requests, at_once(server, "identity", requests), strict=True):
        np.testing.assert_array_equal(outputs["y"], request["x"])


def test_a_kept_answer_never_holds_an_earlier_ones_values(
    serve: Callable[..., str], server: EmbeddedServer, both: Any
) -> None:
    """Tensors, responses and the memory of runs are filled again: by the third request of a kind at the latest."""
    serve("kept", BATCHING + "dynamic_batching { max_queue_delay_microseconds: 20000 }\n", scaling_model(width=600))
    # 1 to 8 rows of 2,400 bytes: some answers are too large to be kept, and all together are too many.
    for number in range(40):
        x = np.full((1 + number % 8, 600), number, np.float32)
        np.testing.assert_array_equal(both.infer("kept", 1, {"x": x})["y"], 2 * x)
    for number in range(4):
        for rows in ([1] * 8, [2] * 4, [1, 2, 1, 3, 1]):
            requests = [
                {"x": np.full((count, 600), 100 * number + place, np.float32)} for place, count in enumerate(rows)
            ]
            for request, outputs in zip(requests, at_once(server, "kept", requests), strict=True):
                np.testing.assert_array_equal(outputs["y"], 2 * request["x"])


@pytest.mark.parametrize(
    ("kind", "dtype"), [(TensorProto.BOOL, np.bool_), (TensorProto.FLOAT16, np.float16), (I64, np.int64)]
)
def test_kept_answers_of_several_outputs_are_those_asked_for(
    serve: Callable[..., str], both: Any, kind: int, dtype: type
) -> None:
    graph = onnx_model(
        [helper.make_node("Identity", ["x"], ["same"]), helper.make_node("Cast", ["x"], ["y"], to=F32)],
        {"x": (kind, ["N", 2])},
        {"same": (kind, ["N", 2]), "y": (F32, ["N", 2])},
    )
    name = serve(f"several_{TensorProto.DataType.Name(kind).lower()}", BATCHING, graph)
    for number in range(6):
        x = np.array([[number % 2, number // 2]]).astype(dtype)
        outputs = both.infer(name, 1, {"x": x}, outputs=["y"] if number % 3 == 2 else None)
        assert set(outputs) == ({"y"} if number % 3 == 2 else {"same", "y"})
        for values in outputs.values():
            np.testing.assert_array_equal(values, x)


def test_an_output_that_depends_on_the_values_keeps_its_true_shape(serve: Callable[..., str], both: Any) -> None:
    """The file declares `[1, 3]`, true only for inputs without zeros."""
    graph = onnx_model([helper.make_node("NonZero", ["x"], ["y"])], {"x": (F32, [3])}, {"y": (I64, [1, 3])})
    serve("nonzero", PLAIN, graph)
    for x in ([1, 1, 1], [2, 2, 2], [3, 3, 3], [0, 1, 1], [1, 1, 1], [1, 0, 0], [4, 5, 6]):
        found = both.infer("nonzero", 1, {"x": np.array(x, np.float32)})["y"]
        np.testing.assert_array_equal(found, [np.flatnonzero(x)])


def test_a_bad_value_after_good_ones_fails_alone(serve: Callable[..., str], client: TritonClient) -> None:
    graph = onnx_model(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        {"x": (I64, [1])},
        {"y": (F32, [1])},
        {"table": np.arange(10, dtype=np.float32)},
    )
    serve("gather_alone", PLAIN, graph)
    for index in (1, 2, 3, 99, 4, 5):
        if index == 99:
            with pytest.raises(ServerRefusedError, match="indices element out of data bounds, idx=99"):
                client.infer("gather_alone", 1, {"x": np.array([index])})
        else:
            np.testing.assert_array_equal(client.infer("gather_alone", 1, {"x": np.array([index])})["y"], [index])


def test_several_versions_and_instances(repository: Path, client: TritonClient, server: EmbeddedServer) -> None:
    config = SCALING_CONFIG.replace("count: 1", "count: 2") + "version_policy { all {} }\n"
    write_model(repository, "versions", config, {1: scaling_model(2.0), 3: scaling_model(3.0)})
    client.load("versions")
    x = np.ones((1, 4), np.float32)
    for version, factor in ((1, 2.0), (3, 3.0), (None, 3.0)):
        np.testing.assert_array_equal(client.infer("versions", version, {"x": x})["y"], factor * x)
    answers = at_once(server, "versions", [{"x": x}] * 16)
    assert all(np.array_equal(answer["y"], 2 * x) for answer in answers)


def test_external_data_and_another_file_name(repository: Path, client: TritonClient) -> None:
    folder = write_model(repository, "external", PLAIN + 'default_model_filename: "net.onnx"\n', {})
    (folder / "1").mkdir()
    weight = np.arange(4096, dtype=np.float32)
    graph = onnx_model(
        [helper.make_node("Add", ["x", "w"], ["y"])], {"x": (F32, [4096])}, {"y": (F32, [4096])}, {"w": weight}
    )
    onnx.save(graph, folder / "1" / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    client.load("external")
    np.testing.assert_array_equal(client.infer("external", 1, {"x": weight})["y"], 2 * weight)


def test_parameters_reach_onnx_runtime(serve: Callable[..., str], client: TritonClient) -> None:
    parameters = "".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
        for key, value in {
            "intra_op_thread_count": 1,
            "inter_op_thread_count": 2,
            "execution_mode": 1,
            "enable_mem_arena": "false",
            "session.disable_prepacking": 1,
        }.items()
    )
    serve("parameters", BATCHING + "optimization { graph { level: 1 } }\n" + parameters, scaling_model())
    x = np.ones((1, 4), np.float32)
    np.testing.assert_array_equal(client.infer("parameters", 1, {"x": x})["y"], 2 * x)


IO = "input {{ name: '{i}' data_type: {t} dims: {d} }}\noutput {{ name: '{o}' data_type: TYPE_FP32 dims: {e} }}\n"


@pytest.mark.parametrize(
    ("case", "config", "reason"),
    [
        ("input_name", BATCHING + IO.format(i="z", t="TYPE_FP32", d=4, o="y", e=4), "'z'.*allowed inputs are: x"),
        ("output_name", BATCHING + IO.format(i="x", t="TYPE_FP32", d=4, o="z", e=4), "'z'.*allowed outputs are: y"),
        (
            "type",
            BATCHING + IO.format(i="x", t="TYPE_INT64", d=4, o="y", e=4),
            "datatype TYPE_INT64.*provides TYPE_FP32",
        ),
        ("input_dims", BATCHING + IO.format(i="x", t="TYPE_FP32", d=5, o="y", e=4), r"\[-1,4\].*\[-1,5\]"),
        ("output_dims", BATCHING + IO.format(i="x", t="TYPE_FP32", d=4, o="y", e=9), r"\[-1,4\].*\[-1,9\]"),
        ("rank", PLAIN + IO.format(i="x", t="TYPE_FP32", d=4, o="y", e=4), "expects 2 dimensions .* specifies 1"),
        (
            "too_many",
            BATCHING
            + "input { name: 'z' data_type: TYPE_FP32 dims: 1 }"
            + IO.format(i="x", t="TYPE_FP32", d=4, o="y", e=4),
            "expects 2 inputs, model provides 1",
        ),
        (
            "threads",
            BATCHING + 'parameters { key: "intra_op_thread_count" value { string_value: "many" } }',
            "intra_op_thread_count is 'many', expected a whole number",
        ),
    ],
)
def test_a_config_that_contradicts_the_model_fails_the_load(
    serve: Callable[..., str], case: str, config: str, reason: str
) -> None:
    with pytest.raises(ServerRefusedError, match=f"(?s){reason}"):
        serve(f"wrong_{case}", config, scaling_model())


def test_batches_asked_of_a_model_without_batch_axis(serve: Callable[..., str]) -> None:
    graph = onnx_model([helper.make_node("Add", ["x", "x"], ["y"])], {"x": (F32, [1, 4])}, {"y": (F32, [1, 4])})
    with pytest.raises(ServerRefusedError, match="does not support batching"):
        serve("unbatched", BATCHING, graph)
    config = BATCHING + IO.format(i="x", t="TYPE_FP32", d=4, o="y", e=4)
    with pytest.raises(ServerRefusedError, match="first dimension must be -1"):
        serve("unbatched_config", config, graph)


@pytest.mark.parametrize("content", [b"", b"no model"], ids=["empty", "garbage"])
def test_a_broken_file_fails_the_load(serve: Callable[..., str], content: bytes) -> None:
    with pytest.raises(ServerRefusedError, match=r"model\.onnx failed"):
        serve(f"broken_{len(content)}", SCALING_CONFIG, content)


def test_a_missing_file_fails_the_load(repository: Path, client: TritonClient) -> None:
    folder = write_model(repository, "missing", SCALING_CONFIG, {})
    (folder / "1").mkdir()
    with pytest.raises(ServerRefusedError, match=r"unable to find .*model\.onnx"):
        client.load("missing")


def test_a_warm_up_sample_is_run_before_the_model_is_ready(serve: Callable[..., str], client: TritonClient) -> None:
    sample = 'inputs { key: "x" value { data_type: TYPE_FP32 dims: 4 zero_data: true } }'
    warm_up = f'model_warmup {{ name: "w" batch_size: 2 {sample} }}'
    serve("warm", SCALING_CONFIG + warm_up, scaling_model())
    assert client.model_ready("warm", 1)
