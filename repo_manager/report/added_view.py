"""The results of `add`, and plans and results of `apply`, as rich renderables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from repo_manager.engine.fit import releases
from repo_manager.report.layout import key_values, make_table
from repo_manager.report.tables import conversion_facts, format_share
from repo_manager.report.terminal import next_command

if TYPE_CHECKING:
    from repo_manager.declared import ApplyResult, ModelPlan

__all__ = [
    "added_files_view",
    "added_view",
    "apply_plan_view",
    "apply_view",
    "ensemble_view",
    "evidence_table",
    "servers_for",
]


def added_view(added: Any, repository: str | None = None) -> list[RenderableType]:
    """Show a `pipeline.Added`.

    Args:
        added: the result of `pipeline.adding.add`. One not published is shown as a dry run.
        repository: value of `--repository`, for the next command. `None`: the option was not given.
    """
    views: list[RenderableType] = []
    layers = added.engine.get("layers")
    if layers:
        views.append(evidence_table(layers))
    views.append(key_values(_facts(added)))
    if added.controls:
        rows = [[f"{control.name}:{control.version}", control.purpose] for control in added.controls]
        views.append(make_table("Controls", ["model", "what comparing with it tells"], rows))
    if added.published:
        command = next_command("deploy", f"{added.name}:{added.version}", repository=repository)
        views.append(Text(f"No server serves it yet. Next: {command}"))
    else:
        views.append(Text(f"Dry run: nothing was written. config.pbtxt would be:\n{added.config}"))
    return views


def added_files_view(added: Any, repository: str | None = None) -> list[RenderableType]:
    """Show a `pipeline.adding_files.AddedFiles`. `repository` as for `added_view`.

    Args:
        added: the result of `pipeline.adding_files.add_files`. One not published is shown as a dry run.
        repository: value of `--repository`, for the next command. `None`: the option was not given.
    """
    proof = {
        "embedded server": f"{added.requests} request(s), answers recorded on the embedded server",
        "given": f"{added.requests} request(s) with the answers of the sample",
        "nobody": f"{added.requests} request(s) without answers: it could not run here",
    }
    pairs: list[tuple[str, object]] = [
        ("version" if added.published else "would be version", f"{added.name}:{added.version}"),
        ("folder", added.path),
        ("backend", added.backend),
        ("files", ", ".join(added.files) or "none"),
        ("sample", proof.get(added.golden, "none: deploy will make requests up")),
    ]
    if added.unreproducible:
        pairs.append(("not compared", f"outputs that differ from run to run: {', '.join(added.unreproducible)}"))
    pairs += [("mind", Text(note, style="yellow")) for note in added.notes]
    pairs += [("mind", Text(f"{problem.message}. {problem.hint}", style="yellow")) for problem in added.fit]
    if added.published:
        command = next_command("deploy", f"{added.name}:{added.version}", repository=repository)
        last = Text(f"No server serves it yet. Next: {command}")
    else:
        last = Text(f"Dry run: nothing was written. config.pbtxt would be:\n{added.config}")
    return [key_values(pairs), last]


def ensemble_view(made: Any, repository: str | None = None) -> list[RenderableType]:
    """Show a `pipeline.ensembling.MadeEnsemble`. `repository` as for `added_view`.

    Args:
        made: the result of `pipeline.ensembling.make_ensemble`. Its edges come first, then its `added`.
        repository: value of `--repository`, for the next command. `None`: the option was not given.
    """
    rows = [[edge.source, f"{edge.model}.{edge.input}", _MATCHED[edge.by]] for edge in made.edges]
    views: list[RenderableType] = [make_table(" -> ".join(made.models), ["tensor", "goes to", "because of"], rows)]
    if made.left_out:
        views.append(Text(f"Optional inputs that get nothing: {', '.join(made.left_out)}", style="yellow"))
    return [*views, *added_files_view(made.added, repository)]


def images_view(made: Any, repository: str | None = None) -> list[RenderableType]:
    """Show the models of a `pipeline.preprocessing.AddedWithImages` beside the main one. `repository` as for
    `added_view`.

    Args:
        made: the result of `pipeline.preprocessing.add_with_images`. Without an ensemble nothing is shown.
        repository: value of `--repository`, for the next command. `None`: the option was not given.
    """
    if made.ensemble is None:
        return []
    ran = made.ensemble.added.golden == "embedded server"
    proof = f"{len(made.images)} image(s): {'as its steps do one by one' if ran else 'it could not run here'}"
    pairs: list[tuple[str, object]] = [
        (f"{each.name}:{each.version}", "makes the input of images" if each is made.preprocess else "takes images")
        for each in made.beside
    ]
    # A deploy of the ensemble brings the versions selected by config.pbtxt. Beside an older one, a new one is not.
    newer = [each for each in (made.preprocess, made.added) if each is not None and each.version > 1]
    commands = [
        next_command("deploy", f"{each.name}:{each.version}", repository=repository)
        for each in (*newer, made.ensemble.added)
    ]
    return [key_values([*pairs, ("proof", proof)]), Text(f"To serve both: {' && '.join(commands)}")]


_MATCHED = {"map": "--map", "name": "its name", "type and dims": "type and dims", "input": "nothing else fits"}


def _pruning(pruned: Any) -> list[tuple[str, object]]:
    """Say how far pruning on data moved the outputs."""
    if pruned is None or pruned.evidence is None:
        return []
    found = pruned.evidence
    ours, by_magnitude = (max(item.relative_error for item in part) for part in (found.drift, found.magnitude_drift))
    where = f"{found.judged_samples} {found.judged_on} sample(s)"
    return [("pruning", f"drift {ours:.3g} on {where}, {by_magnitude:.3g} by magnitude")]


def _facts(added: Any) -> list[tuple[str, object]]:
    totals = added.sparsity.totals
    valid = f"{len(added.sparsity.valid)} of {len(added.sparsity.layers)} layers hold the 2:4 pattern"
    if totals.parameters:
        valid += f", {format_share(totals.valid_parameters / totals.parameters)} of their parameters"
    pairs: list[tuple[str, object]] = [
        ("version" if added.published else "would be version", f"{added.name}:{added.version}"),
        ("folder", added.path),
        ("backend", f"{added.backend.backend} ({added.backend.reason})"),
        ("batch axis", f"{added.batch_axis.kind}: {added.batch_axis.reason}"),
        *_batch_warning(added.batch_axis),
        ("sparsity", valid),
        *_pruning(added.pruned),
        *conversion_facts(added.conversion),
        *_engine_facts(added.engine, str(added.backend.backend)),
        *[("mind", Text(f"{problem.message}. {problem.hint}", style="yellow")) for problem in added.fit],
    ]
    if added.golden.unreproducible:
        pairs.append(("not compared", f"outputs that differ from run to run: {', '.join(added.golden.unreproducible)}"))
    if added.config_kept:
        pairs.append(
            ("config.pbtxt", f"stays as it is; this version alone would say otherwise: {', '.join(added.config_kept)}")
        )
    return pairs


def _batch_warning(axis: Any) -> list[tuple[str, object]]:
    if not axis.forced:
        return []
    text = "--max-batch-size was given all the same: an answer can depend on other clients' requests"
    return [("mind", Text(text, style="yellow"))]


def _engine_facts(engine: Mapping[str, Any], backend: str) -> list[tuple[str, object]]:
    version = engine.get("plan_version")
    if version is None:
        return []
    kinds = ", ".join(engine.get("compute_capabilities", ())) or "not known"
    pairs: list[tuple[str, object]] = [("engine", f"{backend} {version}, for compute capability {kinds}")]
    if backend == "tensorrt":
        pairs.append(("loads on", servers_for(version)))
    return pairs


def servers_for(version: str) -> str:
    """Name the Triton releases whose TensorRT a plan of this version fits, as far as the table has a source for it."""
    parts = version.split(".")
    found = [
        release.release
        for release in releases()
        if release.is_verified("tensorrt") and release.tensorrt.split(".") == parts[: len(release.tensorrt.split("."))]
    ]
    return (
        f"Triton {', '.join(found)}" if found else f"a Triton with TensorRT {version}; no release is known to have it"
    )


def evidence_table(layers: Sequence[Any]) -> RenderableType:
    """Show how far each weight got towards a sparse kernel. Nothing is said the builder did not say."""
    said = {True: "yes", False: "no", None: "not reported"}
    timed = any(layer.time_sparse_ns is not None or layer.time_dense_ns is not None for layer in layers)
    rows = [
        [
            *(layer.layer, layer.op_type, layer.pattern, said[layer.eligible], said[layer.chosen]),
            layer.tactic or "-",
            *((_microseconds(layer.time_sparse_ns), _microseconds(layer.time_dense_ns)) if timed else ()),
            layer.reason,
        ]
        for layer in layers
    ]
    times = ["sparse", "dense"] if timed else []
    columns = ["layer", "operator", "2:4 pattern", "eligible", "chosen", "tactic", *times, "where it stopped"]
    return make_table("Sparse kernels in the engine", columns, rows, right="sparse,dense", drop="tactic,operator,dense")


def _microseconds(time_ns: int | None) -> str:
    return "-" if time_ns is None else f"{time_ns / 1e3:.3g} µs"


# Show the declared state against the real one.


def apply_plan_view(plans: Sequence[ModelPlan]) -> list[RenderableType]:
    """Show the plan, one step a line."""
    rows = []
    for plan in plans:
        if plan.error is not None:
            rows.append([plan.name, Text("cannot", style="red"), plan.error])
        rows += [[plan.name if not index else "", step.action, step.what] for index, step in enumerate(plan.steps)]
    same = sum(not plan.steps and plan.error is None for plan in plans)
    note = Text(f"{same} model{'s' if same != 1 else ''} as declared already.")
    return [make_table("Plan", ["model", "step", "what"], rows), note] if rows else [note]


def apply_view(result: ApplyResult) -> list[RenderableType]:
    """Show the changes made."""
    if not result.models:
        return [
            Text(f"Nothing to do: {_models(result.unchanged)} as declared ({result.seconds:.1f} s).", style="green")
        ]
    rows: list[list[Any]] = []
    for model in result.models:
        rows += [[model.name if not index else "", what] for index, what in enumerate(model.done)]
        if model.error is not None:
            rows.append(["" if model.done else model.name, Text(f"failed: {model.error}", style="red")])
    failed = len(result.failed)
    text = f"{_models(len(result.models) - failed)} brought to what is declared, {failed} failed, "
    style = "red" if failed else "green"
    summary = Text(f"{text}{result.unchanged} unchanged ({result.seconds:.1f} s).", style=style)
    return [make_table("Done", ["model", "what"], rows), summary]


def _models(count: int) -> str:
    return f"{count} model{'s' if count != 1 else ''}"
