"""The schemas of `--json` documents: each command has one, and real documents follow it.

`support.json_documents` holds the documents of all commands that the unit tests run against them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from support.json_documents import check_document, tool

from repo_manager.cli.commands import COMMANDS
from repo_manager.samples import dense_twin, sample_model

ROOT = Path(__file__).parents[2]


def test_every_command_has_a_schema() -> None:
    schemas = tool("json_page").json_schemas()
    assert list(schemas) == [name for names in COMMANDS.values() for name in names]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_a_key_too_many_or_too_few_is_found() -> None:
    tagging = {"name": "digits", "version": 1, "tag": "stable", "before": None, "applied": True}
    check_document("tag", tagging)
    check_document("tag", {"context": "staging", **tagging})
    check_document("tag", {"error": {"type": "UsageError", "message": "no", "hint": None, "exit_code": 2}})
    for wrong in ({**tagging, "more": 1}, {"name": "digits"}, {**tagging, "version": "1"}):
        with pytest.raises(AssertionError, match="tag --json"):
            check_document("tag", wrong)


def test_documents_of_commands_follow_their_schemas(tmp_path: Path) -> None:
    models, other = tmp_path / "models", tmp_path / "other"
    shutil.copytree(ROOT / "model_repository", models)
    (name, *_) = sorted(path.name for path in models.iterdir() if path.is_dir())
    place = ("-r", models)
    for words in (
        ("doctor",),
        ("inspect", sample_model()),
        ("prune", dense_twin(), "-o", tmp_path / "pruned.onnx", "--dry-run"),
        ("convert", sample_model(), "-o", tmp_path / "fp16.onnx", "-p", "fp16"),
        ("list", *place),
        ("show", name, *place),
        ("show", f"{name}:1", *place),
        ("history", name, *place),
        ("report", f"{name}:1", *place),
        ("verify", *place),
        ("diff", f"{name}:1", f"{name}:1", *place),
        ("config", name, *place),
        ("labels", name, *place),
        ("tag", f"{name}:1", "stable", *place),
        ("copy", f"{name}:1", "--into", other, *place),
        ("promote", f"{name}:1", "--into", other, *place),
        ("gc", *place, "--dry-run"),
        ("adopt", *place, "--dry-run"),
        ("export", *place),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "repo_manager", *map(str, words), "--json"],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        check_document(str(words[0]), json.loads(done.stdout))
