"""The controls of a sparse model, made as it was made: same graph, precision, shapes and builder."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Mapping
from typing import Any

from repo_manager.engine.control import ControlTwin, control_twins, dense_twin, join_times, layer_times_of
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.write import save_model
from repo_manager.pipeline.add_types import AddOptions, AddTask, Control
from repo_manager.pipeline.prepare import BuildWatch, Converted, PreparedVersion, build_version, convert_model

__all__ = ["PreparedControl", "build_controls", "with_layer_times"]

_NO_LIMIT = float("inf")


@dataclasses.dataclass(frozen=True)
class PreparedControl:
    """A control, ready to be published.

    Attributes:
        twin: the control's name and purpose, and whether it is dense or without the sparse flag.
        version: files and manifest of the new version.
        filled: weights whose zeros were filled. Empty for the one without the flag.
    """

    twin: ControlTwin
    version: PreparedVersion
    filled: tuple[str, ...]

    def published_as(self, version: int) -> Control:
        """Describe the control made."""
        return Control(self.twin.name, version, self.twin.purpose)


def build_controls(main: PreparedVersion, options: AddOptions, watch: BuildWatch) -> tuple[PreparedControl, ...]:
    """Build the controls of a version.

    Args:
        main: the version. Its layers left in FP32 stay so in the twins, and its shapes are theirs.
        options: options the version was made with.
        watch: receives progress, and can stop the build.

    Raises:
        ModelError: the model holds no zero where sparsity counts, so there is no denser twin.
        InputError, GateError: as the version itself.
    """
    task = main.task
    return tuple(_build(main, twin, options, watch) for twin in control_twins(task.name, task.choice.backend))


def _build(main: PreparedVersion, twin: ControlTwin, options: AddOptions, watch: BuildWatch) -> PreparedControl:
    watch.report(f"Building the control {twin.name}: {twin.purpose}")
    work = main.task.work / twin.name
    work.mkdir()
    task = dataclasses.replace(main.task, name=twin.name, work=work, gate=None)
    matched = _matched(main, options, sparse=twin.sparse_flag)
    converted = main.converted
    filled: tuple[str, ...] = ()
    if twin.dense:
        converted, filled = _dense(main, task, matched, watch)
    return PreparedControl(twin, build_version(converted, task, matched, watch), filled)


def _matched(main: PreparedVersion, options: AddOptions, *, sparse: bool) -> AddOptions:
    """Fix the version's own findings as options, so its twins cannot arrive at others."""
    found = (glob.escape(node.node) for node in main.converted.conversion.kept if node.is_found)
    kept = tuple(dict.fromkeys((*options.convert.keep_fp32, *found)))
    engine: dict[str, Any] = {"sparse": options.engine.sparse and sparse}
    build = main.artifact.facts.get("build")
    if build is not None:
        engine["shapes"] = build.profile
    return dataclasses.replace(
        options,
        config=dataclasses.replace(options.config, max_batch_size=main.config.max_batch_size),
        convert=dataclasses.replace(
            options.convert,
            keep_fp32=kept,
            auto_keep=0,
            # The twin has random weights, so its drift means nothing.
            max_drift=_NO_LIMIT,
            min_top1=0.0,
            min_cosine=None,
        ),
        engine=dataclasses.replace(options.engine, **engine),
    )


def _dense(
    main: PreparedVersion, task: AddTask, options: AddOptions, watch: BuildWatch
) -> tuple[Converted, tuple[str, ...]]:
    source = main.converted.model
    proto, filled = dense_twin(source)
    path = task.work / "dense" / "model.onnx"
    path.parent.mkdir()
    save_model(proto, path, external=True if source.external_files else None)
    return convert_model(load_model(path), task, options, watch), filled


def with_layer_times(main: PreparedVersion, controls: tuple[PreparedControl, ...]) -> PreparedVersion:
    """Measure version and dense twin layer by layer, where a GPU is at hand, and add the times to the evidence.

    Returns:
        The version with `time_sparse_ns` and `time_dense_ns` in its layers. The same one where nothing was measured.
    """
    dense = next((control.version for control in controls if control.twin.dense), None)
    facts: Mapping[str, Any] = main.artifact.facts
    if dense is None or "build" not in facts or "build" not in dense.artifact.facts:
        return main
    pair = [layer_times_of(version.artifact.facts["build"]) for version in (main, dense)]
    if pair[0] is None or pair[1] is None:
        return main
    layers = join_times(facts["layers"], pair[0], dense.artifact.facts["layers"], pair[1])
    artifact = dataclasses.replace(main.artifact, facts={**facts, "layers": layers})
    return dataclasses.replace(main, artifact=artifact)
