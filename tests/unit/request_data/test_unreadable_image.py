"""Images that cannot be read: the error has no address of an object in memory."""

from __future__ import annotations

import io
from pathlib import Path

import PIL.Image
import pytest

from repo_manager.request_data.image_model.rm_pixels import ImageRecipe, UnreadableImage, pixels_of

RECIPE = ImageRecipe((2, 2), None, "nchw", "rgb", 1.0, (0.0,), (1.0,))


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_content_of_no_known_format(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(content)
    for image in (io.BytesIO(content), file):
        with pytest.raises(UnreadableImage) as raised:
            pixels_of(PIL.Image, image, RECIPE)
        assert str(raised.value) == "cannot be read as an image: its format is not known"
