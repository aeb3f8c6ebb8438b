"""`tune` against the exhaustive grid of the same settings, and beside Triton Model Analyzer.

    python benchmarks/tune.py --out DIR [--models NAME ...] [--runs 10] [--budget S] [--sample N] [--minutes N]
        [--rounds N] [--kept N] [--analyzer PATH] [--quick]

Five models, made here: a tiny MLP, a CNN of about a millisecond, a CNN of about twenty, one whose single request gains
from threads, and one that gains from instances only (a long chain of small products). Each is published with one
instance, batches of at most 4 and no queue delay, which is right for none of them. The grid measures the largest rate
that holds the limit for every setting of the space. The largest of many noisy values is too large, and what a machine
does in one hour says little about the next. So the grid's best and each other setting that a run of `tune` chose are
served side by side afterwards, and run short blocks of load in turn, as in the race of `tune`, until `--rounds` of each
count. The ratio of their rates in these counts. The bars, for each model:

- a run of `tune` reaches 95 % of the grid's best in at most 15 % of the grid's time, in at least nine of ten runs.
  Without `--budget`, it gets this time, less what a server takes to end. A setting that it found and did not prove
  counts as today's, because that is what the user keeps;
- started from the best, `tune` changes nothing in at least 19 of 20 runs (`--kept 20`);
- beside Model Analyzer (`--analyzer`, the path of `model-analyzer` in an environment of its own) in one run: at least
  its objective in at most a third of its time. Its choice is measured like a setting of the grid.

With `--sample N` the grid is bounded: N random settings are measured to their end. Every other one is first compared
with the best so far, and measured further only if it holds more. Its best is that of the whole grid, and its time is
the number of settings times the mean of the sample.

Every measurement is a line of a file in DIR. The same command goes on where it was stopped, and prints the bars with
their spread. The models take turns, a run each, so that `--minutes` ends it with as many runs of each. A busy machine
makes all of it worthless: run it alone. `--quick` is two models, a coarse space and two runs: about five minutes, to
see that it works.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import json
import os
import random
import signal
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
from repo_manager.errors import ServerRefusedError
from repo_manager.loadtest.perf_analyzer.drive import find_perf_analyzer
from repo_manager.repository.configuration import change_config
from repo_manager.server.backend_directory import assemble
from repo_manager.server.command import environment_of, free_ports
from repo_manager.server.installation import find_triton
from repo_manager.triton_config.config import read_config
from repo_manager.tuning.race import side_of
from repo_manager.tuning.result import BETTER, TuneOptions, TuneProgress
from repo_manager.tuning.run import TuningRun, tune, tuning_run
from repo_manager.tuning.scratch import CANDIDATE
from repo_manager.tuning.search import MeasuredSetting
from repo_manager.tuning.space import AXES, Setting, setting_of

TRUTH_SHARE, TIME_SHARE = 0.95, 0.15
SPARE_S = 6.0  # for the end of tune's server
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
    "mlp": (lambda: chain(64, 2), 100),
    "cnn_1ms": (lambda: cnn(16, 3, 32), 100),
    "cnn_20ms": (lambda: cnn(32, 5, 96), 300),
    "threads": (lambda: cnn(64, 3, 64), 200),
    "instances": (lambda: chain(48, 300), 100),
}
"""Name -> how it is made, and the limit of its p99 in milliseconds.

Server and client share the cores here, and stop each other for tens of milliseconds at half of the largest rate. A
limit below these pauses measures the pauses: with 10 ms the same setting of the MLP held 6,250 to 8,500 requests a
second within minutes, with 100 ms 12,000 to 13,000.
"""


class TimeUpError(Exception):
    """The time for everything has passed."""


class Record:
    """A file of JSON lines: anything in it is not measured again.

    Args:
        path: the file.
        ends: moment of `time.monotonic` from which on nothing more is measured.
    """

    def __init__(self, path: Path, ends: float) -> None:
        self._path, self._ends = path, ends
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        self._lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def lines(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return the lines with these values."""
        return [line for line in self._lines if all(line.get(key) == value for key, value in wanted.items())]

    def once(self, measure: Callable[[], Mapping[str, Any]], **key: Any) -> dict[str, Any]:
        """Return the line of a key; measure and write it first where there is none.

        Raises:
            TimeUpError: it is not there, and the time is up.
        """
        known = self.lines(**key)
        if known:
            return known[0]
        if time.monotonic() > self._ends:
            raise TimeUpError
        began = time.monotonic()
        line = {**key, "seconds": 0.0, **measure()}
        line["seconds"] = line["seconds"] or time.monotonic() - began
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

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Return this model's record."""
        return self.record.lines(kind=kind, model=self.name)

    def options(self, budget_s: float = 300.0) -> TuneOptions:
        """Return the aim of the search. `budget_s`: seconds for it."""
        gate = rm.parse_slo(f"p99<{self.limit_ms:g}ms")
        return TuneOptions(gates=(gate,), budget_s=budget_s, search=self.axes, fresh=True)

    @contextlib.contextmanager
    def serving(self) -> Iterator[TuningRun]:
        """Serve copies of the model, for as long as the block lasts, with the space in the record."""
        with tuning_run(self.root, {self.name: 1}, self.options()) as run:

            def space() -> dict[str, Any]:
                settings = [vars(setting) for setting in run.prepare()[self.name].settings()]
                return {"settings": settings, "start_rate": run.loads.start_rate}

            run.loads.start_rate = self.record.once(space, kind="space", model=self.name)["start_rate"]
            yield run

    def settings(self) -> list[Setting]:
        """Return every setting of the space in the record."""
        return [_setting(fields) for fields in self.lines("space")[0]["settings"]]

    def grid(self) -> None:
        """Measure every setting missing in the record: to its end, or as far as it may be the best."""
        with self.serving() as run:
            settings = self.settings()
            random.Random(0).shuffle(settings)  # in order, most would be slightly better than the one before
            for setting in settings[: self.chosen.sample or len(settings)]:
                self.held(run, setting, None, kind="grid")
            for setting in settings:
                if not self.record.lines(kind="grid", model=self.name, label=setting.label):
                    self.held(run, setting, self.most()["value"] or None, kind="bounded")

    def most(self) -> dict[str, Any]:
        """Return the line of the grid with the largest rate."""
        return max((*self.lines("grid"), *self.lines("bounded")), key=lambda line: line["value"])

    def best(self) -> Setting | None:
        """Return the best setting of the grid. `None` where none holds the limit."""
        line = self.most()
        return _setting(line["setting"]) if line["value"] else None

    def grid_s(self) -> float:
        """Return how long the grid takes, in seconds."""
        return len(self.settings()) * statistics.mean(line["seconds"] for line in self.lines("grid"))

    def run(self, number: int | str, kind: str = "run", budget_s: float | None = None) -> None:
        """Tune, and measure the chosen setting beside the grid's best. Recorded work is not repeated."""

        def tuned() -> dict[str, Any]:
            seconds = budget_s or self.chosen.budget or TIME_SHARE * self.grid_s() - SPARE_S
            result = tune(self.root, {self.name: 1}, self.options(seconds), progress=_say)
            after = result.best if result.outcome == BETTER else result.today
            return {
                "outcome": result.outcome,
                "setting": vars(after.setting),
                "label": after.label,
                "found": result.best.label,
                "finalists": [dataclasses.asdict(each) for each in result.finalists],
                "verdicts": [each.verdict for each in result.comparisons],
                "changes": {name: dict(changes) for name, changes in result.changes.items()},
                "measured": len(result.trials),
                "searched_s": result.seconds,
            }

        self.record.once(tuned, kind=kind, model=self.name, run=number)

    def again(self) -> None:
        """Run the grid's best and each other chosen setting in turn."""
        best, chosen = self.best(), self.chosen_settings()
        if best is None or not chosen:
            return
        with self.serving() as run:
            for setting in chosen:
                in_turn = functools.partial(self._in_turn, run, best, setting)
                self.record.once(in_turn, kind="in turn", model=self.name, label=setting.label)

    def _in_turn(self, run: TuningRun, best: Setting, setting: Setting) -> dict[str, Any]:
        value = self.most()["value"]
        one, two = (MeasuredSetting(each, True, value, "", 0.0, state={self.name: each}) for each in (best, setting))
        sides = side_of(value, is_rate_sought=True), side_of(value, is_rate_sought=True)
        found = run.race.between((one, two), sides, rounds=(self.chosen.rounds, 2 * self.chosen.rounds))
        levels = [side.rows for side in sides]
        return {"ratio": found.ratio, "error": found.error, "best": one.label, "levels": levels}

    def chosen_settings(self) -> list[Setting]:
        """Return the settings chosen by anyone, without the grid's best."""
        lines = [line for kind in ("run", "third", "analyzer") for line in self.lines(kind) if "setting" in line]
        return [each for each in dict.fromkeys(_setting(line["setting"]) for line in lines) if each != self.best()]

    def held(self, run: TuningRun, setting: Setting, against: float | None, **key: Any) -> None:
        """Measure a setting's rate, if the record lacks it."""
        measure = functools.partial(_held, run, setting, against)
        self.record.once(measure, model=self.name, label=setting.label, **key)

    def reached(self, line: Mapping[str, Any]) -> float | None:
        """Return a chosen setting's share of the grid's best. `None`: it is not measured yet."""
        if _setting(line["setting"]) == self.best():
            return 1.0
        known = self.record.lines(kind="in turn", model=self.name, label=line["label"])
        return known[0]["ratio"] if known else None

    def kept(self, number: int) -> None:
        """Make the best setting today's, tune so many times, and restore the former one."""
        best = self.best()
        if best is None:
            return
        path = self.root / self.name / "config.pbtxt"
        before = path.read_text(encoding="utf-8")
        try:
            change_config(self.root, self.name, best.changes(setting_of(read_config(path))))
            for run in range(number):
                self.run(run, "kept")
        finally:
            path.write_text(before, encoding="utf-8")

    def analyzer(self, mode: str) -> None:
        """Run Model Analyzer in one of its modes, and tune in a third of its time. Measure both choices."""
        line = self.record.once(lambda: run_analyzer(self, mode), kind="analyzer", model=self.name, mode=mode)
        if self.best() is None:
            return
        self.run(mode, "third", line["seconds"] * ANALYZER_TIME_SHARE - SPARE_S)


def _held(run: TuningRun, setting: Setting, against: float | None) -> dict[str, Any]:
    """Return the largest rate held by a setting. 0 where it does not hold more than `against`."""
    began = time.monotonic()
    (name,) = run.subjects.tunable
    try:
        run.copies.load(CANDIDATE, {name: setting.changes(run.subjects.today()[name])})
        found = run.loads.measured(CANDIDATE, against)
        value, reason = found.value, found.reason
    except ServerRefusedError as exc:
        value, reason = None, str(exc)
    seconds = time.monotonic() - began
    return {"value": value or 0.0, "setting": vars(setting), "reason": reason, "seconds": seconds}


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
        http, grpc, metrics = free_ports("127.0.0.1", 3)
        config = {
            "model_repository": str(bench.root),
            "profile_models": [bench.name],
            "triton_launch_mode": "local",
            "triton_server_path": str(triton.binary),
            "triton_http_endpoint": f"localhost:{http}",
            "triton_grpc_endpoint": f"localhost:{grpc}",
            "triton_metrics_url": f"http://localhost:{metrics}/metrics",
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
        command = [str(bench.chosen.analyzer), "profile", "-f", str(folder / "config.json")]
        log = bench.chosen.out / f"analyzer-{bench.name}-{mode}.log"
        limit_s = bench.chosen.analyzer_minutes * 60
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=folder)
            try:
                status = process.wait(timeout=limit_s)
            except subprocess.TimeoutExpired:
                return {"failed": f"it had not ended after {limit_s:.0f} s"}
            finally:
                _end_with_children(process)
        chosen = _chosen(folder / "results", folder / "made") if status == 0 else None
        return (
            {"failed": log.read_text()[-800:]} if chosen is None else {"setting": vars(chosen), "label": chosen.label}
        )


def _end_with_children(process: subprocess.Popen[bytes]) -> None:
    """End a process and everything it started, which may have sessions of their own."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    family = [process.pid]
    for pid in family:
        family += [child for child, parent in parents.items() if parent == pid]
    for pid in family if process.poll() is None else family[1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _chosen(results: Path, made: Path) -> Setting | None:
    """Return the configuration in the first row of its table, its best. `None` where there is none."""
    for path in results.rglob("*metrics-model-inference*.csv"):
        rows = [row for row in csv.reader(path.read_text().splitlines()) if row]
        if len(rows) > 1 and "Model Config Path" in rows[0]:
            name = rows[1][rows[0].index("Model Config Path")]
            return setting_of(read_config(made / name / "config.pbtxt"))
    return None


def report(bench: Bench) -> Iterator[str]:
    """Yield the bars of one model, each with its spread."""
    name, best = bench.name, bench.best()
    if best is None:
        yield f"{name}: no setting of the grid holds p99<{bench.limit_ms:g}ms"
        return
    grid_s, runs = bench.grid_s(), bench.lines("run")
    measured = f"{len(bench.lines('grid'))} measured to their end, {len(bench.lines('bounded'))} bounded"
    yield (
        f"{name}: {len(bench.settings())} settings ({measured}) take {grid_s:.0f} s; the best, {best.label}, holds "
        f"{bench.most()['value']:.4g}/s"
    )
    for line in bench.lines("in turn"):
        share = f"{line['ratio']:.1%} of the grid's best (+-{line['error']:.1%})"
        yield f"{name}: {line['label']} holds {share}, in turn with it"
    reached = [bench.reached(line) for line in runs]
    compared = [share for share in reached if share is not None]
    if len(compared) < len(runs):
        yield f"{name}: the choices of {len(runs) - len(compared)} of {len(runs)} runs are not compared yet"
    if compared:
        shares = [line["seconds"] / grid_s for line in runs]
        both = zip(reached, shares, strict=True)
        held = sum(one is not None and one >= TRUTH_SHARE and share <= TIME_SHARE for one, share in both)
        yield (
            f"{name}: tune reaches {_spread(compared)} of it in {_spread(shares)} of the time "
            f"({statistics.median(line['seconds'] for line in runs):.0f} s): {held} of {len(runs)} runs hold the bar "
            f"({TRUTH_SHARE:.0%} in {TIME_SHARE:.0%}, {RUNS_SHARE:.0%} of the runs): "
            f"{'held' if held >= RUNS_SHARE * len(runs) else 'MISSED'}"
        )
    kept = bench.lines("kept")
    if kept:
        same = sum(not line["changes"] for line in kept)
        verdict = "held" if same >= KEPT_SHARE * len(kept) else "MISSED"
        yield f"{name}: from the best, nothing changes in {same} of {len(kept)} runs: {verdict}"
    for line in bench.lines("analyzer"):
        yield _beside_analyzer(bench, line)


def _beside_analyzer(bench: Bench, line: Mapping[str, Any]) -> str:
    """Return the bar beside Model Analyzer, in one of its modes."""
    name = f"{bench.name}: Model Analyzer ({line['mode']})"
    runs = [run for run in bench.lines("third") if run["run"] == line["mode"]]
    if not runs:
        return f"{name} took {line['seconds']:.0f} s, and tune has no run beside it"
    (run,) = runs
    share = run["seconds"] / line["seconds"]
    if "failed" in line:
        return (
            f"{name} chose nothing in {line['seconds']:.0f} s, tune took {share:.0%} of that: {line['failed'][-200:]!r}"
        )
    theirs, ours = bench.reached(line), bench.reached(run)
    if theirs is None or ours is None:
        return f"{name} took {line['seconds']:.0f} s, tune {share:.0%} of that; their choices are not compared yet"
    return (
        f"{name} chose {line['label']} in {line['seconds']:.0f} s, which reaches {theirs:.1%} of the grid's best; "
        f"tune chose {run['label']}, which reaches {ours:.1%}, in {share:.0%} of that time: "
        f"{'held' if ours >= theirs and share <= ANALYZER_TIME_SHARE else 'MISSED'}"
    )


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1%} ({min(values):.1%} to {max(values):.1%})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where everything that was measured is kept")
    parser.add_argument("--models", nargs="*", choices=MODELS)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=16, help="blocks of a choice in turn with the grid's best")
    parser.add_argument("--kept", type=int, default=0, help="runs that begin with the best setting")
    parser.add_argument("--budget", type=float, help="seconds a run of tune may take [default: 15 %% of the grid's]")
    parser.add_argument("--sample", type=int, default=0, help="settings measured to their end [default: all]")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing more after so long")
    parser.add_argument("--analyzer", type=Path, help="model-analyzer, to run beside it")
    parser.add_argument("--analyzer-minutes", type=float, default=120.0, help="the longest that it may take")
    parser.add_argument("--modes", nargs="*", default=["quick", "optuna"], help="of Model Analyzer")
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    chosen.out = chosen.out.resolve()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.quick:
        chosen.runs, chosen.budget = min(chosen.runs, 2), chosen.budget or 60.0
    record = Record(chosen.out / "measured.jsonl", time.monotonic() + chosen.minutes * 60)
    names = chosen.models or (QUICK_MODELS if chosen.quick else MODELS)
    benches = [Bench(name, chosen, record) for name in names]
    try:
        measure(benches, chosen)
    except TimeUpError:
        print(f"the {chosen.minutes:g} minutes are over: the same command goes on", file=sys.stderr)
    print("\n".join(line for bench in benches if bench.lines("grid") for line in report(bench)))


def measure(benches: list[Bench], chosen: argparse.Namespace) -> None:
    """Measure everything missing in the record.

    Raises:
        TimeUpError: the time is up.
    """
    for bench in benches:
        bench.grid()
    for number in range(chosen.runs):
        for bench in benches:
            bench.run(number)
    for mode in chosen.modes if chosen.analyzer is not None else ():
        for bench in benches:
            bench.analyzer(mode)
    for bench in benches:
        bench.again()
    for bench in benches if chosen.kept else ():
        bench.kept(chosen.kept)


def _say(told: TuneProgress) -> None:
    print(f"  tune: {told.text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
