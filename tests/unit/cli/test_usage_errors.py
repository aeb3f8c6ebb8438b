"""Mistakes on the command line: named on stderr, and with --json one document on stdout as every other error."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from repo_manager.cli.load_options import advice_for
from repo_manager.cli.main import main
from repo_manager.cli.repository_options import RepositoryFlag
from repo_manager.errors import ServerRefusedError, ServerUnreachableError, UsageError
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.served_model import _hint
from repo_manager.samples import sample_model
from repo_manager.server.client import TritonClient


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("loadtest", "m", "--workers", "0"), "--workers"),
        (("loadtest", "m", "--no-such-option"), "--no-such-option"),
        (("serve", "--restart", "maybe"), "on-failure"),
        (("add",), "MODEL.onnx"),
    ],
)
def test_a_mistake_is_a_document_too(
    arguments: tuple[str, ...], word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for json_too in (True, False):
        monkeypatch.setattr(sys, "argv", ["repo-manager", *arguments, *(["--json"] if json_too else [])])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        printed = capsys.readouterr()
        assert word in printed.err
        assert "Input should" not in printed.err  # The words of a library.
        assert "Usage: repo-manager" in printed.err
        if json_too:
            error = json.loads(printed.out)["error"]
            assert (error["type"], error["exit_code"]) == ("UsageError", 2)
            assert word in error["message"]
        else:
            assert printed.out == ""


def test_limits_of_a_run_are_refused_where_nothing_is_run(run: Any, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.py").write_text("")
    done = run("add", tmp_path / "m", "--name", "m", "--timeout", "3", "--memory", "1", "-r", tmp_path / "models")
    assert done.code == 2
    assert "--timeout, --memory: " in done.err
    assert "published as it is" in done.err
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("arguments", "word", "code"),
    [
        (("loadtest", "m", "-c", "abc"), "levels 'abc'", 2),
        (("loadtest", "m", "--rate", "0"), "more than 0", 2),
        (("loadtest", "m", "--shape", "x"), "--shape x", 2),
        (("history", "m:1"), "m:1: expected a model's name", 2),
        (("show", "../evil"), "../evil is a path or a URL, expected a model's name", 2),
        (("loadtest", "m", "--duration", "3x"), "--duration 3x: expected a time such as 30s, 5m or 1h", 2),
        (("serve", "--timeout", "0s"), "--timeout 0s: expected 0.1s or longer", 2),
        (("loadtest", "m", "--report", "x.pdf"), "x.pdf", 2),
        (("loadtest", "m", "--slo", "p98"), "p98", 2),
        (("loadtest", "m", "--baseline", "nope.json"), "nope.json", 3),
        (("loadtest", "m", "--input-data", "nope.npz"), "nope.npz", 3),
        (("loadtest", "m", "--report", "no/x.html"), "mkdir -p", 3),
        (("compare", "a", "b", "-b", "abc"), "levels 'abc'", 2),
        (("compare", "a", "b", "--pairs", "2"), "pairs is 2, expected 6 or more", 2),
        (("compare", "a", "b", "--html", "no/x.html"), "mkdir -p", 3),
        (("infer", "m", "-o", "no/x.npz"), "mkdir -p", 3),
        (("deploy", "m:1", "--shadow", "r.jsonl", "--shadow-report", "no/x.json"), "mkdir -p", 3),
    ],
)
def test_a_mistake_is_named_before_a_server_is_looked_for(
    arguments: tuple[str, ...],
    word: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "model_repository" / "m" / "1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["repo-manager", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, word in (said := capsys.readouterr().err)) == (code, True), said
    assert "server" not in said


@pytest.mark.parametrize("command", [("convert", "-p", "fp16"), ("prune",)])
def test_a_model_never_replaces_its_own_source(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(sample_model().read_bytes())
    for target, code in ((model, 2), (tmp_path / "no" / "x.onnx", 3)):
        name, *more = command
        monkeypatch.setattr(sys, "argv", ["repo-manager", name, str(model), "-o", str(target), *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code, capsys.readouterr().err
    assert model.read_bytes() == sample_model().read_bytes()


def test_a_dry_conversion_says_what_it_would_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "y.onnx"
    words = ["repo-manager", "convert", str(sample_model()), "-o", str(target), "-p", "fp16"]
    monkeypatch.setattr(sys, "argv", [*words, "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, list(tmp_path.iterdir())) == (0, [])
    assert f"{target} was not written" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        main()
    assert (target.is_file(), f"Written: {target}" in capsys.readouterr().err) == (True, True)


def test_help_and_version_end_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--help", "--version"):
        monkeypatch.setattr(sys, "argv", ["repo-manager", option])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        assert "repo-manager" in capsys.readouterr().out


def test_the_status_of_an_unknown_model_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["repo-manager", "status", "nosuch", "-r", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 3
    assert "has no model 'nosuch'" in capsys.readouterr().err


def test_a_protocol_that_there_is_not_is_named() -> None:
    with pytest.raises(UsageError, match="the protocol is 'ftp', expected grpc or http"):
        LoadTestOptions(url="grpc://127.0.0.1:1", model="m", protocol="ftp")


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_server_out_of_reach_is_told_with_the_next_step(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with (
        TritonClient.connect(f"{scheme}://127.0.0.1:{port}") as client,
        pytest.raises(ServerUnreachableError) as caught,
    ):
        client.repository_index()
    assert "8001 gRPC, 8000 HTTP" in (caught.value.hint or "")


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_reason_why_a_server_is_out_of_reach_is_in_words_and_once(protocol: str) -> None:
    """gRPC's own message names the address again, behind three wordings of the same. Python's has a number."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"{protocol}://127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(ServerUnreachableError) as raised, TritonClient.connect(url) as client:
            client.repository_index()
    assert raised.value.message.startswith(f"{url} cannot be reached: ")
    assert raised.value.message.endswith(": Connection refused")
    assert "addresses" not in raised.value.message
    assert "Errno" not in raised.value.message


@pytest.mark.parametrize(("model", "told"), [("m__dense", True), ("m__noflag", True), ("m", False)])
def test_a_control_that_is_not_served_is_told_with_how_it_is_made(model: str, told: bool) -> None:
    hint = _hint(LoadTestOptions(url="grpc://127.0.0.1:1", model=model, concurrency=(1,)))
    assert (f"`add --control` makes it, `deploy {model}` serves it." in hint) is told


@pytest.mark.parametrize(("target", "advice"), [("m:7", "Deploy it first: repo-manager deploy m"), ("nope:1", "")])
def test_only_a_model_of_the_repository_is_advised_to_be_deployed(tmp_path: Path, target: str, advice: str) -> None:
    (tmp_path / "m/1").mkdir(parents=True)
    place = RepositoryFlag(repository=str(tmp_path))
    hint = _hint(LoadTestOptions(url="grpc://127.0.0.1:1", model=target.partition(":")[0], concurrency=(1,)))
    with pytest.raises(ServerRefusedError, match="it is not served") as caught, advice_for(place, target):
        raise ServerRefusedError("it is not served", hint=hint)
    lacking = f"{tmp_path} has no model 'nope'. What it has: repo-manager list -r {tmp_path}"
    assert (caught.value.hint or "").startswith(advice or lacking)


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize(("name", "code"), [("list", 0), ("verify", 3)])
def test_a_reader_that_went_away_changes_nothing(tmp_path, name, code, form):
    """As with `| head`: the command ends with its own exit code, and without a word."""
    (tmp_path / "m/1").mkdir(parents=True)
    (tmp_path / "m/config.pbtxt").write_text('backend: "nonsense" platform: {')
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "repo_manager", name, "-r", str(tmp_path), *form]
    try:
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    finally:
        os.close(writer)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "roken pipe" not in ended.stderr


@pytest.mark.parametrize("written", ["config.pbtxt", "1/model.onnx"])
@pytest.mark.parametrize(("given", "words"), [("m", "model's folder"), ("m/1", "folder of a version")])
def test_a_models_folder_is_no_repository(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: str,
    words: str,
    written: str,
) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / written).write_text('backend: "onnxruntime"')
    monkeypatch.setattr(sys, "argv", ["repo-manager", "list", "-r", str(tmp_path / given)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert (ended.value.code, f"-r {tmp_path}\n" in said, words in said) == (3, True, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("verify", "{root}/m/"), "-r: m -r {root}\n"),
        (("deploy", "{root}/m"), "-r: m -r {root}\n"),
        (("show", "{root}/m:1"), "-r: m:1 -r {root}\n"),
        (("show", "{root}/m/1"), "-r: m:1 -r {root}\n"),
        (("status", "{root}"), "-r: -r {root}\n"),
        (("diff", "a:1", "{root}/m:1"), "-r: m:1 -r {root}\n"),
        (("verify", "s3://bucket/models/m"), "-r s3://bucket/models/m, or for a model in the repository above: m -r"),
    ],
)
def test_a_place_where_a_name_is_expected_is_told_as_repository_and_name(
    words: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "config.pbtxt").write_text("")
    monkeypatch.setattr(sys, "argv", ["repo-manager", *(word.format(root=tmp_path) for word in words)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, said.format(root=tmp_path) in capsys.readouterr().err) == (2, True)


def test_two_services_on_one_port_are_refused_before_a_server_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["serve", "-r", str(tmp_path), "--http-port", "18000", "--grpc-port", "18000"]
    monkeypatch.setattr(sys, "argv", ["repo-manager", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, "must differ" in capsys.readouterr().err) == (2, True)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("add", "MODEL", "-n", "m", "--labels", "y=nope.txt"), 2, "nope.txt: the labels cannot be read: No such file"),
        (("loadtest", "merge", "nope.json"), 3, "nope.json cannot be read as a load test's report: No such file"),
        (("deploy", "m", "--to", "@nope.txt"), 2, "nope.txt: the file of servers cannot be read: No such file"),
        (("deploy", "m", "--shadow", "nope.jsonl"), 3, "nope.jsonl does not exist"),
        (("deploy", "m", "--signed-by", "nope.pub"), 2, "nope.pub is not a key file"),
        (("verify", "--signed-by", "nope.pub"), 2, "nope.pub is not a key file"),
        (("report", "m:1", "-o", "card.pdf"), 2, "the ending .pdf names no format"),
        (("serve", "--load", "nope"), 3, "has no model 'nope' to load"),
        (("serve", "--load", "nope", "--detach"), 3, "has no model 'nope' to load"),
    ],
)
def test_a_wrong_name_is_told_before_anything_else_and_once(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, said: str
) -> None:
    """No server, lease or signature is looked at first, and no file is named a second time in Python's words."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_repository" / "m" / "1").mkdir(parents=True)
    done = run(*(sample_model() if word == "MODEL" else word for word in words))
    assert (done.code, said in done.err) == (code, True), done.err
    assert "Errno" not in done.err
    assert done.err.count("nope") <= 1 + done.err.count("no model")
    assert not (tmp_path / "card.pdf").exists()
