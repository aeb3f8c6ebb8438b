"""One version, and the roll-outs of a model, as rich renderables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.layout import Moment, key_values, make_table
from repo_manager.report.tables import format_bytes, format_share
from repo_manager.repository.difference import judged_drift, kept_sparsity

if TYPE_CHECKING:
    from repo_manager.repository import Manifest, ModelEntry, ModelState, RolloutRecord, VersionEntry

__all__ = ["history_view", "version_view"]

_OUTCOME_STYLES = {"done": "green", "undone": "yellow", "failed": "red"}


def version_view(model: ModelEntry, version: VersionEntry, state: ModelState) -> list[RenderableType]:
    """Show one version: what state it is in, where it came from, what was checked, and its files.

    Args:
        model: the model.
        version: one of its versions, as a deep scan found it.
        state: what is remembered of the model.
    """
    tags = [tag for tag, number in sorted(state.tags.items()) if number == version.version]
    pairs: list[tuple[str, object]] = [
        ("version", f"{model.name}:{version.version}"),
        ("folder", version.path),
        ("state", _words_of_state(model, version, state)),
        ("tags", ", ".join(tags) or "-"),
    ]
    manifest = version.manifest
    if manifest is None:
        pairs.append(("manifest", f"none; `repo-manager adopt {model.name}` writes one"))
    else:
        pairs += _facts(manifest)
    if version.size_bytes is not None:
        pairs.append(("size", format_bytes(version.size_bytes)))
    pairs += [("problem", Text(problem, style="red")) for problem in version.problems]
    return [key_values(pairs), *([] if manifest is None else _tables(manifest))]


def _words_of_state(model: ModelEntry, version: VersionEntry, state: ModelState) -> str | Moment:
    words = ["published"]
    if version.version in model.selected:
        words.append("selected by the version policy")
    if state.unproven is not None and state.unproven.version == version.version:
        words.append(f"on trial since {state.unproven.at}")
    last = state.deployments[-1] if state.deployments else None
    if last is not None and last.version == version.version:
        return Moment(last.at, ", ".join([*words, "deployed "]))
    return ", ".join(words)


def _facts(manifest: Manifest) -> list[tuple[str, object]]:
    conversion, source = manifest.conversion or {}, manifest.source or {}
    pairs: list[tuple[str, object]] = [
        ("created", Moment(manifest.created) if manifest.created else "-"),
        ("backend", manifest.backend or "-"),
        ("precision", manifest.precision or "-"),
        ("source", " ".join(str(part)[:19] for part in (source.get("path"), source.get("digest")) if part) or "-"),
    ]
    origin = manifest.extra.get("copied_from")
    if isinstance(origin, Mapping):
        pairs.append(
            ("copied from", f"{origin.get('model')}:{origin.get('version')} of {origin.get('repository')}"),
        )
    if (kept := kept_sparsity(manifest)) is not None:
        pairs.append(("2:4", f"{format_share(kept)} of the parameters"))
    if (drift := judged_drift(manifest)) is not None:
        samples = conversion.get("samples")
        pairs.append(("drift", f"{drift:.3g}" + (f" on {samples} samples" if samples else "")))
    golden = manifest.golden
    pairs.append(("golden sample", "none" if not golden else f"tolerance {golden.get('tolerance', 'not given')}"))
    tools = {**manifest.tools, **_mapping(conversion.get("tools"))}
    if tools:
        pairs.append(("made with", ", ".join(f"{tool} {release}" for tool, release in sorted(tools.items()))))
    return pairs


def _tables(manifest: Manifest) -> list[RenderableType]:
    views: list[RenderableType] = []
    checks = [each for each in (manifest.conversion or {}).get("checks") or () if isinstance(each, Mapping)]
    if checks:
        rows = [
            [check.get("name", "-"), "passed" if check.get("passed") else "failed", check.get("detail", "")]
            for check in checks
        ]
        views.append(make_table("Checks", ["check", "outcome", "found"], rows))
    files = [[name, format_bytes(file.size_bytes), file.sha256[:19]] for name, file in sorted(manifest.files.items())]
    return [*views, make_table("Files", ["file", "size", "digest"], files, right="size", drop="digest")]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def history_view(name: str, records: Sequence[RolloutRecord]) -> list[RenderableType]:
    """Show the roll-outs of a model, the latest first."""
    if not records:
        return [Text(f"{name} was never deployed.")]
    rows = [
        [
            Moment(record.at),
            record.action,
            "all" if record.version is None else record.version,
            ", ".join(map(str, record.before)) or "-",
            record.target or "not recorded",
            record.by or "not recorded",
            Text(
                f"{record.outcome}: {record.reason}" if record.reason else record.outcome,
                style=_OUTCOME_STYLES.get(record.outcome, ""),
            ),
        ]
        for record in reversed(records)
    ]
    columns = ["when", "action", "version", "before", "target", "by", "outcome"]
    return [make_table(f"Roll-outs of {name}", columns, rows, right="version", drop="by,before,target")]
