"""`tune` against the exhaustive grid of the same settings, and beside Triton Model Analyzer.

    python benchmarks/tune.py --out DIR [--models NAME ...] [--runs 10] [--budget 300] [--analyzer PATH] [--quick]

Five models, made here: a tiny MLP, a CNN of about a millisecond, a CNN of about twenty, one whose single request gains
from threads, and one that gains from instances only (a long chain of small products). Each is published with one
instance, batches of at most 4 and no queue delay, which is right for none of them. The grid measures the largest rate
that holds the limit for every setting of the space; its best is the truth. The bars, for each model:

- a run of `tune` reaches 95 % of the truth (its setting's value in the grid against the grid's best) in at most 15 %
  of the grid's time, in at least nine of ten runs;
- started from the best, `tune` changes nothing in at least 19 of 20 runs (`--kept 20`);
- beside Model Analyzer (`--analyzer`, the path of `model-analyzer` in an environment of its own) in one run: at least
  its objective in at most a third of its time. What it chooses is measured as a setting of the grid is.

Everything that was measured is in DIR, a line each; the same command goes on where it was stopped, and prints the
bars with their spread. A busy machine makes all of it worthless: run it alone. `--quick` is two models, a coarse space
and two runs: about five minutes, to see that it works.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import repo_manager as rm
from repo_manager.loadtest.perf_analyzer.drive import find_perf_analyzer
from repo_manager.repository.configuration import change_config
from repo_manager.server.backend_directory import assemble
from repo_manager.server.command import environment_of
from repo_manager.server.installation import find_triton
from repo_manager.triton_config.config import read_config
from repo_manager.tuning.result import TuneOptions, TuneProgress
from repo_manager.tuning.run import tune, tuning_run
from repo_manager.tuning.space import AXES, Setting, setting_of

TRUTH_SHARE, TIME_SHARE = 0.95, 0.15
RUNS_SHARE, KEPT_SHARE = 0.9, 0.95
ANALYZER_TIME_SHARE = 1 / 3
QUICK_MODELS, QUICK_AXES = ("mlp", "instances"), ("max_batch_size", "instances")


def _model(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], shape: list[object], last: str
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def chain(width: int, depth: int) -> onnx.ModelProto:
    """Make a chain of matrix products: too small for threads, too long for one core."""
    draw, nodes, weights, last = np.random.default_rng(0), [], {}, "x"
    for layer in range(depth):
        weights[f"w{layer}"] = (draw.standard_normal((width, width)) / width**0.5).astype(np.float32)
        nodes += [
            helper.make_node("MatMul", [last, f"w{layer}"], [f"m{layer}"]),
            helper.make_node("Relu", [f"m{layer}"], [f"r{layer}"]),
        ]
        last = f"r{layer}"
    return _model(nodes, weights, [width], last)


def cnn(channels: int, depth: int, size: int) -> onnx.ModelProto:
    """Make a chain of 3x3 convolutions, with a mean over the image at its end."""
    draw, nodes, weights, last, before = np.random.default_rng(0), [], {}, "x", 3
    for layer in range(depth):
        scale = (before * 9) ** 0.5
        weights[f"w{layer}"] = (draw.standard_normal((channels, before, 3, 3)) / scale).astype(np.float32)
        nodes += [
            helper.make_node("Conv", [last, f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]),
        ]
        last, before = f"r{layer}", channels
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["y"]))
    return _model(nodes, weights, [3, size, size], "y")


MODELS: dict[str, tuple[Callable[[], onnx.ModelProto], float]] = {
    "mlp": (lambda: chain(64, 2), 10),
    "cnn_1ms": (lambda: cnn(16, 3, 32), 20),
    "cnn_20ms": (lambda: cnn(32, 5, 96), 300),
    "threads": (lambda: cnn(64, 3, 64), 200),
    "instances": (lambda: chain(48, 300), 40),
}
"""Name -> how it is made, and the limit of its p99 in milliseconds."""


class Record:
    """A file of JSON lines: what is in it is not measured again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        self._lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def lines(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return the lines with these values."""
        return [line for line in self._lines if all(line.get(key) == value for key, value in wanted.items())]

    def once(self, measure: Callable[[], Mapping[str, Any]], **key: Any) -> dict[str, Any]:
        """Return the line of a key; measure and write it first where there is none."""
        known = self.lines(**key)
        if known:
            return known[0]
        line = {**key, **measure()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._lines.append(line)
        print(json.dumps(line), flush=True)
        return line


class Bench:
    """The measurements of one model."""

    def __init__(self, name: str, chosen: argparse.Namespace, record: Record) -> None:
        self.name, self.record, self.chosen = name, record, chosen
        self.root = chosen.out / "models"
        self.make, self.limit_ms = MODELS[name]
        self.axes = QUICK_AXES if chosen.quick else AXES
        if not (self.root / name).is_dir():
            self.root.mkdir(parents=True, exist_ok=True)
            file = chosen.out / f"{name}.onnx"
            onnx.save(self.make(), file)
            config = rm.ConfigOptions(max_batch_size=4, instance_count=1)
            rm.add(file, name, self.root, rm.AddOptions(sparsity="report", config=config))

    def options(self) -> TuneOptions:
        """Return what is sought."""
        gate = rm.parse_slo(f"p99<{self.limit_ms:g}ms")
        return TuneOptions(gates=(gate,), budget_s=self.chosen.budget, search=self.axes, fresh=True)

    def grid(self) -> dict[str, dict[str, Any]]:
        """Measure every setting that is not in the record; return label -> its line."""
        curve = self.record.lines(kind="space", model=self.name)
        with tuning_run(self.root, {self.name: 1}, self.options()) as run:
            began = time.monotonic()
            if curve:
                settings = [_setting(fields) for fields in curve[0]["settings"]]
                run.loads.start_rate = curve[0]["start_rate"]
            else:
                settings = list(run.prepare()[self.name].settings())
                self.record.once(
                    lambda: {
                        "settings": [vars(setting) for setting in settings],
                        "start_rate": run.loads.start_rate,
                        "seconds": time.monotonic() - began,
                    },
                    kind="space",
                    model=self.name,
                )

            def measured(setting: Setting) -> dict[str, Any]:
                start = time.monotonic()
                trial = run.evaluate({self.name: setting}, None, 0.0)
                return {
                    "value": trial.value or 0.0,
                    "seconds": time.monotonic() - start,
                    "setting": vars(setting),
                    "reason": trial.reason,
                }

            return {
                setting.label: self.record.once(
                    lambda setting=setting: measured(setting),  # type: ignore[misc]
                    kind="grid",
                    model=self.name,
                    label=setting.label,
                )
                for setting in settings
            }

    def runs(self, number: int, kind: str = "run") -> list[dict[str, Any]]:
        """Tune so many times, as far as that is not in the record."""

        def tuned() -> dict[str, Any]:
            result = tune(self.root, {self.name: 1}, self.options(), progress=_say)
            return {
                "outcome": result.outcome,
                "label": result.best.label,
                "changes": {name: dict(changes) for name, changes in result.changes.items()},
                "seconds": result.seconds,
                "measured": len(result.trials),
            }

        return [self.record.once(tuned, kind=kind, model=self.name, run=run) for run in range(number)]

    def kept(self, best: Setting, number: int) -> list[dict[str, Any]]:
        """Make the best setting today's, tune, and put back what was there."""
        before = (self.root / self.name / "config.pbtxt").read_text(encoding="utf-8")
        changes = best.changes(Setting(1, 4, 0, None))
        try:
            change_config(self.root, self.name, changes)
            return self.runs(number, "kept")
        finally:
            (self.root / self.name / "config.pbtxt").write_text(before, encoding="utf-8")

    def analyzer(self, mode: str) -> dict[str, Any]:
        """Run Model Analyzer in one of its modes, and measure what it chooses as the grid is measured."""

        def measured() -> dict[str, Any]:
            began = time.monotonic()
            found = run_analyzer(self, mode)
            seconds = time.monotonic() - began
            if "setting" not in found:
                return {**found, "seconds": seconds}
            with tuning_run(self.root, {self.name: 1}, self.options()) as run:
                run.loads.start_rate = self.record.lines(kind="space", model=self.name)[0]["start_rate"]
                trial = run.evaluate({self.name: _setting(found["setting"])}, None, 0.0)
            return {**found, "value": trial.value or 0.0, "seconds": seconds}

        return self.record.once(measured, kind="analyzer", model=self.name, mode=mode)


def _setting(fields: Mapping[str, Any]) -> Setting:
    preferred = fields.get("preferred")
    return Setting(**{**fields, "preferred": None if preferred is None else tuple(preferred)})


def run_analyzer(bench: Bench, mode: str) -> dict[str, Any]:
    """Let Model Analyzer search, with the same tritonserver and perf_analyzer, on a repository of its own.

    Returns:
        `setting`, what it chose; or `failed`, the end of what it said.
    """
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        triton, perf = find_triton(), find_perf_analyzer()
        backends = assemble(triton)
        environment = {**os.environ, **environment_of({}, triton, backends)}
        libraries = [environment["LD_LIBRARY_PATH"], *([str(perf.libraries)] if perf.libraries is not None else [])]
        environment["LD_LIBRARY_PATH"] = ":".join(libraries)
        config = {
            "model_repository": str(bench.root),
            "profile_models": [bench.name],
            "triton_launch_mode": "local",
            "triton_server_path": str(triton.binary),
            "perf_analyzer_path": str(perf.binary),
            "output_model_repository_path": str(folder / "made"),
            "override_output_model_repository": True,
            "checkpoint_directory": str(folder / "checkpoints"),
            "export_path": str(folder / "results"),
            "run_config_search_mode": mode,
            "objectives": ["perf_throughput"],
            "constraints": {"perf_latency_p99": {"max": bench.limit_ms}},
            "triton_server_flags": {"backend-directory": str(backends.path)},
            "perf_analyzer_timeout": 120,
        }
        (folder / "config.json").write_text(json.dumps(config))  # JSON is YAML
        for place in ("checkpoints", "results"):
            (folder / place).mkdir()
        done = subprocess.run(
            [str(bench.chosen.analyzer), "profile", "-f", str(folder / "config.json")],
            capture_output=True,
            text=True,
            check=False,
            timeout=7200,
            env=environment,
        )
        chosen = _chosen(folder / "results", folder / "made") if done.returncode == 0 else None
        if chosen is None:
            return {"failed": (done.stdout + done.stderr)[-800:]}
        return {"setting": vars(chosen)}


def _chosen(results: Path, made: Path) -> Setting | None:
    """Return the configuration in the first row of its table, which is its best; `None` where there is none."""
    for path in results.rglob("*metrics-model-inference*.csv"):
        rows = [row for row in csv.reader(path.read_text().splitlines()) if row]
        if len(rows) > 1 and "Model Config Path" in rows[0]:
            name = rows[1][rows[0].index("Model Config Path")]
            return setting_of(read_config(made / name / "config.pbtxt"))
    return None


def report(bench: Bench, grid: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the bars of one model, each with its spread."""
    name, record = bench.name, bench.record
    best = max(line["value"] for line in grid.values())
    if not best:
        yield f"{name}: no setting of the grid holds p99<{bench.limit_ms:g}ms"
        return
    grid_s = sum(line["seconds"] for line in grid.values()) + record.lines(kind="space", model=name)[0]["seconds"]
    runs = record.lines(kind="run", model=name)
    reached = [grid.get(line["label"], {"value": 0.0})["value"] / best for line in runs]
    shares = [line["seconds"] / grid_s for line in runs]
    held = sum(one >= TRUTH_SHARE and share <= TIME_SHARE for one, share in zip(reached, shares, strict=True))
    if runs:
        yield (
            f"{name}: {len(grid)} settings in {grid_s:.0f} s, the best holds {best:.4g}/s; tune reaches "
            f"{_spread(reached)} of it in {_spread(shares)} of the time: {held} of {len(runs)} runs hold the bar "
            f"({TRUTH_SHARE:.0%} in {TIME_SHARE:.0%}, {RUNS_SHARE:.0%} of the runs): "
            f"{'held' if held >= RUNS_SHARE * len(runs) else 'MISSED'}"
        )
    kept = record.lines(kind="kept", model=name)
    if kept:
        same = sum(not line["changes"] for line in kept)
        verdict = "held" if same >= KEPT_SHARE * len(kept) else "MISSED"
        yield f"{name}: from the best, nothing changes in {same} of {len(kept)} runs: {verdict}"
    for line in record.lines(kind="analyzer", model=name):
        if "failed" in line:
            yield f"{name}: Model Analyzer ({line['mode']}) did not end well: {line['failed'][-200:]!r}"
        elif runs:
            share = statistics.median(run["seconds"] for run in runs) / line["seconds"]
            ours = statistics.median(reached) * best
            is_held = ours >= line["value"] and share <= ANALYZER_TIME_SHARE
            yield (
                f"{name}: Model Analyzer ({line['mode']}) chose one that holds {line['value']:.4g}/s in "
                f"{line['seconds']:.0f} s; tune's holds {ours:.4g}/s in {share:.0%} of that: "
                f"{'held' if is_held else 'MISSED'}"
            )


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1%} ({min(values):.1%} to {max(values):.1%})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where everything that was measured is kept")
    parser.add_argument("--models", nargs="*", choices=MODELS)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--kept", type=int, default=0, help="runs that begin with the best setting")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds a run of tune may take")
    parser.add_argument("--analyzer", type=Path, help="model-analyzer, to run beside it")
    parser.add_argument("--modes", nargs="*", default=["quick", "optuna"], help="of Model Analyzer")
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    chosen.out = chosen.out.resolve()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.quick:
        chosen.runs, chosen.budget = min(chosen.runs, 2), min(chosen.budget, 60.0)
    record, said = Record(chosen.out / "measured.jsonl"), []
    for name in chosen.models or (QUICK_MODELS if chosen.quick else MODELS):
        bench = Bench(name, chosen, record)
        grid = bench.grid()
        bench.runs(chosen.runs)
        if chosen.kept:
            best = max(grid.values(), key=lambda line: line["value"])
            bench.kept(_setting(best["setting"]), chosen.kept)
        for mode in chosen.modes if chosen.analyzer is not None else ():
            bench.analyzer(mode)
        said += report(bench, grid)
    print("\n".join(said))


def _say(told: TuneProgress) -> None:
    print(f"  tune: {told.text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
