"""perf_analyzer's files and exit codes. The real one runs in tests/integration; a script here ends as it is told to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from repo_manager.errors import InputError, MissingDependencyError, ServerUnreachableError, UsageError
from repo_manager.loadtest.measure import Level
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.perf_analyzer.drive import (
    command_of,
    find_perf_analyzer,
    parse_csv,
    parse_profile_export,
    run_perf_analyzer,
)
from repo_manager.loadtest.perf_analyzer.install import PerfAnalyzer
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.request_data.read import read_rows, read_streams
from repo_manager.request_data.tensors import InputFacts
from repo_manager.server.transport import ClientOptions

FACTS = ServedModelFacts(
    "grpc://a:1", "grpc", "triton", "2.51.0", "m", "1", "b", 8,
    (InputFacts("x", "FP32", (-1, 4)), InputFacts("z", "FP32", (2,))), ("y",), False, True, False, False,
)  # fmt: skip
CLOSED, OPEN = Level("concurrency", 4, "closed loop"), Level("rate", 50.0, "poisson")
CSV = (
    "Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,"
    "Server Compute Infer,Server Compute Output,{more}Client Recv,p50 latency,p90 latency,p95 latency,p99 latency"
    "{last}\n"
    "4,1000.5,10,200,30,20,500.5,15,{values}2,800,900,950,1200{tail}\n"
)


def options(**changes):
    return LoadTestOptions(
        **{"url": "grpc://a:1", "model": "m", "concurrency": (4,), "shapes": {"x": (3, 4)}, **changes}
    )


@pytest.mark.parametrize(
    ("fill", "mean"),
    [
        ({"more": "", "values": "", "last": "", "tail": ""}, None),
        (
            {"more": "Server Cache Hit,Server Cache Miss,", "values": "1,2,", "last": ",Avg latency", "tail": ",850"},
            850.0,
        ),
        (
            {"more": "", "values": "", "last": ",Avg latency,Avg GPU Utilization", "tail": ",850,GPU-a:0.5;GPU-b:0.6;"},
            850.0,
        ),
    ],
)
def test_columns_are_found_by_name(fill, mean):
    (row,) = parse_csv(CSV.format(**fill))
    assert row["Inferences/Second"] == 1000.5
    assert row["p99 latency"] == 1200
    assert row.get("Avg latency") == mean
    assert "Avg GPU Utilization" not in row


START = "Concurrency,Inferences/Second,Client Send,"
SERVER = "Network+Server Send/Recv,Server Queue,Server Compute Input,Server Compute Infer,Server Compute Output,"
PERCENTILES = "Client Recv,p50 latency,p90 latency,p95 latency,p99 latency"
VERBOSE = ",Avg latency,request/response,response wait"
GPU = ",Avg GPU Utilization,Avg GPU Power Usage,Max GPU Memory Usage,Total GPU Memory"
GPU_CELLS = ",GPU-a:0.5;GPU-b:0.6;,GPU-a:70;GPU-b:71;,GPU-a:1000;GPU-b:1000;,GPU-a:8000;GPU-b:8000;"
# Headers of the releases of the last three years, by the model or option that adds columns.
RELEASES = {
    "23.11": (
        f"{START}{SERVER}{PERCENTILES}\n4,900,5,100,30,20,500,15,2,800,900,950,1200\n",
        (900.0, 1_200_000, None, 30_000),
    ),
    "24.03, verbose, GPU metrics": (
        f"{START}{SERVER}{PERCENTILES}{VERBOSE}{GPU}\n"
        f"4,900,5,100,30,20,500,15,2,800,900,950,1200,850,7,840{GPU_CELLS}\n",
        (900.0, 1_200_000, 850_000, 30_000),
    ),
    "24.06, request rate, response cache": (
        f"Request Rate,Inferences/Second,Client Send,{SERVER}Server Cache Hit,Server Cache Miss,"
        f"{PERCENTILES}{VERBOSE}\n"
        "50,49.9,5,100,30,20,500,15,7,9,2,800,900,950,1200,850,7,840\n",
        (49.9, 1_200_000, 850_000, 30_000),
    ),
    "24.10, decoupled": (
        f"Concurrency,Inferences/Second,Response Throughput,Client Send,{SERVER}{PERCENTILES}{VERBOSE}\n"
        "4,900,1800,5,100,30,20,500,15,2,800,900,950,1200,850,7,840\n",
        (900.0, 1_200_000, 850_000, 30_000),
    ),
    "25.04, no server statistics, first tokens": (
        f"{START}{PERCENTILES}{VERBOSE},Avg First Token Latency,"
        "Avg Token-to-Token Latency\n4,900,5,2,800,900,950,1200,850,7,840,10,3\n",
        (900.0, 1_200_000, 850_000, None),
    ),
    "a percentile of the user's": (
        f"{START}{SERVER}Client Recv,p50 latency,p90 latency,p95 latency,p97 latency,"
        "p99 latency\n4,900,5,100,30,20,500,15,2,800,900,950,1100,1200\n",
        (900.0, 1_200_000, None, 30_000),
    ),
}  # fmt: skip


@pytest.mark.parametrize("release", RELEASES)
def test_the_csv_of_each_release_gives_the_same_row(tmp_path, release):
    text, (throughput, p99_ns, mean_ns, queue_ns) = RELEASES[release]
    point = run_perf_analyzer(script(tmp_path, text=text), CLOSED, FACTS, options())
    assert point.throughput_per_s == throughput
    assert (point.latency.p50_ns, point.latency.p99_ns) == (800_000, p99_ns)
    assert point.latency.mean_ns == mean_ns
    assert point.server.queue_ns == queue_ns


@pytest.mark.parametrize(
    ("top", "more"),
    [
        ({}, {}),
        ({"version": "2.42.0dev"}, {"sequence_id": 0}),
        (
            {"service_kind": "triton", "endpoint": "", "version": "2.59.0"},
            {"request_inputs": {"x": [1.0]}, "response_outputs": [{"y": [1.0]}]},
        ),
    ],
)
def test_the_profile_of_each_release_counts_the_same_requests(top, more):
    requests = [{"timestamp": n * 10, "response_timestamps": [n * 10 + 5], **more} for n in range(100)]
    experiment = {"mode": "concurrency", "value": 4}
    document = {
        "experiments": [{"experiment": experiment, "requests": requests, "window_boundaries": [0, 200, 400, 600, 800]}],
        **top,
    }
    assert parse_profile_export(json.dumps(document)) == {"requests": 60.0, "duration_s": 600 / 1e9}


@pytest.mark.parametrize(
    "text", ["", "Concurrency,Inferences/Second\n", "a,b\n1,2\n", "Concurrency,Inferences/Second\n4,x\n"]
)
def test_no_row_is_no_row(text):
    assert parse_csv(text) == []


def test_a_profile_counts_the_requests_of_the_last_windows():
    requests = [{"timestamp": n * 10, "response_timestamps": [n * 10 + 5]} for n in range(100)]
    document = {"experiments": [{"requests": requests, "window_boundaries": [0, 200, 400, 600, 800]}]}
    assert parse_profile_export(json.dumps(document)) == {"requests": 60.0, "duration_s": 600 / 1e9}
    document["experiments"][0]["window_boundaries"] = []
    assert parse_profile_export(json.dumps(document))["requests"] == 100
    for text in ("", "{", "{}", '{"experiments": [{"requests": []}]}'):
        assert parse_profile_export(text) == {}


def test_the_command_line(tmp_path):
    data = tmp_path / "d.json"
    closed = command_of(Path("pa"), CLOSED, FACTS, options(version=3, batch_size=2), tmp_path)
    for pair in (["-x", "3"], ["-b", "2"], ["--concurrency-range", "4"], ["--shape", "x:3,4"], ["-u", "a:1"]):
        assert any(closed[place : place + 2] == pair for place in range(len(closed))), pair
    assert "z:2" not in closed
    opened = command_of(Path("pa"), OPEN, FACTS, options(data=data, url="http://a:1"), tmp_path)
    for pair in (
        ["--request-rate-range", "50"],
        ["--request-distribution", "poisson"],
        ["--input-data", str(data)],
    ):
        assert any(opened[place : place + 2] == pair for place in range(len(opened))), pair


@pytest.mark.parametrize(("url", "level", "is_async"), [("http", 4, False), ("http", 5, True), ("grpc", 64, False)])
def test_many_http_requests_at_once_need_no_thread_each(tmp_path, monkeypatch, url, level, is_async):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    closed = Level("concurrency", level, "closed loop")
    command = command_of(Path("pa"), closed, FACTS, options(url=f"{url}://a:1"), tmp_path)
    assert ("--async" in command) is is_async


def test_addresses_keep_brackets_and_the_path_of_a_gateway(tmp_path):
    for url, address in (("grpc://[::1]:5", "[::1]:5"), ("http://a:1/triton/", "a:1/triton"),
                         ("https://[::1]/t", "https://[::1]:443/t")):  # fmt: skip
        command = command_of(Path("pa"), CLOSED, FACTS, options(url=url), tmp_path)
        assert command[command.index("-u") + 1] == address


def test_tls_files_are_passed_on(tmp_path):
    access = ClientOptions(root_certificates=Path("ca.pem"), client_certificate=Path("c.pem"), client_key=Path("c.key"))
    over_grpc = command_of(Path("pa"), CLOSED, FACTS, options(url="grpcs://a:1", access=access), tmp_path)
    assert "--ssl-grpc-use-ssl" in over_grpc
    assert over_grpc[over_grpc.index("--ssl-grpc-root-certifications-file") + 1] == "ca.pem"
    over_http = command_of(Path("pa"), CLOSED, FACTS, options(url="https://a:1", access=access), tmp_path)
    assert over_http[over_http.index("-u") + 1] == "https://a:1"
    assert over_http[over_http.index("--ssl-https-private-key-file") + 1] == "c.key"


@pytest.mark.parametrize(
    ("level", "change", "words"),
    [
        (Level("rate", 5.0, "burst"), {}, "burst"),
        (Level("replay", 5.0, "replay"), {}, "replay"),
        (CLOSED, {"access": ClientOptions(headers={"k": "v"})}, "headers"),
        (CLOSED, {"url": "grpcs://a:1", "access": ClientOptions(server_name="b")}, "other name"),
        (CLOSED, {"data": Path("d.npz")}, "JSON"),
        (CLOSED, {"shapes": {}}, "dynamic shape"),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path, level, change, words):
    with pytest.raises(UsageError, match=words):
        command_of(Path("pa"), level, FACTS, options(**change), tmp_path)


def script(tmp_path, *, code=0, says="", row=True, text=None):
    """Write a stand-in: it writes a row, prints a text and exits as told."""
    if text is None:
        text = CSV.format(more="", values="", last=",Avg latency", tail=",850") if row else ""
    path = tmp_path / "perf_analyzer"
    path.write_text(
        "#!/usr/bin/env python3\nimport sys\n"
        f"open(sys.argv[sys.argv.index('-f') + 1], 'w').write({text!r})\nprint({says!r})\nsys.exit({code})\n"
    )
    path.chmod(0o755)
    return PerfAnalyzer(path, None)


@pytest.mark.parametrize(
    ("code", "row", "outcome"),
    [
        (0, True, "stable"),
        (2, True, "unstable"),
        (2, False, "unstable"),
        (0, False, "over_limit"),
        (99, False, "failed"),
    ],
)
def test_every_ending_is_a_row(tmp_path, code, row, outcome):
    point = run_perf_analyzer(script(tmp_path, code=code, row=row, says="some words"), CLOSED, FACTS, options())
    assert (point.outcome, point.level, point.client.name) == (outcome, 4, "perf_analyzer")
    assert (point.latency.p99_ns == 1_200_000) is row
    assert (point.latency.mean_ns == 850_000) is row
    assert (point.throughput_per_s == 1000.5) is row
    assert row or "some words" in point.reason


@pytest.mark.parametrize("load", ["Request concurrency: 4", "Request Rate: 50 inference requests per seconds"])
def test_an_interval_without_an_answer_is_a_failed_row(tmp_path, load):
    """perf_analyzer 2.50 then ends with the code for wrong options."""
    says = f"{load}\nNo valid requests recorded within time interval. Please use a larger time window."
    point = run_perf_analyzer(script(tmp_path, code=3, row=False, says=says), CLOSED, FACTS, options())
    assert point.outcome == "failed"
    assert "No valid requests" in point.reason


@pytest.mark.parametrize(
    ("code", "says", "error"),
    [
        (3, "bad option", UsageError),
        (99, "failed to connect to all addresses", ServerUnreachableError),
        (127, "error while loading shared libraries: libb64.so.0d", MissingDependencyError),
    ],
)
def test_what_is_no_measurement_is_an_error(tmp_path, code, says, error):
    with pytest.raises(error):
        run_perf_analyzer(script(tmp_path, code=code, row=False, says=says), CLOSED, FACTS, options())


def test_pips_empty_stub_is_not_taken_for_the_real_one(tmp_path, monkeypatch):
    script(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="empty stub"):
        find_perf_analyzer(tmp_path / "cache")
    cached = tmp_path / "cache" / "perf_analyzer-2.50.0"
    (cached / "lib").mkdir(parents=True)
    script(cached)
    found = find_perf_analyzer(tmp_path / "cache")
    assert found.binary == cached / "perf_analyzer"
    assert found.environment()["LD_LIBRARY_PATH"].startswith(str(cached / "lib"))


def test_one_on_path_needs_the_libraries_beside_it(tmp_path, monkeypatch):
    real, linked = tmp_path / "real", tmp_path / "bin"
    real.mkdir()
    linked.mkdir()
    loader = (
        'case "$LD_LIBRARY_PATH" in *real/lib*) exit 0;; esac; echo "error while loading shared libraries: b64" >&2'
    )
    binary = real / "perf_analyzer"
    binary.write_text(f"#!/bin/sh\n{loader}\nexit 127\n#" + "x" * 100_000)
    binary.chmod(0o755)
    (linked / "perf_analyzer").symlink_to(binary)
    monkeypatch.setenv("PATH", str(linked))
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    with pytest.raises(MissingDependencyError, match="does not start: error while loading shared libraries: b64"):
        find_perf_analyzer(tmp_path / "cache")
    (real / "lib").mkdir()
    assert find_perf_analyzer(tmp_path / "cache").libraries == real / "lib"


def test_large_inputs_are_not_exported_and_requests_are_counted_from_what_it_prints(tmp_path):
    small = command_of(Path("pa"), CLOSED, FACTS, options(), tmp_path)
    large = command_of(Path("pa"), CLOSED, FACTS, options(shapes={"x": (1000, 4)}), tmp_path)
    assert "--profile-export-file" in small
    assert "--profile-export-file" not in large
    point = run_perf_analyzer(script(tmp_path, says="  Client:\n    Request count: 3000"), CLOSED, FACTS, options())
    assert point.requests == 3000
    assert point.duration_s == pytest.approx(3000 / 1000.5)


def test_integers_with_ranges_of_their_own_are_drawn_here(tmp_path):
    """perf_analyzer draws from the whole type: a table of 500 rows refuses such an index."""
    kept = tmp_path / "kept.json"
    perf = script(tmp_path)
    copy = f"import shutil; shutil.copy(sys.argv[sys.argv.index('--input-data') + 1], {str(kept)!r})\n"
    perf.binary.write_text(perf.binary.read_text().replace("import sys\n", f"import sys\n{copy}"))
    ids, x = InputFacts("ids", "INT64", (-1,)), InputFacts("x", "FP32", (2,))
    facts = ServedModelFacts(**{**vars(FACTS), "inputs": (ids, x)})
    run_perf_analyzer(perf, CLOSED, facts, options(shapes={"ids": (6,)}, int_ranges={"ids": (7, 9)}, batch_size=4))
    rows = read_rows(kept, (ids, x))
    assert len(rows) == 64
    assert {number for row in rows for number in row["ids"].tolist()} == {7, 8}
    assert all(row["ids"].shape == (6,) and row["x"].shape == (2,) for row in rows)


def test_a_file_of_any_kind_is_checked_and_written_as_its_json(tmp_path):
    kept = tmp_path / "kept.json"
    perf = script(tmp_path)
    copy = f"import shutil; shutil.copy(sys.argv[sys.argv.index('--input-data') + 1], {str(kept)!r})\n"
    perf.binary.write_text(perf.binary.read_text().replace("import sys\n", f"import sys\n{copy}"))
    words, x = InputFacts("words", "BYTES", (-1,)), InputFacts("x", "FP32", (-1, -1))
    facts = ServedModelFacts(**{**vars(FACTS), "inputs": (words, x)})
    data = tmp_path / "d.jsonl"
    data.write_text('{"words": ["a", ""], "x": [1, 2, 3, 4]}\n{"words": {"b64": "/w=="}, "x": [[0.1]]}\n')
    run_perf_analyzer(perf, CLOSED, facts, options(shapes={"x": (1, 4)}, data=data))
    first, second = read_rows(kept, (words, x))
    assert (first["words"].tolist(), first["x"].tolist()) == ([b"a", b""], [[1, 2, 3, 4]])
    assert (second["words"].tolist(), second["x"].tolist()) == ([b"\xff"], [[np.float32(0.1)]])
    data.write_text('{"words": [null], "x": [[1]]}\n')
    with pytest.raises(InputError, match="request 1, input words"):
        run_perf_analyzer(perf, CLOSED, facts, options(shapes={}, data=data))


KINDS = {"sequence": dataclasses.replace(FACTS, sequence=True), "decoupled": dataclasses.replace(FACTS, decoupled=True)}


@pytest.mark.parametrize(
    ("kind", "level", "changes", "words"),
    [
        ("sequence", CLOSED, {}, "--sequence-length 20 --sequence-length-variation 20"),
        (
            "sequence",
            OPEN,
            {"sequence_length": "5", "sequences": 3},
            "5 --sequence-length-variation 0 --num-of-sequences 3",
        ),
        ("decoupled", CLOSED, {}, "--async --streaming"),
        ("decoupled", CLOSED, {"compression": "gzip"}, "--grpc-compression-algorithm gzip"),
        ("decoupled", CLOSED, {"parameters": {"top": 3, "on": True}}, "top:3:int --request-parameter on:true:bool"),
    ],
)
def test_each_kind_of_model_has_its_options(tmp_path, kind, level, changes, words):
    made = command_of(Path("p"), level, KINDS[kind], options(**changes), tmp_path)
    assert words in " ".join(made)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sequence", {"sequence_length": "mean:9"}),
        ("decoupled", {"compression": "gzip", "url": "http://a:1"}),
    ],
)
def test_a_kind_that_it_cannot_send_is_refused(tmp_path, kind, changes):
    with pytest.raises(UsageError):
        command_of(Path("p"), CLOSED, KINDS[kind], options(**changes), tmp_path)


def test_a_recorded_sequence_is_one_stream_of_its_file(tmp_path):
    kept = tmp_path / "kept.json"
    binary = tmp_path / "perf_analyzer"
    binary.write_text(f"""#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" = --input-data ] && cp "$2" {kept}; shift; done
exit 99
""")
    binary.chmod(0o755)
    steps = tuple({"x": np.full((1, 3, 4), n, np.float32), "z": np.zeros((1, 2), np.float32)} for n in (1, 2))
    run_perf_analyzer(PerfAnalyzer(binary, None), CLOSED, KINDS["sequence"], options(recorded=steps, shapes={}))
    (stream,) = json.loads(kept.read_text())["data"]
    assert len(stream) == 2
    (rows,) = read_streams(kept, FACTS.inputs)
    assert [float(row["x"][0, 0]) for row in rows] == [1.0, 2.0]
