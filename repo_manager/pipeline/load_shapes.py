"""Input shapes for a load test, from the sample that was published with the model."""

from __future__ import annotations

from pathlib import Path

from repo_manager.repository import find_model
from repo_manager.repository.golden import GOLDEN_FILE_NAME, read_golden
from repo_manager.triton_config import read_config

__all__ = ["golden_shapes"]


def golden_shapes(repository: Path, name: str, version: int | None = None) -> dict[str, tuple[int, ...]]:
    """Return the golden sample's shape of each input that has dynamic axes, without the batch axis.

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
    if not (repository / name / "config.pbtxt").is_file():
        return {}
    model = find_model(repository, name)
    served = [entry.version for entry in model.versions if entry.version in model.served_versions]
    chosen = version if version is not None else max(served, default=None)
    path = model.path / str(chosen) / GOLDEN_FILE_NAME
    if chosen is None or not path.is_file():
        return {}
    golden = read_golden(path)
    config = read_config(model.path).message()
    dynamic = {item.name for item in config.input if -1 in item.dims}
    skip = 1 if config.max_batch_size > 0 else 0
    return {key: tuple(array.shape[skip:]) for key, array in golden.inputs.items() if key in dynamic}
