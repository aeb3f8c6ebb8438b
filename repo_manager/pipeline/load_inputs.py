"""What a version's record tells a load test of its inputs: sizes of dynamic axes, ranges of integers.

It stands apart from the options that use it because a load test itself knows nothing of repositories.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.errors import RepositoryError
from repo_manager.repository import Location, find_model, version_files
from repo_manager.repository.golden import GOLDEN_FILE_NAME, read_golden
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.repository.manifest import read_manifest
from repo_manager.triton_config import ModelConfig

__all__ = ["KnownInputs", "known_inputs"]


@dataclasses.dataclass(frozen=True)
class KnownInputs:
    """What is known of a version's inputs.

    Attributes:
        shapes: input with dynamic axes -> the golden sample's shape, without the batch axis.
        ranges: integer input -> `[low, high)`: the rows of the table that it picks from, where the manifest names
            them, else what the golden sample holds, on which the model is known to run.
    """

    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    ranges: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)


def known_inputs(repository: Location, name: str, version: int | None = None) -> KnownInputs:
    """Read the record of a version's inputs.

    Args:
        repository: the model repository.
        name: the model.
        version: `None` takes the newest version that is served.

    Returns:
        Nothing when there is no such model or version here, or it came without a golden sample.

    Raises:
        RepositoryError: the repository or the sample cannot be read.
        ConfigError: config.pbtxt is broken.
    """
    try:
        model = find_model(repository, name)
    except RepositoryError:
        return KnownInputs()  # the server may serve another repository than the one here
    config = model.config()
    served = [entry.version for entry in model.versions if entry.version in model.served_versions]
    chosen = version if version is not None else max(served, default=None)
    if config is None or chosen not in {entry.version for entry in model.versions}:
        return KnownInputs()
    with version_files(model.path / str(chosen), [GOLDEN_FILE_NAME, MANIFEST_FILENAME]) as folder:
        if not (folder / GOLDEN_FILE_NAME).is_file():
            return KnownInputs()
        inputs = read_golden(folder / GOLDEN_FILE_NAME).inputs
        limits = _index_limits(folder)
    return KnownInputs(_shapes(inputs, config), _ranges(inputs, limits))


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
    """Return what `add` wrote down; older versions and those of other tools have none."""
    try:
        golden = read_manifest(folder).golden
    except RepositoryError:
        return {}
    found = golden.get("index_limits") if isinstance(golden, dict) else None
    limits = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in limits if isinstance(value, int) and value > 0}
