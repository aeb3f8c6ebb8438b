"""Repositories, versions and signatures as rich renderables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from repo_manager.report.layout import Moment, key_values, last_deployed, make_table
from repo_manager.report.tables import format_bytes, format_share, pruning_facts
from repo_manager.report.terminal import next_command
from repo_manager.repository.difference import judged_drift, kept_sparsity, measured_accuracy
from repo_manager.triton_config.compare import ReloadEffect

if TYPE_CHECKING:
    from repo_manager.repository.difference import VersionDifference
    from repo_manager.repository.location import Location
    from repo_manager.repository.manifest import Manifest
    from repo_manager.repository.plan.configuration import ConfigChange
    from repo_manager.repository.plan.removal import Removal
    from repo_manager.repository.relabel import LabelChange
    from repo_manager.repository.repair import Repair
    from repo_manager.repository.scan import ModelEntry
    from repo_manager.repository.signing import SignatureCheck, WrittenSignature
    from repo_manager.repository.state import ModelState
    from repo_manager.triton_config.problems import Problem

__all__ = [
    "config_change_view",
    "difference_view",
    "label_change_view",
    "labels_view",
    "model_view",
    "models_view",
    "problems_view",
    "removals_view",
    "repairs_view",
    "signature_checks_view",
    "signature_view",
]


def models_view(root: Location, models: Sequence[ModelEntry], states: Mapping[str, ModelState]) -> list[RenderableType]:
    """List models, one a line.

    Args:
        root: the model repository: a folder, or a place in object storage.
        models: the models, in the order of the rows. Empty: the view says how to add one.
        states: model -> its record. One may be missing.
    """
    if not models:
        return [Text(f"{root} holds no models yet. Add one with: repo-manager add MODEL.onnx --name NAME")]
    rows = [
        [
            model.name,
            model.backend or "-",
            _numbers([entry.version for entry in model.versions]),
            _numbers(model.selected),
            _tags(states.get(model.name)),
            model.max_batch_size,
            _problems(model.problems),
        ]
        for model in models
    ]
    columns = ["model", "backend", "published", "selected", "tags", "max batch", "problems"]
    return [make_table(str(root), columns, rows, right="max batch", drop="max batch,backend,tags")]


def model_view(model: ModelEntry, state: ModelState) -> list[RenderableType]:
    """Show one model with its versions."""
    current = state.deployments[-1] if state.deployments else None
    facts = key_values(
        [
            ("model", model.name),
            ("backend", model.backend or "-"),
            ("max batch size", model.max_batch_size),
            ("policy", model.policy if isinstance(model.policy, str) else f"versions {_numbers(model.policy)}"),
            ("last deployed", last_deployed(*((None, None) if current is None else (current.version, current.at)))),
            ("problems", _problems(model.problems)),
        ]
    )
    rows = []
    for entry in model.versions:
        manifest = entry.manifest
        rows.append(
            [
                entry.version,
                ", ".join(tag for tag, version in sorted(state.tags.items()) if version == entry.version),
                "yes" if entry.version in model.selected else "",
                (manifest and manifest.precision) or "-",
                _sparsity(manifest),
                _drift(manifest),
                "-" if entry.size_bytes is None else format_bytes(entry.size_bytes),
                "-" if manifest is None or not manifest.created else Moment(manifest.created),
                _source(manifest),
                _problems(entry.problems),
            ]
        )
    columns = ["version", "tags", "selected", "precision", "2:4", "drift", "size", "created", "source", "problems"]
    drop = "source,created,size,2:4,drift"
    views = [facts, make_table("Versions", columns, rows, right="version,size,2:4,drift", drop=drop)]
    known = [(entry.version, entry.manifest and measured_accuracy(entry.manifest)) for entry in model.versions]
    measured = [[version, text] for version, text in known if text]
    if measured:
        views.append(make_table("Accuracy on held-out data", ["version", "accuracy"], measured))
    extras = [(entry.version, entry.manifest and entry.manifest.extra.get("pruned")) for entry in model.versions]
    pruned = [[version, "; ".join(map(": ".join, pruning_facts(record)))] for version, record in extras if record]
    return [*views, make_table("Pruned to 2:4", ["version", "what it cost"], pruned)] if pruned else views


def problems_view(root: Location, problems: Sequence[Problem]) -> list[RenderableType]:
    """Show the findings of `verify`."""
    if not problems:
        return [Text(f"{root}: no problems found", style="green")]
    rows = [[problem.severity.value, problem.where, problem.what, problem.hint] for problem in problems]
    return [make_table(str(root), ["severity", "where", "what", "next step"], rows)]


def repairs_view(repairs: Sequence[Repair], *, dry_run: bool) -> list[RenderableType]:
    """Show the repairs."""
    if not repairs:
        return []
    title = "Would be repaired" if dry_run else "Repaired"
    return [make_table(title, ["where", "action"], [[repair.where, repair.action] for repair in repairs])]


def removals_view(removals: Sequence[Removal], *, dry_run: bool) -> list[RenderableType]:
    """Show the removals, and the space freed."""
    if not removals:
        return [Text("Nothing to remove.")]
    rows = [
        [
            removal.name,
            "the whole model" if removal.whole_model else _numbers(removal.versions),
            format_bytes(removal.size_bytes),
            "; ".join(removal.in_use) or "-",
        ]
        for removal in removals
    ]
    title = "Would be removed" if dry_run else "Removed"
    return [make_table(title, ["model", "versions", "size", "in use"], rows, right="size")]


def difference_view(difference: VersionDifference, *, everything: bool = False) -> list[RenderableType]:
    """Show the differences between two versions: the most asked ones, and every field of the manifests on request."""
    views: list[RenderableType] = [Text(problem, style="yellow") for problem in difference.problems]
    facts = [[fact, a, b] for fact, (a, b) in difference.facts.items()]
    if facts:
        views.append(make_table("Facts", ["", difference.a, difference.b], facts))
    rows = [[field, _short(a), _short(b)] for field, (a, b) in difference.fields.items()]
    if rows and everything:
        views.append(make_table("Records", ["field", difference.a, difference.b], rows))
    elif rows:
        views.append(Text(f"{len(rows)} fields of the manifests differ (--all, --json)", style="dim"))
    if difference.files:
        sizes = [[f.name, *("-" if s is None else format_bytes(s) for s in f.size_bytes)] for f in difference.files]
        views.append(make_table("Files", ["file", difference.a, difference.b], sizes))
    views += [Text(sentence) for sentence in difference.signature]
    if difference.config:
        views.append(Text(difference.config))
    return views or [Text(f"{difference.a} and {difference.b} are the same.")]


def config_change_view(change: ConfigChange, *, shown: bool, repository: str | None = None) -> list[RenderableType]:
    """Show a configuration, or its change, its effect on a server, and the command for the effect.

    Args:
        change: the change, planned or made.
        shown: nothing was to be changed: show the configuration.
        repository: value of `--repository`, for the next command. `None`: the option was not given.
    """
    if shown:
        return [Text(change.before.rstrip())]
    views: list[RenderableType] = [Text(change.diff or "No change.")]
    views += [Text(f"{problem.severity.value}: {problem.where}: {problem.what}") for problem in change.problems]
    if change.diff:
        views.append(Text(f"{_state(change.applied)} At the next load on a running server {_effect(change)}."))
        if change.applied and change.served and change.effect is not ReloadEffect.NOTHING:
            command = next_command("deploy", f"{change.name}:{change.served[-1]}", repository=repository)
            others = " --keep-previous" if len(change.served) > 1 else ""
            views.append(Text(f"A running server does not have it yet. Next: {command}{others}"))
    return views


def _effect(change: ConfigChange) -> str:
    """Describe the effect on a running server at its next load."""
    if change.reloaded:
        return f"version {_numbers(change.reloaded)} loads again"
    if change.effect is ReloadEffect.NOTHING:
        return "nothing changes: the configuration means the same"
    if "instance_group" in change.fields:
        return "the instances change in place; no version loads again"
    return f"version {_numbers(change.served)} is served; a kept version does not load again"


def labels_view(labels: Mapping[str, Sequence[str]]) -> list[RenderableType]:
    """Show the labels of each output."""
    if not labels:
        return [Text("No output has labels.")]
    return [make_table(output, ["class", "label"], list(enumerate(names))) for output, names in labels.items()]


def label_change_view(change: LabelChange) -> list[RenderableType]:
    """Show the effect of changed labels."""
    reloads = f"version {_numbers(change.reloaded)} loads again" if change.reloaded else "nothing changes"
    text = f"{change.output}: {len(change.before)} labels before, {len(change.after)} now, in {change.file}; {reloads}."
    return [Text(f"{text} {_state(change.applied)}")]


def _state(applied: bool) -> str:
    return "Written." if applied else "Not written."


def _short(value: Any, limit: int = 60) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _numbers(numbers: Sequence[int]) -> str:
    """Write version numbers with runs shortened: `1-3, 5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "-"


def _tags(state: ModelState | None) -> str:
    """Write tags with their versions: `stable:1, canary:2`."""
    tags = {} if state is None else state.tags
    return ", ".join(f"{tag}:{version}" for tag, version in sorted(tags.items(), key=lambda each: each[::-1])) or "-"


def _problems(problems: Sequence[str]) -> Text:
    return Text("; ".join(problems), style="red") if problems else Text("-")


def _field(value: Any, *names: str) -> Any:
    for name in names:
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def _sparsity(manifest: Manifest | None) -> str:
    return format_share(None if manifest is None else kept_sparsity(manifest))


def _drift(manifest: Manifest | None) -> str:
    drift = None if manifest is None else judged_drift(manifest)
    return "-" if drift is None else f"{drift:.3g}"


def _source(manifest: Manifest | None) -> str:
    """Return a version's source. Of a copy, the version it is one of."""
    if manifest is not None and (origin := manifest.extra.get("copied_from")):
        return f"{_field(origin, 'model')}:{_field(origin, 'version')} of {_field(origin, 'repository')}"
    return str(_field(manifest and manifest.source, "path") or "-")


# Signatures as tables.


def signature_view(signature: WrittenSignature) -> list[RenderableType]:
    """Show the signed versions."""
    state = "would be written (dry run)" if not signature.applied else "written"
    if signature.replaced:
        state += ", in place of an earlier one"
    facts = [
        ("version", f"{signature.name}:{signature.version}"),
        ("covers", ", ".join(signature.files)),
        ("signature", f"{signature.file} in the repository's root: {state}"),
    ]
    return [key_values(facts)]


def signature_checks_view(checks: Sequence[SignatureCheck]) -> list[RenderableType]:
    """Show the valid signatures."""
    if not checks:
        return []
    if len(checks) == 1:
        return [Text(f"{checks[0].name}:{checks[0].version} is signed by {checks[0].key}", style="green")]
    rows = [[f"{check.name}:{check.version}", check.key, len(check.files)] for check in checks]
    return [make_table("Valid signatures", ["version", "signed by", "files"], rows, right="files")]
