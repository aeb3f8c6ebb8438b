"""Triton's protobuf messages of a model's configuration, without the rest of `tritonclient`.

`tritonclient.grpc` imports gRPC and NumPy before its generated module, which is all a command needs to read a
config.pbtxt. The generated module is loaded from its file under its own name: when a client imports
`tritonclient.grpc` later in the process, it finds this module, so the message types exist once.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

from repo_manager.errors import MissingDependencyError

if TYPE_CHECKING:
    from tritonclient.grpc import model_config_pb2

__all__ = ["is_repeated", "model_config_pb2"]

_NAME = "tritonclient.grpc.model_config_pb2"


def is_repeated(descriptor: object) -> bool:
    """Return whether a field of any message, of `onnx` as well, may have several values."""
    # Newer releases of protobuf have `is_repeated` and deprecate `label` (protobuf.dev/news/2025-07-14).
    repeated = getattr(descriptor, "is_repeated", None)
    return bool(repeated) if repeated is not None else getattr(descriptor, "label", None) == 3


def _load() -> None:
    """Put the generated module in `sys.modules`.

    Raises:
        MissingDependencyError: `tritonclient` is not installed, or has no such file.
    """
    package = importlib.util.find_spec("tritonclient.grpc")
    folders = package.submodule_search_locations if package is not None else None
    for folder in folders or ():
        spec = importlib.util.spec_from_file_location(_NAME, f"{folder}/model_config_pb2.py")
        if spec is None or spec.loader is None:
            continue
        module = importlib.util.module_from_spec(spec)
        sys.modules[_NAME] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[_NAME]
            raise
        return
    raise MissingDependencyError(
        "tritonclient.grpc has no model_config_pb2", hint="Install it with: pip install 'tritonclient[grpc,http]'"
    )


if not TYPE_CHECKING:
    if _NAME not in sys.modules:
        _load()
    model_config_pb2 = sys.modules[_NAME]
