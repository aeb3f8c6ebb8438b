"""The examples Triton's users start from, rebuilt: verify, deploy, infer the recorded sample, roll back.

`add_sub`, `bls_sync` and `repeat_int32` follow the examples of triton-inference-server/python_backend, `simple_string`
those of triton-inference-server/server (`docs/examples/model_repository`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from repo_manager.pipeline.infer import InferOptions, infer
from repo_manager.repository.adopt import adopt
from repo_manager.repository.golden import Exchange, Golden, write_golden
from repo_manager.repository.verify import verify
from repo_manager.rollout.deploy import deploy, rollback
from repo_manager.server.client import TritonClient
from repo_manager.server.embedded import EmbeddedServer

pytestmark = pytest.mark.integration
AUTO_COMPLETE = False
FIRST_SERVED = "version_policy: { specific: { versions: [1] } }\n"
HEAD = """import numpy as np
import triton_python_backend_utils as pb_utils


def array(request, name):
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()


def response(**outputs):
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(k, v) for k, v in outputs.items()])


class TritonPythonModel:
    def execute(self, requests):
"""
ADD_SUB = """        responses = []
        for request in requests:
            a, b = array(request, "INPUT0"), array(request, "INPUT1")
            responses.append(response(OUTPUT0=(a + b) * VERSION, OUTPUT1=(a - b) * VERSION))
        return responses
"""
BLS_SYNC = """        responses = []
        for request in requests:
            inner = pb_utils.InferenceRequest(
                model_name=array(request, "MODEL_NAME")[0].decode(),
                requested_output_names=["OUTPUT0", "OUTPUT1"],
                inputs=[pb_utils.get_input_tensor_by_name(request, name) for name in ("INPUT0", "INPUT1")],
            ).exec()
            if inner.has_error():
                raise pb_utils.TritonModelException(inner.error().message())
            found = {t.name(): t.as_numpy() * VERSION for t in inner.output_tensors()}
            responses.append(response(**found))
        return responses
"""
REPEAT = """        for request in requests:
            sender = request.get_response_sender()
            for index, value in enumerate(array(request, "IN")):
                outputs = {"OUT": np.array([value * VERSION], np.int32), "IDX": np.array([index], np.uint32)}
                sender.send(response(**outputs))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None
"""
STRING = """        responses = []
        for request in requests:
            a, b = (array(request, name).astype(np.int64) for name in ("INPUT0", "INPUT1"))
            found = {"OUTPUT0": (a + b) * VERSION, "OUTPUT1": (a - b) * VERSION}
            responses.append(response(**{k: v.astype(str).astype(object) for k, v in found.items()}))
        return responses
"""


def tensors(field: str, kind: str, dims: str, *names: str) -> str:
    return "".join(f'{field} [ {{ name: "{name}" data_type: TYPE_{kind} dims: [ {dims} ] }} ]\n' for name in names)


PAIR = tensors("output", "FP32", "4", "OUTPUT0", "OUTPUT1") + tensors("input", "FP32", "4", "INPUT0", "INPUT1")
CPU = "instance_group [ { kind: KIND_CPU } ]\n"
CONFIGS = {
    "add_sub": PAIR + CPU,
    "bls_sync": tensors("input", "STRING", "1", "MODEL_NAME") + PAIR + CPU
    + 'parameters: { key: "uses" value: { string_value: "add_sub" } }\n',
    "repeat_int32": tensors("input", "INT32", "-1", "IN") + tensors("output", "INT32", "1", "OUT")
    + tensors("output", "UINT32", "1", "IDX") + CPU + "model_transaction_policy { decoupled: True }\n",
    "simple_string": "max_batch_size: 8\n" + tensors("input", "STRING", "16", "INPUT0", "INPUT1")
    + tensors("output", "STRING", "16", "OUTPUT0", "OUTPUT1") + CPU,
}  # fmt: skip
CODE = {"add_sub": ADD_SUB, "bls_sync": BLS_SYNC, "repeat_int32": REPEAT, "simple_string": STRING}
A, B = np.array([1, 2, 3, 4], np.float32), np.array([0.5, 0.25, -1, 8], np.float32)
WORDS_A, WORDS_B = (np.array([[str(n * times).encode() for n in range(16)]], object) for times in (1, -3))


def strings(values: np.ndarray) -> np.ndarray:
    return np.array([[str(value).encode() for value in values]], object)


def exchange(name: str, version: int) -> Exchange:
    """Return the example's documented answer, times the version."""
    numbers = {"INPUT0": A, "INPUT1": B}
    answered: Mapping[str, np.ndarray] = {"OUTPUT0": (A + B) * version, "OUTPUT1": (A - B) * version}
    if name == "add_sub":
        return Exchange(numbers, (answered,))
    if name == "bls_sync":
        return Exchange({"MODEL_NAME": np.array([b"add_sub"], object), **numbers}, (answered,))
    if name == "repeat_int32":
        values = np.array([4, 2, 0, 1], np.int32)
        stream = [
            {"OUT": np.array([value * version], np.int32), "IDX": np.array([index], np.uint32)}
            for index, value in enumerate(values)
        ]
        return Exchange({"IN": values}, tuple(stream))
    n = np.arange(16)
    outputs = {"OUTPUT0": strings(-2 * n * version), "OUTPUT1": strings(4 * n * version)}
    return Exchange({"INPUT0": WORDS_A, "INPUT1": WORDS_B}, (outputs,))


@pytest.fixture(scope="module")
def examples(repository: Path) -> Path:
    for name, config in CONFIGS.items():
        for version in (1, 2):
            folder = repository / name / str(version)
            folder.mkdir(parents=True)
            (folder / "model.py").write_text(HEAD + CODE[name].replace("VERSION", str(version)))
            write_golden(folder / "golden.npz", Golden.of([exchange(name, version)]))
        (repository / name / "config.pbtxt").write_text(f'name: "{name}"\nbackend: "python"\n{config}{FIRST_SERVED}')
        adopt(repository, name)
    return repository


@pytest.fixture(scope="module")
def grpc(server: EmbeddedServer) -> Iterator[TritonClient]:
    with TritonClient.connect(server.grpc_url) as client:
        yield client


def test_the_examples_are_in_order(examples: Path) -> None:
    assert verify(examples) == ()


@pytest.mark.parametrize("name", ["bls_sync", "repeat_int32", "simple_string"])
def test_an_example_goes_through_its_life(
    examples: Path, grpc: TritonClient, server: EmbeddedServer, name: str
) -> None:
    def asked() -> list[bool]:
        found = infer(examples, name, None, server.grpc_url, InferOptions(golden=True))
        assert found.comparisons
        return [each.passed for each in found.comparisons]

    first = deploy(examples, name, 1, grpc)
    assert first.servers[0].smoke is not None
    assert first.servers[0].smoke.reference == "golden"
    assert all(asked())
    if name == "bls_sync":
        assert grpc.versions("add_sub")[1].state == "READY"
    assert deploy(examples, name, 2, grpc).ready == (2,)
    assert all(asked())
    assert rollback(examples, name, grpc).ready == (1,)
    assert all(asked())
