"""`add --preprocess`: a model, another one that makes its input of images, and an ensemble of both, proven on
images."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repo_manager.engine.build_log import BuildProgress
from repo_manager.errors import CalibrationError, GateError, InputError, RepoManagerError, ServerError
from repo_manager.files import sha256_file, work_folder
from repo_manager.onnx_model.model import load_model
from repo_manager.onnx_model.signature import Signature, signature_of
from repo_manager.optional import require
from repo_manager.pipeline.adding import Added, AddOptions, add
from repo_manager.pipeline.adding_files import AddedFiles, FilesOptions, add_files
from repo_manager.pipeline.ensembling import MadeEnsemble, make_ensemble
from repo_manager.pipeline.recording import EmbeddedRun, RunOptions
from repo_manager.precision.calibration.images import images_in, input_of, read_image, read_recipe
from repo_manager.repository.configuration import read_config_bytes
from repo_manager.repository.golden import Exchange
from repo_manager.repository.location import Location, LocationLike, as_location
from repo_manager.repository.scan import find_model
from repo_manager.request_data import image_model
from repo_manager.request_data.image_model.rm_pixels import ImageRecipe, typed
from repo_manager.request_data.tensors import NUMPY_OF_TRITON
from repo_manager.rollout.comparison import compare_outputs
from repo_manager.sources import Source, open_source
from repo_manager.summary import Summarized
from repo_manager.triton_config.config import CONFIG_FILENAME, ModelConfig, format_config, parse_config
from repo_manager.triton_messages import model_config_pb2
from repo_manager.types import StrPath

__all__ = ["AddedWithImages", "ImageModels", "add_with_images"]

Array = NDArray[Any]
Report = Callable[[str], None]
_MOST_IMAGES = 4
_IMAGE = "IMAGE"
_RECIPE = "recipe.json"
_CODE = ("model.py", "rm_pixels.py")


@dataclasses.dataclass(frozen=True, repr=False)
class AddedWithImages(Summarized):
    """The result of `add_with_images`.

    Attributes:
        added: result of adding the main model.
        preprocess: the model from encoded images to its input. `None`: the newest version does it already.
        ensemble: both as one. `None` with `dry_run`.
        images: the image files of the proof.
    """

    added: Added
    preprocess: AddedFiles | None
    ensemble: MadeEnsemble | None
    images: tuple[Path, ...]

    @property
    def beside(self) -> tuple[AddedFiles, ...]:
        """The models published beside it."""
        ensemble = None if self.ensemble is None else self.ensemble.added
        return tuple(each for each in (self.preprocess, ensemble) if each is not None)

    def _summary(self) -> Mapping[str, Any]:
        made = self.ensemble
        name = None if made is None else f"{made.added.name}:{made.added.version}"
        return {"model": f"{self.added.name}:{self.added.version}", "takes images": name}


@dataclasses.dataclass(frozen=True)
class ImageModels:
    """Images, and the recipe from image to input.

    Attributes:
        recipe: the steps from an image to an input.
        images: image files for the proof.
    """

    recipe: ImageRecipe
    images: tuple[Path, ...]

    @classmethod
    def read(cls, path: Path, signature: Signature) -> ImageModels:
        """Read the YAML file, and check it against the model, and for images.

        Raises:
            CalibrationError: the file does not fit the model.
            InputError: there are no images.
        """
        recipe = read_recipe(path)
        spec = input_of(recipe, signature, path)
        shape = spec.shape
        if shape is not None:
            expected = recipe.shape
            sizes = [size if isinstance(size, int) else -1 for size in shape[-3:]]
            if len(shape) not in (3, 4) or any(a not in (-1, b) for a, b in zip(sizes, expected, strict=True)):
                raise CalibrationError(
                    f"{path}: images come out as {list(expected)} ({recipe.layout}, {recipe.color}), and the input "
                    f"{spec} takes another shape",
                    hint="Change size, layout or color.",
                )
        files = images_in(recipe.folder)
        if not files:
            raise InputError(
                f"{recipe.folder} holds no images to prove the preprocessing on",
                hint=f"Put a few there, or name their folder in {path}: folder: PATH",
            )
        step = max(1, len(files) // _MOST_IMAGES)
        return cls(recipe, tuple(files[::step][:_MOST_IMAGES]))

    def prepared(self, dtype: np.dtype[Any]) -> list[Array]:
        """Return the model's input for each image, `[1, C, H, W]` or `[1, H, W, C]`."""
        pillow = require("PIL.Image")
        return [typed(read_image(pillow, file, self.recipe), dtype) for file in self.images]


def add_with_images(
    path: StrPath | Source,
    name: str,
    repository: LocationLike,
    preprocess: StrPath,
    options: AddOptions | None = None,
    *,
    report: Report = lambda _: None,
    progress: BuildProgress | None = None,
    cancelled: threading.Event | None = None,
) -> AddedWithImages:
    """Publish a model, `NAME_preprocess` for the way from encoded images to its input, and `NAME_ensemble` of both.

    The preprocessing model runs the code for calibration images, with the recipe of the same YAML file. Both new
    models run on an embedded server before they are published: the preprocessing must give exactly the values
    calibration reads, and the ensemble the model's answers to them.

    Args:
        path: an ONNX file with one input, an image. As `add`.
        name: name of the main model. The others get `NAME_preprocess` and `NAME_ensemble`.
        repository: the model repository: a folder, or a URL of object storage.
        preprocess: the YAML file with the recipe from image to input. Its folder holds images.
        options: settings of the conversion and of the version. `None`: the defaults.
        report: called with one line per step.
        progress: called with each step of an engine build, in the building thread. `None`: nothing is reported.
        cancelled: set it from another thread to stop the build. `None`: the build cannot be stopped.

    Raises:
        CalibrationError: the YAML is wrong or does not fit the model, or an image cannot be read.
        GateError: an answer differs, or as `add`. Versions published before it stay, and the error names them.
    """
    repository, options = as_location(repository), options or AddOptions()
    with open_source(path, report) as source:
        found = ImageModels.read(Path(preprocess), signature_of(load_model(source.path)))
        added = add(source, name, repository, options, report=report, progress=progress, cancelled=cancelled)
    if options.dry_run:
        return AddedWithImages(added, None, None, found.images)
    preprocess_name = f"{name}_preprocess"
    published = [f"{name}:{added.version}"]
    with _says_published(published):
        wanted = _Wanted.of(repository, name, found.recipe)
        first = _add_preprocess(preprocess_name, repository, found, wanted, Path(preprocess).name, report)
        if first is not None:
            published.append(f"{preprocess_name}:{first.version}")
        parts = {name: added.version, preprocess_name: find_model(repository, preprocess_name).versions[-1].version}
        check = _Check(name, preprocess_name, found, wanted)
        run_options = RunOptions(tuple(Exchange(each, ()) for each in wanted.image_requests(found)), parts, check)
        made = make_ensemble(
            repository, f"{name}_ensemble", [preprocess_name, name], run_options=run_options, report=report
        )
    return AddedWithImages(added, first, made, found.images)


@contextlib.contextmanager
def _says_published(published: Sequence[str]) -> Iterator[None]:
    """Let an error name the versions published by then, served by no server."""
    try:
        yield
    except RepoManagerError as exc:
        several = len(published) > 1
        exc.message += (
            f". {' and '.join(published)} {'are' if several else 'is'} published already, and no server serves "
            f"{'them' if several else 'it'}"
        )
        commands = ", ".join(f"repo-manager remove {each}" for each in published)
        exc.hint = " ".join(part for part in (exc.hint, f"To take the published models back: {commands}.") if part)
        raise


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """The model's input made of images.

    Attributes:
        name: name of the model's only input.
        data_type: number of its type in config.pbtxt, of Triton's `DataType`.
        dims: its shape for one image, without the batch axis added by `max_batch_size`.
        batch: `max_batch_size` of the model. 0: it takes no batches.
    """

    name: str
    data_type: int
    dims: tuple[int, ...]
    batch: int

    @classmethod
    def of(cls, repository: Location, model: str, recipe: ImageRecipe) -> _Wanted:
        """Read it from the model's config.pbtxt.

        Raises:
            InputError: images cannot have its type.
        """
        content = read_config_bytes(repository, model) or b""
        config = parse_config(content.decode(errors="replace"), where=f"{model}/{CONFIG_FILENAME}")
        (entry,) = config.message().input
        leading = (1,) if len(entry.dims) == 1 + len(recipe.shape) else ()
        found = cls(str(entry.name), int(entry.data_type), (*leading, *recipe.shape), config.max_batch_size)
        if found.datatype not in NUMPY_OF_TRITON or NUMPY_OF_TRITON[found.datatype].kind not in "iuf":
            raise InputError(f"{model}: images cannot become the input {found.name!r} of type {found.datatype}")
        return found

    @property
    def datatype(self) -> str:
        return str(model_config_pb2.DataType.Name(self.data_type)).removeprefix("TYPE_")

    def tensors(self, found: ImageModels) -> list[Array]:
        """Return the input for each image as a request holds it."""
        shape = (1, *self.dims) if self.batch > 0 else self.dims
        return [each.reshape(shape) for each in found.prepared(NUMPY_OF_TRITON[self.datatype])]

    def image_requests(self, found: ImageModels) -> list[dict[str, Array]]:
        """Return a request for each image, and where batches are taken one of as many as fit."""
        images = [np.array([[file.read_bytes()]], object) for file in found.images]
        if self.batch == 0:
            return [{_IMAGE: each[0]} for each in images]
        together = [np.concatenate(images[: self.batch])] if min(len(images), self.batch) > 1 else []
        return [{_IMAGE: each} for each in (*images, *together)]


def _add_preprocess(
    name: str, repository: Location, found: ImageModels, wanted: _Wanted, source: str, report: Report
) -> AddedFiles | None:
    """Publish the preprocessing model. `None` if its newest version has the very same files."""
    message = model_config_pb2.ModelConfig(name=name, backend="python", max_batch_size=wanted.batch)
    message.input.add(name=_IMAGE, data_type=model_config_pb2.TYPE_STRING, dims=[1])
    message.output.add(name=wanted.name, data_type=wanted.data_type, dims=wanted.dims)
    message.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
    tensors = wanted.tensors(found)
    together = [np.concatenate(tensors[: wanted.batch])] if wanted.batch > 0 else []
    requests = [
        Exchange(request, ({wanted.name: array},))
        for request, array in zip(wanted.image_requests(found), (*tensors, *together), strict=False)
    ]
    with work_folder("repo-manager-images-") as work:
        folder = Path(work) / "1"
        folder.mkdir()
        for file in _CODE:
            shutil.copyfile(Path(image_model.__file__).parent / file, folder / file)
        (folder / _RECIPE).write_text(json.dumps(found.recipe.served(), indent=2) + "\n", encoding="utf-8")
        (Path(work) / CONFIG_FILENAME).write_text(format_config(ModelConfig.from_message(message)), encoding="utf-8")
        if _is_newest(repository, name, folder):
            return None
        options = FilesOptions(origin={"path": source})
        return add_files(work, name, repository, options, run_options=RunOptions(requests), report=report)


def _is_newest(repository: Location, name: str, folder: Path) -> bool:
    """Return whether a model's newest version has the files of a folder."""
    if read_config_bytes(repository, name) is None:
        return False
    manifest = find_model(repository, name).versions[-1].manifest
    known = {} if manifest is None else manifest.files
    return all(file.name in known and known[file.name].sha256 == sha256_file(file) for file in folder.iterdir())


@dataclasses.dataclass(frozen=True)
class _Check:
    """Holds the ensemble, while it runs, against its steps taken one by one.

    Attributes:
        model: name of the main model.
        preprocess: name of the preprocessing model, as the embedded server has it.
        found: the image files of the proof.
        wanted: the model's input made of images.
    """

    model: str
    preprocess: str
    found: ImageModels
    wanted: _Wanted

    def __call__(self, run: EmbeddedRun) -> None:
        """Ask all three.

        Raises:
            GateError: an answer differs.
        """
        message = run.config.message()
        (names,) = (dict(step.output_map) for step in message.ensemble_scheduling.step if step.model_name == self.model)
        requests = self.wanted.image_requests(self.found)
        for file, request, array in zip(self.found.images, requests, self.wanted.tensors(self.found), strict=False):
            try:
                made = run.client.infer(self.preprocess, None, request)[self.wanted.name]
                apart = run.client.infer(self.model, None, {self.wanted.name: array})
                whole = run.client.infer(message.name, None, request)
            except ServerError as exc:
                raise GateError(
                    f"{message.name}: {file.name} is refused on the embedded server: {exc.message}"
                ) from exc
            if not np.array_equal(made, array):
                raise GateError(f"{self.preprocess} makes another input of {file.name} than calibration reads")
            expected = {names[output]: value for output, value in apart.items() if output in names}
            wrong = [each for each in compare_outputs(whole, expected, FilesOptions.tolerance) if not each.passed]
            if wrong:
                off = ", ".join(f"{each.output} by {each.error:.3g}" for each in wrong)
                raise GateError(f"{message.name} answers {file.name} otherwise than {self.model} does: {off}")
