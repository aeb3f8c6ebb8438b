"""Two versions side by side."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from repo_manager.repository.manifest import Manifest
from repo_manager.repository.scan import VersionEntry
from repo_manager.summary import Summarized
from repo_manager.triton_config.compare import same_signature
from repo_manager.triton_config.config import parse_config
from repo_manager.types import as_json

__all__ = [
    "FileDifference",
    "VersionDifference",
    "compare_versions",
    "judged_drift",
    "kept_sparsity",
    "measured_accuracy",
    "origin_of",
    "recorded_checks",
]


@dataclasses.dataclass(frozen=True)
class FileDifference:
    """A file not the same in both versions.

    Attributes:
        name: its path in the version.
        size_bytes: in the first and in the second. `None` where it is missing.
    """

    name: str
    size_bytes: tuple[int | None, int | None]


@dataclasses.dataclass(frozen=True, repr=False)
class VersionDifference(Summarized):
    """The differences between two versions. Empty fields where nothing does.

    Attributes:
        a: `NAME:VERSION` of the first version, the left value of each pair.
        b: `NAME:VERSION` of the second version, the right value of each pair.
        facts: first questions of a person -> the answer as text for each: precision, source, 2:4, drift, backend.
        fields: manifest field, dotted for nested ones -> the value in each: precision, source, sparsity, conversion
            (drift, checks), tools, ...
        signature: differences in backend, batch, inputs and outputs, one sentence each.
        config: unified diff of the derived configurations.
        files: files missing in one version, or of another size or digest, by name.
        size_bytes: total size of each version's files.
        problems: why a version could not be compared (no manifest).
    """

    a: str
    b: str
    facts: Mapping[str, tuple[str, str]]
    fields: Mapping[str, tuple[Any, Any]]
    signature: tuple[str, ...]
    config: str
    files: tuple[FileDifference, ...]
    size_bytes: tuple[int, int]
    problems: tuple[str, ...]

    def _summary(self) -> Mapping[str, Any]:
        return {"A": self.a, "B": self.b, "differing files": len(self.files)}


def compare_versions(a: VersionEntry, b: VersionEntry) -> VersionDifference:
    """Compare two versions by their manifests, of one model or of two.

    Args:
        a: the first version, from `find_model`. Without a manifest only sizes are compared.
        b: the second version to compare.
    """
    names = tuple(f"{entry.path.parent.name}:{entry.version}" for entry in (a, b))
    sizes = (a.size_bytes or 0, b.size_bytes or 0)
    if a.manifest is None or b.manifest is None:
        problems = tuple(
            f"{name} has no manifest; `repo-manager adopt` writes one"
            for name, entry in zip(names, (a, b), strict=True)
            if entry.manifest is None
        )
        return VersionDifference(names[0], names[1], {}, {}, (), "", (), sizes, problems)
    signature: tuple[str, ...] = ()
    if a.manifest.config and b.manifest.config:
        signature = same_signature(parse_config(a.manifest.config), parse_config(b.manifest.config))
    return VersionDifference(
        a=names[0],
        b=names[1],
        facts=_facts(a.manifest, b.manifest),
        fields=_fields(a.manifest, b.manifest),
        signature=signature,
        config="\n".join(
            difflib.unified_diff(
                a.manifest.config.splitlines(), b.manifest.config.splitlines(), names[0], names[1], lineterm=""
            )
        ),
        files=_files(a.manifest, b.manifest),
        size_bytes=sizes,
        problems=(),
    )


def _facts(a: Manifest, b: Manifest) -> dict[str, tuple[str, str]]:
    """Return the facts a person asks first, whether they differ or not."""
    return {name: (fact(a), fact(b)) for name, fact in _FACTS.items()}


def _at(value: Any, *path: str) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def origin_of(manifest: Manifest) -> str | None:
    """Return the URL the source was fetched from, and when, or `None` where it was a path."""
    url, fetched = _at(manifest.source, "origin", "url"), _at(manifest.source, "origin", "fetched")
    return None if url is None else f"{url}, {fetched}"


def kept_sparsity(manifest: Manifest) -> float | None:
    """Return the share of the parameters in weights with the 2:4 pattern. `None` where it does not say."""
    valid = _at(manifest.sparsity, "totals", "valid_parameters")
    total = _at(manifest.sparsity, "totals", "parameters")
    return valid / total if valid is not None and total else None


def judged_drift(manifest: Manifest) -> float | None:
    """Return the largest relative error judged, as `Conversion.worst_drift`. `None` where it does not say."""
    judged = [item for item in _at(manifest.conversion, "drift") or () if not _at(item, "judged_by")]
    errors = [_at(item, key) for item in judged for key in ("relative_error", "rounded_relative_error")]
    known = [float(error) for error in errors if error is not None]
    return max(known, default=None)


def recorded_checks(manifest: Manifest) -> tuple[tuple[str, str, str], ...]:
    """Return the checks of the conversion: name, outcome (`passed`, `failed` or `no evidence`), and the finding.

    A check without anything to look at has shown nothing, so it has not passed.
    """
    checks = [each for each in _at(manifest.conversion, "checks") or () if isinstance(each, Mapping)]
    return tuple((str(each.get("name", "-")), _outcome(each), str(each.get("detail") or "")) for each in checks)


def _outcome(check: Mapping[str, Any]) -> str:
    return "failed" if not check.get("passed") else "no evidence" if check.get("is_empty") else "passed"


def measured_accuracy(manifest: Manifest) -> str | None:
    """Return the accuracy on held-out data beside the source's, in words, or `None` where it was not measured."""
    found = _at(manifest.conversion, "accuracy")
    value, source, samples = (_at(found, key) for key in ("value", "source", "samples"))
    if value is None:
        return None
    count = "" if samples is None else f" on {samples} samples"
    return f"{value:.4g} (source {source:.4g}){count}" if source is not None else f"{value:.4g}{count}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.1f} % of the parameters"


_FACTS: dict[str, Callable[[Manifest], str]] = {
    "precision": lambda manifest: str(manifest.precision or "-"),
    "source": lambda manifest: (
        " ".join(str(part)[:19] for part in (_at(manifest.source, "path"), _at(manifest.source, "digest")) if part)
        or "-"
    ),
    "2:4": lambda manifest: _percent(kept_sparsity(manifest)),
    "drift": lambda manifest: "-" if (drift := judged_drift(manifest)) is None else f"{drift:.3g}",
    "backend": lambda manifest: manifest.backend,
    "accuracy": lambda manifest: measured_accuracy(manifest) or "-",
}


def _fields(a: Manifest, b: Manifest) -> dict[str, tuple[Any, Any]]:
    left, right = _flat(as_json(a)), _flat(as_json(b))
    return {key: (left.get(key), right.get(key)) for key in sorted({*left, *right}) if left.get(key) != right.get(key)}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a JSON value by dotted path. Fields compared elsewhere are left out."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(_label(item, position), item) for position, item in enumerate(value)]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        if not prefix and key in ("config", "files", "version", "created"):
            continue
        flat.update(_flat(item, f"{prefix}.{key}" if prefix else key))
    return flat


def _label(item: Any, position: int) -> str:
    """An element's name, where it has one, so an insertion does not shift all others."""
    if isinstance(item, dict):
        for key in ("name", "node", "output", "layer", "weight"):
            if isinstance(item.get(key), str) and item[key]:
                return str(item[key])
    return str(position)


def _files(a: Manifest, b: Manifest) -> tuple[FileDifference, ...]:
    found = []
    for name in sorted({*a.files, *b.files}):
        left, right = a.files.get(name), b.files.get(name)
        if left != right:
            sizes = (None if left is None else left.size_bytes, None if right is None else right.size_bytes)
            found.append(FileDifference(name, sizes))
    return tuple(found)
