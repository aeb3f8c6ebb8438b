"""A model that never ends is ended by a signal."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

_RUN = """
import sys
import numpy as np
from repo_manager.onnx_model.session import Session
session = Session(sys.argv[1])
print("runs", flush=True)
session.run({"x": np.zeros(1, np.float32)})
"""


def _endless(path: Path) -> None:
    body = onnx.parser.parse_graph(
        "body (int64 i, bool c, float[1] a) => (bool d, float[1] b) { d = Identity(c) b = Add(a, a) }"
    )
    often = onnx.numpy_helper.from_array(np.array(2**62), "often")
    true = onnx.numpy_helper.from_array(np.array(True), "true")
    node = onnx.helper.make_node("Loop", ["often", "true", "x"], ["y"], body=body)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [1])], [value("y", 1, [1])], initializer=[often, true])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_model_that_never_ends(number: signal.Signals, tmp_path: Path) -> None:
    _endless(tmp_path / "model.onnx")
    begin = "import signal; signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
    command = [sys.executable, "-c", begin + _RUN, str(tmp_path / "model.onnx")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "runs\n"
        with pytest.raises(subprocess.TimeoutExpired):  # the run does not end by itself
            process.wait(0.5)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
