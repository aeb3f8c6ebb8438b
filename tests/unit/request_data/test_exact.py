"""Values reach the server as the file has them, or are refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from repo_manager.errors import InputError
from repo_manager.loadtest.inputs.samples import make_samples
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.request_data.read import read_rows, read_streams
from repo_manager.request_data.tensors import NUMPY_OF_TRITON, InputFacts, decoded, exact_array, raw_bytes
from repo_manager.rollout.trial.shadow import read_exchanges
from repo_manager.triton_config.config import parse_config

INTEGERS = [name for name, dtype in NUMPY_OF_TRITON.items() if dtype.kind in "iu"]
FLOATS = ("FP16", "BF16", "FP32", "FP64")


@pytest.mark.parametrize("datatype", INTEGERS)
@pytest.mark.parametrize("form", ["list", "floats", "int64", "float64", "uint64"])
def test_the_ends_of_an_integer_type_are_kept_and_beyond_is_refused(datatype: str, form: str) -> None:
    bounds = np.iinfo(NUMPY_OF_TRITON[datatype])
    for inside in (int(bounds.min), int(bounds.max)):
        for value, fits in ((inside, True), (inside + (1 if inside > 0 else -1), False)):
            made = _in_form(value, form)
            if made is None:
                continue
            if fits:
                assert exact_array(made, datatype).tolist() == [[value]]
            else:
                with pytest.raises(ValueError, match=rf"expected a whole number from {bounds.min} to {bounds.max}"):
                    exact_array(made, datatype)


def _in_form(value: int, form: str) -> object:
    """Return the value as a file holds it. `None` if the form cannot."""
    if form in ("list", "floats"):
        return [[value]] if form == "list" or float(value) != value else [[float(value)]]
    dtype = np.dtype(form)
    if dtype.kind == "f":
        return np.array([[value]], dtype) if int(np.float64(value)) == value else None
    bounds = np.iinfo(dtype)
    return np.array([[value]], dtype) if int(bounds.min) <= value <= int(bounds.max) else None


@pytest.mark.parametrize("datatype", INTEGERS)
@pytest.mark.parametrize("value", [1.9, -2.5, float("nan"), float("inf"), None, "7", [], 2**70])
def test_what_is_no_whole_number_is_refused(datatype: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"element 1 is .*(whole number|a list)"):
        exact_array([1, value], datatype)


def test_large_integers_among_floats_keep_every_digit() -> None:
    assert exact_array([2**63 - 1, 1.0, -5], "INT64").tolist() == [2**63 - 1, 1, -5]
    assert exact_array([2**64 - 1, 0], "UINT64").tolist() == [2**64 - 1, 0]
    with pytest.raises(ValueError, match="element 0 is 18446744073709551615"):
        exact_array([2**64 - 1, -1], "INT64")


@pytest.mark.parametrize(("datatype", "over"), [("FP16", 70000.0), ("BF16", 3.5e38), ("FP32", 1e39), ("FP32", 10**60)])
def test_floats_are_rounded_but_never_become_infinite(datatype: str, over: float) -> None:
    kept = exact_array([0.1, float("inf"), float("nan"), -2], datatype)
    assert kept.dtype == NUMPY_OF_TRITON[datatype]
    assert float(kept[0]) == pytest.approx(0.1, rel=1e-2)
    assert np.isinf(kept[1].astype(np.float64))
    with pytest.raises(ValueError, match=r"element 1 .* within the range, as"):
        exact_array([1.0, over], datatype)


def test_booleans_are_two_values() -> None:
    assert exact_array([True, 0, 1.0], "BOOL").tolist() == [True, False, True]
    with pytest.raises(ValueError, match="element 1 is 2"):
        exact_array([True, 2], "BOOL")


def test_strings_are_bytes() -> None:
    assert exact_array([["a", "ü"], [b"\0", "5"]], "BYTES").tolist() == [[b"a", "ü".encode()], [b"\0", b"5"]]
    for wrong in (None, True, ["a"]):
        with pytest.raises(ValueError, match=r"element 1 is .*(expected a string|a list)"):
            exact_array(["x", wrong], "BYTES")


def test_base64_is_tritons_binary_form() -> None:
    def encoded(raw: bytes) -> str:
        return base64.b64encode(raw).decode()

    words = exact_array(["ab", "", "c" * 300], "BYTES")
    assert decoded(encoded(raw_bytes(words)), "BYTES").tolist() == words.tolist()
    picture = b"\xff\xd8\xff\xe0" + bytes(100)
    assert decoded(encoded(picture), "BYTES").tolist() == [picture]
    halves = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    assert decoded(encoded(raw_bytes(halves)), "BF16").tolist() == halves.tolist()
    for wrong, found in (("%", "not base64"), (encoded(b"abc"), "3 bytes are no whole number"), (5, "b64 is 5")):
        with pytest.raises(ValueError, match=found):
            decoded(wrong, "INT32")
    with pytest.raises(ValueError, match="ends within string 2"):
        decoded(encoded(raw_bytes(words)[:-1]), "BYTES")


def _files(folder: Path, value: float) -> list[Path]:
    """One request in every form."""
    np.savez(folder / "d.npz", ids=np.array([[value, 2]]))
    (folder / "d.json").write_text(json.dumps({"data": [{"ids": {"content": [value, 2], "shape": [2]}}]}))
    (folder / "flat.json").write_text(json.dumps({"data": [{"ids": [value, 2]}]}))
    (folder / "d.jsonl").write_text(json.dumps({"ids": [[value, 2]]}))
    body = {"inputs": [{"name": "ids", "datatype": "INT32", "shape": [1, 2], "data": [value, 2]}]}
    (folder / "body.jsonl").write_text(json.dumps(body))
    return [folder / name for name in ("d.npz", "d.json", "flat.json", "d.jsonl", "body.jsonl")]


@pytest.mark.parametrize(("value", "fits"), [(2147483647, True), (7.0, True), (3_000_000_000, False), (1.9, False)])
def test_load_test_and_trial_send_the_same_or_refuse_the_same(tmp_path: Path, value: float, fits: bool) -> None:
    item = InputFacts("ids", "INT32", (-1,))
    facts = ServedModelFacts(
        "grpc://a:1", "grpc", "t", "1", "m", "1", "b", 4, (item,), ("y",), False, False, False, False
    )
    config = parse_config('backend: "b" max_batch_size: 4 input { name: "ids" data_type: TYPE_INT32 dims: -1 }')
    for path in _files(tmp_path, value):
        options = LoadTestOptions("grpc://a:1", "m", concurrency=(1,), data=path)
        if fits:
            (sample,), ((request,),) = make_samples(facts, options), read_exchanges(path, config)
            assert sample["ids"].tolist() == request["ids"].tolist() == [[value, 2]]
            assert sample["ids"].dtype == request["ids"].dtype == np.int32
            continue
        for read in (lambda: make_samples(facts, options), lambda: read_exchanges(path, config)):  # noqa: B023
            with pytest.raises(InputError, match=rf"{path.name}: .* request 1, input ids: element 0 is {value}"):
                read()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[]", 'found a list, expected {"data"'),
        ('{"data": {}}', 'expected {"data"'),
        ('{"data": [3]}', "request 1 is a number, expected an object"),
        ('{"data": [{"x": {"shape": [1]}}]}', 'input x: it has the keys shape, expected "content" or "b64"'),
        ('{"data": [{"x": {"content": [1], "shape": "1"}}]}', "the shape is '1', expected a list"),
        ('{"data": [{"x": {"content": [1], "shape": [-1]}}]}', "the shape is [-1], expected a list"),
        (
            '{"data": [{"x": [1]}, {"x": {"content": [1], "shape": [5]}}]}',
            "request 2, input x: 1 values do not fill the shape [5]",
        ),
        ('{"data": [{"x": [1]}, [{"x": [1]}, {}]]}', "request 3 (stream 2, step 2) has no input x"),
        ('{"data": [{"x": [1], "z": 1}]}', "request 1 names the input z"),
        ('{"data": [{"x": {"b64": 5}}]}', "request 1, input x: b64 is 5, expected a string"),
        ("null", 'found null, expected {"data"'),
        ('{"data": [[]]}', "holds no request"),
        ('{"data": [null]}', "request 1 is null, expected an object"),
        ('{"data": [{"x": [1, null]}]}', "request 1, input x: element 1 is None, expected a number"),
        ('{"data": [{"x": [1, 2, "3"]}]}', "request 1, input x: element 2 is '3', expected a number"),
        ('{"data": [{"x": [1, [2], 3]}]}', "request 1, input x: element 1 is a list beside others"),
        ('{"data": [{"x": [[1, 2], [3]]}]}', "request 1, input x: lists of 2 and of 1 at one level"),
        ('{"data": [{"x": [1, 1e400]}]}', "request 1, input x: element 1 is beyond the range"),
        ('{"data": [{"x": [1], "x": [2]}]}', "request 1, input x: it is there twice"),
        ('{"data": [{"X": [1]}]}', "request 1 has no input x and names the input X; the model's are x"),
        ('{"data": [{"x": {"b64": "AAA"}}]}', "request 1, input x: its b64 is not base64"),
        ('{"data": [{"x": {"content": [1, 2], "shape": [2, 1, 1]}}]}', "the shape is [2, 1, 1], expected [-1]"),
        ('{"data": [[{"x": [1]}], [[{"x": [1]}]]]}', "request 2 (stream 2, step 1) is a list"),
        (f'{{"data": [{{"x": {{"content": [1], "shape": [{10**30}]}}}}]}}', "expected a list of sizes"),
        (f'{{"x": {"[" * 100_000}', "d.json: the input data cannot be read: nested too deeply"),
    ],
    ids=range(25),
)
def test_messages_name_request_and_input(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(InputError) as caught:
        read_rows(tmp_path / "d.json", [InputFacts("x", "FP32", (-1,))])
    assert found in caught.value.message


def test_a_flat_list_takes_the_shape_that_is_given(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps({"data": [{"x": list(range(1, 7))}]}))
    item = InputFacts("x", "FP32", (-1, -1))
    with pytest.raises(InputError, match="request 1, input x: a flat list of 6"):
        read_rows(tmp_path / "d.json", [item])
    facts = ServedModelFacts(
        "grpc://a:1", "grpc", "t", "1", "m", "1", "b", 0, (item,), ("y",), False, False, False, False
    )
    options = LoadTestOptions("grpc://a:1", "m", concurrency=(1,), data=tmp_path / "d.json", shapes={"x": (2, 3)})
    (sample,) = make_samples(facts, options)
    assert sample["x"].tolist() == [[1, 2, 3], [4, 5, 6]]
    rows = [{"x": [1, 2, 3, 4, 5, 6]}, {"x": {"content": [1, 2, 3, 4], "shape": [2, 2]}}]
    (tmp_path / "d.json").write_text(json.dumps({"data": rows}))
    first, second = read_rows(tmp_path / "d.json", [item], flat={"x": (3, 2)})
    assert (first["x"].shape, second["x"].shape) == ((3, 2), (2, 2))


def test_base64_of_strings_without_lengths_is_refused_where_perf_analyzer_refuses_it(tmp_path: Path) -> None:
    """perf_analyzer's documents need the lengths: Triton refuses strings without them. Other forms take one string."""
    words = InputFacts("words", "BYTES", (1,))
    raw = {"words": {"b64": base64.b64encode(b"hello").decode()}}
    for rows in ([raw], [[raw]]):
        (tmp_path / "d.json").write_text(json.dumps({"data": rows}))
        with pytest.raises(InputError, match="words: its b64 ends within string 0: expected the length in 4 bytes"):
            read_rows(tmp_path / "d.json", [words])
    for name, document in (("d.json", {"instances": [raw]}), ("d.jsonl", raw)):
        (tmp_path / name).write_text(json.dumps(document))
        assert [row["words"].tolist() for row in read_rows(tmp_path / name, [words])] == [[b"hello"]]


def test_every_form_that_perf_analyzer_documents(tmp_path: Path) -> None:
    items = (InputFacts("x", "FP32", (-1, 2)), InputFacts("words", "BYTES", (-1,), optional=True))
    raw = {
        "x": base64.b64encode(raw_bytes(exact_array([1, 2], "FP32"))).decode(),
        "words": base64.b64encode(raw_bytes(exact_array(["ab", ""], "BYTES"))).decode(),
    }
    rows = [
        [{"x": [1, 2]}, {"x": {"content": [1, 2]}, "model": "m"}],
        [{"x": {"b64": raw["x"]}, "words": {"b64": raw["words"]}}],
        [{"x": {"content": {"b64": raw["x"]}, "shape": [1, 2]}, "words": {"content": ["a", "b"], "shape": [2]}}],
    ]
    (tmp_path / "d.json").write_text(json.dumps({"data": rows, "validation_data": [[{"y": [1]}]]}))
    streams = read_streams(tmp_path / "d.json", items)
    assert [len(stream) for stream in streams] == [2, 1, 1]
    assert all(row["x"].tolist() == [[1, 2]] for stream in streams for row in stream)
    assert [row["words"].tolist() for stream in streams for row in stream if "words" in row] == [
        [b"ab", b""],
        [b"a", b"b"],
    ]
    (tmp_path / "x").write_bytes(raw_bytes(exact_array([1, 2, 3, 4], "FP32")))
    (tmp_path / "words").write_text("ab\ncd\n")
    (row,) = read_rows(tmp_path, items)
    assert row["x"].tolist() == [[1, 2], [3, 4]]
    assert row["words"].tolist() == [b"ab", b"cd"]


@pytest.mark.parametrize("text", ['{"x": [1, 2]}', '[{"x": [1, 2]}]', '{"inputs": {"x": [1, 2]}}'])
def test_a_json_file_holds_what_a_line_holds(tmp_path: Path, text: str) -> None:
    (tmp_path / "d.json").write_text(text)
    (row,) = read_rows(tmp_path / "d.json", [InputFacts("x", "FP32", (2,))])
    assert row["x"].tolist() == [1, 2]
    (tmp_path / "d.json").write_text('{"data": [1, 2]}')
    (row,) = read_rows(tmp_path / "d.json", [InputFacts("data", "FP32", (2,))])
    assert row["data"].tolist() == [1, 2]


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"x": [1]}\n\n{"x": ["1"]}\n')
    with pytest.raises(InputError, match=r"request 2 \(line 3\), input x: element 0 is '1'"):
        read_rows(tmp_path / "d.jsonl", [InputFacts("x", "FP32", (1,))])


def test_requests_may_leave_optional_inputs_out(tmp_path: Path) -> None:
    items = (InputFacts("x", "FP32", (1,)), InputFacts("mask", "BOOL", (1,), optional=True))
    rows = [{"x": [1]}, {"x": [2], "mask": [True]}, {"x": [3]}]
    (tmp_path / "d.json").write_text(json.dumps({"data": rows}))
    facts = ServedModelFacts(
        "grpc://a:1", "grpc", "t", "1", "m", "1", "b", 8, items, ("y",), False, False, False, False
    )
    options = LoadTestOptions("grpc://a:1", "m", concurrency=(1,), data=tmp_path / "d.json", batch_size=2)
    samples = make_samples(facts, options)
    assert [{name: array.tolist() for name, array in sample.items()} for sample in samples] == [
        {"x": [[1], [3]]},
        {"x": [[2], [2]], "mask": [[True], [True]]},
    ]


def test_every_sample_is_checked(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"x": [1, 2]}\n{"x": [1, 2, 3]}\n')
    facts = ServedModelFacts(
        "grpc://a:1", "grpc", "t", "1", "m", "1", "b", 0, (InputFacts("x", "FP32", (2,)),), ("y",),
        False, False, False, False,
    )  # fmt: skip
    options = LoadTestOptions("grpc://a:1", "m", concurrency=(1,), data=tmp_path / "d.jsonl")
    with pytest.raises(InputError, match=r"request 2, input x: the shape is \[3\], expected \[2\]"):
        make_samples(facts, options)


PROMPT = [InputFacts("text_input", "BYTES", (1,)), InputFacts("max_tokens", "INT32", (1,), optional=True)]


@pytest.mark.parametrize(
    "text",
    [
        '{"text_input": "a", "max_tokens": 3}',
        '{"text_input": "a", "parameters": {"max_tokens": 3}}',
        '{"instances": [{"text_input": "a", "max_tokens": [3]}]}',
        '{"inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["a"]},'
        '{"name": "max_tokens", "shape": [1], "datatype": "INT32", "data": [3]}], "parameters": {"x": 1}}',
    ],
    ids=["generate", "generate with parameters", "predict", "infer"],
)
def test_bodies_of_http_calls_are_read_as_the_server_reads_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "d.json").write_text(text)
    (row,) = read_rows(tmp_path / "d.json", PROMPT)
    assert {name: array.tolist() for name, array in row.items()} == {"text_input": [b"a"], "max_tokens": [3]}


def test_instances_of_a_model_with_one_input_need_no_name(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text('{"instances": [[1, 2], [3, 4]]}')
    rows = read_rows(tmp_path / "d.json", [InputFacts("x", "FP32", (-1,))])
    assert [row["x"].tolist() for row in rows] == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            '{"text_input": "a", "bad_words": ""}',
            "names the input bad_words; .* max_tokens (--",
        ),
        ('{"text_input": "a", "parameters": {"top_k": 1}}', "names the input top_k; .*--parameter sends"),
        ('{"text_input": "a", "max_tokens": 1, "parameters": {"max_tokens": 3}}', "has max_tokens twice, once in its"),
        ('{"instances": [3]}', "request 1 is a number, expected an object"),
    ],
)
def test_what_a_body_has_beside_inputs_is_never_dropped(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(InputError, match=found.replace("(", r"\(")):
        read_rows(tmp_path / "d.json", PROMPT)


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_arrays_of_python_objects_are_refused_with_the_way_out(tmp_path: Path, suffix: str) -> None:
    texts = np.array([b"a", b"b"], object)
    path = tmp_path / f"d.{suffix}"
    np.savez(path, text_input=texts) if suffix == "npz" else np.save(path, texts)
    with pytest.raises(InputError, match=r"holds Python objects, .*save texts as np\.array\(\[...\], dtype=bytes\)"):
        read_rows(path, PROMPT[:1])
