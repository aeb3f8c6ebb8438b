from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from repo_manager.errors import CalibrationError, MissingDependencyError
from repo_manager.onnx_model.signature import Signature
from repo_manager.optional import is_installed
from repo_manager.precision import load_calibration
from repo_manager.precision.calibration.images import read_recipe
from repo_manager.types import TensorSpec


def signature(*specs: TensorSpec) -> Signature:
    return Signature(specs, (), 17, 8, {"": 17})


IMAGE = signature(TensorSpec("x", "float32", ("N", 3, 4, 4)))
FIXED = signature(TensorSpec("x", "float32", (2, 3)))
TWO = signature(TensorSpec("ids", "int64", ("N", 5)), TensorSpec("rate", "float32", ()))


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def refused(path: object, sig: Signature, *said: str, min_samples: int = 4) -> None:
    with pytest.raises(CalibrationError) as caught:
        load_calibration(path, sig, min_samples=min_samples)
    for text in said:
        assert text in str(caught.value)
    assert caught.value.exit_code == 3


def test_npz_rows_of_a_dynamic_batch_are_samples(tmp_path):
    data = floats(6, 3, 4, 4)
    np.savez(tmp_path / "c.npz", x=data)
    loaded = load_calibration(tmp_path / "c.npz", IMAGE)
    assert (loaded.count, loaded.names) == (6, ("x",))
    np.testing.assert_array_equal(np.concatenate([s["x"] for s in loaded.batches()]), data)
    assert len(list(loaded.batches())) == 6  # anew each time


def test_npz_of_a_fixed_batch_goes_by_that_many_rows(tmp_path):
    np.savez(tmp_path / "c.npz", x=floats(8, 3))
    loaded = load_calibration(tmp_path / "c.npz", FIXED)
    assert [s["x"].shape for s in loaded.batches()] == [(2, 3)] * 4


def test_npz_with_an_axis_of_samples_in_front(tmp_path):
    np.savez(tmp_path / "c.npz", ids=np.zeros((4, 2, 5), np.int64), rate=floats(4))
    samples = list(load_calibration(tmp_path / "c.npz", TWO).batches())
    assert [s["ids"].shape for s in samples] == [(2, 5)] * 4
    assert samples[0]["rate"].shape == ()


def test_digest_depends_on_values_alone(tmp_path):
    data = floats(4, 3, 4, 4)
    np.savez(tmp_path / "a.npz", x=data)
    np.savez_compressed(tmp_path / "b.npz", x=data)
    np.savez(tmp_path / "c.npz", x=data + 1)
    a, b, c = (load_calibration(tmp_path / name, IMAGE).digest for name in ("a.npz", "b.npz", "c.npz"))
    assert a == b != c


def test_folder_with_one_file_an_input(tmp_path):
    np.save(tmp_path / "ids.npy", np.zeros((5, 1, 5), np.int64))
    np.save(tmp_path / "rate.npy", floats(5))
    assert load_calibration(tmp_path, TWO).count == 5


def test_folder_with_a_folder_an_input(tmp_path):
    for index in range(4):
        for name, array in (("ids", np.full((1, 5), index)), ("rate", np.float32(index))):
            (tmp_path / name).mkdir(exist_ok=True)
            np.save(tmp_path / name / f"{index:03}.npy", array)
    assert [float(s["rate"]) for s in load_calibration(tmp_path, TWO).batches()] == [0, 1, 2, 3]


def test_folder_of_loose_samples_without_batch_axis(tmp_path):
    for index in range(4):
        np.save(tmp_path / f"picture{index}.npy", floats(3, 4, 4))
    assert [s["x"].shape for s in load_calibration(tmp_path, IMAGE).batches()] == [(1, 3, 4, 4)] * 4


def test_folder_names_of_inputs_with_slashes(tmp_path):
    np.save(tmp_path / "serving_x_0.npy", floats(4, 3))
    sig = signature(TensorSpec("serving/x:0", "float32", ("N", 3)))
    assert load_calibration(tmp_path, sig).names == ("serving/x:0",)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"y": floats(4, 3, 4, 4)}, ["no data for 'x'", "no such input: 'y'"]),
        ({"x": floats(4, 3, 4, 4), "z": floats(1)}, ["no such input: 'z'"]),
        ({"x": floats(4, 3, 4, 4).astype(np.float64)}, ["float64", "float32", "astype"]),
        ({"x": floats(4, 3, 5, 4)}, ["[1, 3, 5, 4]", "x: float32[N, 3, 4, 4]"]),
        ({"x": floats(4, 3)}, ["[4, 3]", "x: float32[N, 3, 4, 4]"]),
        ({"x": np.where(floats(4, 3, 4, 4) > 2, np.nan, floats(4, 3, 4, 4)).astype(np.float32)}, ["NaN"]),
        ({"x": np.full((4, 3, 4, 4), np.inf, np.float32)}, ["sample 1", "infinite"]),
        ({"x": floats(2, 3, 4, 4)}, ["2 samples", "at least 4"]),
        ({"x": floats(0, 3, 4, 4)}, ["0 samples"]),
        ({"x": np.float32(1)}, ["without an axis"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_file(tmp_path, arrays, said):
    np.savez(tmp_path / "c.npz", **arrays)
    refused(tmp_path / "c.npz", IMAGE, str(tmp_path / "c.npz"), *said)


def test_inputs_with_different_numbers_of_samples(tmp_path):
    np.savez(tmp_path / "c.npz", ids=np.zeros((4, 1, 5), np.int64), rate=floats(5))
    refused(tmp_path / "c.npz", TWO, "'ids' 4", "'rate' 5")


def test_the_bad_file_of_a_folder_is_named(tmp_path):
    for index in range(4):
        np.save(tmp_path / f"s{index}.npy", floats(3, 4, 4) if index != 2 else floats(3, 4, 4).astype(np.float16))
    refused(tmp_path, IMAGE, "s2.npy", "float16")


class _Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_pickles_are_never_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("c.npz", x=np.array([_Bomb()], dtype=object))
    np.save("d.npy", np.array([_Bomb()], dtype=object))
    refused(tmp_path / "c.npz", IMAGE, "c.npz", "pickled")
    (tmp_path / "folder").mkdir()
    (tmp_path / "d.npy").rename(tmp_path / "folder" / "d.npy")
    refused(tmp_path / "folder", IMAGE, "d.npy", "pickled")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "e.npy").write_bytes(pickle.dumps(_Bomb()))
    refused(tmp_path / "raw", IMAGE, "e.npy")
    (tmp_path / "raw.npz").write_bytes(pickle.dumps(_Bomb()))
    refused(tmp_path / "raw.npz", IMAGE, "raw.npz")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"hello"])
def test_broken_files_are_refused(tmp_path, content):
    (tmp_path / "c.npz").write_bytes(content)
    refused(tmp_path / "c.npz", IMAGE, "c.npz")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.npy").write_bytes(content)
    refused(tmp_path / "f", IMAGE, "a.npy")


def test_what_is_not_there_says_what_can_be_given(tmp_path):
    refused(tmp_path / "nothing", IMAGE, "there is no such calibration data", "module:function")
    (tmp_path / "c.csv").write_text("1,2")
    refused(tmp_path / "c.csv", IMAGE, "not a format")


def test_an_empty_folder(tmp_path):
    refused(tmp_path, IMAGE, "no .npy file", "'x.npy'")


@pytest.fixture
def module(tmp_path, monkeypatch):
    def write(body: str) -> str:
        (tmp_path / "calibration_of_test.py").write_text("import numpy as np\n" + body)
        monkeypatch.chdir(tmp_path)
        monkeypatch.delitem(sys.modules, "calibration_of_test", raising=False)
        return "calibration_of_test:samples"

    yield write
    sys.modules.pop("calibration_of_test", None)


def test_entry_point(module):
    name = module("def samples():\n    for i in range(5):\n        yield {'x': np.zeros((1, 3, 4, 4), np.float32)}\n")
    path = list(sys.path)
    assert load_calibration(name, IMAGE).count == 5
    assert sys.path == path


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def other(): pass\n", "AttributeError"),
        ("def samples():\n    raise OSError('no disk')\n", "no disk"),
        ("def samples():\n    yield 3\n", "sample 1 is int"),
        ("def samples():\n    yield {'x': np.zeros(3, np.float32)}\n", "sample 1"),
        ("def samples():\n    return []\n", "0 samples"),
    ],
)
def test_bad_entry_points(module, body, said):
    refused(module(body), IMAGE, said)


RECIPE = "size: [4, 4]\nresize: 8\nmean: [0.5, 0.5, 0.5]\nstd: [0.5, 0.5, 0.5]\n"


def test_recipe(tmp_path):
    (tmp_path / "calibration.yaml").write_text(RECIPE)
    recipe = read_recipe(tmp_path / "calibration.yaml")
    assert (recipe.size, recipe.resize, recipe.layout, recipe.color, recipe.scale) == (
        (4, 4),
        8,
        "nchw",
        "rgb",
        1 / 255,
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a mapping is needed"),
        ("size: [4", "YAML"),
        ("mean: 0", "size is missing"),
        ("size: [4, 4]\ncolour: rgb", "unknown key 'colour'"),
        ("size: [4, 4]\nlayout: hwc", "nchw, nhwc"),
        ("size: [4, 4]\nmean: [1, 2]", "3 numbers"),
        ("size: [4, 4]\nstd: 0", "std holds 0"),
        ("size: [4, 4]\nresize: 2", "at least 4"),
        ("size: big", "2 numbers"),
        ("!!python/object/apply:os.system ['true']", "YAML"),
    ],
)
def test_bad_recipes(tmp_path, text, said):
    (tmp_path / "calibration.yaml").write_text(text)
    refused(tmp_path, IMAGE, said, "calibration.yaml")


def test_images_without_their_yaml_name_the_file_that_is_missing(tmp_path):
    (tmp_path / "1.png").touch()
    refused(tmp_path, IMAGE, "holds images and no calibration.yaml")


def test_images(tmp_path):
    (tmp_path / "calibration.yaml").write_text(RECIPE)
    if not is_installed("PIL"):
        with pytest.raises(MissingDependencyError, match="images"):
            load_calibration(tmp_path, IMAGE)
        return
    from PIL import Image

    for index in range(4):
        Image.new("RGB", (10, 20), (255, 0, index)).save(tmp_path / f"{index}.png")
    samples = list(load_calibration(tmp_path, IMAGE).batches())
    assert samples[0]["x"].shape == (1, 3, 4, 4)
    np.testing.assert_allclose(samples[0]["x"][0, :, 0, 0], [1, -1, -1], atol=1e-6)
    (tmp_path / "9.png").write_bytes(b"no image")
    refused(tmp_path, IMAGE, "9.png")


def test_samples_in_turn_do_not_all_end_in_one_part(tmp_path):
    """One of each of four classes in turn: every fourth sample would be of the same class."""
    np.savez(tmp_path / "c.npz", x=np.repeat(np.arange(4 * 16, dtype=np.float32), 48).reshape(-1, 3, 4, 4))
    loaded = load_calibration(tmp_path / "c.npz", IMAGE)
    rest, held_out = loaded.split()
    numbers = [[int(sample["x"][0, 0, 0, 0]) for sample in part.batches()] for part in (rest, held_out)]
    assert {number % 4 for number in numbers[1]} == {0, 1, 2, 3}
    assert [number // 4 for number in numbers[1]] == list(range(16))  # spread over the whole
    assert sorted(numbers[0] + numbers[1]) == list(range(64))
    again = loaded.split()
    assert [int(sample["x"][0, 0, 0, 0]) for sample in again[1].batches()] == numbers[1]


def test_equal_samples_are_never_in_both_parts(tmp_path):
    """Recorded requests repeat. A copy of a calibration sample proves nothing as a judge."""
    kinds = np.random.default_rng(3).integers(20, size=80).astype(np.float32)
    np.savez(tmp_path / "c.npz", x=np.repeat(kinds, 48).reshape(-1, 3, 4, 4))
    loaded = load_calibration(tmp_path / "c.npz", IMAGE)
    rest, held_out = loaded.split()
    kept, judged = ([float(sample["x"][0, 0, 0, 0]) for sample in part.batches()] for part in (rest, held_out))
    assert not set(kept) & set(judged)
    assert len(judged) == len(set(judged)) == 5
    np.savez(tmp_path / "few.npz", x=np.repeat(kinds % 15, 48).reshape(-1, 3, 4, 4))
    assert load_calibration(tmp_path / "few.npz", IMAGE).split() is None  # 15 different ones
