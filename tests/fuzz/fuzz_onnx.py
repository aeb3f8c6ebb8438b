"""Feed broken ONNX files to all their readers.

    python tests/fuzz/fuzz_onnx.py --cases 20000 [--models DIR] [--run] [--only SEED]

Each case mutates one model (tests/support/mutate_onnx.py) and loads, describes, judges and prunes it; `--run`
also runs it by ONNX Runtime. Anything but success or a one-message ModelError is a finding: another exception,
a dead process, more than 10 s, more than 2 GiB, or a file written. Exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import mutate_onnx, onnx_models

from repo_manager.errors import ModelError
from repo_manager.onnx_model.batch_axis import find_batch_axis
from repo_manager.onnx_model.model import load_model, parameter_count
from repo_manager.onnx_model.signature import signature_of
from repo_manager.sparsity import prune, sparsity_report

LIMIT_S = 10
LIMIT_BYTES = 2 << 30
ADDRESS_BYTES = 12 << 30
BATCH = 200


def seeds_of_models(folder: Path | None) -> list[bytes]:
    """The models to mutate: our tiny ones, those in `folder`, and those that onnx ships."""
    built = [
        onnx_models.mlp(),
        onnx_models.cnn(),
        onnx_models.lstm_with_state(),
        onnx_models.embedding(),
        onnx_models.zoo(),
    ]
    found = [proto.SerializeToString() for proto in built]
    import onnx

    light = Path(onnx.__file__).parent / "backend/test/data/light"
    paths = [*sorted(light.glob("*.onnx")), *(sorted(folder.rglob("*.onnx")) if folder else [])]
    return found + [path.read_bytes() for path in paths if path.stat().st_size < 8 << 20]


def check(path: Path, run: bool) -> str:
    """Put one file through; return the outcome's kind. Anything unexpected raises."""
    try:
        model = load_model(path)
        signature = signature_of(model)
        parameter_count(model)
        sparsity_report(model)
        proto, _ = prune(model, all_valid=True)
        del proto
        if run:
            find_batch_axis(model, signature)
    except ModelError as exc:
        if "\n" in exc.message or len(exc.message) > 2000 or not exc.message:
            raise AssertionError(f"message is not one short line: {exc.message[:300]!r}") from exc
        return "refused"
    return "accepted"


def on_alarm(*_: object) -> None:
    raise TimeoutError("hang")


def worker(first: int, count: int, folder: Path | None, run: bool) -> None:
    """Run cases in this process; a line of JSON for each finding, and a progress line before each case."""
    models = seeds_of_models(folder)
    signal.signal(signal.SIGALRM, on_alarm)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))  # a finding must not take the machine down
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "home"
        home.mkdir()
        os.chdir(home)
        path = home / "model.onnx"
        for seed in range(first, first + count):
            name, data = mutate_onnx.mutate(models[seed % len(models)], seed)
            path.write_bytes(data)
            print(json.dumps({"case": seed, "what": name}), flush=True)
            started = time.monotonic()
            signal.alarm(LIMIT_S * 3)
            try:
                outcomes[check(path, run)] += 1
            except BaseException as exc:  # noqa: BLE001  # finding them all is this script's purpose
                outcomes["finding"] += 1
                frames = traceback.format_exc().splitlines()[-6:]
                print(
                    json.dumps({"finding": repr(exc)[:500], "case": seed, "what": name, "frames": frames}), flush=True
                )
            signal.alarm(0)
            took = time.monotonic() - started
            files = sorted(entry.name for entry in home.iterdir())
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if took > LIMIT_S or peak > LIMIT_BYTES or files != ["model.onnx"]:
                finding = {
                    "finding": f"{took:.1f} s, peak {peak >> 20} MiB, files {files}",
                    "case": seed,
                    "what": name,
                }
                print(json.dumps(finding), flush=True)
                if peak > LIMIT_BYTES:
                    break
    print(
        json.dumps({"done": dict(outcomes), "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}),
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--only", type=int)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.first, options.worker, options.models, options.run)
        return 0
    first, cases = (options.only, 1) if options.only is not None else (options.first, options.cases)
    totals: collections.Counter[str] = collections.Counter()
    findings = 0
    peak = 0
    position = first
    while position < first + cases:
        count = min(BATCH, first + cases - position)
        command = [sys.executable, __file__, "--first", str(position), "--worker", str(count)]
        command += ["--models", str(options.models)] if options.models else []
        command += ["--run"] if options.run else []
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        last: dict[str, object] = {}
        finished = False
        for line in result.stdout.splitlines():
            record = json.loads(line)
            if "finding" in record:
                findings += 1
                print(json.dumps(record, indent=1), flush=True)
            elif "done" in record:
                finished = True
                totals.update(record["done"])
                peak = max(peak, record["peak_mib"])
            else:
                last = record
        position += count
        if not finished:
            findings += 1
            print(f"DEAD: exit {result.returncode} at {last}: {result.stderr[-300:]}", flush=True)
            position = int(str(last.get("case", position))) + 1
    print(f"{dict(totals)}; findings: {findings}; peak {peak} MiB")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
