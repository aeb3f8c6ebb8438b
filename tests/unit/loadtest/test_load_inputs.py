from __future__ import annotations

import base64
import json

import ml_dtypes
import numpy as np
import pytest

from repo_manager.errors import InputError, UsageError
from repo_manager.loadtest.inputs.samples import drawn_note, make_samples, resolve_shapes
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.loadtest.wire.payload import build_endpoint
from repo_manager.repository.golden import Exchange, Golden, read_golden, write_golden
from repo_manager.request_data.read import read_rows, write_rows
from repo_manager.request_data.tensors import NUMPY_OF_TRITON, InputFacts, raw_bytes
from repo_manager.server.transport import ClientOptions
from repo_manager.types import as_json


def facts(*inputs, batch=0, **changes):
    values = {"response_cache": False, "dynamic_batching": False, "decoupled": False, "sequence": False, **changes}
    return ServedModelFacts("grpc://a:1", "grpc", "t", "1", "m", "1", "b", batch, inputs, ("y",), **values)


def options(**changes):
    return LoadTestOptions(**{"url": "grpc://a:1", "model": "m", "concurrency": (1,), "distinct": 3, **changes})


X = InputFacts("x", "FP32", (4,))


@pytest.mark.parametrize("datatype", list(NUMPY_OF_TRITON))
def test_random_inputs_of_every_type_are_seeded_distinct_and_not_zero(datatype):
    target = facts(InputFacts("x", datatype, (64,)))
    samples = make_samples(target, options())
    again = make_samples(target, options())
    other = make_samples(target, options(seed=1))
    assert len(samples) == 3
    raw = [raw_bytes(sample["x"]) for sample in samples]
    assert len(set(raw)) == 3
    assert raw == [raw_bytes(sample["x"]) for sample in again]
    assert raw != [raw_bytes(sample["x"]) for sample in other]
    assert samples[0]["x"].dtype == NUMPY_OF_TRITON[datatype]
    assert any(raw[0])


def test_the_batch_axis_is_added_where_the_model_has_one():
    assert resolve_shapes(facts(X, batch=8), options(batch_size=4)) == {"x": (4, 4)}
    assert resolve_shapes(facts(X), options()) == {"x": (4,)}
    assert resolve_shapes(facts(InputFacts("s", "FP32", ())), options()) == {"s": ()}


@pytest.mark.parametrize(
    ("item", "batch", "change", "words"),
    [
        (InputFacts("x", "FP32", (-1, 3)), 0, {}, r"dynamic shape \[-1,3\]"),
        (X, 0, {"shapes": {"z": (1,)}}, "no input 'z'"),
        (X, 0, {"shapes": {"x": (5,)}}, "does not fit"),
        (X, 0, {"shapes": {"x": (1, 4)}}, "does not fit"),
        (X, 8, {"batch_size": 16}, "max_batch_size 8"),
        (X, 0, {"batch_size": 2}, "no batch axis"),
    ],
)
def test_shapes_that_do_not_fit(item, batch, change, words):
    with pytest.raises(UsageError, match=words):
        make_samples(facts(item, batch=batch), options(**change))


def test_npz_samples_are_batched_in_rotation(tmp_path):
    path = tmp_path / "d.npz"
    np.savez(path, **{"input:x": np.arange(12.0).reshape(3, 4), "output:y": np.zeros(3)})
    samples = make_samples(facts(X, batch=8), options(data=path, batch_size=2))
    assert [sample["x"][:, 0].tolist() for sample in samples] == [[0.0, 4.0], [8.0, 0.0]]
    assert samples[0]["x"].dtype == np.float32


def test_one_npy_without_a_sample_axis_is_one_sample(tmp_path):
    np.save(tmp_path / "d.npy", np.ones(4))
    (sample,) = make_samples(facts(X), options(data=tmp_path / "d.npy"))
    assert sample["x"].shape == (4,)


def test_perf_analyzers_json(tmp_path):
    raw = base64.b64encode(np.arange(4, dtype=np.float32).tobytes()).decode()
    document = {
        "data": [
            {"x": [1, 2, 3, 4], "w": ["a", "b"]},
            {"x": {"content": [5, 6, 7, 8], "shape": [4]}, "w": {"content": ["c", "d"]}},
            {"x": {"b64": raw}, "w": ["e", "f"]},
        ]
    }
    path = tmp_path / "d.json"
    path.write_text(json.dumps(document))
    target = facts(X, InputFacts("w", "BYTES", (-1,)))
    samples = make_samples(target, options(data=path))
    assert [sample["x"].tolist() for sample in samples] == [[1, 2, 3, 4], [5, 6, 7, 8], [0, 1, 2, 3]]
    assert samples[1]["w"].tolist() == [b"c", b"d"]
    path.write_text(json.dumps({"data": [[{"x": [1, 1, 1, 1], "w": ["a"]}], [{"x": [2, 2, 2, 2], "w": ["b"]}]]}))
    assert len(make_samples(target, options(data=path))) == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "{", "cannot be read"),
        ("b.json", '{"data": []}', "no sample"),
        ("c.json", '{"data": [{"y": [1]}]}', "cannot be read"),
        ("d.txt", "1", "not a known kind"),
        ("e.npz", "not a zip", "cannot be read"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=words):
        make_samples(facts(X), options(data=tmp_path / name))


def test_a_file_of_the_wrong_shape_is_refused(tmp_path):
    np.save(tmp_path / "d.npy", np.ones((2, 5)))
    with pytest.raises(InputError, match=r"request 1, input x: the shape is \[5\], expected \[4\]"):
        make_samples(facts(X), options(data=tmp_path / "d.npy"))


def test_zeros_are_refused_unless_allowed(tmp_path):
    np.save(tmp_path / "d.npy", np.zeros((2, 4)))
    with pytest.raises(InputError, match="all zeros"):
        make_samples(facts(X), options(data=tmp_path / "d.npy"))
    assert len(make_samples(facts(X), options(data=tmp_path / "d.npy", allow_zeros=True))) == 2


def test_the_text_of_a_golden_sample_is_sent_as_it_was_recorded(tmp_path):
    given = np.array([["w\u00f6rter".encode(), b"\xff"]], object)
    write_golden(tmp_path / "golden.npz", Golden.of([Exchange({"TEXT": given}, ({},))]))
    read = read_golden(tmp_path / "golden.npz").inputs["TEXT"]
    assert raw_bytes(read) == raw_bytes(given)


def test_raw_bytes():
    assert raw_bytes(np.array([b"ab", b""], dtype=object)) == b"\2\0\0\0ab\0\0\0\0"
    assert raw_bytes(np.array([[1, 2], [3, 4]], dtype=">i2").T) == b"\1\0\3\0\2\0\4\0"
    assert raw_bytes(np.array([1.0], dtype=ml_dtypes.bfloat16)) == b"\x80\x3f"
    assert raw_bytes(np.array(True)) == b"\1"


def test_messages_say_what_the_sample_is():
    from tritonclient.grpc import service_pb2

    target = facts(X, batch=8)
    samples = make_samples(target, options(batch_size=2))
    access = ClientOptions(headers={"Key": "v"}, token="t0ken")
    endpoint = build_endpoint(target, samples, options(batch_size=2, version=3, access=access))
    request = service_pb2.ModelInferRequest.FromString(endpoint.messages[1])
    assert (request.model_name, request.model_version) == ("m", "3")
    assert list(request.inputs[0].shape) == [2, 4]
    assert request.raw_input_contents[0] == samples[1]["x"].tobytes()
    assert dict(endpoint.headers) == {
        "key": "v",
        "triton-grpc-protocol-key": "v",  # as Triton names a restricted API's key over gRPC
        "authorization": "Bearer t0ken",
    }
    assert "t0ken" not in repr(endpoint)
    assert "t0ken" not in repr(options(access=access)) + json.dumps(as_json(options(access=access)))

    http = build_endpoint(target, samples, options(batch_size=2, url="http://a:1", version=3))
    header = json.loads(http.messages[0][: http.json_bytes[0]])
    assert http.path == "/v2/models/m/versions/3/infer"
    assert header["inputs"][0]["parameters"]["binary_data_size"] == 32
    assert http.messages[0][http.json_bytes[0] :] == samples[0]["x"].tobytes()


def test_integers_with_a_range_of_their_own_stay_inside_it():
    tokens, mask = InputFacts("ids", "INT64", (64,)), InputFacts("mask", "UINT8", (64,))
    given = options(int_ranges={"ids": (5, 7), "mask": (1, 1000), "x": (3, 4)})
    samples = make_samples(facts(tokens, mask, X), given)
    assert {int(number) for sample in samples for number in sample["ids"]} == {5, 6}
    assert max(int(sample["mask"].max()) for sample in samples) > 200  # the type ends at 255
    assert min(int(sample["mask"].min()) for sample in samples) >= 1
    note = drawn_note(facts(tokens, mask, X), given)
    assert "ids from 5 to 6, mask from 1 to 999." in note
    assert "x from" not in note


def test_nothing_is_said_of_ranges_where_data_is_given_or_nothing_is_known(tmp_path):
    tokens = InputFacts("ids", "INT64", (4,))
    assert drawn_note(facts(tokens), options()) is None
    assert drawn_note(facts(tokens), options(int_ranges={"ids": (0, 2)}, data=tmp_path / "d.npz")) is None


@pytest.mark.parametrize("datatype", [name for name in NUMPY_OF_TRITON if name not in ("BF16", "FP16")])
def test_samples_for_perf_analyzer_are_read_back_as_they_were(datatype, tmp_path):
    target = facts(InputFacts("x", datatype, (2, 3)))
    samples = make_samples(target, options())
    write_rows(tmp_path / "inputs.json", samples)
    again = read_rows(tmp_path / "inputs.json", target.inputs)
    assert [raw_bytes(row["x"]) for row in again] == [raw_bytes(row["x"]) for row in samples]
