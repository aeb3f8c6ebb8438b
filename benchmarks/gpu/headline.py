"""What 2:4 sparsity brings on a GPU: engine alone and through Triton, dense against sparse, interleaved.

    python benchmarks/gpu/headline.py                      # everything, resumable; needs an NVIDIA GPU and tensorrt
    python benchmarks/gpu/headline.py --models resnext101_32x8d --precisions fp16 --batches 128
    python benchmarks/gpu/headline.py --budget-s 540       # as much as fits; run it again for the next part
    python benchmarks/gpu/headline.py --rehearse           # the same code on a CPU in minutes; its numbers mean nothing

For each model, precision and batch three engines are built for exactly that shape: dense weights, sparse weights, and
sparse weights with sparse kernels not offered (`noflag`). They run in turn, round after round, so that clocks and heat
hit all alike; the ratio is the mean of the rounds' log ratios with its 95 % interval. Every finished cell is on
disk before the next one starts. Beside the JSON: a chart, and the build log of every engine. A cell's `layers` hold the
evidence of each weight with its times in the sparse and in the dense engine, by TensorRT's profiler.

State: run in part on an H200 with TensorRT 8.6.0 (results/); rehearsed on a CPU, from the builds to the chart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from repo_manager.engine.builder import EngineBuild, build_engine
from repo_manager.engine.control import join_times, layer_times_of
from repo_manager.engine.evidence import join_evidence
from repo_manager.engine.gpu import find_gpus
from repo_manager.engine.options import EngineOptions
from repo_manager.engine.profiles import ShapeRange
from repo_manager.files import write_atomic
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.run import run_load_test
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.signature import signature_of
from repo_manager.optional import require
from repo_manager.pipeline.adding import AddOptions, add
from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer
from repo_manager.sparsity import sparsity_report
from repo_manager.triton_config.options import ConfigOptions
from repo_manager.types import Precision, as_json

sys.path.insert(0, str(Path(__file__).parent))
from chart import speedup_chart
from models import MODELS
from runners import Power, PowerMeter, engine_runner, measure, rehearsal_runner
from sources import NO_GATE, calibration_of, converted, weights

HERE = Path(__file__).parent
VARIANTS = ("dense", "sparse", "noflag")
TRITON_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs, and their length."""

    models: tuple[str, ...]
    precisions: tuple[Precision, ...]
    batches: tuple[int, ...]
    rounds: int
    round_s: float
    rehearse: bool
    output: Path
    library_name: str
    variants: tuple[str, ...] = VARIANTS
    triton: bool = True
    sources: Path | None = None
    end_s: float | None = None
    without_tactics: tuple[str, ...] = ()

    @property
    def library(self) -> Any:
        """The builder: TensorRT, or TensorRT-RTX where there is no GPU."""
        return require(self.library_name)

    def has_time_for(self, seconds: float) -> bool:
        """Return whether something of this length ends within the budget."""
        return self.end_s is None or time.monotonic() + seconds < self.end_s


def build(plan: Plan, file: Path, precision: Precision, batch: int, *, sparse: bool) -> EngineBuild:
    """Build an engine for one shape."""
    model = load_model(file)
    shapes = {spec.name: (batch, *(spec.shape or ())[1:]) for spec in signature_of(model).inputs}
    profile = {name: ShapeRange(shape, shape, shape) for name, shape in shapes.items()}
    output = file.with_name(f"batch{batch}-{'sparse' if sparse else 'dense'}.plan")
    options = EngineOptions(sparse=sparse, without_tactics=plan.without_tactics)
    return build_engine(model, plan.library, output, profile, precision=precision, options=options)


def run_cell(plan: Plan, model: str, precision: Precision, batch: int, sources: Mapping[str, Path]) -> dict[str, Any]:
    """Build the three engines of a cell and run them in turn."""
    runs: dict[str, Callable[[], None]] = {}
    closers, facts, builds = [], {}, {}
    for variant in plan.variants:
        file = converted(sources[variant], precision)
        builds[variant] = built = build(plan, file, precision, batch, sparse=variant != "noflag")
        log = plan.output.parent / "logs" / f"{model}-{precision}-{batch}-{variant}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(log, built.log.encode())
        facts[variant] = {"build_s": built.seconds, "size_bytes": built.size_bytes, "evidence": as_json(built.evidence)}
        runner = rehearsal_runner(file, batch) if plan.rehearse else engine_runner(plan.library, built.path, batch)
        runs[variant] = runner[0]
        closers.append(runner[1])
    meter = PowerMeter(enabled=not plan.rehearse)
    rounds: dict[str, list[dict[str, float]]] = {variant: [] for variant in plan.variants}
    for number in range(plan.rounds):
        for variant in plan.variants if number % 2 else plan.variants[::-1]:
            for _ in range(3):  # warm: the meter counts from the first timed run
                runs[variant]()
            with meter.watch() as power:
                times = measure(runs[variant], plan.round_s)
            rounds[variant].append(_summary(times, batch, power))
    for close in closers:
        close()
    totals = sparsity_report(load_model(sources["sparse"])).totals
    ratios = {}
    for other in plan.variants:
        if other != "sparse":
            ratios[f"sparse_over_{other}"] = ratio_of(rounds["sparse"], rounds[other])
            if all("watts" in row for row in (*rounds["sparse"], *rounds[other])):
                ratios[f"sparse_over_{other}_per_watt"] = ratio_of(
                    rounds["sparse"], rounds[other], "inferences_per_joule"
                )
    return {
        "model": model,
        "precision": str(precision),
        "batch": batch,
        "rehearsal": plan.rehearse,
        "variants": {v: {**facts[v], **_middle(rounds[v]), "rounds": rounds[v]} for v in plan.variants},
        "valid_mac_share": totals.gain_share,
        "speedup_bound": totals.speedup_bound,
        **ratios,
        "layers": layers_of(converted(sources["sparse"], precision), builds["sparse"], builds["dense"]),
    }


def layers_of(model: Path, sparse: EngineBuild, dense: EngineBuild) -> Any:
    """Join pattern, eligible, chosen, tactic and, on a GPU, the times of each weight's layer in both engines."""
    report = sparsity_report(load_model(model))
    rows, dense_rows = (join_evidence(report, build.evidence, build.layers) for build in (sparse, dense))
    times = [layer_times_of(build) for build in (sparse, dense)]
    if times[0] is not None and times[1] is not None:
        rows = join_times(rows, times[0], dense_rows, times[1])
    return as_json(rows)


def _summary(times_ns: list[int], batch: int, power: Power) -> dict[str, float]:
    per_s = batch * len(times_ns) / (sum(times_ns) / 1e9)
    low, high = np.percentile(times_ns, [50, 99])
    summary = {"inferences_per_s": per_s, "p50_ns": float(low), "p99_ns": float(high), "runs": len(times_ns)}
    if power.watts is not None:
        summary |= {"watts": power.watts, "inferences_per_joule": per_s / power.watts}
    if power.sm_mhz is not None:
        summary["sm_mhz"] = power.sm_mhz
    return summary


def _middle(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(r[name] for r in rounds if name in r) for name in rounds[0]}


def ratio_of(
    ours: list[dict[str, float]], theirs: list[dict[str, float]], field: str = "inferences_per_s"
) -> dict[str, float]:
    """Return the ratio of a field with a 95 % interval (Student's t over the rounds' log ratios)."""
    logs = [math.log(a[field] / b[field]) for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return {"ratio": math.exp(mean), "low": math.exp(mean), "high": math.exp(mean)}
    t = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}.get(len(logs) - 1, 2.1)
    half = t * statistics.stdev(logs) / len(logs) ** 0.5
    return {"ratio": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half)}


def run_triton(plan: Plan, model: str, precision: Precision, sources: Mapping[str, Path]) -> dict[str, Any]:
    """Publish dense and sparse by `add`, serve both, and load them."""
    backend = "onnxruntime" if plan.rehearse else plan.library_name
    batch = min(TRITON_BATCH, max(plan.batches))
    with tempfile.TemporaryDirectory() as root:
        repository = Path(root, "models")
        for variant in ("dense", "sparse"):
            data = str(calibration_of(sources[variant])) if "int8" in str(precision) else None
            config = ConfigOptions(max_batch_size=batch)
            engine = EngineOptions(without_tactics=() if plan.rehearse else plan.without_tactics)
            options = AddOptions(precision, backend, calibration=data, config=config, engine=engine, convert=NO_GATE)
            add(sources[variant], variant, repository, options)
        with EmbeddedServer(ServerOptions(repository=str(repository))) as server:
            server.wait_ready(120)
            client = TritonClient.connect(server.grpc_url)
            points: dict[str, list[Any]] = {"dense": [], "sparse": []}
            for variant in points:
                client.load(variant)
            for _ in range(plan.rounds):
                for variant, rows in points.items():
                    load = LoadTestOptions(
                        url=server.grpc_url,
                        model=variant,
                        concurrency=(4,),
                        batch_size=batch,
                        duration_s=max(plan.round_s, 1.0),
                        metrics_url=f"{server.metrics_url}/metrics",
                        distinct=2,
                    )
                    (point,) = run_load_test(load).points
                    rows.append(
                        {
                            "outcome": point.outcome,
                            "inferences_per_s": point.throughput_per_s,
                            "latency": as_json(point.latency),
                            "gpu": as_json(point.gpu),
                        }
                    )
    failed = [row for rows in points.values() for row in rows if not row["inferences_per_s"]]
    ratio = None if failed else ratio_of(points["sparse"], points["dense"])
    return {"model": model, "precision": str(precision), "batch": batch, "points": points, "sparse_over_dense": ratio}


def run(plan: Plan) -> None:
    """Run everything missing in the output."""
    state: dict[str, Any] = {"rehearsal": plan.rehearse, "cells": {}, "triton": {}}
    if plan.output.exists():
        state = json.loads(plan.output.read_text())
    if state["rehearsal"] != plan.rehearse:
        raise SystemExit(
            f"{plan.output} holds {'a rehearsal' if state['rehearsal'] else 'real runs'}: take another file"
        )
    state["machine"] = {"gpus": as_json(find_gpus()), "library": f"{plan.library_name} {plan.library.__version__}"}
    slowest = 0.0
    for model in plan.models:
        with tempfile.TemporaryDirectory() as folder:
            sources: dict[str, Path] = {}
            for kind, key, work in jobs(plan, model):
                if key in state[kind]:
                    continue
                if not plan.has_time_for(slowest):
                    print(f"{key}: not begun, the last part took {slowest:.0f} s; run the command again", flush=True)
                    return
                started = time.monotonic()
                sources = sources or weights(model, plan.sources or Path(folder))
                state[kind][key] = result = work(sources)
                save(plan, state)
                slowest = max(slowest, time.monotonic() - started)
                print(f"{key} ({kind}): sparse over dense {result['sparse_over_dense']}", flush=True)


def jobs(plan: Plan, model: str) -> Iterator[tuple[str, str, Callable[[Mapping[str, Path]], dict[str, Any]]]]:
    """Yield (kind, key, function that makes it from the weights) of one model."""
    for precision in plan.precisions:
        for batch in plan.batches:
            yield "cells", f"{model}/{precision}/{batch}", partial(run_cell, plan, model, precision, batch)
        if plan.triton:
            yield "triton", f"{model}/{precision}", partial(run_triton, plan, model, precision)


def prepare(plan: Plan) -> None:
    """Write and convert the models, without a GPU, so a run with the same `--sources` starts at once."""
    assert plan.sources is not None
    for model in plan.models:
        for source in dict.fromkeys(weights(model, plan.sources).values()):
            for precision in plan.precisions:
                converted(source, precision)


def save(plan: Plan, state: Mapping[str, Any]) -> None:
    """Write JSON and chart, each in one step."""
    title = "REHEARSAL on a CPU: not a measurement" if plan.rehearse else "2:4 sparse against dense, engine alone"
    write_atomic(plan.output, (json.dumps(state, indent=1) + "\n").encode())
    write_atomic(plan.output.with_suffix(".svg"), speedup_chart(state["cells"], title).encode())


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS))
    parser.add_argument("--precisions", nargs="+", type=Precision, default=[Precision.FP16, Precision.INT8])
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--round-s", type=float)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--library", choices=("tensorrt", "tensorrt_rtx"), default="tensorrt")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--no-triton", action="store_true", help="the engines alone")
    parser.add_argument("--without-tactics", nargs="+", default=[], help="libraries whose kernels are left out")
    parser.add_argument("--budget-s", type=float, help="begin nothing that would probably end later")
    parser.add_argument("--sources", type=Path, help="keep the ONNX files in this folder, and take them from there")
    parser.add_argument("--prepare", action="store_true", help="only write the ONNX files; needs --sources and no GPU")
    given = parser.parse_args()
    rehearse = given.rehearse
    if given.prepare and given.sources is None:
        parser.error("--prepare needs --sources")
    if not rehearse and not given.prepare and not find_gpus():
        raise SystemExit("no NVIDIA GPU here (nvidia-smi lists none); --rehearse runs the same code on the CPU")
    everything = ["resnext101_32x8d", "resnet50", "vgg16", "encoder"]
    plan = Plan(
        models=tuple(given.models or (["tiny"] if rehearse else everything)),
        precisions=tuple(given.precisions),
        batches=tuple(given.batches or ([1, 2] if rehearse else [1, 8, 32, 128, 256])),
        rounds=given.rounds or (2 if rehearse else 10),
        round_s=given.round_s or (0.2 if rehearse else 2.0),
        rehearse=rehearse,
        output=given.output or HERE / ("headline-rehearsal.json" if rehearse else "headline.json"),
        library_name="tensorrt_rtx" if rehearse else given.library,
        variants=tuple(variant for variant in VARIANTS if variant in {"dense", "sparse", *given.variants}),
        triton=not given.no_triton,
        without_tactics=tuple(given.without_tactics),
        sources=given.sources,
        end_s=None if given.budget_s is None else time.monotonic() + given.budget_s,
    )
    if given.prepare:
        prepare(plan)
    else:
        run(plan)


if __name__ == "__main__":
    main()
