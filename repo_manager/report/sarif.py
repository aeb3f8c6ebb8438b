"""Findings of `verify` as SARIF 2.1.0, shown by code hosts beside the lines of a change."""

from __future__ import annotations

import json
import os
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repo_manager import __version__
from repo_manager.errors import RepositoryError
from repo_manager.repository.location import Location, local_folder
from repo_manager.repository.stores import open_store
from repo_manager.triton_config.config import CONFIG_FILENAME
from repo_manager.triton_config.problems import Problem, Severity
from repo_manager.triton_config.rules import RULES
from repo_manager.triton_config.text_fields import line_of

__all__ = ["sarif_text"]

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_OTHER = "finding"


def sarif_text(repository: Location, problems: Sequence[Problem]) -> str:
    """Return a SARIF log of one run, with a result for each finding.

    A result names its rule, its file and, where a field of config.pbtxt is meant, the line. Paths are relative to the
    current folder where the repository is below it, as code hosts want them, else URLs.

    Args:
        repository: the root. Each config.pbtxt a finding is about is read once more for its lines.
        problems: the findings of `verify`, kept in order. Empty: a log without results.
    """
    configs = _Configs(repository)
    ids = sorted({problem.rule or _OTHER for problem in problems})
    run = {
        "tool": {
            "driver": {
                "name": "repo-manager",
                "semanticVersion": __version__,
                "rules": [_rule(name) for name in ids],
            }
        },
        "columnKind": "unicodeCodePoints",
        "results": [_result(problem, repository, ids, configs) for problem in problems],
    }
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, ensure_ascii=False) + "\n"


def _rule(name: str) -> dict[str, Any]:
    """Describe a rule. One of Triton's says where Triton checks it."""
    found: dict[str, Any] = {"id": name, "name": "".join(part.capitalize() for part in name.split("-"))}
    text = name.replace("-", " ").capitalize()
    source = next((rule.source for rule in RULES if rule.name == name), "")
    found["shortDescription"] = {"text": f"{text}."}
    if source:
        found["fullDescription"] = {"text": f"{text}: Triton checks it in {source} (triton-inference-server/core)."}
    return found


class _Configs:
    """The text of each model's config.pbtxt, read when it is asked for."""

    def __init__(self, repository: Location) -> None:
        self._repository = repository
        self._texts: dict[str, str] = {}

    def text(self, model: str) -> str:
        """Return it. Empty when there is none, or it is unreadable."""
        if model not in self._texts:
            try:
                content = open_store(self._repository).read(f"{model}/{CONFIG_FILENAME}")
                self._texts[model] = "" if content is None else content.decode("utf-8")
            except (OSError, ValueError, RepositoryError):  # the finding is reported without a line number
                self._texts[model] = ""
        return self._texts[model]


def _result(problem: Problem, repository: Location, ids: Sequence[str], configs: _Configs) -> dict[str, Any]:
    rule = problem.rule or _OTHER
    where, line = _place(problem, configs)
    location: dict[str, Any] = {"artifactLocation": {"uri": _uri(repository, where)}}
    if line is not None:
        location["region"] = {"startLine": line}
    return {
        "ruleId": rule,
        "ruleIndex": ids.index(rule),
        "level": "error" if problem.severity is Severity.ERROR else "warning",
        "message": {"text": f"{problem.where}: {problem.what}" + (f" ({problem.hint})" if problem.hint else "")},
        "locations": [{"physicalLocation": location}],
    }


def _place(problem: Problem, configs: _Configs) -> tuple[str, int | None]:
    """Return the file, below the root, and the line. For a contradiction by a model file, the line of config.pbtxt."""
    model, _, rest = problem.where.partition("/")
    if rest == CONFIG_FILENAME or problem.rule in ("tensors-of-the-model", "config-signature", "samples-depend"):
        line = line_of(configs.text(model), problem.what) if configs.text(model) else None
        if line is not None:
            return f"{model}/{CONFIG_FILENAME}", line
    return problem.where, None


def _uri(repository: Location, where: str) -> str:
    folder = local_folder(repository)
    if folder is None:
        return f"{repository}/{urllib.parse.quote(where)}"
    path = Path(os.path.normpath(Path.cwd() / folder / where))
    if path.is_relative_to(Path.cwd()):
        return urllib.parse.quote(path.relative_to(Path.cwd()).as_posix())
    return path.as_uri()
