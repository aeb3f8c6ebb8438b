"""Findings as SARIF, complete enough for code hosts to show them beside the right line."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.serving import scaling_model

from repo_manager.report.sarif import sarif_text
from repo_manager.repository.verify import verify
from repo_manager.triton_config.text_fields import line_of

ROOT = Path(__file__).parents[3]
CONFIG = """# a comment: priority_levels
backend: "onnxruntime"
max_batch_size: 8
input [
  { name: "x" data_type: TYPE_FP32 dims: [ 5 ] },
  {
    name: "z"
    data_type: TYPE_FP32
    dims: [ 4 ]
  }
]
output { name: "y", data_type: TYPE_FP32, dims: 4 }
dynamic_batching {
  preserve_ordering: true
  priority_levels: 2
}
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "my models"
    (root / "m" / "1").mkdir(parents=True)
    (root / "m" / "config.pbtxt").write_text(CONFIG)
    (root / "m" / "1" / "model.onnx").write_bytes(scaling_model(2.0).SerializeToString())
    (root / "broken" / "1").mkdir(parents=True)
    (root / "broken" / "config.pbtxt").write_text('backend: "python"\ninput {\n  data_type: FP32\n}\n')
    monkeypatch.chdir(tmp_path)
    return root


def places(document: dict[str, Any]) -> dict[str, tuple[str, int | None]]:
    (run,) = document["runs"]
    found = {}
    for result in run["results"]:
        (location,) = result["locations"]
        place = location["physicalLocation"]
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("error", "warning")
        assert result["message"]["text"]
        found[result["ruleId"]] = (place["artifactLocation"]["uri"], place.get("region", {}).get("startLine"))
    return found


def test_each_finding_has_its_rule_its_file_and_its_line(repository: Path) -> None:
    problems = verify(Path("my models"))
    assert all(problem.rule for problem in problems)
    document = json.loads(sarif_text(Path("my models"), problems))
    assert (document["version"], len(document["runs"])) == ("2.1.0", 1)
    found = places(document)
    assert found["config-syntax"] == ("my%20models/broken/config.pbtxt", 3)
    assert found["priority-levels"] == ("my%20models/m/config.pbtxt", 15)
    assert found["preserve-ordering"] == ("my%20models/m/config.pbtxt", 14)
    assert found["tensors-of-the-model"][0] == "my%20models/m/config.pbtxt"
    assert found["manifest-missing"] == ("my%20models/m/1", None)


def test_a_repository_elsewhere_has_urls(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    document = json.loads(sarif_text(repository, verify(repository)))
    relative = repository.relative_to("/").as_posix().replace(" ", "%20")
    assert places(document)["priority-levels"] == (f"{relative}/m/config.pbtxt", 15)
    other = repository / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)
    document = json.loads(sarif_text(repository, verify(repository)))
    assert places(document)["priority-levels"] == (f"file:///{relative}/m/config.pbtxt", 15)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("input 'x': dims [5] do not fit", 5),
        ("input 'z': dims [4] do not fit", 9),
        ("input 'z' is unknown", 6),
        ("output 'y': dims [4] do not fit", 12),
        ("max_batch_size is 8", 3),
        ("priority_queue_policy has a level 3; expected 1 to 2, the priority_levels", 15),
        ("config.pbtxt, line 7: found '}'", 7),
        ("12:3 : Expected integer", 12),
        ("the file is a link", None),
    ],
)
def test_the_line_is_that_of_the_field_that_is_meant(what: str, line: int | None) -> None:
    assert line_of(CONFIG, what) == line


def test_the_hook_runs_and_is_one_for_pre_commit(repository: Path) -> None:
    pytest.importorskip("pre_commit")
    manifest = ROOT / ".pre-commit-hooks.yaml"
    command = [sys.executable, "-m", "pre_commit", "validate-manifest", str(manifest)]
    subprocess.run(command, check=True, timeout=60)
    (hook,) = yaml.safe_load(manifest.read_text(encoding="utf-8"))
    program, *words = shlex.split(hook["entry"])
    assert (program, hook["pass_filenames"]) == ("repo-manager", False)
    command = [sys.executable, "-m", "repo_manager", *words, "-r", str(repository), "--sarif", "out.sarif"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "priority_levels" in done.stdout) == (3, True)
    assert "priority-levels" in places(json.loads(Path("out.sarif").read_text(encoding="utf-8")))
