"""Load on a served model: loadtest, and loadtest merge."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from repo_manager.cli.connection import ConnectionFlags
from repo_manager.cli.level_options import LevelFlags, MeasureFlags, SequenceFlags
from repo_manager.cli.load_options import DataFlags, GateFlags, Load, ServerFlags, advice_for, raise_for, show_report
from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import Output, check_input, check_outputs
from repo_manager.cli.repository_options import RepositoryFlag, model_versions
from repo_manager.errors import RepositoryError, UsageError
from repo_manager.gates import Verdict, combine_verdicts
from repo_manager.loadtest.judge import judge_against
from repo_manager.loadtest.merge import merge_reports, read_report
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.result import LoadTestReport
from repo_manager.loadtest.run import LoadTestInterrupted, run_load_test
from repo_manager.loadtest.search import search_verdict
from repo_manager.pipeline.load_records import keep_load_test, kept_load_tests
from repo_manager.report.progress import load_progress
from repo_manager.report.terminal import Terminal, next_command
from repo_manager.repository.location import Location, local_folder
from repo_manager.repository.tags import resolve_version

__all__ = ["DefaultGroup", "app"]


# A command with sub-commands: `loadtest NAME` and `loadtest merge FILES`.

_DEFAULT = "run"


class DefaultGroup(TyperGroup):
    """Runs its command `run` unless the first word names another one. Users never write `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command in front of arguments without a command."""
        named = [name for name in self.commands if name != _DEFAULT]
        return super().parse_args(ctx, args if args[:1] and args[0] in named else [_DEFAULT, *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """Leave the default command's name out of usage lines."""
        name, command, rest = super().resolve_command(ctx, args)
        return (None if name == _DEFAULT else name), command, rest


class _DefaultContext(typer.Context):
    @property
    def command_path(self) -> str:
        """The words of the usage line, without an empty one for the default command."""
        return super().command_path.rstrip()


class _DefaultCommand(TyperCommand):
    context_class = _DefaultContext


app = typer.Typer()
_INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class InputFlags(DataFlags):
    """Content of the requests of `loadtest`."""

    image: list[str] | None = option(
        "--image",
        metavar="KEY=VALUE",
        sets=(LoadTestOptions, "image"),
        read=lambda texts: _image_options(texts),
        help="How images become inputs: resize, color, scale, mean, std, layout (may be given often).",
    )
    distinct: int = option(
        "--distinct",
        sets=(LoadTestOptions, "distinct"),
        min=1,
        help="Number of different random requests, sent in rotation.",
    )
    allow_zeros: bool = option(
        "--allow-zeros", sets=(LoadTestOptions, "allow_zeros"), help="Accept input data that is all zeros."
    )


@dataclasses.dataclass(frozen=True)
class JudgingFlags(GateFlags):
    """Options for the exit code of `loadtest`."""

    baseline: str | None = option(
        "--baseline",
        metavar="FILE.json|NAME:VERSION",
        help="Fail on a regression against an earlier JSON report, or the latest load test kept with a version.",
    )
    tolerance: float = option(
        "--tolerance",
        sets=(judge_against, "tolerance"),
        read=lambda percent: percent / 100,
        show=lambda share: share * 100,
        min=0.0,
        help="Largest accepted regression against --baseline, in percent.",
    )
    keep: bool = option(
        "--keep",
        default=False,
        help="Keep the result with the version, for show, history, diff, report and --baseline.",
    )


@dataclasses.dataclass(frozen=True)
class LoadFlags(JudgingFlags, MeasureFlags, SequenceFlags, InputFlags, LevelFlags, ServerFlags):
    """The options of `loadtest` (the last base's come first in the help)."""

    def load_options(self, named_version: str, load: Load) -> LoadTestOptions:
        """Return the library's options.

        Raises:
            UsageError: a text has another form.
            ServerUnreachableError: there is no server.
        """
        own: dict[str, Any] = {
            **settings_of(LoadTestOptions, self),
            "concurrency": self.levels(),
            "until": self.searched(),
            "command": shlex.join(["repo-manager", *sys.argv[1:]]),
        }
        if self.metrics is not None:
            own["metrics_url"] = self.metrics
        for path in (self.data, self.replay):
            check_input(path)
        load.check(named_version, own)
        return LoadTestOptions(**{**load.settings(named_version, self.url, own), **own})


@grouped
def loadtest(
    named_version: Annotated[
        str,
        typer.Argument(
            metavar="NAME[:VERSION]",
            help="The served model; or: merge FILES..., see its --help.",
            show_default=False,
            autocompletion=model_versions,
        ),
    ],
    *,
    place: RepositoryFlag,
    flags: LoadFlags,
    output: Output,
    connection: ConnectionFlags,
) -> None:
    """Measure latency, throughput, errors and server times of a served model. Gates decide the exit code.

    Exit code 4 when a gate fails, 5 when the server failed at a level, 6 when the measurement decides neither way.
    Ctrl-C shows the results so far. Reports of several machines: repo-manager loadtest merge FILES...
    """
    terminal = output.terminal()
    flags.gates()  # An invalid gate or unreadable file stops the command before the load starts.
    files = flags.files()
    check_outputs(*files)
    if flags.searched() and flags.baseline is not None:
        raise UsageError(
            "--until with gates searches for a load, but --baseline compares fixed loads",
            hint="Measure the found load: loadtest NAME -c N --baseline FILE.",
        )
    earlier = None if flags.baseline is None else _earlier(flags.baseline, place)
    keeping = _kept_in(place, named_version) if flags.keep else None
    options = flags.load_options(named_version, Load(terminal, place, flags, flags, connection))
    report, is_interrupted = _measure(terminal, options, place, named_version)
    verdict = None if is_interrupted else _judge(report, earlier, flags)
    show_report(terminal, report, verdict, files)
    if is_interrupted:
        raise typer.Exit(_INTERRUPTED)
    if keeping is not None:
        _keep(terminal, keeping, report)
    raise_for(report, verdict)


def _earlier(baseline: str, place: RepositoryFlag) -> LoadTestReport:
    """Return the report compared with: of a file, or the latest kept of a version.

    Raises:
        InputError: there is no such file.
        RepositoryError: no such version, or none of its load tests is kept.
    """
    if ":" not in baseline or Path(baseline).exists():
        check_input(Path(baseline))
        return read_report(baseline)
    root = place.root()
    name, version = resolve_version(root, baseline)
    kept = kept_load_tests(root, name, version)
    if not kept:
        command = next_command("loadtest", f"{name}:{version}", "--keep", repository=place.repository)
        raise RepositoryError(f"no load test of {name}:{version} is kept in {root}", hint=f"Keep one with: {command}")
    return kept[-1]


def _kept_in(place: RepositoryFlag, named_version: str) -> Location:
    """Return the repository for the result, looked at before the load.

    Raises:
        RepositoryError: it has no such version, or cannot be written.
    """
    root = place.root()
    resolve_version(root, named_version)
    folder = local_folder(root)
    if folder is not None and not os.access(folder, os.W_OK):
        raise RepositoryError(f"--keep: {folder} cannot be written. Nothing was done.", hint="Measure without --keep.")
    return root


def _keep(terminal: Terminal, repository: Location, report: LoadTestReport) -> None:
    """Keep the result. It has been shown by now, so an error loses nothing.

    Raises:
        RepositoryError: the repository refuses.
    """
    try:
        version = keep_load_test(repository, report)
    except RepositoryError as exc:
        raise RepositoryError(f"The load test was not kept: {exc.message}", hint=exc.hint, is_shown=True) from exc
    terminal.note(f"Kept with {report.target.model}:{version} in {repository}")


def _measure(
    terminal: Terminal, options: LoadTestOptions, place: RepositoryFlag, named_version: str
) -> tuple[LoadTestReport, bool]:
    """Return the report, and whether it was cut short."""
    try:
        with advice_for(place, named_version), load_progress(terminal.console, quiet=terminal.quiet) as progress:
            return run_load_test(options, progress=progress), False
    except LoadTestInterrupted as exc:
        return exc.report, True


def _judge(report: LoadTestReport, earlier: LoadTestReport | None, flags: JudgingFlags) -> Verdict | None:
    verdicts: list[Verdict] = []
    if report.search is not None:
        verdicts.append(search_verdict(report.search, report.points))
        report = dataclasses.replace(
            report, points=tuple(point for point in report.points if point.level == report.search.holds)
        )
    if flags.slo and report.points:
        verdicts.append(flags.judge(report))
    if earlier is not None:
        verdicts.append(judge_against(report, earlier, **settings_of(judge_against, flags)))
    return combine_verdicts(verdicts)


def _image_options(texts: list[str] | None) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts or []]
    if any(not mark for _, mark, _ in pairs):
        raise UsageError(f"--image {texts}: expected KEY=VALUE", hint="For instance --image mean=0.485,0.456,0.406.")
    return {name.strip(): value.strip() for name, _, value in pairs}


@grouped
def merge(
    reports: Annotated[
        list[Path], typer.Argument(metavar="FILES...", help="JSON reports of one load test.", show_default=False)
    ],
    merged_file: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.json", help="The merged report.")
    ] = None,
    *,
    judging: GateFlags,
    output: Output,
) -> None:
    """Join the JSON reports of load generators run at the same time: rates added, histograms merged.

    Refused when model, configuration or times do not match. Exit codes are those of loadtest.
    """
    terminal = output.terminal()
    judging.gates()
    files = judging.files()
    if merged_file is not None:
        if merged_file.suffix.lower() != ".json":
            raise UsageError(
                f"--output {merged_file}: the merged report is JSON", hint="Name it FILE.json; see --report."
            )
        files = (merged_file, *files)
    check_outputs(*files)
    merged = merge_reports([read_report(path) for path in reports])
    verdict = judging.judge(merged) if judging.slo else None
    show_report(terminal, merged, verdict, files)
    raise_for(merged, verdict)


group = typer.Typer(cls=DefaultGroup, rich_markup_mode="rich", help=loadtest.__doc__)
group.command("run", cls=_DefaultCommand)(loadtest)
group.command("merge")(merge)
app.add_typer(group, name="loadtest")
