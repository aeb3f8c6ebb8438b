"""Files of class labels, one a line, for `add --labels` and `labels --file`."""

from __future__ import annotations

from pathlib import Path

from repo_manager.errors import UsageError

__all__ = ["read_labels_file"]


def read_labels_file(path: Path) -> tuple[str, ...]:
    """Read class labels, one a line; empty lines do not count.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path}: the labels cannot be read: {exc}") from exc
    return tuple(line.strip() for line in lines if line.strip())
