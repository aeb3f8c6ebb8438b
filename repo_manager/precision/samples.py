"""The inputs on which a conversion is judged: calibration data, or natural (seeded random) ones."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from repo_manager.errors import ModelError
from repo_manager.files import document
from repo_manager.onnx_model.draft import Array
from repo_manager.onnx_model.inputs import find_sizes, natural_inputs
from repo_manager.onnx_model.model import Model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.signature import Signature
from repo_manager.precision.calibration.load import CalibrationData

__all__ = ["Reference", "reference_of"]

_NATURAL_SAMPLES = 3
_OUT_OF_MEMORY = re.compile(r"alloc", re.IGNORECASE)  # ONNX Runtime: "Failed to allocate memory"; C++: bad_alloc
_LARGE_BYTES = 100 << 20  # a run of a larger model takes seconds, and a second made-up input adds little

Outputs = dict[str, Array]


@dataclass(frozen=True)
class Reference:
    """What the source model answers.

    Attributes:
        kind: origin of the inputs: `held-out`, `calibration` or `natural` (seeded random numbers).
        inputs: one dictionary a sample: input name -> array, batch axis included.
        outputs: the source's outputs, in step with `inputs`.
        optimized: ONNX Runtime optimised the source for these answers.
    """

    kind: str
    inputs: tuple[Outputs, ...] = field(repr=False)
    outputs: tuple[Outputs, ...] = field(repr=False)
    optimized: bool = True


def reference_of(
    model: Model,
    signature: Signature,
    calibration: CalibrationData | None,
    *,
    samples: int,
    seed: int,
    kind: str = "calibration",
    given: Mapping[str, int] | None = None,
) -> Reference:
    """Run the source model.

    Args:
        model: the ONNX model, which is not changed.
        signature: the model's inputs and outputs.
        calibration: where inputs come from. `None` makes natural ones.
        samples: largest number of the calibration data, spread evenly over it.
        seed: seed of the random numbers. Equal seeds give equal results.
        kind: what to call the calibration data.
        given: known sizes of natural inputs (`given_sizes`). `None`: usual sizes.

    Raises:
        ModelError: ONNX Runtime does not run the source.
    """
    large = model.size_bytes > _LARGE_BYTES
    if calibration is not None:
        step = max(1, calibration.count // max(1, samples))
        inputs = tuple(itertools.islice(calibration.batches(), 0, step * samples, step))
        session = Session(model.path)
        return Reference(kind, inputs, tuple(session.run(sample) for sample in inputs))
    # Without optimisation, a large model needs a third of the memory.
    session = Session(model.path, optimize=not large)
    first, outputs, sizes = _first_run(session, model, signature, seed, given or {})
    more = tuple(
        natural_inputs(signature, seed=seed + number, sizes=sizes)
        for number in range(1, 1 if large else _NATURAL_SAMPLES)
    )
    answers = (outputs, *(session.run(sample) for sample in more))
    return Reference("natural", (first, *more), answers, optimized=not large)


def _first_run(
    session: Session, model: Model, signature: Signature, seed: int, given: Mapping[str, int]
) -> tuple[Outputs, Outputs, dict[str, int]]:
    """Return the first natural inputs the model takes, its answer, and the sizes of its dynamic axes."""
    sizes = dict(given)
    inputs = natural_inputs(signature, seed=seed, sizes=sizes)
    try:
        return inputs, session.run(inputs), sizes
    except ModelError:
        pass
    try:
        sizes = find_sizes(session, signature, seed=seed, given=given)
    except ModelError as exc:
        raise ModelError(
            f"{model.path}: it does not run on made-up inputs, so its precision cannot be judged: {exc.message}",
            hint=("It may need more than --memory allows. " if _OUT_OF_MEMORY.search(exc.message) else "")
            + "Give the sizes that it takes with --shape NAME:SIZES (all axes), or real inputs with --calibration; "
            f"{document('dynamic-axes.md')}.",
        ) from exc
    inputs = natural_inputs(signature, seed=seed, sizes=sizes)
    return inputs, session.run(inputs), sizes
