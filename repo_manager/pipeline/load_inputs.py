"""A version's record of its inputs, for a load test: sizes of dynamic axes, ranges of integers.

It is separate from the options because a load test itself knows nothing of repositories.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.errors import RepositoryError
from repo_manager.repository.golden import GOLDEN_FILE_NAME, read_golden
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.repository.location import Location
from repo_manager.repository.manifest import read_manifest
from repo_manager.repository.scan import find_model
from repo_manager.repository.transfer import version_files
from repo_manager.triton_config.config import ModelConfig, takes_sequences

__all__ = ["KnownInputs", "known_inputs"]


@dataclasses.dataclass(frozen=True)
class KnownInputs:
    """The facts of a version's inputs.

    Attributes:
        shapes: input with dynamic axes -> the golden sample's shape, without the batch axis.
        ranges: integer input -> `[low, high)`: the rows of the table it picks from, where the manifest names them,
            else the range of the golden sample, proven to run on the model.
        golden: the golden sample's requests, batch axis included: all of a sequence, else the first.
        why_golden: why they are sent where nothing else is asked for, since random ones would mean nothing to the
            model. Empty where random ones do.
    """

    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    ranges: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    golden: tuple[Mapping[str, NDArray[Any]], ...] = dataclasses.field(default=(), repr=False)
    why_golden: str = ""


def known_inputs(repository: Location, name: str, version: int | None = None) -> KnownInputs:
    """Read the record of a version's inputs.

    Args:
        repository: the model repository: a folder, or a place in object storage.
        name: name of the model on the server. The repository need not have it.
        version: `None` takes the newest version served.

    Returns:
        Nothing when there is no such model or version here, or it came without a golden sample.

    Raises:
        RepositoryError: the repository or the sample cannot be read.
        ConfigError: config.pbtxt is broken.
    """
    try:
        model = find_model(repository, name)
    except RepositoryError:
        return KnownInputs()  # the server may serve another repository
    config = model.config()
    served = [entry.version for entry in model.versions if entry.version in model.selected]
    chosen = version if version is not None else max(served, default=None)
    if config is None or chosen not in {entry.version for entry in model.versions}:
        return KnownInputs()
    with version_files(model.path / str(chosen), [GOLDEN_FILE_NAME, MANIFEST_FILENAME]) as folder:
        if not (folder / GOLDEN_FILE_NAME).is_file():
            return KnownInputs()
        golden = read_golden(folder / GOLDEN_FILE_NAME)
        limits = _index_limits(folder)
    inputs = golden.inputs
    requests = tuple(exchange.inputs for exchange in golden.exchanges)
    is_sequence = takes_sequences(config.message())
    return KnownInputs(
        _shapes(inputs, config), _ranges(inputs, limits), requests if is_sequence else requests[:1], _why_golden(config)
    )


def _why_golden(config: ModelConfig) -> str:
    """Say why random inputs would mean nothing to a model. Empty when they do."""
    message = config.message()
    strings = [item.name for item in message.input if _type_name(item) == "TYPE_STRING"]
    if takes_sequences(message):
        return "it is a recorded sequence"
    if message.model_transaction_policy.decoupled:
        return "the responses of the model to a random request, and their number, are unknown"
    return f"{', '.join(strings)}: random words mean nothing to a model" if strings else ""


def _type_name(item: Any) -> str:
    kinds = item.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    return str(kinds[item.data_type].name) if item.data_type in kinds else ""


def _shapes(inputs: Mapping[str, NDArray[Any]], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    dynamic = {item.name for item in config.message().input if -1 in item.dims}
    skip = 1 if config.max_batch_size > 0 else 0
    return {key: tuple(array.shape[skip:]) for key, array in inputs.items() if key in dynamic}


def _ranges(inputs: Mapping[str, NDArray[Any]], limits: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    integers = {key: array for key, array in inputs.items() if array.dtype.kind in "iu" and array.size}
    return {
        key: (0, limits[key]) if key in limits else (int(np.min(array)), int(np.max(array)) + 1)
        for key, array in integers.items()
    }


def _index_limits(folder: Path) -> dict[str, int]:
    """Return the record of `add`. Older versions and those of other tools have none."""
    try:
        golden = read_manifest(folder).golden
    except RepositoryError:
        return {}
    found = golden.get("index_limits") if isinstance(golden, dict) else None
    limits = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in limits if isinstance(value, int) and value > 0}
