"""Every option of `add` and `convert` reaches the library: each case fails when its option is ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from repo_manager import samples
from repo_manager.accuracy import AccuracyOptions
from repo_manager.cli.option_groups import grouped
from repo_manager.engine.fit import FitTarget, release_of_container
from repo_manager.engine.profiles import ShapeRange
from repo_manager.engine.triton_options import AcceleratorOptions
from repo_manager.pipeline.adding import AddOptions, SparsityMode
from repo_manager.types import Precision

Run = Callable[..., Any]


class Called(Exception):  # noqa: N818 - it ends the command where the library would begin
    """The arguments of the library call."""

    def __init__(self, name: str, repository: Path, options: AddOptions) -> None:
        super().__init__()
        self.name, self.repository, self.options = name, repository, options


@pytest.fixture
def asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Called]:
    def add(_: Path, name: str, repository: Path, options: AddOptions, **__: Any) -> None:
        raise Called(name, repository, options)

    monkeypatch.setattr("repo_manager.cli.add.add", add)

    def asked(*arguments: object) -> Called:
        with pytest.raises(Called) as caught:
            run("add", samples.sample_model(), "-n", "digits", "-r", "models", *arguments)
        return caught.value

    return asked


R2607 = release_of_container("26.07")
CASES: list[tuple[list[str], str, Any]] = [
    (["--precision", "fp16"], "precision", Precision.FP16),
    (["--backend", "tensorrt_rtx"], "backend", "tensorrt_rtx"),
    (["--sparsity", "require"], "sparsity", SparsityMode.REQUIRE),
    (["--prune-drift", "0.05"], "prune_drift", 0.05),
    (["--permute"], "permute", True),
    (["--distill"], "distill", True),
    (["--calibration", "data.npz"], "calibration", "data.npz"),
    (["--dry-run"], "dry_run", True),
    (["--control"], "control", True),
    (["--model-config", "h100=9.0"], "model_configs", {"h100": "9.0"}),
    (["--for-server", "26.07"], "target", FitTarget(R2607)),
    (["--for-server", "26.07:9.0"], "target", FitTarget(R2607, "9.0")),
    (["--keep-fp32", "a*", "--keep-fp32", "b"], "convert.keep_fp32", ("a*", "b")),
    (["--shape", "input:1,512"], "convert.shapes", {"input": (1, 512)}),
    (["--auto-keep", "3"], "convert.auto_keep", 3),
    (["--allow-unchanged"], "convert.allow_unchanged", True),
    (["--max-drift", "0"], "convert.max_drift", 0.0),
    (["--eval", "d.npz:y"], "accuracy", AccuracyOptions("d.npz:y")),
    (["--eval", "m:f", "--min-accuracy", "-1"], "accuracy.min_accuracy", -1.0),
    (["--eval", "m:f", "--max-accuracy-drop", "0"], "accuracy.max_drop", 0.0),
    (["--max-batch-size", "0"], "config.max_batch_size", 0),
    (["--instances", "2"], "config.instance_count", 2),
    (["--instance-kind", "gpu"], "config.instance_kind", "gpu"),
    (["--queue-delay-us", "7"], "config.max_queue_delay_us", 7),
    (["--warmup"], "config.warmup", True),
    (["--set", "response_cache.enable=true"], "config.fields", {"response_cache.enable": "true"}),
    (["--for", "8.0=a.plan", "--for", "8.9"], "engine.plans", {"8.0": Path("a.plan"), "8.9": None}),
    (["--shape-range", "x:1,2:3,4:5,6"], "engine.shapes", {"x": ShapeRange((1, 2), (3, 4), (5, 6))}),
    (["--profile", "x:1,2"], "engine.shapes", {"x": ShapeRange((1, 2), (1, 2), (1, 2))}),
    (["--no-sparse"], "engine.sparse", False),
    (["--workspace", "1024"], "engine.workspace_bytes", 1024),
    (["--optimization-level", "0"], "engine.optimization_level", 0),
    (["--timing-cache", "t.cache"], "engine.timing_cache", Path("t.cache")),
    (["--deterministic"], "engine.deterministic", True),
    (["--version-compatible"], "engine.version_compatible", True),
    (["--hardware-compatibility", "ampere_plus"], "engine.hardware_compatibility", "ampere_plus"),
    (["--compute-capability", "8.6", "--compute-capability", "8.9"], "engine.compute_capabilities", ("8.6", "8.9")),
    (["--strip"], "engine.strip", True),
    (["--refit"], "engine.refit", True),
    (["--plan-detail", "none"], "engine.plan_detail", "none"),
    (["--without-tactics", "cudnn", "--without-tactics", "cublas"], "engine.without_tactics", ("cudnn", "cublas")),
    (["--accelerator", "tensorrt"], "accelerator", AcceleratorOptions()),
    (["--accelerator", "tensorrt", "-p", "fp16"], "accelerator.precision", Precision.FP16),
    (["--accelerator", "tensorrt", "--accelerator-precision", "int8"], "accelerator.precision", Precision.INT8),
    (["--accelerator", "tensorrt", "--engine-cache", "/c"], "accelerator.engine_cache", "/c"),
    (["--accelerator", "tensorrt", "--workspace", "9"], "accelerator.workspace_bytes", 9),
    (["--accelerator", "tensorrt", "--no-sparse"], "accelerator.sparse", False),
]


def field(options: AddOptions, path: str) -> Any:
    value: Any = options
    for name in path.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(("arguments", "path", "expected"), CASES)
def test_every_option_reaches_the_library(
    arguments: list[str], path: str, expected: Any, asked: Callable[..., Called]
) -> None:
    assert field(asked(*arguments).options, path) == expected
    if not path.startswith(("accelerator.", "accuracy.")):
        assert field(AddOptions(), path) != expected, "the case would pass if the option were ignored"


def test_every_option_has_a_case() -> None:
    from repo_manager.cli.main import app

    command = typer.main.get_command(app).get_command(None, "add")  # type: ignore[attr-defined, arg-type]
    assert command is not None
    tried = {word for arguments, _, _ in (*CASES, *FILES_CASES) for word in arguments if word.startswith("-")}
    # Tested where their effect shows.
    elsewhere = {
        "--timeout",
        "--memory",
        "--name",
        "--repository",
        "--labels",
        "--sign",
        "--html",
        "--json",
        "--quiet",
        "--wide",
        "--help",
    }
    elsewhere |= {"--preprocess", "--context"}
    for parameter in command.params:
        names = {*parameter.opts, *parameter.secondary_opts}
        if any(name.startswith("-") for name in names) and not names & elsewhere:
            assert names & tried, f"no case for {sorted(names)}"


def test_the_recipe_of_images_reaches_the_library(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def add_with_images(*given: Any, **_: Any) -> None:
        raise Called(given[1], given[3], given[4])

    monkeypatch.setattr("repo_manager.cli.add.add_with_images", add_with_images)
    with pytest.raises(Called) as caught:
        run("add", samples.sample_model(), "-n", "digits", "-r", "models", "--preprocess", "c.yaml", "--warmup")
    assert caught.value.repository == Path("c.yaml")
    assert caught.value.options.config.warmup
    refused = run("add", __file__, "-n", "digits", "-r", "models", "--preprocess", "c.yaml")
    assert (refused.code, "--preprocess" in refused.err) == (2, True)


FILES_CASES: list[tuple[list[str], str, Any]] = [
    (["--config", "config.pbtxt"], "config", Path("config.pbtxt")),
    (["--sample", "x.npz"], "sample", Path("x.npz")),
    (["--uses", "a", "--uses", "b"], "uses", ("a", "b")),
    (["--backend", "openvino"], "backend", "openvino"),
    (["--sample", "x.npz", "--dry-run"], "dry_run", True),
    (["--sample", "x.npz", "--for-server", "26.07"], "target", FitTarget(R2607)),
]


@pytest.mark.parametrize(("arguments", "field", "expected"), FILES_CASES)
def test_what_is_published_as_it_is(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], field: str, expected: Any
) -> None:
    def add_files(_: Path, name: str, repository: Path, options: Any, **__: Any) -> None:
        raise Called(name, repository, options)

    monkeypatch.setattr("repo_manager.cli.add.add_files", add_files)
    with pytest.raises(Called) as caught:
        run("add", samples.sample_model(), "-n", "digits", "-r", "models", *arguments)
    assert getattr(caught.value.options, field) == expected


def test_without_options_the_library_gets_its_defaults(asked: Callable[..., Called]) -> None:
    called = asked()
    assert called.options == AddOptions()
    assert (called.name, str(called.repository)) == ("digits", "models")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--for", "a.plan"], "expected CAPABILITY=FILE"),
        (["--model-config", "h100"], "expected NAME=CAPABILITY"),
        (["--for-server", "19.99"], "no Triton release '19.99' is known"),
        (["--for-server", "26.07:x"], "expected RELEASE:CAPABILITY"),
        (["--accelerator", "openvino"], "'openvino' is not one of 'tensorrt'"),
        (["--engine-cache", "/c"], "go with --accelerator tensorrt"),
        (["--accelerator-precision", "fp16"], "go with --accelerator tensorrt"),
        (["--accelerator", "tensorrt", "--accelerator-precision", "fp8"], "is not one of 'fp32', 'fp16', 'int8'"),
        (["--instance-kind", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'gpu'"),
        (["--backend", "caffe"], "'caffe' is not one of 'auto', 'onnxruntime', 'tensorrt', 'tensorrt_rtx'"),
        (["--uses", "other", "--control"], "--control: "),
        (["--optimization-level", "6"], "expected 5 or less"),
        (["--shape-range", "x"], "NAME:MIN:OPT:MAX"),
        (["--backend", "onnxruntime", "--deterministic", "--strip"], "--deterministic, --strip: for engines"),
        (["--backend", "onnxruntime", "--no-sparse"], "--no-sparse: for engines"),
        (["--backend", "tensorrt", "--accelerator", "tensorrt"], "goes with --backend onnxruntime"),
        (["--backend", "tensorrt", "--control", "--for", "8.0=a"], "built elsewhere"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(arguments: list[str], said: str, run: Run) -> None:
    ended = run("add", samples.sample_model(), "-n", "digits", "-r", "models", *arguments)
    assert ended.code == 2
    assert said in ended.err
    assert not Path("models").exists()


@dataclasses.dataclass(frozen=True)
class Pair:
    left: int = 1
    right: int = 2


def test_a_group_of_options_arrives_as_its_dataclass() -> None:
    seen: list[Any] = []

    @grouped
    def command(name: str, flag: bool = False, *, pair: Pair) -> None:
        """Words of help."""
        seen.append((name, flag, pair))

    app = typer.Typer()
    app.command()(command)
    assert CliRunner().invoke(app, ["--right", "5", "--flag", "x"]).exit_code == 0
    assert seen == [("x", True, Pair(1, 5))]
    assert "Words of help" in CliRunner().invoke(app, ["--help"]).stdout
