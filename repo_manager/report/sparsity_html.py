"""A sparsity report as one HTML file: the network as a strip of layers, and the table below. No JavaScript."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from repo_manager.optional import deferred
from repo_manager.report.prune_html import STYLE, pruning_section
from repo_manager.sparsity import LayerSparsity, SparsityReport, Verdict

if TYPE_CHECKING:
    import jinja2

    from repo_manager.engine.evidence import LayerEvidence
else:
    jinja2 = deferred("jinja2")

__all__ = ["sparsity_page"]

_STRIP_WIDTH = 1200.0
# Okabe and Ito's palette, which stays apart for colour-blind readers; a letter says the same without colour.
_STYLE_OF = {
    Verdict.VALID: ("valid", "#009e73", "holds 2:4: sparse Tensor Cores can take it"),
    Verdict.NOT_24: ("dense", "#e69f00", "could be 2:4, and is not"),
    Verdict.GROUPED: ("grouped", "#cc79a7", "group convolution: never sparse"),
    Verdict.INDIVISIBLE: ("odd", "#999999", "its size does not divide by 4"),
    Verdict.DYNAMIC: ("dynamic", "#56b4e9", "its weight is computed at run time"),
    Verdict.UNSUPPORTED: ("other", "#555555", "the operator cannot run sparse"),
}

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>2:4 sparsity of {{ title }}</title>
<style>
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; } .sub { opacity: .7; margin-top: .2rem; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem 2rem; margin: 1.2rem 0; }
.facts b { display: block; font-size: 1.5rem; }
svg { width: 100%; height: 76px; display: block; border-radius: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: .6rem 0 1.6rem; padding: 0; list-style: none; }
.key { display: inline-block; width: .9em; height: .9em; border-radius: 2px; vertical-align: -1px; margin-right: .4em; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { position: sticky; top: 0; background: Canvas; } td.n { white-space: nowrap; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
td.name { overflow-wrap: anywhere; min-width: 10rem; } .hint { opacity: .75; display: block; }
{{ more_style | safe }}</style>
</head>
<body>
<h1>2:4 sparsity of {{ title }}</h1>
<p class="sub">{{ report.source }}{% if shapes %}<br>Compute counted at {{ shapes }}{% endif %}</p>
<div class="facts">
<div><b>{{ report.valid | length }} of {{ report.layers | length }}</b> weights in use are 2:4</div>
<div><b>{{ percent(totals.valid_parameters, totals.parameters) }}</b> of {{ si(totals.parameters) }} weights</div>
<div><b>{{ percent(totals.valid_macs, totals.macs) }}</b> of {{ si(totals.macs) }} multiply-accumulates can gain</div>
<div><b>{{ factor(totals.speedup_bound) }}</b> is the most that sparse math can give (Amdahl); less is usual</div>
<div><b>{{ factor(totals.speedup_bound_if_pruned) }}</b> if every layer that could be 2:4 were</div>
</div>
{% if bars %}
<svg viewBox="0 0 {{ width }} 76" preserveAspectRatio="none" role="img"
 aria-label="The network from input to output; a layer's width is its share of the compute">
{% for bar in bars %}<rect x="{{ bar.x }}" y="0" width="{{ bar.width }}" height="76" fill="{{ bar.colour }}"
 stroke="#fff" stroke-opacity="0.55" stroke-width="0.5"><title>{{ bar.title }}</title></rect>
{% endfor %}</svg>
{% endif %}
<ul class="legend">
{% for key in keys %}<li><span class="key" style="background: {{ key.colour }}"></span>{{ key.count }} {{ key.label }}:
 {{ key.meaning }} ({{ percent(key.macs, totals.macs) }} of the compute)</li>
{% endfor %}</ul>
{% if totals.uncounted_layers %}<p>{{ totals.uncounted_layers }} layers are not in the strip and the sums of compute:
their shapes are not known.</p>{% endif %}
<div class="scroll"><table>
<thead><tr><th>Layer</th><th>Operator</th><th>Weight</th><th>Shape</th><th class="n">Axis</th>
<th class="n">Valid groups</th><th class="n">Non-zero</th><th class="n">Compute</th><th>Verdict</th></tr></thead>
<tbody>
{% for layer in report.layers %}<tr>
<td class="name">{{ layer.node }}</td><td>{{ layer.op_type }}</td>
<td class="name">{{ layer.weight }}
{% if layer.via %}<span class="hint">via {{ layer.via | join(", ") }}</span>{% endif %}</td>
<td>{{ layer.dtype }} {{ layer.shape | join("&times;" | safe) }}</td>
<td class="n">{{ "" if layer.axis is none else layer.axis }}</td>
<td class="n">{% if layer.groups %}{{ layer.valid_groups }} / {{ layer.groups }}{% endif %}</td>
<td class="n">{% if layer.size %}{{ percent(layer.size - layer.zeros, layer.size) }}{% endif %}</td>
<td class="n">{% if layer.macs is none %}?{% else %}{{ percent(layer.macs, totals.macs) }}{% endif %}</td>
<td><span class="key" style="background: {{ colour_of(layer) }}"></span>{{ layer.reason }}
{% for hint in layer.hints %}<span class="hint">{{ hint }}</span>{% endfor %}</td>
</tr>
{% endfor %}</tbody>
</table></div>
{% if evidence %}
<h2>Sparse kernels in the engine</h2>
<p class="sub">How far each weight got: its pattern is 2:4, the builder offered it to sparse kernels, it chose one.
Nothing is said here that the builder did not say{% if timed %}; times are medians on this machine's GPU, by
TensorRT's own profiler, which count a fused layer in the row of each of its nodes{% endif %}.</p>
<div class="scroll"><table>
<thead><tr><th>Layer</th><th>Engine layer</th><th>Pattern</th><th>Eligible</th><th>Chosen</th><th>Tactic</th>
{% if timed %}<th class="n">Sparse</th><th class="n">Dense</th>{% endif %}<th>Where it stopped</th></tr></thead>
<tbody>
{% for row in evidence %}<tr>
<td class="name">{{ row.layer }}</td><td class="name">{{ row.engine_layer or "not listed" }}</td>
<td>{{ row.pattern }}</td><td>{{ said[row.eligible] }}</td><td>{{ said[row.chosen] }}</td>
<td class="name">{{ row.tactic or "not reported" }}</td>
{% if timed %}<td class="n">{{ time(row.time_sparse_ns) }}</td>
<td class="n">{{ time(row.time_dense_ns) }}</td>{% endif %}
<td>{{ row.reason }}</td>
</tr>
{% endfor %}</tbody>
</table></div>
{% endif %}
{{ pruning | safe }}
<p class="sub">What each verdict and hint means, and its source: the document sparsity.md of repo-manager.</p>
</body>
</html>
"""


@dataclass(frozen=True)
class _Bar:
    x: str
    width: str
    colour: str
    title: str


@dataclass(frozen=True)
class _Key:
    label: str
    colour: str
    meaning: str
    count: int
    macs: int


def sparsity_page(
    report: SparsityReport,
    *,
    title: str,
    evidence: Sequence[LayerEvidence] = (),
    pruned: Mapping[str, Any] | None = None,
) -> str:
    """Return the whole page; every name from the model is escaped.

    Args:
        report: what to show.
        title: the model's name.
        evidence: of an engine that was built of it; empty for none.
        pruned: what pruning did, as it is in a manifest or in JSON; `None`: nothing is known of it.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_TEMPLATE).render(
        report=report,
        totals=report.totals,
        title=title,
        shapes="; ".join(f"{name}: {list(shape)}" for name, shape in report.shapes.items()),
        width=f"{_STRIP_WIDTH:g}",
        bars=_bars(report),
        keys=_keys(report),
        percent=_percent,
        si=_si,
        factor=_factor,
        colour_of=lambda layer: _STYLE_OF[layer.verdict][1],
        evidence=evidence,
        more_style="" if pruned is None else STYLE,
        pruning="" if pruned is None else pruning_section(pruned),
        timed=any(row.time_sparse_ns is not None or row.time_dense_ns is not None for row in evidence),
        said={True: "yes", False: "no", None: "not reported"},
        time=lambda time_ns: "" if time_ns is None else f"{time_ns / 1e3:.3g} us",
    )


def _bars(report: SparsityReport) -> list[_Bar]:
    bars: list[_Bar] = []
    done = 0
    for layer in report.layers:
        if not layer.macs:
            continue
        start, end = (_STRIP_WIDTH * macs / report.totals.macs for macs in (done, done + layer.macs))
        done += layer.macs
        text = f"{layer.node} ({layer.op_type}, {_percent(layer.macs, report.totals.macs)}): {layer.reason}"
        bars.append(_Bar(f"{start:.2f}", f"{end - start:.2f}", _STYLE_OF[layer.verdict][1], text))
    return bars


def _keys(report: SparsityReport) -> list[_Key]:
    keys = []
    for verdict, (label, colour, meaning) in _STYLE_OF.items():
        layers: list[LayerSparsity] = [layer for layer in report.layers if layer.verdict is verdict]
        if layers:
            keys.append(_Key(label, colour, meaning, len(layers), sum(layer.macs or 0 for layer in layers)))
    return keys


def _percent(part: int, whole: int) -> str:
    return f"{100.0 * part / whole:.1f} %" if whole else "none"


def _si(number: int) -> str:
    for limit, suffix in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {suffix}"
    return str(number)


def _factor(bound: float | None) -> str:
    return "unknown" if bound is None else f"{bound:.2f}x"
