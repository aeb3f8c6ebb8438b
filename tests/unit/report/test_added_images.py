"""The commands that serve a model and its ensemble for images."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from rich.text import Text

from repo_manager.report.added_view import images_view


def last_line(model: int, preprocess: int | None, ensemble: int) -> str:
    added = SimpleNamespace(name="m", version=model)
    before = None if preprocess is None else SimpleNamespace(name="m_preprocess", version=preprocess)
    whole = SimpleNamespace(name="m_ensemble", version=ensemble, golden="embedded server")
    beside = (whole,) if before is None else (before, whole)
    made = SimpleNamespace(
        added=added, preprocess=before, ensemble=SimpleNamespace(added=whole), images=(), beside=beside
    )
    last = images_view(made, "r")[-1]
    assert isinstance(last, Text)
    return last.plain


@pytest.mark.parametrize(
    ("versions", "names"),
    [
        ((1, 1, 1), ["m_ensemble:1"]),
        ((2, 1, 1), ["m:2", "m_ensemble:1"]),
        ((3, None, 2), ["m:3", "m_ensemble:2"]),
        ((2, 2, 2), ["m_preprocess:2", "m:2", "m_ensemble:2"]),
    ],
)
def test_a_part_beside_an_older_version_is_deployed_first(
    versions: tuple[int, int | None, int], names: list[str]
) -> None:
    commands = " && ".join(f"repo-manager deploy {name} -r r" for name in names)
    assert last_line(*versions) == f"To serve both: {commands}"
