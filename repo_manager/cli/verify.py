"""The command to check a repository: verify."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import typer

from repo_manager.cli.option_groups import grouped, option, settings_of
from repo_manager.cli.options import DryRun, Output, RuntimeFlags, check_keys, check_outputs, writing
from repo_manager.cli.repository_options import AnyModelName, RepositoryFlag
from repo_manager.cli.signing import check_signatures
from repo_manager.errors import RepositoryError
from repo_manager.files import write_atomic
from repo_manager.report.repository_tables import problems_view, repairs_view, signature_checks_view
from repo_manager.report.sarif import sarif_text
from repo_manager.repository.location import parse_location
from repo_manager.repository.repair import repair
from repo_manager.repository.verify import verify
from repo_manager.triton_config.problems import Severity

__all__ = ["app"]

app = typer.Typer()


@dataclasses.dataclass(frozen=True)
class VerifyFlags:
    """The extent of the check, and its keys."""

    digests: bool = option(
        "--digests/--no-digests", sets=(verify, "digests"), help="Read every file to compare its digest."
    )
    sarif: Path | None = option(
        "--sarif", metavar="FILE", help="Also write the findings as SARIF 2.1.0, with the lines of config.pbtxt."
    )
    signed_by: list[Path] | None = option(
        "--signed-by",
        metavar="KEY.pub",
        help="Require a signature of every version by this key, or under this root certificate (may be given often) "
        "[default: the settings' signed_by].",
    )


@dataclasses.dataclass(frozen=True)
class RepairFlags:
    """Repairs before the check."""

    PANEL: ClassVar[str] = "Repair"
    repair: bool = option("--repair", default=False, help="First repair whatever can be repaired.")
    copies: list[str] | None = option(
        "--copy", metavar="DIR|URL", help="Repositories with good copies of damaged files (may be given often)."
    )


@app.command("verify")
@grouped
def verify_command(
    name: AnyModelName = None,
    *,
    place: RepositoryFlag,
    flags: VerifyFlags,
    repairing: RepairFlags,
    _runtime: RuntimeFlags,
    dry_run: DryRun = False,
    output: Output,
) -> None:
    """Check a repository: layout, configurations, every file against its manifest, and signatures."""
    check_outputs(flags.sarif)
    root = place.root()
    copies = tuple(map(parse_location, repairing.copies or ()))
    repairs = repair(root, name, copies=copies, dry_run=dry_run) if repairing.repair else ()
    check_keys(flags.signed_by)
    checks, unsigned = check_signatures(root, name, flags.signed_by)
    problems = (*verify(root, name, **settings_of(verify, flags)), *unsigned)
    if flags.sarif is not None:
        with writing(flags.sarif):
            write_atomic(flags.sarif, sarif_text(root, problems).encode())
    views = [*repairs_view(repairs, dry_run=dry_run), *signature_checks_view(checks), *problems_view(root, problems)]
    result = {"repairs": repairs, "signatures": checks, "problems": problems}
    output.terminal().result(result, *views)
    errors = [problem for problem in problems if problem.severity is Severity.ERROR]
    if errors:
        raise RepositoryError(
            f"{root}: {len(errors)} problem(s) found", hint="The result lists the problems.", is_shown=True
        )
