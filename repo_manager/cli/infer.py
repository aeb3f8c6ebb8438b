"""Requests to a served model: infer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from repo_manager.cli.connection import ConnectionFlags, client_options
from repo_manager.cli.durations import seconds_option
from repo_manager.cli.load_options import advice_for
from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import Output, check_outputs, parse_pairs, parse_shapes, writing
from repo_manager.cli.repository_options import RepositoryFlag, model_versions
from repo_manager.errors import GateError
from repo_manager.pipeline.infer import InferOptions, infer, server_of
from repo_manager.pipeline.inference import Answer, Inference, write_answers
from repo_manager.report.infer_tables import answer_view, inference_view
from repo_manager.repository.location import Location
from repo_manager.repository.tags import resolve_version
from repo_manager.settings import load_settings

__all__ = ["app"]

app = typer.Typer()

_NamedVersion = Annotated[
    str,
    typer.Argument(
        metavar="NAME[:VERSION]",
        help="VERSION is a number or a tag \\[default: the server chooses].",
        show_default=False,
        autocompletion=model_versions,
    ),
]


@dataclasses.dataclass(frozen=True)
class RequestFlags:
    """The requests, and the server for them."""

    PANEL: ClassVar[str] = "Request"
    data: str | None = option(
        "--input",
        "-i",
        metavar="FILE|JSON|-",
        sets=(InferOptions, "data"),
        help='.npz, .npy, .json, .jsonl, an image or a folder of images; JSON itself, {"NAME": [...]}; or - for JSON '
        "on standard input [default: the version's recorded sample].",
    )
    golden: bool = option(
        "--golden",
        sets=(InferOptions, "golden"),
        help="Send the version's recorded sample, and compare the answers: exit code 4 if they differ.",
    )
    to: str | None = option(
        "--to", metavar="URL", help="grpc(s):// or http(s)://host:port [default: the running serve of the repository]."
    )
    image: list[str] | None = option(
        "--image",
        metavar="KEY=VALUE",
        sets=(InferOptions, "image"),
        read=lambda texts: parse_pairs(texts, "--image"),
        help="How images become inputs, as for loadtest: resize, mean, std, scale, color, layout (may be given often).",
    )
    shape: list[str] | None = option(
        "--shape",
        metavar="NAME:SIZES",
        sets=(InferOptions, "shapes"),
        read=lambda texts: parse_shapes(texts),
        help="Size of an image input with dynamic axes, without the batch.",
    )
    parameter: list[str] | None = option(
        "--parameter",
        metavar="KEY=VALUE",
        sets=(InferOptions, "parameters"),
        read=lambda texts: parse_pairs(texts, "--parameter"),
        help="A custom parameter of each request (may be given often).",
    )
    timeout: float = seconds_option("--timeout", sets=(InferOptions, "timeout_s"), help="Deadline of each request.")


@dataclasses.dataclass(frozen=True)
class SequenceFlags:
    """The sequence the requests are a part of."""

    PANEL: ClassVar[str] = "Sequence"
    sequence: str | None = option(
        "--sequence",
        metavar="ID",
        sets=(InferOptions, "sequence"),
        help="Correlation ID; the requests of the input are one sequence [default: a new ID where one is needed].",
    )
    resume: bool = option(
        "--resume", sets=(InferOptions, "resume"), help="Earlier requests started the sequence: send no start."
    )
    keep_open: bool = option(
        "--keep-open", sets=(InferOptions, "keep_open"), help="Later requests go on with the sequence: send no end."
    )


@dataclasses.dataclass(frozen=True)
class AnswerFlags:
    """The parts of the answers to show and write."""

    PANEL: ClassVar[str] = "Output"
    output: Path | None = option(
        "--output", "-o", metavar="FILE.npz|FILE.json", help="Write every output, whole, to a file."
    )
    top: int = option("--top", sets=(InferOptions, "top"), min=1, help="How many labels are shown.")


def _resolved(root: Location, text: str) -> tuple[str, int | None]:
    """Read `NAME`, `NAME:VERSION` or `NAME:TAG`. A number may be absent from this repository."""
    name, separator, version = text.partition(":")
    if not separator:
        return name, None
    if version.isdecimal() and int(version) > 0:
        return name, int(version)
    return resolve_version(root, text)


@app.command("infer")
@grouped
def infer_command(
    named_version: _NamedVersion,
    *,
    place: RepositoryFlag,
    request: RequestFlags,
    sequence: SequenceFlags,
    answers: AnswerFlags,
    output: Output,
    connection: ConnectionFlags,
) -> None:
    """Send requests to a served model and show its answers.

    The requests of a file are sent one after another: in one sequence if the model keeps state, and as streams if it
    is decoupled. Streamed responses are shown as they arrive. With --golden, an answer that differs from the recorded
    one by more than its tolerance is exit code 4.
    """
    terminal = output.terminal()
    root = place.root()
    check_outputs(answers.output)
    name, version = _resolved(root, named_version)
    url = server_of(root, request.to or load_settings().server)
    options = InferOptions(**settings_of(InferOptions, request, sequence, answers))

    def on_answer(answer: Answer) -> None:
        if not terminal.json:
            terminal.result(None, *answer_view(answer))

    connected = client_options(connection, [url])
    with advice_for(place, name):
        found = infer(root, name, version, url, options, connection=connected, on_answer=on_answer)
    if answers.output is not None:
        with writing(answers.output):
            write_answers(answers.output, found)
        terminal.note(f"Written to {answers.output}")
    if terminal.json:
        terminal.result(found.document())
    else:
        terminal.show(*inference_view(found))
    if request.golden:
        _raise_for(named_version, found)


def _raise_for(named_version: str, found: Inference) -> None:
    """Turn a shown difference from the recorded answers into an exit code.

    Raises:
        GateError: an output differs by more than its tolerance, or a response is missing.
    """
    failed = [each for each in found.comparisons if not each.passed]
    if failed:
        raise GateError(
            f"{named_version} does not answer as recorded: {len(failed)} of {len(found.comparisons)} comparisons "
            "failed",
            hint="The result shows the largest error. Which version answers: repo-manager status.",
            is_shown=True,
        )
