"""Triton's `tensorrt` backend for the embedded server (no repo_manager here: it runs in Triton's stub)."""

from __future__ import annotations

from typing import Any

from rm_trt_model import EngineModel  # type: ignore[import-not-found]  # beside this file, in the stub's sys.path


class TritonPythonModel(EngineModel):  # type: ignore[misc]  # the type of its base is unknown here
    """One instance of one version of one model."""

    library_name = "tensorrt"
    default_file = "model.plan"

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Fill in missing fields of a configuration."""
        return TritonPythonModel.complete_config(auto_complete_model_config)
