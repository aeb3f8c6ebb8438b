"""The sparsity lines are composed here from the wordings in the libraries (tests/data/build_logs/README.md)."""

from __future__ import annotations

import dataclasses

import pytest

from repo_manager.engine.evidence import LayerEvidence, join_evidence, read_evidence
from repo_manager.engine.layers import EngineLayer
from repo_manager.sparsity import LayerSparsity, SparsityReport, SparsityTotals, SparsityVerdict
from repo_manager.types import Digest

OLD_ELIGIBLE = "(Sparsity) Layers eligible for sparse math:"
OLD_CHOSEN = "(Sparsity) TRT inference plan picked sparse implementation for layers:"


def found(count: int, names: str = "") -> str:
    return f"(Sparsity) Found {count} layer(s) eligible to use sparse tactics{names}"


def chose(count: int, names: str = "") -> str:
    return f"(Sparsity) Chose {count} layer(s) using sparse tactics{names}"


def layer(name: str, verdict: SparsityVerdict = SparsityVerdict.VALID) -> LayerSparsity:
    valid = 64 if verdict is SparsityVerdict.VALID else 10
    return LayerSparsity(
        node=name, op_type="Conv", weight=f"{name}.w", dtype="float16", shape=(64, 64, 1, 1), axis=1, groups=64,
        valid_groups=valid, zeros=0, size=4096, verdict=verdict, reason="10 of 64 groups", hints=(), macs=None,
    )  # fmt: skip


def report(*layers: LayerSparsity) -> SparsityReport:
    empty = {field.name: 0 for field in dataclasses.fields(SparsityTotals)}
    return SparsityReport(Digest("sha256:0"), layers, SparsityTotals(**empty), {})


def engine_layer(name: str, tactic: str = "") -> EngineLayer:
    nodes = tuple(name.split(" + "))
    return EngineLayer(name, "CaskConvolution", nodes, ("float16",), ("float16",), ("float16",), tactic)


def rows(messages: list[str], *layers: EngineLayer, weights: tuple[str, ...] = ("a", "b")) -> dict[str, LayerEvidence]:
    joined = join_evidence(report(*(layer(name) for name in weights)), read_evidence(messages), layers)
    return {row.layer: row for row in joined}


def test_the_old_wording_lists_names_split_at_comma_space() -> None:
    evidence = read_evidence([f"{OLD_ELIGIBLE} Conv_0 + Relu_1, Conv_2,with,commas", f"{OLD_CHOSEN} Conv_0 + Relu_1"])
    assert evidence.eligible == ("Conv_0 + Relu_1", "Conv_2,with,commas")
    assert evidence.chosen == ("Conv_0 + Relu_1",)
    assert (evidence.eligible_count, evidence.chosen_count) == (2, 1)


def test_the_old_wording_with_an_empty_list_says_none() -> None:
    evidence = read_evidence([OLD_ELIGIBLE, f"{OLD_CHOSEN} "])
    assert evidence.reported
    assert evidence.eligible == ()
    assert evidence.chosen == ()


def test_the_new_wording_has_names_at_verbose_and_numbers_always() -> None:
    verbose = read_evidence([found(2, ": a, b"), chose(1, ": a")])
    assert (verbose.eligible, verbose.chosen) == (("a", "b"), ("a",))
    quiet = read_evidence([found(39), chose(0)])
    assert (quiet.eligible, quiet.eligible_count, quiet.chosen_count) == (None, 39, 0)


@pytest.mark.parametrize("prefix", ["", "[08/05/2024-12:06:54] [I] [TRT] ", "[VERBOSE] "])
def test_a_line_prefix_does_not_matter(prefix: str) -> None:
    assert read_evidence([prefix + found(1, ": a"), prefix + chose(1, ": a")]).chosen == ("a",)


def test_the_last_pass_counts() -> None:
    evidence = read_evidence([found(2, ": a, b"), chose(2, ": a, b"), found(1, ": b"), chose(0)])
    assert (evidence.eligible, evidence.chosen, evidence.chosen_count) == (("b",), (), 0)


def test_an_eligible_line_without_its_pair_does_not_borrow_the_choice_of_the_pass_before() -> None:
    evidence = read_evidence([found(1, ": a"), chose(1, ": a"), found(2, ": a, b")])
    assert evidence.chosen is None
    assert evidence.chosen_count is None


def test_other_sparsity_lines_are_no_evidence() -> None:
    evidence = read_evidence(["(Sparsity) Please provide sparse weights if you want to refit these layers.", "noise"])
    assert not evidence.reported


def test_a_silent_builder_gives_not_reported_and_never_a_yes() -> None:
    row = rows([], engine_layer("a"))["a"]
    assert row.eligible is None
    assert row.chosen is None
    assert "not reported by this builder" in row.reason


def test_fused_names_are_matched_by_their_whole_parts() -> None:
    found_rows = rows([found(1, ": a + relu"), chose(1, ": a + relu")], weights=("a", "rel", "relu2"))
    assert found_rows["a"].chosen
    assert found_rows["rel"].eligible is False
    assert found_rows["relu2"].chosen is False


def test_where_it_stopped_is_said() -> None:
    table = rows([found(1, ": a"), chose(0)])
    assert "dense kernel was faster" in table["a"].reason
    assert "no sparse kernel for this layer" in table["b"].reason


def test_counts_without_names_do_not_name_layers() -> None:
    row = rows([found(39), chose(4)])["a"]
    assert row.eligible is None
    assert row.chosen is None


def test_no_choice_at_all_is_known_for_every_layer_even_without_names() -> None:
    assert rows([found(39), chose(0)])["a"].chosen is False


@pytest.mark.parametrize("tactic", ["sm80_xmma_fprop_sparse_conv_f16", "ampere_spmma_s16816"])
def test_the_kernels_name_is_evidence_too(tactic: str) -> None:
    row = rows([], engine_layer("a + relu", tactic))["a"]
    assert row.chosen
    assert row.tactic == tactic
    assert row.engine_layer == "a + relu"


def test_weights_that_are_not_24_stop_there() -> None:
    (row,) = join_evidence(report(layer("a", SparsityVerdict.NOT_24)), read_evidence([found(0), chose(0)]), ())
    assert row.reason == "weights are not 2:4: 10 of 64 groups"
