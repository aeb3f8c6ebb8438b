"""Load on a served model for teams with Locust: inputs are made up from the server's description of the model.

    MODEL=digits locust -f locustfile.py --host http://localhost:8000 --headless -u 16 -r 16 -t 1m

Locust builds and reads each request in Python, so it reaches its own limit long before `repo-manager loadtest`, and its
latencies hold its own waiting. Use it for scenarios with other calls beside models, not for a server's limit.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
from locust import FastHttpUser, between, events, task

MODEL = os.environ.get("MODEL", "")
VERSION = os.environ.get("VERSION", "")
BATCH = int(os.environ.get("BATCH", "1"))
THINK_TIME_S = float(os.environ.get("THINK_TIME_S", "0"))
_DTYPES = {
    "BOOL": np.bool_,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    **{f"{sign}INT{bits}": np.dtype(f"{sign.lower()}int{bits}") for sign in ("", "U") for bits in (8, 16, 32, 64)},
}


@events.test_start.add_listener
def check(environment: Any, **_: Any) -> None:
    """Stop before the first request when no model was named."""
    if not MODEL:
        environment.process_exit_code = 2
        raise SystemExit("Name the model: MODEL=digits locust ...")


def body_of(metadata: dict[str, Any], batch: int) -> tuple[bytes, int]:
    """Return a request's body by the binary extension of the KServe protocol, and the size of its JSON part.

    Args:
        metadata: `GET /v2/models/NAME`.
        batch: taken for each dynamic axis, the batch axis among them.
    """
    rng = np.random.default_rng(0)
    inputs, parts = [], []
    for entry in metadata["inputs"]:
        shape = [batch if size < 0 else size for size in entry["shape"]]
        array = (rng.random(shape) * 2).astype(_DTYPES[entry["datatype"]])
        parts.append(array.tobytes())
        inputs.append(
            {
                "name": entry["name"],
                "shape": shape,
                "datatype": entry["datatype"],
                "parameters": {"binary_data_size": len(parts[-1])},
            }
        )
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    return head + b"".join(parts), len(head)


class ModelUser(FastHttpUser):
    """One client, inferring again and again."""

    wait_time = between(THINK_TIME_S, THINK_TIME_S)

    def on_start(self) -> None:
        """Ask the server for the model's inputs."""
        path = f"/v2/models/{MODEL}" + (f"/versions/{VERSION}" if VERSION else "")
        answer = self.client.get(path, name="metadata")
        self._body, size = body_of(answer.json(), BATCH)
        self._path = f"{path}/infer"
        self._headers = {"Inference-Header-Content-Length": str(size), "Content-Type": "application/octet-stream"}

    @task
    def infer(self) -> None:
        """Send one inference; anything but 200 counts as an error."""
        self.client.post(self._path, data=self._body, headers=self._headers, name=f"infer {MODEL}")
