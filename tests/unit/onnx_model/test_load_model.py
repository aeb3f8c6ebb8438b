"""Loading: a valid file is read as a whole, a broken one refused with one message."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import mutate_onnx, onnx_models

from repo_manager.errors import ModelError
from repo_manager.onnx_model.model import load_model, parameter_count
from repo_manager.onnx_model.signature import signature_of
from repo_manager.onnx_model.walk import tensors_of
from repo_manager.onnx_model.write import save_model
from repo_manager.sparsity import prune, sparsity_report


@pytest.mark.parametrize("build", ["mlp", "cnn", "lstm_with_state", "embedding", "zoo", "qdq_conv"])
def test_the_whole_model_comes_back_byte_for_byte(build: str, tmp_path: Path) -> None:
    path = onnx_models.save(getattr(onnx_models, build)(), tmp_path / "m.onnx")
    model = load_model(path)
    assert model.proto.SerializeToString() == path.read_bytes()
    assert model.digest == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.size_bytes == path.stat().st_size
    assert model.external_files == ()


def test_large_weights_are_not_held_by_the_graph(tmp_path: Path) -> None:
    proto = onnx_models.mlp(width=4096)
    path = onnx_models.save(proto, tmp_path / "m.onnx")
    model = load_model(path)
    assert model.graph_only.ByteSize() < 20_000 < path.stat().st_size
    for light, full in zip(tensors_of(model.graph_only), tensors_of(proto), strict=True):
        np.testing.assert_array_equal(model.array(light), numpy_helper.to_array(full))
    assert parameter_count(model) == 32 * 4096 + 4096 + 4096 * 8


def test_external_data(tmp_path: Path) -> None:
    proto = onnx_models.mlp(width=512)
    written = save_model(proto, tmp_path / "m.onnx", external=True)
    assert [path.name for path in written] == ["m.onnx", "m.onnx.data"]
    assert proto.SerializeToString() == onnx_models.mlp(width=512).SerializeToString(), "its input was changed"
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    model = load_model(tmp_path / "m.onnx")
    assert [path.name for path in model.external_files] == ["m.onnx.data"]
    assert model.proto.SerializeToString() == proto.SerializeToString()
    before = model.digest
    data = bytearray(written[1].read_bytes())
    data[0] ^= 1
    written[1].write_bytes(data)
    assert load_model(tmp_path / "m.onnx").digest != before


def _external(tmp_path: Path, **entries: str) -> Path:
    proto = onnx_models.mlp()
    tensor = proto.graph.initializer[0]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "inside.bin").write_bytes(tensor.raw_data)
    (tmp_path / "outside.bin").write_bytes(tensor.raw_data)
    (tmp_path / "home" / "link.bin").symlink_to(tmp_path / "outside.bin")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, entry in entries.items():
        tensor.external_data.add(key=key, value=entry)
    return onnx_models.save(proto, tmp_path / "home" / "m.onnx")


def test_external_data_without_offset_and_length(tmp_path: Path) -> None:
    assert load_model(_external(tmp_path, location="inside.bin")).size_bytes > 8192


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "../outside.bin"}, "outside the model's folder"),
        ({"location": "/etc/passwd"}, "outside the model's folder"),
        ({"location": "link.bin"}, "outside the model's folder"),
        ({"location": "gone.bin"}, "missing"),
        ({"location": "."}, "not a file"),
        ({}, "without a usable location"),
        ({"location": "inside.bin", "offset": "4"}, "needs 8192 from byte 4"),
        ({"location": "inside.bin", "length": "5"}, "declares 5 bytes"),
        ({"location": "inside.bin", "offset": "-1"}, "not a byte count"),
        ({"location": "inside.bin", "offset": "9" * 40}, "not a byte count"),
    ],
)
def test_bad_external_data(entries: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_model(_external(tmp_path, **entries))
    assert str(tmp_path / "home" / "m.onnx") in caught.value.message


def _with_tensor(**fields: object) -> onnx.ModelProto:
    proto = onnx_models.mlp()
    tensor = proto.graph.initializer[0]
    for name, value in fields.items():
        if name == "dims":
            tensor.dims[:] = value  # type: ignore[index]
        else:
            setattr(tensor, name, value)
    return proto


def _cyclic() -> onnx.ModelProto:
    proto = onnx_models.mlp()
    proto.graph.node[0].input[0] = "r"
    return proto


def _function_calls_itself() -> onnx.ModelProto:
    body = [helper.make_node("F", ["a"], ["b"], domain="loc")]
    function = helper.make_function("loc", "F", ["a"], ["b"], body, [helper.make_opsetid("loc", 1)])
    node = helper.make_node("F", ["x"], ["y"], domain="loc")
    value = onnx_models.value
    return onnx_models.model([node], [value("x", [1])], [value("y", [1])], functions=[function], domains=[("loc", 1)])


def _function_bomb() -> onnx.ModelProto:
    functions = []
    for level in range(40):
        names = [f"F{level + 1}"] * 2 if level < 39 else ["Relu", "Relu"]
        domain = "loc" if level < 39 else ""
        nodes = [
            helper.make_node(names[0], ["a"], ["m"], domain=domain),
            helper.make_node(names[1], ["m"], ["b"], domain=domain),
        ]
        functions.append(helper.make_function("loc", f"F{level}", ["a"], ["b"], nodes, [helper.make_opsetid("", 17)]))
    node = helper.make_node("F0", ["x"], ["y"], domain="loc")
    value = onnx_models.value
    return onnx_models.model([node], [value("x", [1])], [value("y", [1])], functions=functions, domains=[("loc", 1)])


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (_with_tensor(dims=[2**62, 2**62]), "absurd shape"),
        (_with_tensor(dims=[-1, 32]), "negative dimension"),
        (_with_tensor(dims=[64, 33]), "holds 8192 bytes; its shape needs 8448"),
        (_with_tensor(raw_data=b"abc"), "holds 3 bytes"),
        (_with_tensor(data_type=99), "element type 99"),
        (_cyclic(), r"has a cycle: 'fc1' \(Gemm\) -> 'relu' \(Relu\) -> 'fc1'"),
        (_function_calls_itself(), "calls itself"),
        (_function_bomb(), "more than 200000 nodes"),
        (onnx_models.model([helper.make_node("Nonsense", [], ["y"])], [], []), "Nonsense"),
        (
            onnx_models.model([helper.make_node("Relu", ["x"], ["y"])], [onnx_models.value("x", [1])], [], opset=9999),
            "9999",
        ),
        (onnx.ModelProto(ir_version=8), "no graph"),
    ],
)
def test_broken_graphs(proto: onnx.ModelProto, message: str, tmp_path: Path) -> None:
    path = onnx_models.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=message) as caught:
        load_model(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "content", [b"", b"hello, this is text\n" * 50, b"\xff" * 100, b"\x00" * 100, b"PK\x03\x04" * 9]
)
def test_what_is_no_model(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError):
        load_model(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(tmp_path / "gone.onnx")
    with pytest.raises(ModelError, match="is a directory"):
        load_model(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="not a regular file"):
        load_model(tmp_path / "pipe")


def test_every_truncation_is_refused_or_harmless(tmp_path: Path) -> None:
    data = onnx_models.qdq_conv().SerializeToString()
    path = tmp_path / "m.onnx"
    refused = 0
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        try:
            signature_of(load_model(path))
        except ModelError:
            refused += 1
    assert refused > 0.9 * len(data) / 7


def test_mutations_are_refused_or_work(tmp_path: Path) -> None:
    """The short form of tests/fuzz/fuzz_onnx.py."""
    models = [onnx_models.zoo(), onnx_models.cnn(), onnx_models.qdq_conv(), onnx_models.lstm_with_state()]
    originals = [proto.SerializeToString() for proto in models]
    path = tmp_path / "m.onnx"
    outcomes = {"refused": 0, "accepted": 0}
    for seed in range(300):
        _, data = mutate_onnx.mutate(originals[seed % len(originals)], seed)
        path.write_bytes(data)
        try:
            model = load_model(path)
            signature_of(model)
            sparsity_report(model)
            prune(model, all_valid=True)
            outcomes["accepted"] += 1
        except ModelError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


def test_a_saved_model_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    proto = onnx_models.mlp()
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(OSError, match="directory"):
        save_model(proto, tmp_path / "m.onnx", external=True)
    assert [entry.name for entry in tmp_path.iterdir()] in (
        ["m.onnx"],
        ["m.onnx.data", "m.onnx"],
        ["m.onnx", "m.onnx.data"],
    )
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_loading_does_not_need_the_weights_in_memory(tmp_path: Path) -> None:
    """A 400 MB sparse file: loading, describing and judging it peaks far below its size."""
    proto = onnx_models.mlp()
    tensor = proto.graph.initializer[0]
    tensor.dims[:] = [64, 1_600_000]
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1_600_000
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(64 * 1_600_000 * 4)
    path = onnx_models.save(proto, tmp_path / "m.onnx")
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from repo_manager.onnx_model.model import load_model\n"
        "from repo_manager.onnx_model.signature import signature_of\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "signature_of(load_model(Path(sys.argv[1])))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(result.stdout) * 1024 < 100_000_000


@pytest.mark.parametrize("build", ["mlp", "cnn", "lstm_with_state", "embedding", "zoo", "qdq_conv"])
def test_saving_writes_what_protobuf_would(build: str, tmp_path: Path) -> None:
    """The file is put together piece by piece, so a model is not held three times. Unknown fields are kept."""
    proto = getattr(onnx_models, build)()
    proto.MergeFromString(b"\xfa\x3f\x05hello")
    proto.graph.MergeFromString(b"\xf0\x3f\x07")
    assert [path.name for path in save_model(proto, tmp_path / "m.onnx")] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == proto.SerializeToString()
    save_model(proto, tmp_path / "e.onnx", external=True)
    assert load_model(tmp_path / "e.onnx").proto.SerializeToString() == proto.SerializeToString()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"root:x:0:0:root:/root:/bin/bash\n" * 40, "it is text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n", "Git LFS pointer"),
        (b"PK\x03\x04" + bytes(200), "ZIP archive"),
        (b"\x89HDF\r\n\x1a\n" + bytes(200), "HDF5"),
        (b"\x1c\0\0\0TFL3" + bytes(200), "TensorFlow Lite"),
    ],
)
def test_another_kind_of_file_is_called_what_it_is(tmp_path, content, word):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not an ONNX file") as caught:
        load_model(path)
    assert word in caught.value.message
    assert "byte" not in caught.value.message


def test_a_weight_that_two_layers_share_counts_once():
    weight = numpy_helper.from_array(np.ones((8, 8), np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["y"])]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], [weight])
    report = sparsity_report(helper.make_model(graph))
    assert (len(report.layers), report.totals.parameters) == (2, 64)


def test_a_shape_of_no_input_is_refused():
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    with pytest.raises(ModelError, match="no input 'foo'"):
        sparsity_report(helper.make_model(graph), shapes={"foo": (1, 2)})
