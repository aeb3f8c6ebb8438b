"""`add --preprocess`: one recipe for calibration, load tests and serving, and an ensemble for image files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import PIL.Image
import pytest
from onnx import TensorProto, helper

from repo_manager.errors import CalibrationError, InputError, RepositoryError, ServerRefusedError, UsageError
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.signature import signature_of
from repo_manager.pipeline.infer import InferOptions, infer
from repo_manager.pipeline.preprocessing import add_with_images
from repo_manager.precision import load_calibration
from repo_manager.repository.golden import read_golden
from repo_manager.repository.scan import find_model
from repo_manager.repository.verify import verify
from repo_manager.rollout.deploy import deploy
from repo_manager.server.client import TritonClient
from repo_manager.server.embedded import EmbeddedServer

pytestmark = [pytest.mark.integration, pytest.mark.slow]
AUTO_COMPLETE = False
RECIPE = "size: [12, 16]\nresize: 20\ncolor: bgr\nlayout: {}\nscale: 1.0\nmean: [100, 110, 120]\nstd: [50, 60, 70]\n"


def write_model(path: Path, shape: list[int | str], element: int = TensorProto.FLOAT) -> Path:
    """Write a model with the sums over each axis but the first, so every wrong pixel shows."""
    axes = onnx.numpy_helper.from_array(np.array(range(1, len(shape)), np.int64), "axes")
    nodes = [
        helper.make_node("Cast", ["pixels"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["real", "axes"], ["mean"], keepdims=0),
        helper.make_node("ReduceMax", ["real", "axes"], ["most"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info("pixels", element, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape[:1]) for name in ("mean", "most")],
        [axes],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(5)
    for number, (width, height) in enumerate([(40, 30), (21, 60), (16, 12), (33, 33)]):
        pixels = rng.integers(0, 255, (height // 3, width // 3, 3), np.uint8)
        image = PIL.Image.fromarray(pixels).resize((width, height))
        image.save(folder / f"{number}.{'jpg' if number % 2 else 'png'}")
    (folder / "calibration.yaml").write_text(RECIPE.format("nchw"))
    return folder


def test_images_are_served_as_calibration_reads_them(
    images: Path, repository: Path, server: EmbeddedServer, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "net.onnx", ["N", 3, 12, 16])
    recipe = images / "calibration.yaml"
    made = add_with_images(model, "net", repository, recipe)
    assert made.preprocess is not None
    assert made.ensemble is not None
    assert [each.name for each in made.beside] == ["net_preprocess", "net_ensemble"]
    assert made.ensemble.added.golden == "embedded server"
    assert verify(repository) == ()

    golden = read_golden(repository / "net_preprocess" / "1" / "golden.npz")
    read = list(load_calibration(recipe, signature_of(load_model(model))).batches())
    for exchange, sample in zip(golden.exchanges, read, strict=False):
        np.testing.assert_array_equal(exchange.responses[0]["pixels"], sample["pixels"])

    with TritonClient.connect(server.grpc_url) as client:
        assert deploy(repository, "net_ensemble", 1, client).ready == (1,)
        broken = np.array([[b"no image"]], object)
        with pytest.raises(ServerRefusedError, match="the image: cannot be read as an image: its format is not known"):
            client.infer("net_ensemble", None, {"IMAGE": broken})
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    shutil.copy(images / "0.png", mixed)
    (mixed / "1.png").write_bytes(b"no image")
    for data, place in ((mixed, "mixed, request 2 of 2: "), (mixed / "1.png", "1.png: ")):
        with pytest.raises(ServerRefusedError, match=f"{place}grpc://.*the image: cannot be read as an image"):
            infer(repository, "net_ensemble", to=server.grpc_url, options=InferOptions(data=str(data)))
    served = infer(repository, "net_ensemble", to=server.grpc_url, options=InferOptions(data=str(images)))
    apart = infer(repository, "net", to=server.grpc_url, options=InferOptions(data=str(images)))
    for one, other in zip(served.answers, apart.answers, strict=True):
        np.testing.assert_array_equal(one.outputs["most"], other.outputs["most"])
    with pytest.raises(UsageError, match="takes images as their files hold them"):
        infer(
            repository,
            "net_ensemble",
            to=server.grpc_url,
            options=InferOptions(data=str(images), image={"scale": "1"}),
        )

    again = add_with_images(model, "net", repository, recipe)
    assert (again.added.version, again.preprocess) == (2, None)
    assert again.ensemble is not None
    manifest = find_model(repository, "net_ensemble").version(2).manifest
    assert manifest is not None
    assert manifest.golden["parts"] == {"net": 2, "net_preprocess": 1}


def test_whole_numbers_without_batches_in_nhwc(images: Path, repository: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "calibration.yaml"
    recipe.write_text(f"size: [12, 16]\nlayout: nhwc\nscale: 0.5\nfolder: {images}\n")
    model = write_model(tmp_path / "whole.onnx", [1, 12, 16, 3], TensorProto.UINT8)
    made = add_with_images(model, "whole", repository, recipe)
    assert made.ensemble is not None
    exchange = read_golden(repository / "whole_preprocess" / "1" / "golden.npz").exchanges[0]
    assert exchange.inputs["IMAGE"].shape == (1,)
    assert (exchange.responses[0]["pixels"].dtype, exchange.responses[0]["pixels"].shape) == (np.uint8, (1, 12, 16, 3))
    written = json.loads((repository / "whole_preprocess" / "1" / "recipe.json").read_text())
    assert (written["layout"], written["scale"]) == ("nhwc", 0.5)


def test_what_does_not_fit_leaves_nothing(images: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "net.onnx", ["N", 3, 12, 16])
    recipe = tmp_path / "calibration.yaml"
    recipe.write_text("size: [12, 16]\n")
    with pytest.raises(InputError, match="holds no images to prove the preprocessing on"):
        add_with_images(model, "net", tmp_path / "models", recipe)
    recipe.write_text(f"size: [16, 12]\nfolder: {images}\n")
    with pytest.raises(CalibrationError, match=r"come out as \[3, 16, 12\]"):
        add_with_images(model, "net", tmp_path / "models", recipe)
    assert not (tmp_path / "models").exists()


def test_a_later_step_that_fails_says_what_is_published(images: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    other = repository / "net_ensemble"
    (other / "1").mkdir(parents=True)
    (other / "config.pbtxt").write_text('backend: "python"\nmax_batch_size: 0\n')
    model = write_model(tmp_path / "net.onnx", ["N", 3, 12, 16])
    with pytest.raises(RepositoryError, match="the model 'net_ensemble' exists and is another one") as failed:
        add_with_images(model, "net", repository, images / "calibration.yaml")
    assert failed.value.message.endswith("net:1 and net_preprocess:1 are published already, and no server serves them")
    assert "repo-manager remove net:1, repo-manager remove net_preprocess:1" in (failed.value.hint or "")
    assert [each.version for each in find_model(repository, "net").versions] == [1]
