"""Triton's `tensorrt_rtx` backend for the embedded server (no repo_manager here: it runs in Triton's stub).

It shares the modules of the `tensorrt` backend, whose folder is beside this one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tensorrt"))

from rm_trt_model import EngineModel  # type: ignore[import-not-found]


class TritonPythonModel(EngineModel):  # type: ignore[misc]  # the type of its base is unknown here
    """One instance of one version of one model."""

    library_name = "tensorrt_rtx"
    default_file = "model.engine"

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Fill in missing fields of a configuration."""
        return TritonPythonModel.complete_config(auto_complete_model_config)
