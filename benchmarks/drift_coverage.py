"""Measure the honesty of `prune`'s reported drift: prune on some samples, and compare with all the others.

    python benchmarks/drift_coverage.py MODEL.onnx DATA [--samples 64] [--runs 40] [--max-drift 0.1] [--resamples 2000]

Each run draws `--samples` of the data at random and prunes on them. The drift on the samples left over, which `prune`
never saw, is taken as the true one. Reported:

1. The ratio of the reported drift and the true one: its median and its 10th and 90th percentile. Honest is 1.
2. How often the true drift is below the reported bound. Promised is 95 %.
3. With `--max-drift`: how often the true drift is below the limit, and how often no set of layers fits.
4. For the first run's model, how often the bound from 4, 8, 16 and 32 random samples left over covers the drift of all
   of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from repo_manager.errors import GateError
from repo_manager.onnx_model.model import Model, load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import signature_of
from repo_manager.onnx_model.write import save_model
from repo_manager.precision import load_calibration
from repo_manager.precision.calibration.data import CalibrationData, data_of_samples
from repo_manager.pruning import PruneOptions, prune_with_data
from repo_manager.pruning.judge import errors_by_sample, upper_bound
from repo_manager.sparsity import PruneReport

SIZES = (4, 8, 16, 32)
Pairs = dict[str, list[tuple[float, float]]]


def drift_of(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the drift over samples."""
    errors, sizes = np.array(pairs, np.float64).T
    return float(np.sqrt(errors.sum() / sizes.sum())) if errors.sum() else 0.0


def pruned_pairs(
    model: Model, samples: Sequence[dict[str, np.ndarray]], rest: Sequence[dict[str, np.ndarray]], options: PruneOptions
) -> tuple[PruneReport, Pairs]:
    """Prune on some samples. Return the report, and each output's errors on the others."""
    data = data_of_samples(samples, signature_of(model), "drawn")
    proto, report = prune_with_data(model, data, options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.onnx"
        save_model(proto, path)
        pruned, dense = Session(path), Session(model)
        return report, errors_by_sample(
            ((pruned.run(sample), dense.run(sample)) for sample in rest), dense.output_names
        )


def one_run(report: PruneReport, pairs: Pairs, limit: float | None) -> dict[str, float | bool]:
    """Compare the reported drift with the true one, for the worst output."""
    evidence = report.evidence
    assert evidence is not None
    assert evidence.drift_upper is not None
    true = max(drift_of(each) for each in pairs.values())
    reported = max(item.relative_error for item in evidence.drift)
    covered = all(drift_of(each) <= evidence.drift_upper[name] for name, each in pairs.items())
    within = limit is None or true <= limit
    return {
        "reported": reported,
        "bound": max(evidence.drift_upper.values()),
        "true": true,
        "covered": covered,
        "within": within,
        "layers": len(report.pruned),
    }


def resampled(pairs: Pairs, count: int) -> dict[int, tuple[float, float]]:
    """Return, by number of samples, how often their bound covers the drift of all, and the bound's median ratio."""
    random, found = np.random.default_rng(7), {}
    every = np.array(max(pairs.values(), key=drift_of))
    true = drift_of([(error, size) for error, size in every])
    for size in (size for size in SIZES if 2 * size <= len(every)):
        bounds = [upper_bound(every[random.choice(len(every), size, replace=False)].tolist()) for _ in range(count)]
        found[size] = float(np.mean(np.array(bounds) >= true)), float(np.median(bounds)) / true
    return found


def runs_of(model: Model, data: CalibrationData, given: argparse.Namespace) -> dict[str, object]:
    """Do all runs, and print their results."""
    samples, found, refused, first = list(data.batches()), [], 0, None
    options = PruneOptions(max_drift=given.max_drift, layers=tuple(given.layers))
    for seed in range(given.runs):
        order = np.random.default_rng(seed).permutation(len(samples))
        drawn, rest = order[: given.samples], order[given.samples :]
        try:
            report, pairs = pruned_pairs(model, [samples[i] for i in drawn], [samples[i] for i in rest], options)
        except GateError:
            refused += 1
            continue
        first = first or resampled(pairs, given.resamples)
        found.append(one_run(report, pairs, given.max_drift))
    if not found:
        print(f"all {refused} runs were refused: no set of layers fits")
        return {"refused": refused}
    ratios = np.array([one["reported"] / one["true"] for one in found if one["true"]])
    low, middle, high = np.percentile(ratios, (10, 50, 90)) if len(ratios) else (1.0, 1.0, 1.0)
    covered, within = (float(np.mean([one[key] for one in found])) for key in ("covered", "within"))
    print(f"{len(found)} runs with {given.samples} of {len(samples)} samples, {refused} refused")
    print(f"reported / true drift: median {middle:.3f}, 10 % to 90 %: {low:.3f} to {high:.3f}")
    widths = [one["bound"] / one["true"] for one in found if one["true"]]
    print(f"true drift below the bound: {covered:.1%} of the runs; median bound / true {np.median(widths):.2f}")
    if given.max_drift is not None:
        print(f"true drift below the limit of {given.max_drift:g}: {within:.1%} of the runs")
    for size, (share, width) in (first or {}).items():
        print(f"one model, bound from {size} samples: covers {share:.1%}, median bound / true {width:.2f}")
    return {"runs": found, "refused": refused, "resampled": first}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", help="as for --calibration: many more samples than --samples")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--max-drift", type=float)
    parser.add_argument("--layers", action="append", default=[])
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = load_model(given.model)
    result = runs_of(model, load_calibration(given.data, signature_of(model)), given)
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
