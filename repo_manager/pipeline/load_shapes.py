"""Input shapes for a load test, from the sample that was published with the model."""

from __future__ import annotations

from repo_manager.errors import RepositoryError
from repo_manager.repository import Location, find_model, version_files
from repo_manager.repository.golden import GOLDEN_FILE_NAME, read_golden

__all__ = ["golden_shapes"]


def golden_shapes(repository: Location, name: str, version: int | None = None) -> dict[str, tuple[int, ...]]:
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
    try:
        model = find_model(repository, name)
    except RepositoryError:
        return {}  # the server may serve another repository than the one here
    config = model.config()
    served = [entry.version for entry in model.versions if entry.version in model.served_versions]
    chosen = version if version is not None else max(served, default=None)
    if config is None or chosen not in {entry.version for entry in model.versions}:
        return {}
    with version_files(model.path / str(chosen), [GOLDEN_FILE_NAME]) as folder:
        if not (folder / GOLDEN_FILE_NAME).is_file():
            return {}
        golden = read_golden(folder / GOLDEN_FILE_NAME)
    dynamic = {item.name for item in config.message().input if -1 in item.dims}
    skip = 1 if config.max_batch_size > 0 else 0
    return {key: tuple(array.shape[skip:]) for key, array in golden.inputs.items() if key in dynamic}
