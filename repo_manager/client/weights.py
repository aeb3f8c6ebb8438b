"""Which share of the requests goes to which version, and where clients learn it from.

A server tells it by itself: the name of a model's first instance group is free text, changing it reloads nothing
(docs/triton-reload.md), and every client can read it with the model's configuration. A canary writes
`NAME@1=0.95,2=0.05` there. Where that is not wanted, a JSON file or a function of the application says it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from repo_manager.errors import InputError

__all__ = ["VersionWeights", "WeightsSource", "published_name", "published_weights", "read_weights"]

_MARK = "@"


@dataclasses.dataclass(frozen=True)
class VersionWeights:
    """How the requests are spread.

    Attributes:
        shares: version -> its share of the requests, 0 to 1; they sum to 1.
    """

    shares: Mapping[int, float]

    @classmethod
    def of(cls, weights: Mapping[int, float]) -> VersionWeights:
        """Make shares of any weights.

        Raises:
            InputError: one is negative or no number, a version is below 1, or all are 0.
        """
        total = sum(weights.values())
        bad = [f"{version}: {weight}" for version, weight in weights.items() if version < 1 or not weight >= 0]
        if bad or not total > 0 or not math.isfinite(total):
            found = ", ".join(bad) or str(dict(weights))
            raise InputError(
                f"the weights {found} cannot be used: expected versions from 1 with weights from 0, and not all 0",
                hint='For instance {"1": 0.95, "2": 0.05}.',
            )
        return cls({version: weight / total for version, weight in sorted(weights.items())})

    def choose(
        self, draw: random.Random, *, key: str | bytes | None = None, without: Collection[int] = ()
    ) -> int | None:
        """Choose a version.

        With a key the choice is always the same for the same weights, and when a version's share grows, keys only move
        to it, never between the others: weighted rendezvous hashing, Schindelhauer and Schomaker, "Weighted
        Distributed Hash Tables", SPAA 2005 (the logarithmic method).

        Args:
            draw: of the draws without a key.
            key: what the choice depends on, a user's name for instance; `None` draws.
            without: versions that are not there.

        Returns:
            The version; `None` when none with a share is left.
        """
        left = {version: share for version, share in self.shares.items() if share > 0 and version not in without}
        if not left:
            return None
        if key is None:
            return draw.choices(list(left), list(left.values()))[0]
        data = key.encode() if isinstance(key, str) else key
        return min(left, key=lambda version: (_distance(data, version) / left[version], version))


WeightsSource = Mapping[int, float] | Path | Callable[[], Mapping[int, float]]
"""Fixed weights, a JSON file that is read again when it changes, or a function that is asked now and then."""


def _distance(key: bytes, version: int) -> float:
    """Return an exponentially distributed number that depends on nothing but key and version."""
    digest = hashlib.blake2b(key, digest_size=8, salt=version.to_bytes(8, "little")).digest()
    return -math.log((int.from_bytes(digest, "little") + 1) / 2.0**64)


def read_weights(path: Path, model: str) -> VersionWeights:
    """Read a weights file: `{"1": 0.95, "2": 0.05}`, or one such object a model under its name.

    Raises:
        InputError: it cannot be read or is of another form.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise InputError(f"the weights file {path} cannot be read: {exc}") from exc
    if isinstance(found, Mapping) and model in found:
        found = found[model]
    try:
        return VersionWeights.of(_numbers(found))
    except (TypeError, ValueError, AttributeError) as exc:
        raise InputError(
            f"the weights file {path} has another form: {exc}", hint='Expected {"1": 0.95, "2": 0.05}.'
        ) from exc


def _numbers(found: Any) -> dict[int, float]:
    return {int(version): float(weight) for version, weight in found.items()}


def published_name(base: str, weights: VersionWeights) -> str:
    """Return the instance group's name that tells the weights.

    Args:
        base: the name without them; the result can be passed here again.
        weights: the weights.
    """
    shares = ",".join(f"{version}={share:.6g}" for version, share in weights.shares.items())
    return f"{base.partition(_MARK)[0]}{_MARK}{shares}"


def published_weights(name: str) -> VersionWeights | None:
    """Return the weights that an instance group's name tells; `None` when it tells none."""
    _, mark, text = name.partition(_MARK)
    if not mark:
        return None
    try:
        pairs = (item.split("=") for item in text.split(","))
        return VersionWeights.of({int(version): float(weight) for version, weight in pairs})
    except (ValueError, InputError):
        return None  # a name of somebody else's that happens to hold the mark
