"""`infer` and `logs` against a real server: sequences, streams, strings, optional inputs, the recorded sample."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.python_models import write_python_model
from support.serving import SCALING_CONFIG, scaling_model, write_model

from repo_manager.cli.main import main
from repo_manager.errors import InputError, ServerRefusedError, UsageError
from repo_manager.pipeline.infer import InferOptions, infer
from repo_manager.pipeline.inference import Inference, write_answers
from repo_manager.repository.golden import Exchange, Golden, write_golden
from repo_manager.server.client import TritonClient
from repo_manager.server.embedded import EmbeddedServer

pytestmark = pytest.mark.integration
AUTO_COMPLETE = False
MODELS = ("acc", "repeat", "upper", "opt", "strict")


@pytest.fixture(scope="module")
def served(server: EmbeddedServer, repository: Path) -> EmbeddedServer:
    for name in MODELS:
        write_python_model(repository, name)
    config = SCALING_CONFIG.replace("dims: 4 }\ndynamic", 'dims: 4 label_filename: "labels.txt" }\ndynamic')
    folder = write_model(repository, "scaling", config, {1: scaling_model(2.0)})
    (folder / "labels.txt").write_text("ant\nbee\ncow\ndog\n")
    inputs = np.array([[1, 2, 3, 4]], np.float32)
    write_golden(folder / "1" / "golden.npz", Golden({"x": inputs}, {"y": inputs * 2.5}))
    with TritonClient.connect(server.grpc_url) as client:
        for name in (*MODELS, "scaling"):
            client.load(name)
    return server


@pytest.fixture(params=["grpc", "http"])
def ask(request: pytest.FixtureRequest, served: EmbeddedServer, repository: Path) -> Callable[..., Inference]:
    def ask(name: str, url: str | None = None, **options: Any) -> Inference:
        chosen = served.grpc_url if request.param == "grpc" else served.http_url
        return infer(repository, name, None, url or chosen, InferOptions(**options))

    return ask


def outputs(inference: Inference, name: str) -> list[Any]:
    return [answer.outputs[name].reshape(-1).tolist() for answer in inference.answers]


def test_a_file_of_requests_is_one_sequence(ask: Callable[..., Inference], tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"X": [1]}\n{"X": [2]}\n{"X": [3]}\n')
    found = ask("acc", data=str(path))
    assert outputs(found, "SUM") == [[1], [3], [6]]
    assert found.sequence
    assert outputs(ask("acc", data=str(path)), "SUM") == [[1], [3], [6]], "the second sequence begins anew"


def test_a_sequence_goes_on_in_the_next_call(ask: Callable[..., Inference]) -> None:
    first = ask("acc", data='{"X": [5]}', sequence="77", keep_open=True)
    assert (outputs(first, "SUM"), first.sequence) == ([[5]], 77)
    assert outputs(ask("acc", data='{"X": [6]}', sequence="77", resume=True), "SUM") == [[11]]
    with pytest.raises(ServerRefusedError):
        ask("acc", data='{"X": [1]}', sequence="77", resume=True)  # it has ended


def test_every_response_of_a_decoupled_model(served: EmbeddedServer, repository: Path) -> None:
    seen: list[int] = []
    found = infer(
        repository,
        "repeat",
        None,
        served.grpc_url,
        InferOptions(data='{"IN": [4, 5, 6]}'),
        on_answer=lambda answer: seen.append(answer.response),
    )
    assert outputs(found, "OUT") == [[4], [5], [6]]
    assert seen == [1, 2, 3]
    none = infer(repository, "repeat", None, served.grpc_url, InferOptions(data='{"IN": []}'))
    assert none.answers == ()
    with pytest.raises(UsageError, match="over gRPC only"):
        infer(repository, "repeat", None, served.http_url, InferOptions(data='{"IN": [1]}'))


def test_strings_and_optional_inputs(ask: Callable[..., Inference]) -> None:
    assert outputs(ask("upper", data='{"TEXT": ["h\\u00e9"]}'), "UPPER") == [["Hé".encode()]]
    assert outputs(ask("opt", data='{"A": [1, 2]}'), "Y") == [[2, 4]]
    assert outputs(ask("opt", data='{"A": [1, 2], "B": [10, 20]}'), "Y") == [[11, 22]]


def test_json_on_the_command_line_is_read_as_a_file_is(ask: Callable[..., Inference]) -> None:
    assert outputs(ask("opt", data='{"data": [{"A": [1, 2]}, {"A": [3, 4]}]}'), "Y") == [[2, 4], [6, 8]]
    assert outputs(ask("opt", data='{"instances": [{"A": [1, 2]}]}'), "Y") == [[2, 4]]
    assert outputs(ask("opt", data='{"A":\n [1,\r\n 2]}'), "Y") == [[2, 4]]
    assert outputs(ask("opt", data='{"A": [1, 2]}\n{"A": [3, 4]}'), "Y") == [[2, 4], [6, 8]]
    with pytest.raises(InputError, match="input A: it is there twice"):
        ask("opt", data='{"A": [1, 2], "A": [3, 4]}')


def test_the_recorded_sample_is_compared_and_labels_are_named(ask: Callable[..., Inference]) -> None:
    found = ask("scaling", golden=True)
    assert outputs(found, "y") == [[2, 4, 6, 8]]
    assert [each.error for each in found.comparisons] == [pytest.approx(0.2)]
    best = found.answers[0].labels["y"][0]
    assert [(label.label, label.index, label.value) for label in best[:2]] == [("dog", 3, 8.0), ("cow", 2, 6.0)]


def test_what_is_missing_or_wrong_is_said(ask: Callable[..., Inference], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no recorded sample") as missing:
        ask("opt")
    assert "A (FP32, [2]), B (FP32, [2], optional)" in str(missing.value.hint)
    with pytest.raises(InputError, match="does not exist"):
        ask("opt", data=str(tmp_path / "absent.npz"))
    with pytest.raises(InputError, match=r"--input: .*has no input A"):
        ask("opt", data='{"C": [1]}')
    with pytest.raises(InputError, match=r"--input: .*nested too deeply"):
        ask("opt", data=f'{{"A": {"[" * 100_000}')
    with pytest.raises(ServerRefusedError, match=r"AttributeError|JSONDecodeError"):
        ask("strict", data='{"JSON": ["7"]}')
    with pytest.raises(UsageError, match="--sequence"):
        InferOptions(resume=True)


def test_outputs_are_written_whole(ask: Callable[..., Inference], tmp_path: Path) -> None:
    found = ask("scaling", data='{"x": [1, 2, 3, 4]}')
    write_answers(tmp_path / "out.npz", found)
    with np.load(tmp_path / "out.npz") as archive:
        np.testing.assert_array_equal(archive["y"], [[2, 4, 6, 8]])
    write_answers(tmp_path / "out.json", found)
    document = json.loads((tmp_path / "out.json").read_text())
    assert document[0]["outputs"]["y"] == {"dtype": "float32", "shape": [1, 4], "data": [[2.0, 4.0, 6.0, 8.0]]}
    with pytest.raises(UsageError, match="ends in"):
        write_answers(tmp_path / "out.txt", found)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run a command in this process, with settings of its own; return its stdout."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def run(*arguments: object, code: int = 0, both: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["repo-manager", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capfd.readouterr()
        assert (ended.value.code or 0) == code, captured
        return captured.out + captured.err * both

    return run


def test_the_commands_find_the_running_server(
    served: EmbeddedServer, repository: Path, run: Callable[..., str], tmp_path: Path
) -> None:
    document = json.loads(run("infer", "repeat", "-r", repository, "--input", '{"IN": [7, 8]}', "--json"))
    assert [answer["outputs"]["OUT"]["data"] for answer in document["answers"]] == [[7], [8]]
    assert "[7]" in run("infer", "repeat:1", "-r", repository, "--input", '{"IN": [7]}')
    log = json.loads(run("logs", "-r", repository, "--json", "--lines", "0"))
    assert any("successfully loaded 'repeat'" in line for line in log["lines"])
    assert len(run("logs", "-r", repository, "--lines", "2").splitlines()) == 2


def test_an_answer_unlike_the_recorded_one_is_a_failed_gate(
    served: EmbeddedServer, repository: Path, run: Callable[..., str]
) -> None:
    shown = run("infer", "scaling", "-r", repository, "--golden", code=4, both=True)
    assert "largest relative error 2.00e-01 (y), allowed 1.00e-02" in shown
    assert json.loads(run("infer", "scaling", "-r", repository, "--golden", "--json", code=4))["comparisons"]
    run("infer", "scaling", "-r", repository)  # the sample is only a request here

    three = np.array([5, 6, 7], np.int32)
    responses = [{"OUT": np.array([value], np.int32)} for value in (5, 6, 7, 8)]
    for recorded, code in ((3, 0), (4, 4)):  # the fourth does not come
        golden = Golden.of([Exchange({"IN": three}, tuple(responses[:recorded]))])
        write_golden(repository / "repeat" / "1" / "golden.npz", golden)
        shown = run("infer", "repeat", "-r", repository, "--golden", code=code, both=True)
    assert "the request with 3 responses, recorded were 4" in shown
