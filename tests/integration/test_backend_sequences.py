"""Sequences, states and ragged batches in the embedded onnxruntime backend, as the native backend serves them."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.grpc as grpc
from onnx import TensorProto, helper
from support.serving import onnx_model, write_model
from support.waiting import eventually

from repo_manager.repository.verify import verify
from repo_manager.rollout.deploy import deploy
from repo_manager.server.client import TritonClient
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.triton_config.problems import Severity

pytestmark = pytest.mark.integration

AUTO_COMPLETE = False
F32, N = TensorProto.FLOAT, helper.make_node
IO = (
    'backend: "onnxruntime"\nmax_batch_size: 4\ninstance_group { count: 1 kind: KIND_CPU }\n'
    'input { name: "x" data_type: TYPE_FP32 dims: 1 }\noutput { name: "y" data_type: TYPE_FP32 dims: 1 }\n'
)
OLDEST = "oldest { max_candidate_sequences: 4 max_queue_delay_microseconds: 100000 }"
STATE = 'state { input_name: "s" output_name: "t" data_type: TYPE_FP32 dims: 1 %s }'
INITIAL = 'initial_state { name: "i" data_type: TYPE_FP32 dims: 1 %s }'


def control(name: str, kind: str, values: str = "fp32_false_true: [ 0, 1 ]") -> str:
    return f'control_input {{ name: "{name}" control {{ kind: CONTROL_SEQUENCE_{kind} {values} }} }}'


@pytest.fixture
def serve(repository: Path, client: TritonClient) -> Iterator[Callable[..., str]]:
    """Write a model, load it, return its name; unloaded afterwards."""
    names: list[str] = []

    def write_and_load(name: str, config: str, model: onnx.ModelProto) -> str:
        write_model(repository, name, config, {1: model})
        names.append(name)
        client.load(name)
        return name

    yield write_and_load
    for name in names:
        client.unload(name)


class Caller:
    """Requests of sequences."""

    def __init__(self, server: EmbeddedServer) -> None:
        self._client = grpc.InferenceServerClient(server.grpc_url.removeprefix("grpc://"))

    def ask(self, name: str, values: Any, sequence: int | str = 0, where: str = "", names: Any = ("x", "y")) -> Any:
        """Send one request; `where` is "start", "end" or nothing."""
        array = np.array(values, np.float32)
        array = array if array.ndim == 2 else array.reshape(1, -1)
        source, *outputs = names
        given = grpc.InferInput(source, array.shape, "FP32")
        given.set_data_from_numpy(array)
        answer = self._client.infer(
            name,
            [given],
            outputs=[grpc.InferRequestedOutput(each) for each in outputs],
            sequence_id=sequence,
            sequence_start="start" in where,
            sequence_end="end" in where,
        )
        found = [answer.as_numpy(each) for each in outputs]
        return found[0] if len(found) == 1 else found


@pytest.fixture
def caller(server: EmbeddedServer) -> Caller:
    return Caller(server)


def test_controls_are_fed_to_the_model(serve: Callable[..., str], caller: Caller) -> None:
    """y = 1000 id + 100 start + 10 end + x, all zero for an empty slot."""
    tensors = ("x", "start", "end", "ready", "id")
    nodes = [
        N("Cast", ["id"], ["fid"], to=F32),
        N("Sum", ["x", *(["start"] * 100), *(["end"] * 10), *(["fid"] * 1000)], ["sum"]),
        N("Mul", ["sum", "ready"], ["y"]),
    ]
    kinds = dict.fromkeys(tensors, F32) | {"id": TensorProto.INT32}
    model = onnx_model(nodes, {name: (kinds[name], ["N", 1]) for name in tensors}, {"y": (F32, ["N", 1])})
    batching = " ".join(
        [
            control("start", "START"),
            control("end", "END"),
            control("ready", "READY"),
            control("id", "CORRID", "data_type: TYPE_INT32"),
        ]
    )
    name = serve("controls", IO + f"sequence_batching {{ {batching} }}\n", model)
    assert caller.ask(name, 1, 7, "start") == 7101
    assert caller.ask(name, 2, 7) == 7002
    assert caller.ask(name, 3, 7, "end") == 7013


def accumulator() -> onnx.ModelProto:
    """y = t = x + s."""
    return onnx_model(
        [N("Add", ["x", "s"], ["y"]), N("Identity", ["y"], ["t"])],
        {"x": (F32, ["N", 1]), "s": (F32, ["N", 1])},
        {"y": (F32, ["N", 1]), "t": (F32, ["N", 1])},
    )


@pytest.mark.parametrize("strategy", ["direct {}", OLDEST])
def test_a_state_lasts_from_start_to_end(serve: Callable[..., str], caller: Caller, strategy: str) -> None:
    name = serve("state", IO + f"sequence_batching {{ {strategy} {STATE % ''} }}\n", accumulator())
    assert [caller.ask(name, value, 5, where).item() for value, where in ((1, "start"), (2, ""), (3, ""))] == [1, 3, 6]
    assert caller.ask(name, 10, 6, "start") == 10
    assert caller.ask(name, 4, 5, "end") == 10
    assert caller.ask(name, 1, 6) == 11
    assert caller.ask(name, 1, 5, "start") == 1  # nothing is left of the ended sequence
    assert caller.ask(name, 2, 6, "start end") == 2  # nor of one that starts anew
    assert caller.ask(name, 2, 5, "end") == 3
    with pytest.raises(Exception, match="must specify the START flag"):
        caller.ask(name, 2, 5)


def test_sequences_in_one_batch_keep_their_own_states(
    serve: Callable[..., str], server: EmbeddedServer, client: TritonClient
) -> None:
    name = serve("together", IO + f"sequence_batching {{ {OLDEST} {STATE % ''} }}\n", accumulator())

    def sequence(number: int) -> list[float]:
        caller = Caller(server)
        steps = ["start", "", "", "", "end"]
        return [caller.ask(name, number, number, where).item() for where in steps]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(sequence, (1, 2, 3, 4)))
    assert found == [[number * count for count in (1, 2, 3, 4, 5)] for number in (1, 2, 3, 4)]
    # Triton counts a request after it has sent the answer.
    assert eventually(lambda: client.statistics(name)[0].inference_count == 20)
    assert client.statistics(name)[0].execution_count < 20  # some were joined


@pytest.mark.parametrize(("data", "first"), [("zero_data: true", 1.0), ('data_file: "seven"', 8.0)])
def test_the_initial_state_is_where_a_sequence_starts(
    serve: Callable[..., str], repository: Path, caller: Caller, data: str, first: float
) -> None:
    name = f"initial_{int(first)}"
    (repository / name / "initial_state").mkdir(parents=True)
    (repository / name / "initial_state" / "seven").write_bytes(np.array([7], np.float32).tobytes())
    serve(name, IO + f"sequence_batching {{ {OLDEST} {STATE % (INITIAL % data)} }}\n", accumulator())
    for _ in range(2):
        assert caller.ask(name, 1, 3, "start") == first
        assert caller.ask(name, 1, 3, "end") == first + 1


RAGGED = (
    'backend: "onnxruntime"\nmax_batch_size: 4\ninstance_group { count: 1 kind: KIND_CPU }\n'
    'input { name: "x" data_type: TYPE_FP32 dims: -1 allow_ragged_batch: true }\n'
    "dynamic_batching { max_queue_delay_microseconds: 300000 preferred_batch_size: 4 }\n"
)


def batch_input(kind: str, target: str) -> str:
    return f'batch_input {{ kind: {kind} target_name: "{target}" data_type: TYPE_FP32 source_input: "x" }}\n'


def ragged_model() -> onnx.ModelProto:
    """Every request sees the whole batch: y = all of x, c = all counts, b = the other batch inputs, a row each."""
    nodes = [
        N("Div", ["count", "count"], ["ones"]),
        N("Unsqueeze", ["ones", "one"], ["column"]),
        *(
            node
            for source, made in (("x", "y"), ("count", "c"), ("told", "b"))
            for node in (
                N("Unsqueeze", [source, "zero"], [f"{source}_row"]),
                N("MatMul", ["column", f"{source}_row"], [made]),
            )
        ),
    ]
    return onnx_model(
        nodes,
        {"x": (F32, ["L"]), "count": (F32, ["B"]), "told": (F32, ["M"])},
        {name: (F32, ["B", f"{name}_size"]) for name in ("y", "c", "b")},
        {"zero": np.array([0], np.int64), "one": np.array([1], np.int64)},
    )


@pytest.mark.parametrize(
    "kind",
    [
        "BATCH_ACCUMULATED_ELEMENT_COUNT",
        "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO",
        "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE",
        "BATCH_ITEM_SHAPE_FLATTEN",
    ],
)
def test_ragged_requests_are_one_run(serve: Callable[..., str], server: EmbeddedServer, kind: str) -> None:
    outputs = "".join(f'output {{ name: "{name}" data_type: TYPE_FP32 dims: -1 }}\n' for name in ("y", "c", "b"))
    made = batch_input("BATCH_ELEMENT_COUNT", "count") + batch_input(kind, "told")
    name = serve(f"ragged_{kind.lower()}", RAGGED + outputs + made, ragged_model())
    requests = [[1.0, 2.0], [3.0], [4.0, 5.0, 6.0], [7.0]]

    def ask(values: list[float]) -> Any:
        return Caller(server).ask(name, values, names=("x", "y", "c", "b"))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, requests))
    for values, (y, c, b) in zip(requests, answers, strict=True):
        counts = [int(count) for count in c[0]]
        assert y.shape == (1, sum(counts))
        position = [start for start in range(y.shape[1]) if list(y[0][start : start + len(values)]) == values]
        assert position, (values, y)
        expected = {
            "BATCH_ACCUMULATED_ELEMENT_COUNT": list(np.cumsum(counts)),
            "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO": [0, *np.cumsum(counts)],
            "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE": [0] * max(counts),
            "BATCH_ITEM_SHAPE_FLATTEN": counts,
        }[kind]
        if kind == "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE":
            assert b.shape == (1, max(counts))  # only the shape is promised
        else:
            assert list(b[0]) == expected
    assert any(len(answer[1][0]) > 1 for answer in answers)  # requests did meet


def test_a_ragged_model_is_verified_and_deployed(
    serve: Callable[..., str], repository: Path, client: TritonClient
) -> None:
    outputs = "".join(f'output {{ name: "{name}" data_type: TYPE_FP32 dims: -1 }}\n' for name in ("y", "c", "b"))
    made = batch_input("BATCH_ELEMENT_COUNT", "count") + batch_input("BATCH_ACCUMULATED_ELEMENT_COUNT", "told")
    name = serve("ragged_deployed", RAGGED + outputs + made, ragged_model())
    client.unload(name)
    assert [each for each in verify(repository, name) if each.severity is Severity.ERROR] == []
    (server,) = deploy(repository, name, 1, client).servers
    assert server.smoke is not None
    assert server.smoke.reference == "none"  # ONNX Runtime alone does not join requests


def test_a_scattered_output_has_the_shape_of_its_request(serve: Callable[..., str], server: EmbeddedServer) -> None:
    model = onnx_model([N("Neg", ["x"], ["y"])], {"x": (F32, ["L"])}, {"y": (F32, ["L"])})
    output = 'output { name: "y" data_type: TYPE_FP32 dims: -1 }\n'
    scatter = 'batch_output { target_name: "y" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "x" }\n'
    name = serve("scattered", RAGGED + output + scatter, model)
    requests = [[[1.0, 2.0]], [[3.0]], [[4.0, 5.0, 6.0]], [[7.0], [8.0]]]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda values: Caller(server).ask(name, values), requests))
    for values, answer in zip(requests, answers, strict=True):
        np.testing.assert_array_equal(answer, -np.array(values, np.float32))


def test_an_item_shape_is_told_for_every_item(serve: Callable[..., str], caller: Caller) -> None:
    model = onnx_model(
        [N("Identity", ["told"], ["y"]), N("ReduceSum", ["x"], ["unused"])],
        {"x": (F32, ["L"]), "told": (F32, ["B", 1])},
        {"y": (F32, ["B", 1])},
    )
    config = RAGGED + 'output { name: "y" data_type: TYPE_FP32 dims: 1 }\n' + batch_input("BATCH_ITEM_SHAPE", "told")
    name = serve("item_shape", config, model)
    np.testing.assert_array_equal(caller.ask(name, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), [[3], [3]])
