"""Graphs whose nodes are stored in any order load, keep their meaning, and come out sorted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from support import onnx_models
from support.onnx_models import value

from repo_manager.engine.builder import named_graph
from repo_manager.errors import ModelError
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.order import sort_nodes
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.walk import graphs_of
from repo_manager.precision import convert
from repo_manager.sparsity import prune, sparsity_report
from repo_manager.types import Precision

T = onnx.TensorProto
SIZE = 16


def random_graph(seed: int) -> onnx.ModelProto:
    """A sorted graph of additions and products with an If, a Loop's body inside it, and a local function."""
    generator = np.random.default_rng(seed)
    names, nodes, weights = ["x"], [], {}

    def some() -> str:
        return names[int(generator.integers(len(names)))]

    for number in range(14):
        output = f"v{number}"
        kind = generator.integers(5)
        if kind == 0:
            weights[f"w{number}"] = (
                onnx_models.weight((SIZE, SIZE), sparse=bool(number % 2), axis=0, seed=number) / SIZE
            )
            node = helper.make_node("MatMul", [some(), f"w{number}"], [output], name=f"dot{number}")
        elif kind == 1:
            branches = {key: _branch(f"{output}_{key[:4]}", some(), some()) for key in ("then_branch", "else_branch")}
            node = helper.make_node("If", ["choice"], [output], name=f"if{number}", **branches)
        elif kind == 2:
            node = helper.make_node("twice", [some()], [output], domain="local", name=f"call{number}")
        else:
            node = helper.make_node("Add", [some(), some()], [output], name=f"add{number}")
        nodes.append(node)
        names.append(output)
    nodes.append(helper.make_node("Sum", names[1:], ["y"], name="sum"))
    body = [helper.make_node("Relu", ["a"], ["r"]), helper.make_node("Add", ["r", "a"], ["b"])]
    function = helper.make_function("local", "twice", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    inputs = [value("x", ["N", SIZE]), value("choice", [], T.BOOL)]
    outputs = [value("y", ["N", SIZE])]
    return onnx_models.model(nodes, inputs, outputs, weights, functions=[function], domains=[("local", 1)])


def _branch(prefix: str, first: str, second: str) -> onnx.GraphProto:
    """Reads two outer values; a name of its own (`<prefix>_a`) is read by two nodes and by a body within it."""
    inner = helper.make_graph(
        [
            helper.make_node("Identity", ["keep"], ["keep_out"]),
            helper.make_node("Add", ["state", f"{prefix}_a"], ["grown"]),
            helper.make_node("Relu", ["grown"], ["state_out"]),
        ],
        "loop_body",
        [value("i", [], T.INT64), value("keep", [], T.BOOL), value("state", None)],
        [value("keep_out", [], T.BOOL), value("state_out", None)],
    )
    nodes = [
        helper.make_node("Sub", [first, second], [f"{prefix}_a"]),
        helper.make_node("Constant", [], [f"{prefix}_times"], value=helper.make_tensor("t", T.INT64, [], [2])),
        helper.make_node("Loop", [f"{prefix}_times", "", f"{prefix}_a"], [f"{prefix}_b"], body=inner),
        helper.make_node("Add", [f"{prefix}_a", f"{prefix}_b"], [prefix]),
    ]
    return helper.make_graph(nodes, prefix, [], [value(prefix, None)])


def shuffled(proto: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """The same model with the nodes of every graph, body and function in a random order."""
    generator = np.random.default_rng(seed)
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    for holder in [*list(graphs_of(result.graph))[::-1], *result.functions]:
        nodes = []
        for index in generator.permutation(len(holder.node)):
            copy = onnx.NodeProto()
            copy.CopyFrom(holder.node[index])
            nodes.append(copy)
        del holder.node[:]
        holder.node.extend(nodes)
    return result


@pytest.mark.parametrize("seed", range(20))
def test_any_order_loads_and_means_the_same(seed: int, tmp_path: Path) -> None:
    proto = random_graph(seed)
    onnx.checker.check_model(proto)  # the case itself is valid
    model = load_model(onnx_models.save(shuffled(proto, seed), tmp_path / "shuffled.onnx"))
    assert model.reordered
    onnx.checker.check_model(model.proto)
    given = {"x": np.random.default_rng(seed).standard_normal((2, SIZE)).astype(np.float32), "choice": np.array(True)}
    for choice in (True, False):
        given["choice"] = np.array(choice)
        np.testing.assert_allclose(Session(model.proto).run(given)["y"], Session(proto).run(given)["y"], rtol=1e-4)
    found = {(layer.node, layer.valid_groups, layer.groups) for layer in sparsity_report(model).layers}
    assert found == {(layer.node, layer.valid_groups, layer.groups) for layer in sparsity_report(proto).layers}


def test_a_sorted_graph_stays_as_it_is() -> None:
    proto = random_graph(3)
    before = proto.SerializeToString(deterministic=True)
    assert not sort_nodes(proto)
    assert proto.SerializeToString(deterministic=True) == before


def test_the_order_stays_where_it_is_free(tmp_path: Path) -> None:
    """Only the node that comes too early moves, to just behind its inputs."""
    nodes = [
        helper.make_node("Relu", ["c"], ["y"], name="early"),
        *(helper.make_node("Neg", ["x"], [name], name=name) for name in "abcde"),
        helper.make_node("Sum", list("abde"), ["z"], name="last"),
    ]
    proto = onnx_models.model(nodes, [value("x", ["N"])], [value("y", ["N"]), value("z", ["N"])])
    model = load_model(onnx_models.save(proto, tmp_path / "m.onnx"))
    assert [node.name for node in model.graph_only.graph.node] == ["a", "b", "c", "early", "d", "e", "last"]


def test_a_cycle_through_a_body_is_named(tmp_path: Path) -> None:
    then = helper.make_graph([helper.make_node("Relu", ["late"], ["t"])], "then", [], [value("t", None)])
    other = helper.make_graph([helper.make_node("Relu", ["x"], ["e"])], "else", [], [value("e", None)])
    nodes = [
        helper.make_node("If", ["c"], ["y"], name="choose", then_branch=then, else_branch=other),
        helper.make_node("Neg", ["y"], ["late"], name="after"),
    ]
    proto = onnx_models.model(nodes, [value("x", ["N"]), value("c", [], T.BOOL)], [value("y", ["N"])])
    path = onnx_models.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"has a cycle: 'choose' \(If\) -> 'after' \(Neg\) -> 'choose'") as caught:
        load_model(path)
    assert str(path) in caught.value.message


def test_a_node_that_reads_itself_is_a_cycle(tmp_path: Path) -> None:
    proto = onnx_models.model(
        [helper.make_node("Add", ["x", "y"], ["y"], name="n")], [value("x", ["N"])], [value("y", ["N"])]
    )
    with pytest.raises(ModelError, match=r"has a cycle: 'n' \(Add\) -> 'n' \(Add\)"):
        load_model(onnx_models.save(proto, tmp_path / "m.onnx"))


def test_a_cycle_in_a_function_is_named(tmp_path: Path) -> None:
    body = [helper.make_node("Add", ["a", "b"], ["m"], name="one"), helper.make_node("Relu", ["m"], ["b"], name="two")]
    function = helper.make_function("local", "f", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    proto = onnx_models.model(
        [helper.make_node("f", ["x"], ["y"], domain="local")], [value("x", ["N"])], [value("y", ["N"])],
        functions=[function], domains=[("local", 1)],
    )  # fmt: skip
    with pytest.raises(ModelError, match="function 'f' has a cycle"):
        load_model(onnx_models.save(proto, tmp_path / "m.onnx"))


def test_what_is_written_is_sorted(tmp_path: Path) -> None:
    """prune and convert write sorted files, with external data, too; an engine's parser gets a sorted graph."""
    proto = shuffled(onnx_models.mlp(sparse=False), 2)
    path = tmp_path / "m.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, location="m.data", size_threshold=64)
    model = load_model(path)
    assert model.reordered
    onnx.checker.check_model(prune(model, all_valid=True)[0])
    for precision in (Precision.FP32, Precision.FP16):
        output = tmp_path / f"{precision}" / "m.onnx"
        output.parent.mkdir()
        convert(model, precision, output)
        assert not load_model(output).reordered
    renamed = named_graph(model)
    assert renamed is not None
    assert [node.name for node in renamed.graph.node] == [node.name for node in model.graph_only.graph.node]
