from __future__ import annotations

from pathlib import Path

import pytest

from repo_manager.engine.artifact import build_artifact
from repo_manager.engine.capabilities import Capabilities, StrongTyping
from repo_manager.engine.gpu import Gpu
from repo_manager.engine.options import EngineOptions
from repo_manager.engine.plan_set import adopt_plans, check_buildable, parse_for
from repo_manager.errors import EngineError, UsageError
from repo_manager.types import Backend

TRT, RTX = Backend.TENSORRT, Backend.TENSORRT_RTX


def plan(path: Path, tag: bytes = b"ftrt", version: tuple[int, ...] = (11, 1, 0, 5), targets: int = 0) -> Path:
    path.write_bytes(tag + bytes(20) + bytes(version) + tag + targets.to_bytes(4, "little") + bytes(100))
    return path


def able(*targets: str, backend: Backend = TRT) -> Capabilities:
    return Capabilities(
        backend, "11.1.0", frozenset(), False, StrongTyping.ALWAYS, targets, (), True, True, True, True, True
    )


def test_for_options_are_read() -> None:
    found = parse_for(["8.0=a.plan", "12.0=x=y.plan", "8.9"])
    assert found == {"8.0": Path("a.plan"), "12.0": Path("x=y.plan"), "8.9": None}


@pytest.mark.parametrize("text", ["a.plan", "8=a.plan", "8.0=", "=a", "8.x=a", "sm80=a", "8", ""])
def test_other_forms_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError, match="expected CAPABILITY=FILE or CAPABILITY"):
        parse_for([text])


def test_a_gpu_kind_given_twice_is_an_error() -> None:
    with pytest.raises(UsageError, match="twice"):
        parse_for(["8.0=a", "8.0"])


def test_plans_are_adopted_with_what_their_heads_say(tmp_path: Path) -> None:
    found = adopt_plans({"8.0": plan(tmp_path / "a"), "8.9": None, "9.0": plan(tmp_path / "b")}, TRT)
    assert {capability: (p.source, p.version) for capability, p in found.items()} == {
        "8.0": ("a", "11.1.0.5"),
        "9.0": ("b", "11.1.0.5"),
    }


def test_plans_of_different_versions_fit_no_one_server(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"8\.0: 11\.1\.0\.5, 9\.0: 10\.5\.0\.1"):
        adopt_plans({"8.0": plan(tmp_path / "a"), "9.0": plan(tmp_path / "b", version=(10, 5, 0, 1))}, TRT)


def test_a_plan_is_for_the_backend_and_the_gpu_that_it_is_given_for(tmp_path: Path) -> None:
    rtx = plan(tmp_path / "r", tag=b"vtrt", version=(1, 7, 1, 116), targets=0b1100)
    with pytest.raises(EngineError, match="TensorRT-RTX engine"):
        adopt_plans({"8.9": rtx}, TRT)
    with pytest.raises(EngineError, match="the backend is tensorrt_rtx"):
        adopt_plans({"8.9": plan(tmp_path / "a")}, RTX)
    with pytest.raises(EngineError, match=r"built for compute capability 8\.6, 8\.9, and given for 12\.0"):
        adopt_plans({"12.0": rtx}, RTX)
    assert adopt_plans({"8.9": rtx}, RTX)["8.9"].compute_capabilities == ("8.6", "8.9")
    with pytest.raises(UsageError, match="cannot be read"):
        adopt_plans({"8.0": tmp_path / "gone"}, TRT)


def test_a_plan_is_built_for_the_gpu_at_hand_only() -> None:
    gpu = Gpu("H100", "9.0", "1", 1)
    check_buildable("9.0", able(), [gpu])
    with pytest.raises(UsageError, match=r"here is 9\.0"):
        check_buildable("8.0", able(), [gpu])
    with pytest.raises(UsageError, match="here is none"):
        check_buildable("8.0", able(), [])


def test_tensorrt_rtx_builds_for_any_that_it_knows() -> None:
    check_buildable("8.9", able("8.6", "8.9", backend=RTX), [])
    with pytest.raises(UsageError, match=r"it builds for 8\.6, 8\.9") as caught:
        check_buildable("9.0", able("8.6", "8.9", backend=RTX), [])
    assert "--for 9.0=FILE" in str(caught.value.hint)


def test_onnxruntime_has_no_plans(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="onnxruntime backend has none"):
        build_artifact((tmp_path / "m.onnx",), Backend.ONNXRUNTIME, options=EngineOptions(plans={"8.0": None}))
