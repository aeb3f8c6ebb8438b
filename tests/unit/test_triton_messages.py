"""Triton's message types come without gRPC, and exist once in a process, whoever imports them first."""

from __future__ import annotations

import subprocess
import sys

import pytest

OURS = "from repo_manager.triton_messages import model_config_pb2 as ours\n"
THEIRS = "import tritonclient.grpc as client\nfrom tritonclient.grpc import service_pb2\n"
SAME = "assert ours is client.model_config_pb2\n"
SAME += "assert type(service_pb2.ModelConfigResponse().config) is ours.ModelConfig"


def run(code: str) -> str:
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_reading_a_configuration_imports_neither_grpc_nor_numpy() -> None:
    read = "from repo_manager.triton_config.config import parse_config\nparse_config('name: \"m\"')\n"
    heavy = "import sys\nprint([name for name in ('grpc', 'numpy', 'ml_dtypes') if name in sys.modules])"
    assert run(read + heavy).strip() == "[]"


@pytest.mark.parametrize("order", [OURS + THEIRS, THEIRS + OURS], ids=["ours first", "client first"])
def test_a_client_has_the_same_types(order: str) -> None:
    run(order + SAME)
