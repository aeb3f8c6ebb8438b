"""Run many commands at once, each forked from one process with everything imported: 10 ms a start.

`run_commands` starts this file as a script, gives it the commands as JSON, and returns how each ended: exit code,
seconds, output, and its memory beyond the fork's initial one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Command", "Outcome", "findings", "run_commands"]

_MOST_MIB = 500
_COMMANDS = ("main", "add", "rollout", "status", "loadtest", "repository", "verify", "apply")
_MODULES = (
    *("numpy", "onnx", "onnxruntime", "tritonclient.grpc", "tritonclient.http", "google.protobuf.json_format"),
    *("yaml", "pydantic", "obstore", "obstore.store", "PIL.Image", "lightkube", "lightkube.core.exceptions"),
    *("lightkube.resources.apps_v1", "lightkube.resources.core_v1", "lightkube.generic_resource", "lightkube.types"),
    *(f"repo_manager.cli.{name}" for name in _COMMANDS),
    *("repo_manager.loadtest.run", "repo_manager.repository.stores.objects.store"),
)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line of repo-manager.

    Attributes:
        words: after `repo-manager`.
        environment: on top of this process's own.
        presets: `module:NAME.field` -> value: fields of frozen dataclasses, shortened for the test.
        limit_s: it is killed then.
        limits: RLIMIT name -> value.
        prepare: Python code, run in the child before the command.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    folder: str | None = None
    presets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    limit_s: float = 60.0
    limits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    prepare: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended. `code` is -9 for one killed at its limit."""

    code: int
    seconds: float
    memory_mib: int
    output: str


def run_commands(commands: Sequence[Command], folder: Path, *, at_once: int = 16) -> list[Outcome]:
    """Run commands, `at_once` at a time; their output goes to files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    told = json.dumps([dataclasses.asdict(command) for command in commands])
    done = subprocess.run(
        [sys.executable, __file__, str(folder), str(at_once)], input=told, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise AssertionError(done.stderr)
    return [
        Outcome(output=(folder / f"{number}.txt").read_text(errors="replace"), **each)
        for number, each in enumerate(json.loads(done.stdout))
    ]


def findings(
    commands: Mapping[str, Command], control: Command, folder: Path, *, deadline_s: float, at_once: int = 16
) -> tuple[list[str], list[Outcome]]:
    """Run commands. Return the faults of their ends in words, and the ends.

    No command may end in a traceback, take 500 MiB, or be more than 2 s late. The time of a command's other work
    depends on the machine and its load: a control runs after every tenth command, and three times its time is allowed.
    A late command runs once more, alone, as the machine may have paused.

    Args:
        commands: name -> command, each against another peer.
        control: the same command against a peer with an immediate refusal.
        folder: for their output.
        deadline_s: the deadline given to the commands.
        at_once: how many run at a time.
    """
    names, all_commands = [], []
    for number, (name, command) in enumerate(commands.items()):
        if number % 10 == 0:
            names.append("")
            all_commands.append(control)
        names.append(name)
        all_commands.append(command)
    outcomes = run_commands(all_commands, folder, at_once=at_once)
    most_s = deadline_s + 2.0 + 3.0 * max(done.seconds for name, done in zip(names, outcomes, strict=True) if not name)
    found = []
    for number, name in enumerate(names):
        text = _finding(outcomes[number], most_s)
        if text and outcomes[number].seconds > most_s:
            alone, outcomes[number] = run_commands([control, all_commands[number]], folder / f"{number}", at_once=1)
            text = _finding(outcomes[number], deadline_s + 2.0 + 3.0 * alone.seconds)
        if text:
            found.append(f"{name or 'the control'}: {text}")
    return found, [done for name, done in zip(names, outcomes, strict=True) if name]


def _finding(outcome: Outcome, most_s: float) -> str:
    last = (outcome.output.strip().splitlines() or [""])[-1][:200]
    if outcome.code in (1, -9) or "Traceback" in outcome.output or "Exception" in outcome.output:
        return f"exit code {outcome.code}: {last}"
    if outcome.seconds > most_s:
        return f"{outcome.seconds:.1f} s, at most {most_s:.1f}: {last}"
    return f"{outcome.memory_mib} MiB: {last}" if outcome.memory_mib > _MOST_MIB else ""


def _child(command: dict[str, Any], output: Path) -> None:
    """Be the command; never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.environ.update(command["environment"])
        if command["folder"]:
            os.chdir(command["folder"])
        for place, value in command["presets"].items():
            _preset(place, value)
        exec(command["prepare"], {})
        for name, value in command["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        sys.argv = ["repo-manager", *command["words"]]
        import repo_manager.cli.main

        repo_manager.cli.main.main()
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1 if exc.code else 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 1
        os._exit(code)


def _preset(place: str, value: float) -> None:
    module, _, path = place.partition(":")
    *owners, field = path.split(".")
    found: Any = sys.modules[module]
    for name in owners:
        found = getattr(found, name)
    object.__setattr__(found, field, value) if dataclasses.is_dataclass(found) else setattr(found, field, value)


def main() -> None:
    """Run the commands described on standard input."""
    import importlib

    for module in _MODULES:
        importlib.import_module(module)
    folder, at_once = Path(sys.argv[1]), int(sys.argv[2])
    commands = json.load(sys.stdin)
    base_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: list[Any] = [None] * len(commands)
    running: dict[int, tuple[int, float]] = {}
    waiting = list(range(len(commands)))[::-1]
    while waiting or running:
        while waiting and len(running) < at_once:
            number = waiting.pop()
            pid = os.fork()
            if pid == 0:
                _child(commands[number], folder / f"{number}.txt")
            running[pid] = (number, time.monotonic())
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if pid == 0:
            for late, (number, began) in running.items():
                if time.monotonic() - began > commands[number]["limit_s"]:
                    os.kill(late, 9)
            time.sleep(0.005)
            continue
        number, began = running.pop(pid)
        outcomes[number] = {
            "code": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - began,
            "memory_mib": max(0, usage.ru_maxrss - base_kib) >> 10,
        }
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
