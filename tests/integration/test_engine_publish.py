"""`add --backend tensorrt_rtx` as a whole: the real builder, a real repository, and interrupted builds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from support import onnx_models

from repo_manager.engine.fit import plan_facts
from repo_manager.engine.options import EngineOptions
from repo_manager.errors import EngineError
from repo_manager.optional import is_installed
from repo_manager.pipeline.adding import AddOptions, add
from repo_manager.repository.scan import scan
from repo_manager.repository.verify import verify
from repo_manager.types import Backend, Precision

pytestmark = pytest.mark.integration

if not is_installed("tensorrt_rtx"):
    pytest.skip("tensorrt_rtx is not installed: pip install 'triton-repo-manager[rtx]'", allow_module_level=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_models.save(onnx_models.cnn(), tmp_path_factory.mktemp("model") / "cnn.onnx")


def tree(root: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with a file's content."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))
    }


def test_an_engine_is_published_listed_and_verified(source: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    options = AddOptions(backend="tensorrt_rtx", precision=Precision.FP16)
    added = add(source, "cnn", repository, options)
    assert "model.engine" in added.files
    assert 'backend: "tensorrt_rtx"' in added.config
    (entry,) = scan(repository)
    assert entry.backend == "tensorrt_rtx"
    assert verify(repository) == ()
    manifest = json.loads((added.path / "manifest.json").read_text())
    engine = manifest["engine"]
    assert engine["build"]["profile"], "the shapes are on record"
    assert engine["build"]["options"]["sparse"] is True
    assert engine["sparsity_reported"] is False
    assert {row["found"] for row in engine["build"]["precision"]} == {"float16"}
    facts = plan_facts(added.path / "model.engine", engine)
    assert facts.backend is Backend.TENSORRT_RTX
    assert facts.version_compatible is False


def test_the_options_of_the_engine_reach_it(source: Path, tmp_path: Path) -> None:
    engine = EngineOptions(compute_capabilities=("8.9",), max_batch_size=3)
    added = add(source, "cnn", tmp_path / "models", AddOptions(backend="tensorrt_rtx", engine=engine))
    section = json.loads((added.path / "manifest.json").read_text())["engine"]
    assert section["compute_capabilities"] == ["8.9"]
    assert all(shape["max"][0] == 3 for shape in section["build"]["profile"].values())


def test_the_configs_batch_is_the_engines(source: Path, tmp_path: Path) -> None:
    added = add(source, "cnn", tmp_path / "models", AddOptions(backend="tensorrt_rtx"))
    section = json.loads((added.path / "manifest.json").read_text())["engine"]
    (limit,) = {shape["max"][0] for shape in section["build"]["profile"].values()}
    assert f"max_batch_size: {limit}" in added.config


def test_a_failed_build_leaves_the_repository_as_it_was(source: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    add(source, "cnn", repository, AddOptions(backend="tensorrt_rtx"))
    before = tree(repository)
    options = AddOptions(backend="tensorrt_rtx", engine=EngineOptions(workspace_bytes=1))
    with pytest.raises(EngineError):
        add(source, "cnn", repository, options)
    assert tree(repository) == before


SCRIPT = """
    import sys, time
    from pathlib import Path
    import repo_manager.engine.builder as builder
    from repo_manager.pipeline.adding import AddOptions, add

    seen = 0
    def tell(phase, done, steps):
        global seen
        seen += 1
        if seen == int(sys.argv[3]):
            Path(sys.argv[4]).touch()
            time.sleep(1)   # the parent stops the build here, in the middle of it
    builder._quiet = tell
    add(Path(sys.argv[1]), "cnn", Path(sys.argv[2]), AddOptions(backend="tensorrt_rtx"))
"""


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 1), (signal.SIGKILL, 12), (signal.SIGINT, 40)])
def test_a_build_stopped_at_any_moment_leaves_nothing_in_the_repository(
    source: Path, tmp_path: Path, number: signal.Signals, step: int
) -> None:
    repository, mark = tmp_path / "models", tmp_path / "mark"
    add(source, "cnn", repository, AddOptions(backend="tensorrt_rtx"))
    before = tree(repository)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(source), str(repository), str(step), str(mark)],
        env={**os.environ, "TMPDIR": str(scratch)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert mark.exists(), process.communicate()[1]
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert tree(repository) == before
    assert verify(repository) == ()
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
        assert list(scratch.glob("repo-manager*")) == [], "Ctrl-C cleans up behind itself"
