"""Recorded requests in their three forms."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from repo_manager.errors import InputError
from repo_manager.repository.golden import Exchange, Golden, write_golden
from repo_manager.rollout.trial.shadow import read_exchanges
from repo_manager.triton_config.config import ModelConfig, parse_config

IMAGE = 'input { name: "x" data_type: TYPE_FP32 dims: [2, 3] } output { name: "y" data_type: TYPE_FP32 dims: 1 }'
ONE = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


def config(inputs: str = IMAGE, batch: int = 4) -> ModelConfig:
    return parse_config(f'backend: "b" max_batch_size: {batch} {inputs}')


def read(path: Path, text: str, of: ModelConfig | None = None) -> list[dict[str, np.ndarray]]:
    path.write_text(text)
    return [dict(request) for (request,) in read_exchanges(path, of or config())]


def test_json_lines_plain_and_as_tritons_http_body(tmp_path: Path) -> None:
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2, 3], "data": [1, 2, 3, 4, 5, 6]}]}
    lines = [
        json.dumps({"x": ONE}),
        "",
        json.dumps({"x": [ONE, ONE]}),
        json.dumps(body),
        json.dumps({"inputs": {"x": ONE}}),
    ]
    requests = read(tmp_path / "r.jsonl", "\n".join(lines))
    assert [request["x"].shape for request in requests] == [(1, 2, 3), (2, 2, 3), (1, 2, 3), (1, 2, 3)]
    assert all(request["x"].dtype == np.float32 for request in requests)
    np.testing.assert_array_equal(requests[2]["x"][0], ONE)


def test_perf_analyzers_input_data(tmp_path: Path) -> None:
    raw = base64.b64encode(np.asarray(ONE, np.float32).tobytes()).decode()
    entries = [{"x": [1, 2, 3, 4, 5, 6]}, {"x": {"content": [6, 5, 4, 3, 2, 1], "shape": [2, 3]}}, {"x": {"b64": raw}}]
    requests = read(tmp_path / "r.json", json.dumps({"data": entries}))
    assert [request["x"].shape for request in requests] == [(1, 2, 3)] * 3
    np.testing.assert_array_equal(requests[2]["x"][0], ONE)
    streams = read(tmp_path / "r.json", json.dumps({"data": [[entries[0]], [entries[1], entries[2]]]}))
    assert len(streams) == 3


def test_npz_and_a_golden_sample(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    np.savez(path, x=np.arange(30, dtype=np.float64).reshape(5, 2, 3))
    requests = [request for (request,) in read_exchanges(path, config())]
    assert [request["x"].shape for request in requests] == [(1, 2, 3)] * 5
    assert requests[4]["x"][0, 1, 2] == 29.0
    write_golden(path, Golden({"x": np.ones((1, 2, 3), np.float32)}, {"y": np.ones((1, 1), np.float32)}))
    assert [request["x"].shape for (request,) in read_exchanges(path, config())] == [(1, 2, 3)]


def test_without_a_batch_axis(tmp_path: Path) -> None:
    (request,) = read(tmp_path / "r.jsonl", json.dumps({"x": ONE}), config(batch=0))
    assert request["x"].shape == (2, 3)


def test_strings_booleans_and_dynamic_dims(tmp_path: Path) -> None:
    inputs = (
        'input { name: "words" data_type: TYPE_STRING dims: -1 } input { name: "flag" data_type: TYPE_BOOL dims: 1 }'
        'input { name: "spare" data_type: TYPE_INT64 dims: 1 optional: true }'
    )
    lines = [{"words": ["a", "ü"], "flag": [True]}, {"words": ["x"], "flag": [False], "spare": [7]}]
    first, second = read(tmp_path / "r.jsonl", "\n".join(map(json.dumps, lines)), config(inputs))
    assert first["words"].tolist() == [[b"a", "ü".encode()]]
    assert first["flag"].tolist() == [[True]]
    assert "spare" not in first
    assert second["spare"].tolist() == [[7]]


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("r.txt", "x", "none of .jsonl, .json and .npz"),
        ("r.jsonl", "", "holds no request"),
        ("r.jsonl", "{", "cannot be read"),
        ("r.jsonl", "[1]", "expected an object"),
        ("r.jsonl", '{"y": [1]}', r"request 1 has no input x and names the input y; the model's are x"),
        ("r.jsonl", json.dumps({"x": ONE}) + '\n{"x": [1, 2], "z": 1}', r"request 2 names the input z"),
        (
            "r.jsonl",
            json.dumps({"x": ONE}) + '\n{"x": [[1, 2]]}',
            r"request 2, input x: the shape is \[1, 2\], expected \[2, 3\]",
        ),
        ("r.jsonl", '{"x": [[1, 2, 3], [4, 5]]}', "request 1, input x"),
        ("r.jsonl", '{"x": [["a", "b", "c"], ["d", "e", "f"]]}', "request 1, input x"),
        ("r.json", '{"data": []}', "holds no request"),
        ("r.json", '{"other": []}', "cannot be read"),
        ("r.json", '{"data": [{"x": {"b64": "%"}}]}', "request 1, input x"),
        ("r.npz", "no archive", "cannot be read"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, text: str, found: str) -> None:
    with pytest.raises(InputError, match=found):
        read(tmp_path / name, text)


def test_arrays_that_count_differently(tmp_path: Path) -> None:
    two = config(IMAGE + ' input { name: "z" data_type: TYPE_FP32 dims: 1 }')
    np.savez(tmp_path / "r.npz", x=np.ones((3, 2, 3)), z=np.ones((2, 1)))
    with pytest.raises(InputError, match="the arrays have different ones"):
        read_exchanges(tmp_path / "r.npz", two)
    with pytest.raises(InputError, match="cannot be read"):
        read_exchanges(tmp_path / "missing.jsonl", two)


def test_a_golden_sample_of_several_requests_is_sent_as_recorded(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    answered = ({"y": np.ones((1, 1), np.float32)},)
    exchanges = [Exchange({"x": x}, answered), Exchange({"x": np.concatenate([x + 1, x + 2])}, answered * 2)]
    write_golden(tmp_path / "golden.npz", Golden.of([*exchanges, Exchange({"x": x + 3}, ())]))
    requests = [request for (request,) in read_exchanges(tmp_path / "golden.npz", config())]
    for request, expected in zip(requests, (x, np.concatenate([x + 1, x + 2]), x + 3), strict=True):
        np.testing.assert_array_equal(request["x"], expected)


def test_recorded_exchanges_of_a_decoupled_or_string_model(tmp_path: Path) -> None:
    of = config('input { name: "t" data_type: TYPE_STRING dims: [-1] } output { name: "u" data_type: TYPE_STRING }', 0)
    write_golden(
        tmp_path / "golden.npz",
        Golden.of(
            [
                Exchange({"t": np.array([b"a", "\u00e9".encode(), b"\xff"], object)}, ()),
                Exchange({"t": np.array([b"b"], object)}, ({"u": np.array([b"c"], object)},) * 3),
            ]
        ),
    )
    found = [request["t"].tolist() for (request,) in read_exchanges(tmp_path / "golden.npz", of)]
    assert found == [[b"a", "\u00e9".encode(), b"\xff"], [b"b"]]


def test_recorded_exchanges_that_do_not_fit_are_refused_with_the_request(tmp_path: Path) -> None:
    other = Exchange({"z": np.ones((1, 2, 3), np.float32)}, ())
    write_golden(tmp_path / "golden.npz", Golden.of([Exchange({"x": np.ones((1, 2, 3), np.float32)}, ()), other]))
    with pytest.raises(InputError, match="request 2 has no input x and names the input z"):
        read_exchanges(tmp_path / "golden.npz", config())


def test_a_file_is_one_sequence_and_each_stream_of_perf_analyzers_json_is_one(tmp_path: Path) -> None:
    row = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    (tmp_path / "one.jsonl").write_text(f'{{"x": {row}}}\n' * 3)
    assert [len(each) for each in read_exchanges(tmp_path / "one.jsonl", config(), sequence=True)] == [3]
    step = {"x": {"content": [1.0] * 6, "shape": [2, 3]}}
    (tmp_path / "two.json").write_text(json.dumps({"data": [[step, step], [step]]}))
    assert [len(each) for each in read_exchanges(tmp_path / "two.json", config(), sequence=True)] == [2, 1]
    assert [len(each) for each in read_exchanges(tmp_path / "two.json", config())] == [1, 1, 1]
