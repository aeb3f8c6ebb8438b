"""A version's model card: its whole story in sections, as one HTML file or as Markdown, and an index of cards."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from repo_manager.loadtest.result import LoadTestReport
from repo_manager.report.markdown import markdown_code, markdown_table, markdown_text
from repo_manager.report.page import render_page
from repo_manager.report.tables import format_bytes, format_count, format_share, pruning_facts
from repo_manager.repository.difference import (
    judged_drift,
    kept_sparsity,
    measured_accuracy,
    origin_of,
    recorded_checks,
)
from repo_manager.repository.manifest import Manifest
from repo_manager.repository.scan import ModelEntry, VersionEntry
from repo_manager.repository.state import ModelState, current_version, history_of
from repo_manager.types import Backend

__all__ = ["Card", "Section", "card_html", "card_markdown", "index_html", "version_card"]

_MOST_ROLLOUTS = 20
_WITHOUT_SPARSE_KERNELS = (
    "ONNX Runtime has no sparse kernels, so nothing of this version runs sparse. The numbers say what a TensorRT "
    "engine of the same model could gain."
)
_SAID = {True: "yes", False: "no"}


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of a card.

    Attributes:
        title: heading of the section. `card_html` recognises `Sparsity` and `Pruning` by it.
        facts: name and value of each.
        heads: titles of the table's columns. Empty for no table.
        rows: cells of the table, row by row.
        code: text as it is, a file for instance.
        note: remark below the table. A section can consist of it alone.
    """

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    heads: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    code: str = ""
    note: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing."""
        return not (self.facts or self.rows or self.code or self.note)


@dataclasses.dataclass(frozen=True)
class Card:
    """The facts of one version.

    Attributes:
        name: name of the model, also the first part of `title` and `file_name`.
        version: number of the version, never a tag.
        headline: the most important facts: name and value.
        sections: in the order of the story.
    """

    name: str
    version: int
    headline: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]

    @property
    def title(self) -> str:
        """`NAME:VERSION`."""
        return f"{self.name}:{self.version}"

    @property
    def file_name(self) -> str:
        """The name of its page in a folder of cards."""
        return f"{self.name}-{self.version}.html"


def version_card(
    model: ModelEntry,
    version: VersionEntry,
    state: ModelState,
    *,
    signature: str = "",
    loads: Sequence[LoadTestReport] = (),
) -> Card:
    """Collect the facts of a version.

    Args:
        model: the model of the version.
        version: one of its versions, as a deep scan found it.
        state: the model's record, for the version's tags and roll-outs.
        signature: state of its signature, in words. Empty: nothing.
        loads: load tests. Those of other models and versions are left out.
    """
    manifest = version.manifest
    sections = [_state(model, version, state, signature)]
    if manifest is None:
        note = f"It has no manifest, so nothing is known of its origin; `repo-manager adopt {model.name}` writes one."
        sections.append(Section("Origin", note=note))
    else:
        sections += [_source(manifest), *_conversion(manifest), _sparsity(manifest), _pruning(manifest)]
        sections += [_engine(manifest), _configuration(manifest), _files(manifest)]
    sections += [_rollouts(version.version, state), _loads(model.name, version.version, loads)]
    headline = _headline(version, manifest)
    return Card(model.name, version.version, headline, tuple(each for each in sections if not each.is_empty))


def card_html(card: Card, *, sparsity: Markup | None = None) -> str:
    """Return the card as a complete HTML document without references to the outside.

    Args:
        card: from `version_card`. Its texts are escaped.
        sparsity: from `sparsity_part`, in place of the card's own tables of layers. `None` for none.
    """
    return render_page("card.html.j2", card=card, sparsity=sparsity)


def card_markdown(card: Card) -> str:
    """Return the card as GitHub-flavoured Markdown."""
    lines = [f"# {markdown_text(card.title)}", ""]
    lines += [*markdown_table([name for name, _ in card.headline], [[value for _, value in card.headline]]), ""]
    for section in card.sections:
        lines += [f"## {section.title}", ""]
        lines += [f"- **{markdown_text(name)}**: {markdown_text(value)}" for name, value in section.facts]
        lines += [""] * bool(section.facts)
        if section.rows:
            lines += [*markdown_table(section.heads, section.rows), ""]
        if section.code:
            lines += [*markdown_code(section.code, "text"), ""]
        if section.note:
            lines += [markdown_text(section.note), ""]
    return "\n".join(lines)


def index_html(repository: str, cards: Sequence[Card]) -> str:
    """Return a page with a list of cards, and links to their files beside it.

    Args:
        repository: name of the repository, for the title.
        cards: the cards, in the order of appearance listed.
    """
    facts = {card.title: {**dict(card.headline), **_listed(card)} for card in cards}
    heads = tuple(dict.fromkeys(name for found in facts.values() for name in found))
    rows = [(card, [facts[card.title].get(name, "") for name in heads]) for card in cards]
    return render_page("index.html.j2", repository=repository, heads=heads, rows=rows)


def _listed(card: Card) -> dict[str, str]:
    """Return the index's cells beside the most important facts: the state of the version, and its tags."""
    return {name: value for section in card.sections[:1] for name, value in section.facts if name in ("state", "tags")}


def _headline(version: VersionEntry, manifest: Manifest | None) -> tuple[tuple[str, str], ...]:
    if manifest is None:
        return (("size", _size(version)),)
    kept, drift = kept_sparsity(manifest), judged_drift(manifest)
    found = {
        "precision": manifest.precision,
        "backend": manifest.backend,
        "2:4 parameters": None if kept is None else format_share(kept),
        "drift": None if drift is None else f"{drift:.3g}",
        "accuracy": measured_accuracy(manifest),
        "size": _size(version),
    }
    return tuple((name, str(value)) for name, value in found.items() if value)


def _size(version: VersionEntry) -> str:
    return "unknown" if version.size_bytes is None else format_bytes(version.size_bytes)


def _at(value: Any, *path: str) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _pairs(found: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(value)) for name, value in found.items() if value not in (None, "", (), [], {}))


def _state(model: ModelEntry, version: VersionEntry, state: ModelState, signature: str) -> Section:
    tags = sorted(tag for tag, number in state.tags.items() if number == version.version)
    words = ["published"]
    words += ["selected by the version policy"] if version.version in model.selected else []
    words += ["deployed last"] if current_version(state) == version.version else []
    facts = {
        "state": ", ".join(words),
        "tags": ", ".join(tags),
        "signature": signature,
        "problems": "; ".join(version.problems),
    }
    return Section("State", _pairs(facts))


def _source(manifest: Manifest) -> Section:
    source, origin, calibration = manifest.source, manifest.extra.get("copied_from"), _at(manifest.extra, "request")
    size = _at(source, "size_bytes")
    copied = f"{_at(origin, 'model')}:{_at(origin, 'version')} of {_at(origin, 'repository')}" if origin else None
    data = " ".join(str(part) for part in (_at(calibration, "calibration") or {}).values() if part)
    return Section(
        "Source",
        _pairs(
            {
                "file": _at(source, "path"),
                "digest": _at(source, "digest"),
                "size": None if size is None else format_bytes(size),
                "fetched from": origin_of(manifest),
                "copied from": copied,
                "created": manifest.created,
                "calibration data": data,
                "made with": ", ".join(f"{tool} {release}" for tool, release in sorted(manifest.tools.items())),
                "machine": _at(manifest.machine, "system"),
            }
        ),
    )


def _conversion(manifest: Manifest) -> list[Section]:
    found = manifest.conversion
    if not isinstance(found, Mapping):
        return []
    checks = recorded_checks(manifest)
    drift = tuple(
        (
            str(_at(item, "output")),
            _number(_worst(item), ".3g"),
            _number(_at(item, "max_abs_error"), ".3g"),
            _number(_at(item, "cosine"), ".6f"),
            format_share(_at(item, "top1_agreement")),
        )
        for item in found.get("drift") or ()
    )
    heads = ("output", "relative error", "largest error", "cosine", "same top class")
    samples = f"Against the source, on {found.get('samples')} {found.get('inputs')} samples."
    kept = found.get("kept") or ()
    reasons = dict.fromkeys(str(_at(item, "reason")) for item in kept)
    note = f"{len(kept)} operators were left in higher precision: {'; '.join(reasons)}." if kept else ""
    accuracy = found.get("accuracy")
    sections = [Section("Checks", heads=("check", "result", "detail"), rows=checks, note=note)]
    sections.append(Section("Drift", heads=heads, rows=drift, note=samples if drift else ""))
    if isinstance(accuracy, Mapping):
        facts = {name: accuracy.get(name) for name in ("data", "digest", "metric", "detail")}
        sections.append(Section("Accuracy on held-out data", _pairs(facts)))
    return sections


def _worst(item: Any) -> float | None:
    """Return the error judged: the larger of those with and without 16-bit rounding."""
    errors = [_at(item, name) for name in ("relative_error", "rounded_relative_error")]
    return max((error for error in errors if error is not None), default=None)


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _sparsity(manifest: Manifest) -> Section:
    totals = _at(manifest.sparsity, "totals")
    layers = _at(manifest.sparsity, "layers") or ()
    if totals is None:
        return Section("Sparsity")
    valid = sum(_at(layer, "verdict") == "valid" for layer in layers)
    kept, bound, gain = kept_sparsity(manifest), _at(totals, "speedup_bound"), _at(totals, "gain_share")
    note = _WITHOUT_SPARSE_KERNELS if manifest.backend == Backend.ONNXRUNTIME and valid else ""
    rows = tuple(
        (
            str(_at(layer, "node")),
            str(_at(layer, "op_type")),
            "x".join(map(str, _at(layer, "shape") or ())),
            format_count(_at(layer, "macs")),
            str(_at(layer, "reason") or _at(layer, "verdict")),
        )
        for layer in layers
    )
    facts = {
        "2:4 layers": f"{valid} of {len(layers)}",
        "2:4 parameters": None if kept is None else format_share(kept),
        "compute with a possible gain": None if gain is None else format_share(gain),
        "most sparse math can give": None if bound is None else f"{bound:.2f}x (Amdahl)",
    }
    return Section("Sparsity", _pairs(facts), ("layer", "operator", "shape", "MACs", "verdict"), rows, note=note)


def _pruning(manifest: Manifest) -> Section:
    pruned = manifest.extra.get("pruned")
    if not isinstance(pruned, Mapping) or "pruned" not in pruned:
        return Section("Pruning")
    return Section("Pruning", (("method", str(pruned.get("method"))), *pruning_facts(pruned)))


def _engine(manifest: Manifest) -> Section:
    """Return the facts of an engine, and how far each weight got to a sparse kernel, as its builder said."""
    engine = manifest.extra.get("engine")
    known = ("library", "library_version", "gpu", "compute_capability", "platform")
    rows = tuple(
        (
            str(_at(layer, "layer")),
            str(_at(layer, "pattern")),
            *(_SAID.get(_at(layer, name), "not reported") for name in ("eligible", "chosen")),
            str(_at(layer, "reason") or ""),
        )
        for layer in _at(engine, "layers") or ()
    )
    facts = _pairs({name.replace("_", " "): _at(engine, "build", name) for name in known})
    return Section("Engine", facts, ("layer", "pattern", "eligible", "chosen", "where it stopped"), rows)


def _configuration(manifest: Manifest) -> Section:
    tolerance = _at(manifest.golden, "tolerance")
    golden = "none" if not manifest.golden else f"recorded, tolerance {tolerance}"
    return Section("Configuration", (("golden sample", golden),), code=manifest.config)


def _files(manifest: Manifest) -> Section:
    rows = tuple((name, format_bytes(record.size_bytes), record.sha256) for name, record in manifest.files.items())
    return Section("Files", heads=("file", "size", "sha256"), rows=rows)


def _rollouts(version: int, state: ModelState) -> Section:
    records = [each for each in reversed(history_of(state)) if each.version in (version, None)][:_MOST_ROLLOUTS]
    rows = tuple(
        (each.at, each.action, each.target or "-", each.by or "-", ": ".join(filter(None, (each.outcome, each.reason))))
        for each in records
    )
    return Section("Deployments", heads=("when", "action", "target", "by", "outcome"), rows=rows)


def _loads(name: str, version: int, loads: Sequence[LoadTestReport]) -> Section:
    rows = []
    for report in loads:
        if (report.target.model, report.target.version) != (name, str(version)):
            continue
        for point in report.points:
            times = [_milliseconds(value) for value in (point.latency.p50_ns, point.latency.p99_ns)]
            where = report.environment.get("machine", "") or report.target.url
            rows.append((report.started, where, point.label, f"{point.throughput_per_s:,.1f}", *times, point.outcome))
    return Section(
        "Load tests", heads=("started", "where", "load", "inferences/s", "p50", "p99", "outcome"), rows=tuple(rows)
    )


def _milliseconds(nanoseconds: int | None) -> str:
    return "-" if nanoseconds is None else f"{nanoseconds / 1e6:.3g} ms"
