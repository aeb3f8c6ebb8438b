"""Publish the shipped sparse model into the sample repository, as `repo-manager add` would.

python examples/make_sample_repository.py            # writes ../model_repository anew
python examples/make_sample_repository.py --check    # says what is out of date, and changes nothing
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from repo_manager import samples
from repo_manager.pipeline.adding import AddOptions, SparsityMode, add
from repo_manager.repository.manifest import read_manifest
from repo_manager.repository.scan import scan
from repo_manager.repository.verify import verify
from repo_manager.types import Backend, Precision

REPOSITORY = Path(__file__).resolve().parents[1] / "model_repository"


@dataclass(frozen=True)
class SampleVersion:
    """One version of the sample repository."""

    name: str
    version: int
    precision: Precision


# FP32 and FP16 keep the same inputs and outputs, so they are versions of one model; INT8 is a model of its own so that
# a load test can address both at once.
VERSIONS = (
    SampleVersion("digits", 1, Precision.FP32),
    SampleVersion("digits", 2, Precision.FP16),
    SampleVersion("digits_int8", 1, Precision.INT8),
)


def build(repository: Path) -> None:
    """Publish every sample version into an empty or missing repository."""
    for sample in VERSIONS:
        options = AddOptions(
            precision=sample.precision,
            backend=str(Backend.ONNXRUNTIME),
            sparsity=SparsityMode.REQUIRE,
            calibration=str(samples.calibration_data()),
        )
        added = add(samples.sample_model(), sample.name, repository, options)
        if added.version != sample.version:
            raise RuntimeError(f"{repository}: {sample.name} became version {added.version}, not {sample.version}")


def differences(repository: Path) -> list[str]:
    """Return what would change if the repository were written anew: one line each, empty when it is current.

    Model files are not compared byte by byte: another release of a converter may write the same model otherwise.
    """
    found = [str(problem) for problem in verify(repository)]
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "model_repository"
        build(fresh)
        names = [entry.name for entry in scan(repository)]
        if names != [entry.name for entry in scan(fresh)]:
            found.append(f"{repository}: holds {', '.join(names) or 'nothing'}")
        for sample in VERSIONS:
            place = repository / sample.name / str(sample.version)
            if not place.is_dir():
                found.append(f"{place}: missing")
                continue
            old = read_manifest(place)
            new = read_manifest(fresh / sample.name / str(sample.version))
            for field in ("source", "precision", "backend", "schema_version"):
                if getattr(old, field) != getattr(new, field):
                    found.append(f"{place}: {field} is {getattr(old, field)}, now {getattr(new, field)}")
            if set(old.files) != set(new.files):
                found.append(f"{place}: files are {sorted(old.files)}, now {sorted(new.files)}")
        for name in {sample.name for sample in VERSIONS}:
            config = Path(name, "config.pbtxt")
            if not (repository / config).is_file() or (repository / config).read_text() != (fresh / config).read_text():
                found.append(f"{repository / config}: differs from what add writes now")
    return found


def rewrite(repository: Path) -> None:
    """Replace the repository's models by freshly published ones; its README stays."""
    with tempfile.TemporaryDirectory(dir=repository.parent) as folder:
        fresh = Path(folder) / "model_repository"
        build(fresh)
        for old in repository.iterdir():
            if old.is_dir():
                shutil.rmtree(old)
            elif old.name != "README.md":
                old.unlink()
        for new in fresh.iterdir():
            new.rename(repository / new.name)


def main() -> int:
    """Write the sample repository, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="only say what is out of date; exit code 1 if anything is")
    arguments = parser.parse_args()
    if not arguments.check:
        rewrite(REPOSITORY)
        return 0
    found = differences(REPOSITORY)
    print("\n".join(found) or f"{REPOSITORY} is current")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
