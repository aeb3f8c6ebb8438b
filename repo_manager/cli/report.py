"""Cards of versions: report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from repo_manager.cli.option_groups import grouped
from repo_manager.cli.options import Output, check_input, check_outputs, writing
from repo_manager.cli.repository_options import RepositoryFlag, model_versions
from repo_manager.errors import UsageError
from repo_manager.files import write_atomic
from repo_manager.loadtest.merge import read_report
from repo_manager.pipeline.cards import version_cards
from repo_manager.report.card import Card, card_html, card_markdown, index_html

__all__ = ["app"]

app = typer.Typer()
_WRITERS = {".html": card_html, ".md": card_markdown}


@dataclasses.dataclass(frozen=True)
class WrittenCards:
    """The cards of versions, as `--json` prints them.

    Attributes:
        cards: one per version asked for, by name and version.
        files: the written pages; empty without `--output`.
    """

    cards: tuple[Card, ...]
    files: tuple[Path, ...]


@app.command("report")
@grouped
def report_command(
    named_version: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME[:VERSION]]",
            help="One version, by number or tag, or every version of a model \\[default: every version of the "
            "repository].",
            show_default=False,
            autocompletion=model_versions,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.html|FILE.md|FOLDER",
            help="File of the card, or a folder for several cards and an index.",
        ),
    ] = None,
    loads: Annotated[
        list[Path] | None,
        typer.Option(
            "--loadtest", metavar="FILE.json", help="A load test's report to put into its card (may be given often)."
        ),
    ] = None,
    *,
    place: RepositoryFlag,
    output: Output,
) -> None:
    """Write a version's card: source, checks, drift, sparsity, configuration, deployments, load tests.

    NAME:VERSION without --output prints the card as Markdown. A folder gets one page a version, and index.html.
    """
    root, terminal = place.root(), output.terminal()
    for path in loads or ():
        check_input(path)
    reports = [read_report(path) for path in loads or ()]
    is_folder = _is_folder(file, named_version)
    cards = version_cards(root, named_version, loads=reports)
    written: list[Path] = []
    if file is not None and is_folder:
        with writing(file):
            file.mkdir(parents=True, exist_ok=True)
            pages = {card.file_name: card_html(card) for card in cards} | {"index.html": index_html(str(root), cards)}
            for name, page in pages.items():
                write_atomic(file / name, page.encode())
                written.append(file / name)
    elif file is not None:
        with writing(file):
            write_atomic(file, _WRITERS[file.suffix](cards[0]).encode())
        written.append(file)
    elif not output.json:
        typer.echo(card_markdown(cards[0]), nl=False)
        return
    shown = f"Written: {written[-1]} ({len(cards)} cards)" if written else ""
    terminal.result(WrittenCards(tuple(cards), tuple(written)), shown)


def _is_folder(file: Path | None, named_version: str | None) -> bool:
    """Return whether the output is a folder of cards, and check whether it can be written.

    Raises:
        UsageError: the ending names no format, or several versions would go into one file.
        InputError: the file cannot be written.
    """
    is_folder = file is not None and file.suffix not in _WRITERS
    if is_folder and file is not None and file.suffix and not file.is_dir():
        raise UsageError(
            f"--output {file}: the ending {file.suffix} names no format",
            hint="Expected FILE.html, FILE.md, or a folder (created if needed).",
        )
    if not is_folder and (named_version is None or ":" not in named_version):
        raise UsageError(
            "a card shows one version: name it as NAME:VERSION",
            hint="Or give a folder, --output FOLDER: it gets a page per version and an index.",
        )
    if not is_folder:
        check_outputs(file)
    return is_folder
