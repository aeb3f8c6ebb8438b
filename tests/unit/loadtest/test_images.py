from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from repo_manager.errors import InputError, UsageError
from repo_manager.loadtest.inputs.samples import make_samples
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.request_data.tensors import InputFacts

NCHW = InputFacts("x", "FP32", (3, 4, 6))


def facts(*inputs, batch=8):
    return ServedModelFacts(
        "grpc://a:1", "grpc", "t", "1", "m", "1", "b", batch, inputs, ("y",), False, False, False, False
    )


def options(**changes):
    return LoadTestOptions(**{"url": "grpc://a:1", "model": "m", "concurrency": (1,), **changes})


@pytest.fixture
def folder(tmp_path):
    """Two pictures, one all (200, 100, 50) and one all white, and a file that is none."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    Image.new("RGB", (12, 8), (200, 100, 50)).save(folder / "a.png")
    Image.new("RGB", (30, 30), (255, 255, 255)).save(folder / "more" / "b.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_the_shape_says_size_and_layout_and_values_become_shares(folder):
    samples = make_samples(facts(NCHW), options(data=folder))
    assert [sample["x"].shape for sample in samples] == [(1, 3, 4, 6)] * 2
    assert samples[0]["x"].dtype == np.float32
    np.testing.assert_allclose(samples[0]["x"][0, :, 2, 3], np.array([200, 100, 50]) / 255, rtol=1e-5)
    assert samples[1]["x"].min() == pytest.approx(1)
    (nhwc, _) = make_samples(facts(InputFacts("x", "FP16", (4, 6, 3))), options(data=folder))
    assert nhwc["x"].shape == (1, 4, 6, 3)
    assert nhwc["x"].dtype == np.float16


def test_images_share_batches_and_dynamic_sizes_come_from_the_shapes(folder):
    dynamic = facts(InputFacts("x", "FP32", (3, -1, -1)))
    with pytest.raises(UsageError, match="size in pixels"):
        make_samples(dynamic, options(data=folder))
    samples = make_samples(dynamic, options(data=folder, shapes={"x": (3, 5, 7)}, batch_size=2))
    assert [sample["x"].shape for sample in samples] == [(2, 3, 5, 7)]
    without_batch = facts(InputFacts("x", "FP32", (-1, 3, 4, 6)), batch=0)
    assert make_samples(without_batch, options(data=folder / "a.png"))[0]["x"].shape == (1, 3, 4, 6)


@pytest.mark.parametrize(
    ("image", "values"),
    [
        ({"color": "bgr"}, np.array([50, 100, 200]) / 255),
        ({"scale": "1"}, [200, 100, 50]),
        ({"scale": "1", "mean": "100,50,0", "std": "2"}, [50, 25, 25]),
        ({"mean": "0.5", "std": "0.5,1,2", "scale": "0.01"}, [3, 0.5, 0]),
    ],
)
def test_options_normalise(folder, image, values):
    (sample,) = make_samples(facts(NCHW), options(data=folder / "a.png", image=image))
    np.testing.assert_allclose(sample["x"][0, :, 0, 0], values, atol=1e-5)


def test_resize_and_crop_keep_the_middle(tmp_path):
    picture = Image.new("L", (300, 100), 0)
    picture.paste(255, (100, 0, 200, 100))
    picture.save(tmp_path / "p.png")
    gray = facts(InputFacts("x", "UINT8", (1, 50, 50)))
    (cropped,) = make_samples(gray, options(data=tmp_path / "p.png", image={"resize": "50"}))
    (stretched,) = make_samples(gray, options(data=tmp_path / "p.png"))
    assert cropped["x"].dtype == np.uint8
    assert cropped["x"].mean() > 240
    assert 70 < stretched["x"].mean() < 100


@pytest.mark.parametrize(
    ("size", "resize", "left", "resized"),
    [
        ((5, 4), 4, 0, (5, 4)),  # half a pixel: to the even 0
        ((7, 4), 4, 2, (7, 4)),  # 1.5: to the even 2
        ((9, 4), 4, 2, (9, 4)),  # 2.5: to the even 2
        ((29, 8), 4, 5, (14, 4)),  # 14.5 wide, cut down
        ((31, 8), 4, 6, (15, 4)),  # 15.5 wide, cut down; 5.5 to the even 6
    ],
)
def test_resize_and_centre_crop_round_as_torchvision(tmp_path, size, resize, left, resized):
    """`int(size * long / short)` of its Resize, `int(round((width - crop_width) / 2.0))` of its CenterCrop."""
    for name, turned in (("wide", False), ("high", True)):
        ramp = np.tile(np.arange(size[0], dtype=np.uint8) * 8, (size[1], 1))
        picture = Image.fromarray(ramp.T.copy() if turned else ramp)
        picture.save(tmp_path / f"{name}.png")
        whole = np.asarray(picture.resize(resized[::-1] if turned else resized, Image.Resampling.BILINEAR))
        expected = whole[left : left + 4] if turned else whole[:, left : left + 4]
        gray = facts(InputFacts("x", "UINT8", (1, 4, 4)))
        (sample,) = make_samples(gray, options(data=tmp_path / f"{name}.png", image={"resize": str(resize)}))
        np.testing.assert_array_equal(sample["x"][0, 0], expected)


def test_a_recipe_beside_the_images_is_taken_and_options_go_over_it(folder):
    (folder / "calibration.yaml").write_text("size: [4, 6]\nscale: 1\nmean: [100, 100, 100]\n")
    samples = make_samples(facts(NCHW), options(data=folder))
    assert samples[0]["x"][0, 0, 0, 0] == 100
    samples = make_samples(facts(NCHW), options(data=folder, image={"mean": "0"}))
    assert samples[0]["x"][0, 0, 0, 0] == 200
    (folder / "calibration.yaml").write_text("size: [4, 7]\n")
    with pytest.raises(UsageError, match=r"3, 4, 7"):
        make_samples(facts(NCHW), options(data=folder))


@pytest.mark.parametrize(
    ("inputs", "image", "words"),
    [
        ((NCHW, NCHW), {}, "has 2"),
        ((InputFacts("x", "FP32", (10,)),), {}, "no image's"),
        ((InputFacts("x", "FP32", (5, 4, 4)),), {}, "channels"),
        ((NCHW,), {"size": "3"}, "unknown"),
        ((NCHW,), {"mean": "a"}, "3 numbers"),
        ((NCHW,), {"mean": "1,2"}, "3 numbers"),
        ((NCHW,), {"std": "0"}, "must not hold 0"),
        ((NCHW,), {"resize": "3"}, "at least 6"),
        ((NCHW,), {"color": "cmyk"}, "expected one of"),
        ((NCHW,), {"color": "gray"}, "takes"),
        ((NCHW,), {"layout": "chw"}, "nchw, nhwc"),
    ],
)
def test_what_does_not_fit_is_said(folder, inputs, image, words):
    with pytest.raises((UsageError, InputError), match=words):
        make_samples(facts(*inputs), options(data=folder, image=image))


def test_no_image_and_a_broken_one(tmp_path):
    with pytest.raises(InputError, match="no image found"):
        make_samples(facts(NCHW), options(data=tmp_path))
    (tmp_path / "x.png").write_bytes(b"no png")
    with pytest.raises(InputError, match=r"x\.png"):
        make_samples(facts(NCHW), options(data=tmp_path))
    with pytest.raises(UsageError, match="there are none"):
        make_samples(facts(NCHW), options(image={"color": "rgb"}))


def png(width: int, height: int) -> bytes:
    """A grey picture of a thousandth of its pixels."""
    ihdr = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = zlib.compress(bytes(width + 1) * height, 1)
    chunks = ((b"IHDR", ihdr), (b"IDAT", content), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize(
    ("size", "image", "text"),
    [
        ((10_000, 10_000), {}, r"10000 x 10000 pixels, and at most 89,478,485"),
        ((1, 2_000_000), {"resize": "256"}, r"resized, it has 256 x 512000000 pixels"),
        ((8, 8), {"resize": "100000"}, r"resized, it has 100000 x 100000 pixels"),
    ],
)
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, size, image, text):
    (tmp_path / "bomb.png").write_bytes(png(*size))
    with pytest.raises(InputError, match=text):
        make_samples(facts(NCHW), options(data=tmp_path, image=image))
