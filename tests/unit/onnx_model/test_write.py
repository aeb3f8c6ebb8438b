"""One writer: a model or a draft, in one file or two; the weights lie where it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from support import onnx_models
from support.onnx_models import value

from repo_manager.onnx_model.draft import Draft, Weight
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.session import Session
from repo_manager.onnx_model.source import draft_of
from repo_manager.onnx_model.walk import tensors_of
from repo_manager.onnx_model.write import save_model, write_draft, write_view

Write = Callable[[onnx.ModelProto, Path], tuple[Path, ...]]


def with_weights_everywhere() -> onnx.ModelProto:
    """Large weights in an initializer, a Constant node, a body, a sparse initializer; a small and an empty one."""
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "body"], ["t"])],
        "then",
        [],
        [value("t", None)],
        [numpy_helper.from_array(onnx_models.weight((32, 32), seed=3), "body")],
    )
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["e"])], "else", [], [value("e", None)])
    nodes = [
        helper.make_node("If", ["flag"], ["a"], then_branch=inner, else_branch=other),
        helper.make_node(
            "Constant", [], ["c"], value=numpy_helper.from_array(onnx_models.weight((32, 32), seed=4), "c")
        ),
        helper.make_node("MatMul", ["a", "c"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["d"]),
        helper.make_node("Add", ["d", "small"], ["y"]),
    ]
    weights: dict[str, np.ndarray | onnx.TensorProto] = {
        "w": onnx_models.weight((32, 32), seed=1),
        "small": onnx_models.weight((32,), seed=2),
        "flag": np.array(True),
    }
    return onnx_models.model(nodes, [value("x", ["N", 32])], [value("y", ["N", 32])], weights)


def _save(proto: onnx.ModelProto, path: Path) -> tuple[Path, ...]:
    return save_model(proto, path)


def _save_external(proto: onnx.ModelProto, path: Path) -> tuple[Path, ...]:
    return save_model(proto, path, external=True)


def _draft(proto: onnx.ModelProto, path: Path) -> tuple[Path, ...]:
    return write_draft(draft_of(load_model(onnx_models.save(proto, path.with_name("source.onnx")))), path).files


def _draft_external(proto: onnx.ModelProto, path: Path) -> tuple[Path, ...]:
    source = load_model(onnx_models.save(proto, path.with_name("source.onnx")))
    return write_draft(draft_of(source), path, limit_bytes=1).files


@pytest.mark.parametrize("write", [_save, _save_external, _draft, _draft_external])
def test_every_layout_holds_the_same_model(write: Write, tmp_path: Path) -> None:
    proto = with_weights_everywhere()
    files = write(proto, tmp_path / "m.onnx")
    assert [file.name for file in files] == ["m.onnx", "m.onnx.data"][: len(files)]
    assert (len(files) == 2) == ("external" in write.__name__)
    given = {"x": np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)}
    found = Session(load_model(files[0])).run(given)["y"]
    np.testing.assert_array_equal(found, Session(proto).run(given)["y"])
    onnx.checker.check_model(str(files[0]), full_check=True)


@pytest.mark.parametrize("limit_bytes", [1, 1 << 31])
def test_a_weight_lies_at_its_place_and_a_view_refers_to_it(limit_bytes: int, tmp_path: Path) -> None:
    draft = draft_of(load_model(onnx_models.save(onnx_models.mlp(), tmp_path / "source.onnx")))
    written = write_draft(draft, tmp_path / "m.onnx", limit_bytes=limit_bytes)
    assert set(written.places) == {"w1", "w2"}
    for name, place in written.places.items():
        content = place.file.read_bytes()[place.offset_bytes :][: place.length_bytes]
        assert content == np.ascontiguousarray(draft.weights[name].load()).tobytes()
    view = tmp_path / "view.onnx"
    write_view(draft, written, view)
    assert view.stat().st_size < 2048
    given = {"x": np.ones((1, 32), np.float32)}
    expected = Session(tmp_path / "source.onnx").run(given)["y"]
    np.testing.assert_array_equal(Session(view).run(given)["y"], expected)


def test_each_weight_is_read_once_and_let_go(tmp_path: Path) -> None:
    """The peak is one weight: none is alive when the next one is read."""
    alive: list[int] = []

    class Counted(np.ndarray):
        def __del__(self) -> None:
            alive.pop()

    def load() -> np.ndarray:
        assert not alive, "the weight before is still held"
        alive.append(1)
        return np.ones((64, 64), np.float32).view(Counted)

    proto = onnx_models.model(
        [helper.make_node("Sum", [f"w{number}" for number in range(5)], ["y"])], [], [value("y", [64, 64])]
    )
    weights = {f"w{number}": Weight(onnx.TensorProto.FLOAT, (64, 64), load) for number in range(5)}
    for limit_bytes in (1, 1 << 31):
        written = write_draft(Draft(proto, weights), tmp_path / "m.onnx", limit_bytes=limit_bytes)
        assert len(written.places) == 5
        assert not alive


def test_typed_and_raw_values_are_kept_as_they_are(tmp_path: Path) -> None:
    proto = with_weights_everywhere()
    typed = helper.make_tensor("small", onnx.TensorProto.FLOAT, [32], list(range(32)))
    (place,) = [index for index, tensor in enumerate(proto.graph.initializer) if tensor.name == "small"]
    proto.graph.initializer[place].CopyFrom(typed)
    files = save_model(proto, tmp_path / "m.onnx")
    again = onnx.load(files[0])
    assert again == proto
    assert [t.HasField("raw_data") for t in tensors_of(again)] == [t.HasField("raw_data") for t in tensors_of(proto)]
