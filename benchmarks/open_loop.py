"""An open-loop gRPC client in a process of its own, for benchmarks/rollout.py.

One request is due every `1 / rate` seconds, whatever the answers do, and its latency counts from its due time. The
process is separate, so the roll-outs' Python and the client's do not share one interpreter lock.

Run as a script it sends until its standard input ends:  python benchmarks/open_loop.py URL MODEL RATE OUT.npz
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import tritonclient.grpc as triton

_DRAIN_S = 20.0
Samples = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True)
class Seen:
    """The clients' view.

    Attributes:
        due_s: when each answered request was due, on the monotonic clock; shape `[N]`.
        latency_s: from there to its answer; shape `[N]`.
        sent: requests sent, the failed ones included.
        errors: one text for each failed request.
    """

    due_s: Samples
    latency_s: Samples
    sent: int
    errors: tuple[str, ...]

    def p99_ms(self, wanted: Any) -> float:
        """Return the 99th percentile of the chosen requests' latencies, in milliseconds; NaN for none."""
        chosen = self.latency_s[wanted]
        return float(np.percentile(chosen, 99)) * 1e3 if chosen.size else float("nan")

    def worst_ms(self, wanted: Any) -> float:
        """Return the largest of the chosen requests' latencies, in milliseconds; 0 for none."""
        return float(self.latency_s[wanted].max(initial=0.0)) * 1e3


class OpenLoop:
    """Clients that send `rate_per_s` together while this context is open. Then `seen` holds their answers."""

    def __init__(self, url: str, model: str, rate_per_s: float, *, clients: int) -> None:
        self.seen = Seen(np.empty(0), np.empty(0), 0, ())
        self._command = [sys.executable, __file__, url.removeprefix("grpc://"), model, str(rate_per_s / clients)]
        self._clients = clients
        self._folder = tempfile.TemporaryDirectory()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> OpenLoop:
        for number in range(self._clients):
            command = [*self._command, str(Path(self._folder.name) / f"{number}.npz")]
            self._processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        for process in self._processes:
            assert process.stdout is not None
            process.stdout.readline()  # its first answer is there
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.communicate()
        if kind is None:
            files = [np.load(path) for path in sorted(Path(self._folder.name).glob("*.npz"))]
            if len(files) != self._clients:
                raise SystemExit("a load client ended without a result")
            self.seen = Seen(
                np.concatenate([file["due_s"] for file in files]),
                np.concatenate([file["latency_s"] for file in files]),
                sum(int(file["sent"]) for file in files),
                tuple(str(text) for file in files for text in file["errors"]),
            )
        self._folder.cleanup()


def send(address: str, model: str, rate_per_s: float, out: Path) -> None:
    """Send until standard input ends, and write the results."""
    image = triton.InferInput("image", [1, 1, 8, 8], "FP32")
    image.set_data_from_numpy(np.zeros((1, 1, 8, 8), np.float32))
    answered: list[tuple[float, float]] = []
    errors: list[str] = []

    def taker(due: float) -> Any:
        def take(result: object, error: object) -> None:
            if error is None:
                answered.append((due, time.monotonic() - due))
            else:
                errors.append(str(error))

        return take

    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    with triton.InferenceServerClient(address) as client:
        client.infer(model, [image])
        print("sending", flush=True)
        began, sent = time.monotonic(), 0
        while not stop.is_set():
            due = began + sent / rate_per_s
            pause = due - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            client.async_infer(model, [image], callback=taker(due), client_timeout=30.0)
            sent += 1
        deadline = time.monotonic() + _DRAIN_S
        while len(answered) + len(errors) < sent and time.monotonic() < deadline:
            time.sleep(0.01)
    errors += ["no answer"] * (sent - len(answered) - len(errors))
    pairs = np.array(answered, np.float64).reshape(-1, 2)
    np.savez(out, due_s=pairs[:, 0], latency_s=pairs[:, 1], sent=sent, errors=np.array(errors, np.str_))


if __name__ == "__main__":
    send(sys.argv[1], sys.argv[2], float(sys.argv[3]), Path(sys.argv[4]))
