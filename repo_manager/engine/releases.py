"""Triton container releases and what is inside them: the data is triton_releases.csv.

A column of a row is verified when a source for it could be read (docs/tensorrt-versions.md lists them); the others
are from memory and are always worded as such. An empty cell is not known.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
from pathlib import Path

__all__ = ["Release", "release_of_container", "release_of_server", "releases"]


@dataclasses.dataclass(frozen=True)
class Release:
    """One monthly container, `tritonserver:<release>-py3`.

    Attributes:
        release: for instance `24.10`.
        triton: the server's version, as its metadata says it; empty when it is not known.
        tensorrt: likewise.
        cuda: likewise.
        driver: the smallest driver of the table; data-centre GPUs may use older branches.
        verified: the columns for which a source was read.
        sources: names of docs/tensorrt-versions.md.
    """

    release: str
    triton: str
    tensorrt: str
    cuda: str
    driver: str
    verified: frozenset[str]
    sources: tuple[str, ...]

    def is_verified(self, column: str) -> bool:
        """Say whether a column's value has a source."""
        return column in self.verified


@functools.cache
def releases() -> tuple[Release, ...]:
    """Return all releases, oldest first."""
    text = Path(__file__).with_name("triton_releases.csv").read_text(encoding="utf-8")
    return tuple(
        Release(
            release=row["release"],
            triton=row["triton"],
            tensorrt=row["tensorrt"],
            cuda=row["cuda"],
            driver=row["driver"],
            verified=frozenset(row["verified"].split()),
            sources=tuple(row["sources"].split()),
        )
        for row in csv.DictReader(text.splitlines())
    )


def release_of_server(version: str) -> Release | None:
    """Find a release by the server's version, for instance `2.51.0`; `None` when the table lacks it."""
    return next((release for release in releases() if release.triton and release.triton == version), None)


def release_of_container(name: str) -> Release | None:
    """Find a release by its name or image tag, for instance `24.10` or `24.10-py3`."""
    return next((release for release in releases() if name.split("-")[0] == release.release), None)
