"""One version, and the roll-outs of a model, as rich renderables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.layout import Moment, key_values, make_table
from repo_manager.report.tables import format_bytes, format_share
from repo_manager.repository.difference import judged_drift, kept_sparsity, origin_of, recorded_checks

if TYPE_CHECKING:
    from repo_manager.loadtest.judge import LoadComparison
    from repo_manager.repository.manifest import Manifest
    from repo_manager.repository.scan import ModelEntry, VersionEntry
    from repo_manager.repository.state import KeptLoadTest, ModelState, RolloutRecord

__all__ = ["history_view", "kept_tests_view", "load_differences_view", "version_view"]

_CHECK_STYLES = {"passed": "green", "failed": "red", "no evidence": "yellow"}
_OUTCOME_STYLES = {"done": "green", "undone": "yellow", "failed": "red"}


def version_view(model: ModelEntry, version: VersionEntry, state: ModelState) -> list[RenderableType]:
    """Show one version: its state, its source, its checks, and its files.

    Args:
        model: the model of the version.
        version: one of its versions, as a deep scan found it.
        state: the model's record, for the version's tags, trial and last deployment.
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
    tests = [test for test in state.load_tests if test.version == version.version]
    return [key_values(pairs), *([] if manifest is None else _tables(manifest)), *kept_tests_view(tests)]


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
    if (url := origin_of(manifest)) is not None:
        pairs.append(("fetched from", url))
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
    checks = [
        [name, Text(outcome, style=_CHECK_STYLES[outcome]), detail]
        for name, outcome, detail in recorded_checks(manifest)
    ]
    if checks:
        views.append(make_table("Checks", ["check", "outcome", "found"], checks))
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


def kept_tests_view(tests: Sequence[KeptLoadTest]) -> list[RenderableType]:
    """Show load tests kept, the latest first, a row for each level. Nothing where there are none."""
    rows = []
    for test in reversed(tests):
        target, started = _mapping(test.report.get("target")), str(test.report.get("started", ""))
        for point in test.report.get("points") or ():
            level, latency = _mapping(point), _mapping(_mapping(point).get("latency"))
            rows.append(
                [
                    Moment(started),
                    test.version,
                    level.get("label", "-"),
                    level.get("outcome", "-"),
                    _number(level.get("throughput_per_s"), 1.0),
                    *(_number(latency.get(name), 1e6) for name in ("p50_ns", "p99_ns")),
                    level.get("errors", "-"),
                    target.get("url", "-"),
                ]
            )
    if not rows:
        return []
    columns = ["when", "version", "load", "outcome", "inf/s", "p50 ms", "p99 ms", "errors", "server"]
    right = "version,inf/s,p50 ms,p99 ms,errors"
    return [make_table("Load tests", columns, rows, right=right, drop="server,errors,p50 ms")]


def _number(value: Any, size: float) -> str:
    return f"{value / size:.4g}" if isinstance(value, int | float) else "-"


def load_differences_view(compared: LoadComparison) -> list[RenderableType]:
    """Show how the latest kept load tests of two versions differ."""
    sides = (compared.before, compared.after)
    names = [f"{side.target.model}:{side.target.version}" for side in sides]
    when = ", ".join(f"{name} at {side.started}" for name, side in zip(names, sides, strict=True))
    views: list[RenderableType] = []
    if compared.differences:
        rows = [
            [each.level, each.metric, each.before, each.after, each.outcome, each.change]
            for each in compared.differences
        ]
        columns = ["load", "number", *names, "outcome", "change"]
        views.append(make_table("Load tests", columns, rows, right=",".join(names), drop="change"))
    else:
        views.append(Text("The load tests kept have no level in common."))
    views.append(Text(f"Measured one after the other: {when}. `repo-manager compare` measures both together."))
    return [*views, *(Text(f"Note: {note}") for note in compared.notes)]
