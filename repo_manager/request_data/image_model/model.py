"""Encoded images (JPEG, PNG, ...) in, a model's input out. Written by `repo-manager add --preprocess`.

It runs in Triton's Python backend with NumPy and Pillow. The steps are in `recipe.json` beside it.
"""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from rm_pixels import ImageRecipe, UnreadableImage, pixels_of, typed  # type: ignore[import-not-found]  # beside it

try:
    import PIL.Image
except ImportError as exc:
    raise pb_utils.TritonModelException(
        "this model decodes images with Pillow, which the server's Python lacks: pip install pillow"
    ) from exc

# Pillow warns about images above 89 million pixels and rejects images of twice this size. Here the warning is an error.
warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)


class TritonPythonModel:
    """One instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the recipe and the configuration."""
        path = Path(args["model_repository"]) / args["model_version"] / "recipe.json"
        self._recipe = ImageRecipe.of(json.loads(path.read_text(encoding="utf-8")))
        config = json.loads(args["model_config"])
        (wanted,), (made,) = config["input"], config["output"]
        self._input, self._output = wanted["name"], made["name"]
        self._dtype = np.dtype(pb_utils.triton_string_to_numpy(made["data_type"]))
        self._has_batch = int(config["max_batch_size"]) > 0 or len(made["dims"]) == 1 + len(self._recipe.shape)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        given = pb_utils.get_input_tensor_by_name(request, self._input).as_numpy().reshape(-1)
        arrays = []
        for number, item in enumerate(given, start=1):
            try:
                pixels = pixels_of(PIL.Image, io.BytesIO(item), self._recipe)
            except (UnreadableImage, Warning) as exc:
                where = f"image {number} of {len(given)}" if len(given) > 1 else "the image"
                return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{where}: {exc}"))
            arrays.append(typed(pixels, self._dtype))
        made = np.stack(arrays) if self._has_batch else arrays[0]
        return pb_utils.InferenceResponse([pb_utils.Tensor(self._output, made)])
