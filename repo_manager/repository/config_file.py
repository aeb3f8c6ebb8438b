"""config.pbtxt as bytes: read as it is, put back as it was, made newer than anything that a server has seen."""

from __future__ import annotations

from pathlib import Path

from repo_manager.errors import RepositoryError
from repo_manager.files import read_regular, write_atomic
from repo_manager.repository.state import repository_lock
from repo_manager.repository.stores.staging import staged
from repo_manager.triton_config import CONFIG_FILENAME

__all__ = ["read_config_bytes", "touch_config", "write_config_bytes"]


def read_config_bytes(repository: Path, name: str) -> bytes | None:
    """Return config.pbtxt as it is; `None` when the model has none, or does not exist.

    Raises:
        RepositoryError: it cannot be read.
    """
    path = repository / name / CONFIG_FILENAME
    try:
        return read_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise RepositoryError(f"{path} cannot be read: {exc.strerror}") from exc


def write_config_bytes(repository: Path, name: str, content: bytes | None) -> None:
    """Make config.pbtxt what it was; a file that says so already is not touched.

    Args:
        repository: the root.
        name: the model.
        content: its bytes; `None`: there was none.

    Raises:
        RepositoryError: the disk refuses.
    """
    path = repository / name / CONFIG_FILENAME
    try:
        if read_config_bytes(repository, name) == content:
            return
        if content is None:
            path.unlink(missing_ok=True)
            return
        root = repository.resolve()
        with staged(root) as staging, repository_lock(root):
            write_atomic(path, content, staging=staging)
    except OSError as exc:
        raise RepositoryError(f"{path} cannot be put back: {exc.strerror or exc}") from exc


def touch_config(repository: Path, name: str) -> None:
    """Make config.pbtxt newer than anything that the server has seen, so that a load looks at the model again.

    Raises:
        RepositoryError: the disk refuses.
    """
    path = repository / name / CONFIG_FILENAME
    try:
        path.touch()
    except OSError as exc:
        raise RepositoryError(f"{path} cannot be touched: {exc.strerror or exc}") from exc
