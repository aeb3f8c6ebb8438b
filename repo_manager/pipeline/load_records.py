"""Load tests kept with versions: recorded, and read back.

It is separate because `show` and `history` read the records without the packages of load tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from repo_manager.errors import InputError, RepositoryError
from repo_manager.loadtest.judge import COMPARED_OPTIONS
from repo_manager.loadtest.merge import report_from_json
from repo_manager.loadtest.result import LoadPoint, LoadTestReport
from repo_manager.repository.layout import version_number
from repo_manager.repository.location import LocationLike, as_location
from repo_manager.repository.scan import find_model
from repo_manager.repository.state import KeptLoadTest
from repo_manager.repository.tags import model_state, record_load_test
from repo_manager.types import as_json

__all__ = ["keep_load_test", "kept_load_tests", "read_kept"]

# Used only by charts, and most of a report: slices of time, windows and histograms.
_OF_CHARTS = {"windows", "series", "curve", "histogram"}


def keep_load_test(repository: LocationLike, report: LoadTestReport) -> int:
    """Keep a load test with the version it measured. The latest five of a version stay.

    Args:
        repository: the root of the repository the version is in.
        report: from `run_load_test` or `read_report`. It must name the version, and not every level may have failed.

    Returns:
        The version.

    Raises:
        RepositoryError: no level was measured, or the repository has no such version.
    """
    target = report.target
    version = version_number(target.version)
    if version is None:
        raise RepositoryError(f"the load test of {target.model} does not say which version it measured")
    if all(point.outcome == "failed" for point in report.points):
        raise RepositoryError(f"nothing of {target.model}:{version} was measured, so there is nothing to keep")
    document = as_json(report)
    document["points"] = [_kept(point) for point in report.points]
    document["options"] = {name: document["options"][name] for name in COMPARED_OPTIONS if name in document["options"]}
    record_load_test(as_location(repository), target.model, KeptLoadTest(version, document))
    return version


def _kept(point: LoadPoint) -> Mapping[str, Any]:
    document = {key: value for key, value in as_json(point).items() if key not in _OF_CHARTS}
    document["details"] = {name: {**detail, "histogram": {}} for name, detail in as_json(dict(point.details)).items()}
    return {"label": point.label, **document}


def kept_load_tests(repository: LocationLike, name: str, version: int | None = None) -> tuple[LoadTestReport, ...]:
    """Return the load tests kept of a version, oldest first. Without charts.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        name: the model whose kept tests are read. The repository must have it.
        version: one of its versions. `None`: all of them.

    Raises:
        RepositoryError: no such model, or its record is damaged.
    """
    root = as_location(repository)
    find_model(root, name)
    return read_kept(name, model_state(root, name).load_tests, version)


def read_kept(name: str, tests: Iterable[KeptLoadTest], version: int | None = None) -> tuple[LoadTestReport, ...]:
    """Return the reports of records. Unreadable ones of a newer repo-manager are left out.

    Args:
        name: name of the tests' model, for messages. It selects nothing.
        tests: one model's records, as `ModelState.load_tests` has them. Their order stays.
        version: version of the model. `None`: the newest, or the server's choice.
    """
    reports = []
    for test in tests:
        if version in (None, test.version):
            try:
                reports.append(report_from_json(test.report, where=f"a load test of {name}:{test.version}"))
            except InputError:
                continue
    return tuple(reports)
