from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repo_manager.errors import ConfigError
from repo_manager.repository.relabel import read_labels, set_labels
from repo_manager.repository.verify import verify

Put = Callable[..., Any]


def test_labels_can_be_given_later_and_changed(root: Path, put: Put) -> None:
    put()
    assert read_labels(root, "m") == {}
    config = root / "m/config.pbtxt"
    config.write_text("# mine\n" + config.read_text())
    planned = set_labels(root, "m", "y", ("cat", "dog"), dry_run=True)
    assert (planned.before, planned.reloaded, planned.applied) == ((), (1,), False)
    assert read_labels(root, "m") == {}
    assert set_labels(root, "m", "y", ("cat", "dog")).applied
    assert read_labels(root, "m") == {"y": ("cat", "dog")}
    assert config.read_text().startswith("# mine\n")
    before = config.stat().st_mtime_ns
    assert set_labels(root, "m", "y", ("dog", "cat")).before == ("cat", "dog")
    again = set_labels(root, "m", "y", ("dog", "cat"))
    assert (again.reloaded, again.applied) == ((), False)
    assert config.stat().st_mtime_ns == before
    assert verify(root, models=False) == ()


@pytest.mark.parametrize(
    ("output", "labels"), [("z", ("a", "b")), ("y", ("a",)), ("y", ()), ("y", ("a", "b\nc")), ("y", ("a", " "))]
)
def test_labels_that_do_not_fit_are_refused(root: Path, put: Put, output: str, labels: tuple[str, ...]) -> None:
    put()
    with pytest.raises(ConfigError, match="labels for"):
        set_labels(root, "m", output, labels)
    assert sorted(path.name for path in (root / "m").iterdir()) == ["1", "config.pbtxt"]
