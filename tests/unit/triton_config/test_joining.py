"""Ensembles from their models: automatic matches, and the choices left to the user."""

from __future__ import annotations

import pytest

from repo_manager.errors import ConfigError, UsageError
from repo_manager.triton_config.config import ModelConfig, parse_config
from repo_manager.triton_config.ensembles import Member, check_ensemble
from repo_manager.triton_config.joining import EnsemblePart, Joined, TensorMap, join_models


def config(inputs: str, outputs: str, batch: int = 8) -> ModelConfig:
    """`name:TYPE:dims` tensors, separated by spaces; `?` after the name makes an input optional."""

    def listed(kind: str, text: str) -> str:
        found = ""
        for each in text.split():
            name, data_type, dims = each.split(":")
            optional = " optional: true" if name.endswith("?") else ""
            found += f'{kind} {{ name: "{name.rstrip("?")}" data_type: TYPE_{data_type} dims: [{dims}]{optional} }}\n'
        return found

    return parse_config(
        f'backend: "python"\nmax_batch_size: {batch}\n{listed("input", inputs)}{listed("output", outputs)}'
    )


PRE = config("raw:UINT8:-1", "mid:FP32:3,224,224", 0)
NET = config("images:FP32:3,224,224", "logits:FP32:1000")
POST = config("logits:FP32:1000", "label:STRING:1")


def joined(*configs: ModelConfig, maps: tuple[str, ...] = (), outputs: tuple[str, ...] = ()) -> Joined:
    """Join m1, m2, ... and check the result by Triton's own rules."""
    parts = [EnsemblePart(f"m{number}", None, each) for number, each in enumerate(configs, start=1)]
    found = join_models("ens", parts, [TensorMap.parse(each) for each in maps], outputs)
    members = {part.model: Member(part.config, (1,)) for part in parts}
    assert check_ensemble("ens", {**members, "ens": Member(found.config, (1,))}, where="ens") == []
    return found


def edges(found: Joined) -> list[str]:
    return [f"{edge.source} > {edge.model}.{edge.input} ({edge.by})" for edge in found.edges]


def tensors(found: Joined) -> list[str]:
    message = found.config.message()
    return [f"{each.name} {list(each.dims)}" for each in (*message.input, *message.output)]


def test_a_chain_is_matched_by_type_and_by_name() -> None:
    found = joined(PRE, NET, POST)
    assert edges(found) == [
        "input:raw > m1.raw (input)",
        "m1.mid > m2.images (type and dims)",
        "m2.logits > m3.logits (name)",
    ]
    assert tensors(found) == ["raw [-1]", "label [1]"]
    assert found.config.max_batch_size == 0
    assert dict(found.config.message().ensemble_scheduling.step[1].input_map) == {"images": "mid"}


def test_batching_is_the_smallest_of_the_models() -> None:
    assert joined(NET, config("logits:FP32:1000", "label:STRING:1", 2)).config.max_batch_size == 2


def test_a_whole_batch_of_a_model_without_batching_stays_one() -> None:
    tiles = config("raw:UINT8:-1", "mid:FP32:-1,3,224,224", 0)
    assert tensors(joined(tiles, NET)) == ["raw [-1]", "logits [-1, 1000]"]
    assert tensors(joined(tiles, NET, POST)) == ["raw [-1]", "label [-1, 1]"]


ADD_SUB = config("A:FP32:4 B:FP32:4", "SUM:FP32:4 DIFF:FP32:4")


def test_what_fits_twice_is_listed_and_not_guessed() -> None:
    with pytest.raises(UsageError, match=r"m2\.A \(FP32 \[4\]\) may take m1\.SUM .*m1\.DIFF .*input:A") as caught:
        joined(ADD_SUB, ADD_SUB)
    assert "--map m1.DIFF=m2.B" in str(caught.value.hint)
    found = joined(ADD_SUB, ADD_SUB, maps=("SUM=m2.A", "input:B=m2.B"), outputs=("m2.SUM", "m1.SUM"))
    assert edges(found)[2:] == ["m1.SUM > m2.A (map)", "input:B > m2.B (map)"]
    assert tensors(found) == ["A [4]", "B [4]", "SUM [4]", "m1_SUM [4]"]


def test_a_model_can_be_a_step_twice() -> None:
    part = EnsemblePart("add_sub", None, ADD_SUB)
    maps = [TensorMap.parse(each) for each in ("SUM=add_sub#2.A", "DIFF=add_sub#2.B")]
    found = join_models("ens", [part, part], maps)
    assert edges(found)[2:] == ["add_sub#1.SUM > add_sub#2.A (map)", "add_sub#1.DIFF > add_sub#2.B (map)"]
    assert tensors(found) == ["A [4]", "B [4]", "SUM [4]", "DIFF [4]"]
    members = {"add_sub": Member(ADD_SUB, (1,)), "ens": Member(found.config, (1,))}
    assert check_ensemble("ens", members, where="ens") == []


def test_one_tensor_is_not_given_to_two_inputs_unasked() -> None:
    pair = config("ids:INT64:-1 mask:INT64:-1", "out:FP32:2")
    with pytest.raises(UsageError, match=r"m2\.ids .*\n.*m2\.mask"):
        joined(config("text:STRING:1", "tokens:INT64:-1"), pair)
    named = joined(config("text:STRING:1", "ids:INT64:-1 mask:INT64:-1"), pair)
    assert [edge.by for edge in named.edges] == ["input", "name", "name"]


def test_an_input_of_the_same_name_is_shared_where_it_fits() -> None:
    late = config("logits:FP32:1000 raw:UINT8:-1", "label:STRING:1", 0)
    assert edges(joined(PRE, NET, late))[-1] == "input:raw > m3.raw (name)"
    other = joined(PRE, NET, config("logits:FP32:1000 raw:FP64:2", "label:STRING:1", 0))
    assert tensors(other) == ["raw [-1]", "m3_raw [2]", "label [1]"]


def test_an_optional_input_gets_what_has_its_name_only() -> None:
    late = config("logits:FP32:1000 limit?:FP32:1", "label:STRING:1")
    assert joined(NET, late).left_out == ("m2.limit",)
    with_limit = config("images:FP32:3,224,224", "logits:FP32:1000 limit:FP32:1")
    assert edges(joined(with_limit, late))[-1] == "m1.limit > m2.limit (name)"


def test_outputs_with_labels_keep_them() -> None:
    message = NET.message()
    message.output[0].label_filename = "labels.txt"
    found = joined(PRE, ModelConfig.from_message(message, labels={"labels.txt": ("cat", "dog")}))
    assert found.config.message().output[0].label_filename == "labels.txt"
    assert found.config.labels == {"labels.txt": ("cat", "dog")}


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (("nothing=images",), "no model has the output 'nothing'"),
        (("mid=nothing",), "no model has the input 'nothing'"),
        (("m2.logits=m1.raw",), "is made at step 2 and m1.raw is taken at step 1"),
        (("mid=logits",), r"m1\.mid \(FP32 \[3, 224, 224\]\) does not fit m3\.logits"),
        (("logits",), "expected OUTPUT=INPUT"),
    ],
)
def test_a_wrong_map_is_refused(maps: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        joined(PRE, NET, POST, maps=maps)


def test_a_model_whose_tensors_are_not_known_is_named() -> None:
    with pytest.raises(ConfigError, match=r"m2: its config\.pbtxt lists no inputs"):
        joined(PRE, parse_config('backend: "onnxruntime"\n'))
