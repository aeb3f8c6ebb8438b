"""Python-backend models of every kind Triton serves, written into a repository for tests.

With several versions, each answer contains the version's number, so a test sees which one answered.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

__all__ = ["KINDS", "PythonModel", "write_python_model"]

_HEAD = """import json
import numpy as np
import triton_python_backend_utils as pb


def read(request, name):
    found = pb.get_input_tensor_by_name(request, name)
    return None if found is None else found.as_numpy()


def respond(**outputs):
    return pb.InferenceResponse([pb.Tensor(name, array) for name, array in outputs.items()])


class TritonPythonModel:
    def initialize(self, args):
        self.sums = {}

    def execute(self, requests):
        return [self.answer(request) for request in requests]

"""


@dataclasses.dataclass(frozen=True)
class PythonModel:
    """A model of the Python backend, or an ensemble.

    Attributes:
        config: its config.pbtxt.
        code: methods of `TritonPythonModel`, `VERSION` standing for the version's number; empty for an ensemble.
    """

    config: str
    code: str = ""


def write_python_model(
    repository: Path, name: str, *, kind: str | None = None, versions: tuple[int, ...] = (1,), extra: str = ""
) -> Path:
    """Write a model's folder; return it.

    Args:
        repository: the root.
        name: the model's name.
        kind: which of `KINDS`; `None`: the one of that name.
        versions: its versions.
        extra: appended to config.pbtxt.
    """
    model, folder = KINDS[kind or name], repository / name
    for version in versions:
        (folder / str(version)).mkdir(parents=True, exist_ok=True)
        if model.code:
            code = _HEAD + model.code.replace("VERSION", str(version))
            (folder / str(version) / "model.py").write_text(code, encoding="utf-8")
    (folder / "config.pbtxt").write_text(model.config + extra, encoding="utf-8")
    return folder


KINDS: dict[str, PythonModel] = {
    # Sums the values of a sequence, times the version.
    "acc": PythonModel(
        """backend: "python"
max_batch_size: 4
input [{ name: "X" data_type: TYPE_INT32 dims: [1] }]
output [{ name: "SUM" data_type: TYPE_INT32 dims: [1] }]
sequence_batching {
  max_sequence_idle_microseconds: 5000000
  control_input [
    { name: "START" control [{ kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] }] },
    { name: "READY" control [{ kind: CONTROL_SEQUENCE_READY int32_false_true: [0, 1] }] },
    { name: "CORRID" control [{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 }] }
  ]
  oldest { max_candidate_sequences: 4 }
}
""",
        """    def answer(self, request):
        id = int(read(request, "CORRID").reshape(-1)[0])
        if read(request, "START").reshape(-1)[0]:
            self.sums[id] = 0
        self.sums[id] += int(read(request, "X").reshape(-1)[0]) * VERSION
        return respond(SUM=np.array([[self.sums[id]]], np.int32))
""",
    ),
    # Answers with one response per value, each times the version.
    "repeat": PythonModel(
        """backend: "python"
max_batch_size: 0
input [{ name: "IN" data_type: TYPE_INT32 dims: [-1] }]
output [{ name: "OUT" data_type: TYPE_INT32 dims: [1] }]
model_transaction_policy { decoupled: true }
""",
        """    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            for value in read(request, "IN"):
                sender.send(respond(OUT=np.array([value * VERSION], np.int32)))
            sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
""",
    ),
    # Answers with n - 1, ..., 0, one response each time Triton schedules the request.
    "iterative": PythonModel(
        """backend: "python"
max_batch_size: 0
input [{ name: "IN" data_type: TYPE_INT32 dims: [1] }]
output [{ name: "OUT" data_type: TYPE_INT32 dims: [1] }]
model_transaction_policy { decoupled: true }
sequence_batching { iterative_sequence: true }
instance_group [{ kind: KIND_CPU }]
""",
        """    def execute(self, requests):
        for request in requests:
            id = request.correlation_id()
            left = self.sums[id] = self.sums.get(id, int(read(request, "IN")[0])) - 1
            ends = left <= 0
            if ends:
                del self.sums[id]
            else:
                request.set_release_flags(pb.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
            flags = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if ends else 0
            request.get_response_sender().send(respond(OUT=np.array([left], np.int32)), flags=flags)
""",
    ),
    "upper": PythonModel(
        """backend: "python"
max_batch_size: 8
input [{ name: "TEXT" data_type: TYPE_STRING dims: [1] }]
output [{ name: "UPPER" data_type: TYPE_STRING dims: [1] }]
""",
        """    def answer(self, request):
        rows = [[item.upper() for item in row] for row in read(request, "TEXT")]
        return respond(UPPER=np.array(rows, dtype=object))
""",
    ),
    "opt": PythonModel(
        """backend: "python"
max_batch_size: 8
input [
  { name: "A" data_type: TYPE_FP32 dims: [2] },
  { name: "B" data_type: TYPE_FP32 dims: [2] optional: true }
]
output [{ name: "Y" data_type: TYPE_FP32 dims: [2] }]
""",
        """    def answer(self, request):
        a, b = read(request, "A"), read(request, "B")
        return respond(Y=(a * 2 if b is None else a + b).astype(np.float32))
""",
    ),
    # Refuses anything but a JSON object, so every made-up request.
    "strict": PythonModel(
        """backend: "python"
max_batch_size: 0
input [{ name: "JSON" data_type: TYPE_STRING dims: [1] }]
output [{ name: "KEYS" data_type: TYPE_INT32 dims: [1] }]
""",
        """    def answer(self, request):
        return respond(KEYS=np.array([len(json.loads(read(request, "JSON")[0]).keys())], np.int32))
""",
    ),
    # Takes only the size of its warm-up sample.
    "warm": PythonModel(
        """backend: "python"
max_batch_size: 4
input [{ name: "X" data_type: TYPE_FP32 dims: [-1] }]
output [{ name: "Y" data_type: TYPE_FP32 dims: [-1] }]
model_warmup [{
  name: "w" batch_size: 2
  inputs { key: "X" value { data_type: TYPE_FP32 dims: [3] zero_data: true } }
}]
""",
        """    def answer(self, request):
        x = read(request, "X")
        if x.shape[-1] != 3:
            raise ValueError("expected 3 values")
        return respond(Y=x * 2)
""",
    ),
    "scale": PythonModel(
        """backend: "python"
max_batch_size: 8
input [{ name: "X" data_type: TYPE_FP32 dims: [2] }]
output [{ name: "Y" data_type: TYPE_FP32 dims: [2] }]
""",
        """    def answer(self, request):
        return respond(Y=read(request, "X") * VERSION)
""",
    ),
    "plus_one": PythonModel(
        """backend: "python"
max_batch_size: 8
input [{ name: "P" data_type: TYPE_FP32 dims: [1, 2] reshape: { shape: [2] } }]
output [{ name: "Q" data_type: TYPE_FP32 dims: [1, 2] reshape: { shape: [2] } }]
""",
        """    def answer(self, request):
        return respond(Q=read(request, "P") + 1)
""",
    ),
    # `scale`, then `opt`, which doubles.
    "ens": PythonModel(
        """platform: "ensemble"
max_batch_size: 8
input [{ name: "IN" data_type: TYPE_FP32 dims: [2] }]
output [{ name: "OUT" data_type: TYPE_FP32 dims: [2] }]
ensemble_scheduling { step [
  {
    model_name: "scale" model_version: -1
    input_map { key: "X" value: "IN" } output_map { key: "Y" value: "mid" }
  },
  {
    model_name: "opt" model_version: -1
    input_map { key: "A" value: "mid" } output_map { key: "Y" value: "OUT" }
  }
] }
"""
    ),
    # Asks `scale` from its own code, and adds a half.
    "bls": PythonModel(
        """backend: "python"
max_batch_size: 0
input [{ name: "X" data_type: TYPE_FP32 dims: [1, 2] }]
output [{ name: "Y" data_type: TYPE_FP32 dims: [1, 2] }]
parameters [{ key: "uses" value: { string_value: "scale" } }]
""",
        """    def answer(self, request):
        inner = pb.InferenceRequest(
            model_name="scale", requested_output_names=["Y"], inputs=[pb.get_input_tensor_by_name(request, "X")]
        ).exec()
        if inner.has_error():
            raise pb.TritonModelException(inner.error().message())
        return respond(Y=pb.get_output_tensor_by_name(inner, "Y").as_numpy() + 0.5)
""",
    ),
}
