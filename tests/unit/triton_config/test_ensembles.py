"""Ensembles: who needs whom, pins, misfits. The server's verdict is in tests/integration."""

from __future__ import annotations

from repo_manager.triton_config.config import ModelConfig, parse_config
from repo_manager.triton_config.ensembles import (
    Member,
    check_ensembles,
    dependents_of,
    models_needed_by,
    pinned_versions,
    steps_of,
)

IO = 'input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }'
PART = parse_config(f'backend: "onnxruntime" max_batch_size: 8 {IO}')


def ensemble(*models: str, batch: int = 8, io: str = IO) -> ModelConfig:
    """A chain x -> ... -> y of `name` or `name:version`."""
    names = ["x", *(f"t{index}" for index in range(len(models) - 1)), "y"]
    steps = ""
    for index, model in enumerate(models):
        name, _, version = model.partition(":")
        steps += (
            f'step {{ model_name: "{name}" model_version: {version or -1} '
            f'input_map {{ key: "x" value: "{names[index]}" }} '
            f'output_map {{ key: "y" value: "{names[index + 1]}" }} }} '
        )
    return parse_config(f'platform: "ensemble" max_batch_size: {batch} {io} ensemble_scheduling {{ {steps} }}')


def problems(configs: dict[str, ModelConfig], name: str = "whole", **served: tuple[int, ...]) -> list[str]:
    members = {each: Member(config, served.get(each, (1,))) for each, config in configs.items()}
    return [f"{problem.rule}: {problem.what}" for problem in check_ensembles([name], members)]


def test_steps_tell_the_newest_version_from_a_pinned_one() -> None:
    first, second = steps_of(ensemble("a", "b:3"))
    assert (first.model, first.version, first.inputs, first.outputs) == ("a", None, {"x": "x"}, {"y": "t0"})
    assert (second.model, second.version) == ("b", 3)
    assert steps_of(PART) == ()


def test_pinned_versions_name_every_ensemble_that_pins() -> None:
    ensembles = {"e": ensemble("part:1"), "d": ensemble("part:1", "part:2"), "f": ensemble("part"), "part": PART}
    assert pinned_versions(ensembles, "part") == {1: ("d", "e"), 2: ("d",)}
    assert pinned_versions(ensembles, "e") == {}


def test_dependents_and_needs_go_through_inner_ensembles_in_the_order_of_loading() -> None:
    ensembles = {"outer": ensemble("inner", "part"), "inner": ensemble("part", "other"), "part": PART}
    assert dependents_of(ensembles, "part") == ("inner", "outer")
    assert dependents_of(ensembles, "outer") == ()
    assert models_needed_by(ensembles, "outer") == ("other", "part", "inner")
    assert models_needed_by(ensembles, "part") == ()


def test_a_cycle_ends_every_walk() -> None:
    ensembles = {"a": ensemble("b"), "b": ensemble("a"), "c": ensemble("b")}
    assert dependents_of(ensembles, "a") == ("b", "c")
    assert set(models_needed_by(ensembles, "a")) == {"b"}
    assert problems(ensembles, "a") == ["ensemble-cycle: contains itself: a -> b -> a"]
    (found,) = problems(ensembles, "c")
    assert found.startswith("ensemble-model: needs the model 'b', which Triton would not load: contains itself")


def test_what_fits_has_no_finding() -> None:
    assert problems({"whole": ensemble("part", "part:1"), "part": PART}) == []
    assert problems({"part": PART}, "part") == []


def test_missing_models_and_versions_are_named() -> None:
    assert problems({"whole": ensemble("nobody")}) == [
        "ensemble-model: needs the model 'nobody', which is not in the repository"
    ]
    assert problems({"whole": ensemble("part:1"), "part": PART}, part=(2, 3)) == [
        "ensemble-version: needs version 1 of 'part', which is not served; 'part' serves 2, 3"
    ]
    assert problems({"whole": ensemble("part"), "part": PART}, part=()) == [
        "ensemble-model: needs the model 'part', of which no version would be served"
    ]


def test_a_model_that_triton_refuses_takes_its_ensembles_with_it() -> None:
    bad = parse_config(f'backend: "python" max_batch_size: 8 {IO} dynamic_batching {{ preferred_batch_size: 9 }}')
    (found,) = problems({"whole": ensemble("inner"), "inner": ensemble("part"), "part": bad})
    assert "needs the model 'inner', which Triton would not load: needs the model 'part'" in found


def test_tensors_that_do_not_fit_are_named_with_both_sides() -> None:
    ints = parse_config(PART.text.replace("TYPE_FP32", "TYPE_INT32"))
    assert problems({"whole": ensemble("part", "ints"), "part": PART, "ints": ints}) == [
        "ensemble-tensors: tensor 't0': it is TYPE_FP32 for the model 'part' and TYPE_INT32 for the model 'ints'",
        "ensemble-tensors: tensor 'y': it is TYPE_FP32 for the ensemble 'whole' and TYPE_INT32 for the model 'ints'",
    ]
    wide = parse_config(PART.text.replace("dims: [4]", "dims: [4, 2]"))
    (found, _) = problems({"whole": ensemble("wide"), "wide": wide})
    assert found.endswith("[-1, 4] for the ensemble 'whole' and [-1, 4, 2] for the model 'wide'")


def test_a_batch_axis_may_be_a_dimension_of_a_model_that_does_not_batch() -> None:
    whole = parse_config(PART.text.replace("max_batch_size: 8", "max_batch_size: 0").replace("[4]", "[-1, 4]"))
    assert problems({"whole": ensemble("part", "unbatched"), "part": PART, "unbatched": whole}) == []
    small = parse_config(PART.text.replace("max_batch_size: 8", "max_batch_size: 2"))
    assert problems({"whole": ensemble("small"), "small": small}) == [
        "ensemble-batch: has max_batch_size 8, and its model 'small' takes 2 at most"
    ]


def test_maps_name_existing_tensors_and_every_required_input() -> None:
    other = parse_config(PART.text.replace('"x"', '"image"').replace('"y"', '"scores"'))
    found = problems({"whole": ensemble("other"), "other": other})
    assert found == [
        "ensemble-tensors: input_map names the input 'x' of the model 'other', which has 'image'",
        "ensemble-tensors: input 'image' of the model 'other' gets no tensor: it is not in the input_map",
        "ensemble-tensors: output_map names the output 'y' of the model 'other', which has 'scores'",
    ]
    optional = parse_config(PART.text + 'input { name: "more" data_type: TYPE_FP32 dims: 1 optional: true }')
    assert problems({"whole": ensemble("other"), "other": optional}) == []
    unlisted = parse_config('backend: "onnxruntime" max_batch_size: 8')
    assert problems({"whole": ensemble("other"), "other": unlisted}) == []


def test_outputs_come_from_one_stream() -> None:
    stream = parse_config(PART.text + "model_transaction_policy { decoupled: true }")
    two = parse_config(
        'platform: "ensemble" max_batch_size: 8 '
        + IO
        + 'output { name: "z" data_type: TYPE_FP32 dims: 4 } ensemble_scheduling { '
        + "".join(
            f'step {{ model_name: "{model}" model_version: -1 input_map {{ key: "x" value: "x" }} '
            f'output_map {{ key: "y" value: "{made}" }} }} '
            for model, made in (("stream", "y"), ("part", "z"))
        )
        + "}"
    )
    (found,) = problems({"whole": two, "stream": stream, "part": PART})
    assert found.startswith("ensemble-decoupled: ")
    assert problems({"whole": ensemble("stream", "part"), "stream": stream, "part": PART}) == []
