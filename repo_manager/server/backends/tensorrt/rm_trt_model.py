"""Triton's `tensorrt` and `tensorrt_rtx` on top of its Python backend (no repo_manager here: it runs in Triton's stub).

For the embedded server on a machine with a GPU. NVIDIA's container serves the same repository with its native backend.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from rm_trt_cuda import Cuda, CudaError  # type: ignore[import-not-found]  # beside this file, in the stub's sys.path
from rm_trt_engine import Engine, import_library  # type: ignore[import-not-found]
from rm_trt_shapes import Mismatch, check, complete, plan_filename  # type: ignore[import-not-found]

Array = np.ndarray[Any, Any]


def open_engine(library_name: str, default_file: str, folder: Path, config: dict[str, Any], device: int) -> Engine:
    """Load a version's engine.

    Args:
        library_name: name of the module, `tensorrt` or `tensorrt_rtx`.
        default_file: file name without one in the configuration.
        folder: the version's folder. `config` or `default_file` names the plan in it.
        config: configuration of the model, as parsed JSON.
        device: number of the GPU the engine runs on, from 0.

    Raises:
        TritonModelException: no GPU, no library, or an unfit plan. In words for the user.
    """
    try:
        cuda = Cuda(device)
        library = import_library(library_name)
        path = folder / plan_filename(config, cuda.compute_capability(), default_file)
        return Engine(library, path, cuda)
    except CudaError as exc:
        raise pb_utils.TritonModelException(
            f"the {library_name} backend needs an NVIDIA GPU: {exc}. Serve this model on a machine that has one, or "
            "add it again with --backend onnxruntime."
        ) from None
    except Mismatch as exc:
        raise pb_utils.TritonModelException(f"{library_name}: {exc}") from None


class EngineModel:
    """One instance of one version. The two backends name the library and the file."""

    library_name = ""
    default_file = ""

    @classmethod
    def complete_config(cls, auto_complete_model_config: Any) -> Any:
        """Fill in inputs, outputs and batching where the configuration leaves them out."""
        config = auto_complete_model_config.as_dict()
        if not (config.get("input") and config.get("output")):
            engine = open_engine(cls.library_name, cls.default_file, Path(pb_utils.get_model_dir()), config, 0)
            complete(config, engine.tensors, engine.profiles)
            engine.close()
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine and check the configuration against it."""
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        device = int(args["model_instance_device_id"] or 0)
        self._engine = open_engine(self.library_name, self.default_file, folder, config, device)
        try:
            check(config, self._engine.tensors, self._engine.profiles)
        except Mismatch as exc:
            raise pb_utils.TritonModelException(str(exc)) from None
        self._batched = int(config.get("max_batch_size", 0)) > 0
        self._outputs = [entry["name"] for entry in config["output"]]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request: with its outputs or with its own error."""
        responses: list[Any] = [None] * len(requests)
        groups: dict[tuple[Any, ...], list[int]] = {}
        feeds: dict[int, dict[str, Array]] = {}
        for index, request in enumerate(requests):
            try:
                feeds[index] = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                groups.setdefault(self._key(index, feeds[index]), []).append(index)
            except Exception as exc:  # noqa: BLE001 - a fault of one request becomes the error of this request
                responses[index] = _error(exc)
        for members in groups.values():
            for index, response in self._run(members, feeds):
                responses[index] = response
        return responses

    def finalize(self) -> None:
        """Free the GPU's memory."""
        self._engine.close()

    def _key(self, index: int, feed: dict[str, Array]) -> tuple[Any, ...]:
        """Return the key requests must share to run as one. Without batching each is alone."""
        if not self._batched:
            return (index,)
        return tuple((name, array.shape[1:]) for name, array in sorted(feed.items()))

    def _run(self, members: list[int], feeds: dict[int, dict[str, Array]]) -> list[tuple[int, Any]]:
        first = feeds[members[0]]
        try:
            outputs = self._engine.run({name: [feeds[index][name] for index in members] for name in first})
        except Exception as exc:  # noqa: BLE001 - see execute
            if len(members) == 1:
                return [(members[0], _error(exc))]
            # If the joined run fails, run each request alone: a bad request must not fail the others.
            return [pair for index in members for pair in self._run([index], feeds)]
        responses, start = [], 0
        for index in members:
            end = start + (next(iter(feeds[index].values())).shape[0] if self._batched else 0)
            parts = {name: outputs[name][start:end] if self._batched else outputs[name] for name in self._outputs}
            # Copied: the next batch overwrites the engine's memory.
            tensors = [pb_utils.Tensor(name, np.array(part)) for name, part in parts.items()]
            responses.append((index, pb_utils.InferenceResponse(tensors)))
            start = end
        return responses


def _error(exc: Exception) -> Any:
    """Return a response with the reason."""
    message = str(exc) or type(exc).__name__
    code = pb_utils.TritonError.INVALID_ARG if "INVALID_ARGUMENT" in message else pb_utils.TritonError.INTERNAL
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"tensorrt error: {message}", code))
