"""deploy, rollback and status as commands, on two real servers of one repository."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.certificates import make_key_pair
from support.serving import SCALING_CONFIG, running_server, scaling_model, write_model

from repo_manager.cli.main import main
from repo_manager.onnx_model import runtime
from repo_manager.server.command import ServerOptions

pytestmark = pytest.mark.integration
POLICY = "version_policy { specific { versions: [1] } }\n"


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command in this process, with settings of its own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def run(*arguments: object, code: int = 0) -> Ended:
        monkeypatch.setattr(sys, "argv", ["repo-manager", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capfd.readouterr()
        result = Ended(ended.value.code if isinstance(ended.value.code, int) else 0, captured.out, captured.err)
        assert result.code == code, result
        return result

    return run


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, str]]:
    """A repository with versions 1 and 2 of `m`, and the URLs of its two servers."""
    root = tmp_path_factory.mktemp("models")
    write_model(root, "m", SCALING_CONFIG + POLICY, {1: scaling_model(2.0), 2: scaling_model(3.0)})
    options = ServerOptions(str(root), auto_complete=False)
    with running_server(options) as first, running_server(options) as second:
        yield root, first.grpc_url, second.http_url


@pytest.fixture
def nobody() -> str:
    """The URL of a silent server."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"grpc://127.0.0.1:{probe.getsockname()[1]}"


def test_several_servers_by_urls_files_and_names(run: Run, fleet: tuple[Path, str, str], tmp_path: Path) -> None:
    root, first, second = fleet
    listed = tmp_path / "servers"
    listed.write_text(f"{first}\ndns+http://{second.removeprefix('http://')}  # by name\n")
    done = run("deploy", "m:1", "-r", root, "--to", first, "--to", second, "--json").document["rollout"]
    assert [(server["name"], server["ready"]) for server in done["servers"]] == [(first, [1]), (second, [1])]
    assert done["batch"] == 1
    done = run("deploy", "m:2", "-r", root, "--to", f"@{listed}", "--batch", "100%", "--json").document["rollout"]
    assert (done["batch"], [server["ready"] for server in done["servers"]]) == (2, [[2], [2]])
    dry = run("rollback", "m", "-r", root, "--to", listed, "--dry-run", "--json").document["rollout"]
    assert (dry["dry_run"], dry["version"], dry["changed"]) == (True, 1, False)
    kept = run("rollback", "m", "-r", root, "--to", listed, "--keep-previous", "--json").document["rollout"]
    assert [server["ready"] for server in kept["servers"]] == [[1, 2], [1, 2]]
    table = run("deploy", "m:1", "-r", root, "--to", listed)
    assert "drop 2" in table.out
    assert f"{first}: serves it (1 of 2)" in table.err
    assert run("deploy", "m:1", "-r", root, "--to", listed, "--quiet").err == ""
    again = run("deploy", "m:1", "-r", root, "--to", listed)
    assert "Nothing to do" in again.out
    config = root / "m" / "config.pbtxt"
    before = config.read_text()
    config.write_text(f"{before}future_field: 1\n")
    for servers in (["--to", first], ["--to", listed]):
        again = run("deploy", "m:1", "-r", root, *servers)
        assert "Nothing to do" in again.out
        assert again.out.count("Note: config.pbtxt has fields") == 1
    config.write_text(before)
    models = run("status", "-r", root, "--to", listed, "--json").document["models"]
    assert [(model["url"], model["ready"], model["differences"]) for model in models] == [
        (first, [1], []),
        (second, [1], []),
    ]


def test_servers_that_do_not_answer(run: Run, fleet: tuple[Path, str, str], nobody: str) -> None:
    root, first, _ = fleet
    both = ("-r", root, "--to", first, "--to", nobody)
    refused = run("deploy", "m:2", *both, "--retries", "1", code=5)
    assert "1 of 2 servers do not answer, at most 0 may be missing" in refused.err
    assert refused.err.count("asking again") == 1
    assert "asking again" not in run("deploy", "m:2", *both, "--retries", "0", code=5).err
    done = run("deploy", "m:2", *both, "--max-unavailable", "50%", "--json").document["rollout"]
    assert (done["unavailable"], [server["ready"] for server in done["servers"]]) == ([nobody], [[2]])
    shown = run("status", *both, "--json", code=5).document
    assert list(shown["unreachable"]) == [nobody]
    assert [model["ready"] for model in shown["models"]] == [[2]]
    assert "does not answer" in run("status", *both, code=5).out


def test_wrong_options_are_named(run: Run, fleet: tuple[Path, str, str]) -> None:
    root, first, second = fleet
    for options, text in (
        (("--batch", "0"), "--batch 0"),
        (("--batch", "many"), "--batch many"),
        (("--max-unavailable", "200%"), "--max-unavailable 200%"),
        (("--to", "nonsense"), "neither a server's URL nor a file"),
        (("--to", "k8s://a/b"), "cannot be mixed with servers"),
    ):
        assert text in run("deploy", "m:2", "-r", root, "--to", first, "--to", second, *options, code=2).err


def test_too_little_memory_is_refused_and_forced(
    run: Run, fleet: tuple[Path, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, first, second = fleet
    run("deploy", "m:1", "-r", root, "--to", first, "--to", second)
    (tmp_path / "meminfo").write_text("MemAvailable: 1 kB\n")
    monkeypatch.setattr(runtime, "_MEMINFO", tmp_path / "meminfo")
    one = ("deploy", "m:2", "-r", root, "--to", first)
    assert "the machine has 0.0 MiB free" in run(*one, code=3).err
    dry = run(*one, "--dry-run", code=3)
    assert "refused" in dry.out
    assert "nothing was changed" in dry.out
    run(*one, "--dry-run", "--force")
    assert run(*one, "--force", "--json").document["rollout"]["servers"][0]["ready"] == [2]


def test_a_signature_can_be_asked_for(run: Run, fleet: tuple[Path, str, str], tmp_path: Path) -> None:
    root, first, second = fleet
    run("deploy", "m:1", "-r", root, "--to", first, "--to", second)
    _, key = make_key_pair(tmp_path)
    refused = run("deploy", "m:2", "-r", root, "--to", first, "--signed-by", key, code=3)
    assert "signature: " in refused.err


def test_a_deadline_ends_it(run: Run, fleet: tuple[Path, str, str]) -> None:
    root, first, second = fleet
    run("deploy", "m:1", "-r", root, "--to", first, "--to", second)
    before = (root / "m" / "config.pbtxt").read_bytes()
    ended = run("deploy", "m:2", "-r", root, "--to", first, "--timeout", "0.1", code=5)
    # On a slow machine no time is left before the first change, so there is nothing to put back.
    assert "did not answer within 0.0" in ended.err or "0.1 s of --timeout" in ended.err
    assert (root / "m" / "config.pbtxt").read_bytes() == before
    shown = run("status", "-r", root, "--to", first, "--json").document
    assert [model["ready"] for model in shown["models"]] == [[1]]
