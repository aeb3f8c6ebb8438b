"""The request behind a version: the same source and options need no second conversion.

`add` and `apply` record it in the manifest as `request`. Options at their default are left out, so a later
repo-manager with more options still recognises an earlier one's version. The tools behind it do not count.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repo_manager.errors import GateError, InputError
from repo_manager.files import sha256_file
from repo_manager.repository.manifest import Manifest
from repo_manager.types import Backend, Digest, StrPath, as_json

__all__ = [
    "FetchedSource",
    "Request",
    "calibration_record",
    "check_accuracy",
    "fulfils",
    "options_record",
    "request_record",
    "source_digest",
]

# Engine options about the place of the build. They do not change the engine.
_PLACES = ("timing_cache", "plans", "max_batch_size")


@dataclasses.dataclass(frozen=True)
class Request:
    """The request for a version.

    Attributes:
        source: path of the ONNX file. Need not exist when `digest` gives its content. Of a URL only once `fetched`.
        digest: digest the file must have. `None`: any content.
        precision: of the version, as text: a value of `Precision`, such as `fp16`.
        backend: a backend's name. `None`: the one of the existing versions.
        sparsity: `require`, `report` or `prune`, as in `SparsityMode`. A version made with `report` can fulfil
            `require`.
        calibration: a file, a folder or `module:function`. `None` for none.
        calibration_digest: digest the calibration data must have.
        convert: options of the conversion not at their default.
        engine: options of the engine not at their default.
        accuracy: held-out data and limits, as `AccuracyOptions` takes them. Empty for none.
        url: where the source is fetched from. Empty for a path.
        fetched: the source of a URL, open. `None` before it was fetched.
    """

    source: Path
    digest: str | None
    precision: str
    backend: str | None
    sparsity: str
    calibration: str | None
    calibration_digest: str | None
    convert: Mapping[str, Any]
    engine: Mapping[str, Any]
    accuracy: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    url: str = ""
    fetched: FetchedSource | None = None

    @property
    def shown(self) -> str:
        """The source as it is shown: the path, or the URL without possible credentials."""
        return str(self.source) if self.fetched is None else str(self.fetched.opened)


@dataclasses.dataclass(frozen=True)
class FetchedSource:
    """A source fetched from a URL.

    Attributes:
        path: the local copy. It is removed at the end of the `fetching` block.
        opened: the source for `add` in place of the path, so the manifest names the URL. Its text is shown.
    """

    path: Path
    opened: Any


def request_record(
    *, backend: Backend, sparsity: str, calibration: StrPath | None, convert: Any, engine: Any
) -> dict[str, Any]:
    """Return a manifest's record of a version's options.

    Args:
        backend: the backend chosen, never `auto`. For ONNX Runtime the engine's options are not recorded.
        sparsity: the sparsity mode: `require`, `report` or `prune`.
        calibration: the calibration option as given. `None`: no calibration data.
        convert: the conversion's options, a dataclass.
        engine: the engine's options, a dataclass.

    Raises:
        InputError: the calibration data cannot be read.
    """
    return {
        "sparsity": sparsity,
        "calibration": None if calibration is None else calibration_record(calibration),
        "convert": options_record(convert),
        "engine": {} if backend is Backend.ONNXRUNTIME else options_record(engine),
    }


def options_record(options: Any) -> dict[str, Any]:
    """Return the fields of an options' dataclass not at their default, as JSON."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = getattr(options, field.name)
        if value != default and field.name not in _PLACES:
            found[field.name] = as_json(value)
    return found


def calibration_record(calibration: StrPath) -> dict[str, Any]:
    """Return name and digest of calibration data. A function has no digest.

    Raises:
        InputError: it cannot be read.
    """
    path = Path(calibration)
    try:
        if path.is_file():
            return {"path": path.name, "digest": sha256_file(path)}
        if path.is_dir():
            return {"path": path.name, "digest": _folder_digest(path)}
    except OSError as exc:
        raise InputError(f"{path}: the calibration data cannot be read: {exc.strerror or exc}") from exc
    return {"path": os.fspath(calibration), "digest": None}


def source_digest(path: Path, external: Mapping[str, Any] | tuple[str, ...] = ()) -> Digest:
    """Return the digest of a model, as `onnx_model` makes it, without reading the model.

    Args:
        path: the ONNX file. Its bytes are hashed, and need not be a valid model.
        external: the names of its files with external data, in order, beside it.

    Raises:
        OSError: a file cannot be read.
    """
    digest = sha256_file(path)
    if not external:
        return digest
    joint = hashlib.sha256(f"{digest}\n".encode())
    for name in external:
        joint.update(f"{sha256_file(path.parent / name)}  {name}\n".encode())
    return Digest("sha256:" + joint.hexdigest())


def fulfils(manifest: Manifest, request: Request) -> bool:
    """Return whether a version was made as asked.

    Raises:
        InputError: the source or the calibration data cannot be read, or has another digest than the pinned one.
    """
    source = manifest.source or {}
    if manifest.precision != request.precision or request.backend not in (None, manifest.backend):
        return False
    if source.get("digest") is None or source.get("digest") != _wanted_digest(request, source):
        return False
    record = manifest.extra.get("request")
    if not isinstance(record, dict):
        # An older version without a recorded request: only these fields are known.
        return not request.convert and not request.engine and request.sparsity != "prune" and _sparse(manifest, request)
    if record.get("convert", {}) != request.convert:
        return False
    if manifest.backend != Backend.ONNXRUNTIME and record.get("engine", {}) != request.engine:
        return False
    if (record.get("sparsity") == "prune") != (request.sparsity == "prune"):
        return False
    if not _same_calibration(record.get("calibration"), request):
        return False
    return record.get("sparsity") == request.sparsity or _sparse(manifest, request)


def check_accuracy(where: str, manifest: Manifest, request: Request) -> None:
    """Compare the record of a version's accuracy with the declared limits. One without a measurement passes.

    Args:
        where: `NAME:VERSION`, for the message.
        manifest: manifest of the version. `conversion.accuracy` in it is the measurement.
        request: its `accuracy` has the data and the limits. Empty: everything passes.

    Raises:
        GateError: it was measured on these data, and is below a limit.
        InputError: the data cannot be read.
    """
    found = (manifest.conversion or {}).get("accuracy")
    if not request.accuracy or not isinstance(found, Mapping):
        return
    data = str(request.accuracy["data"])
    file, is_file, names = data.rpartition(".npz:")
    path = Path(f"{file}.npz")
    labels = f"{path.name}:{names.partition(':')[0]}"
    same = found.get("data") in ((labels, f"{path.name}:{names}") if is_file else (data,))
    if is_file and path.is_file():
        same = same and found.get("digest") == calibration_record(path)["digest"]
    value, source = found.get("value"), found.get("source")
    if not same or value is None:
        return
    least, drop = request.accuracy.get("min_accuracy"), request.accuracy.get("max_drop")
    if least is not None and value < least:
        raise GateError(f"{where} has {value:.4g} on {found['data']}, below min_accuracy {least:g}")
    if drop is not None and source is not None and source - value > drop:
        raise GateError(
            f"{where} has {value:.4g} on {found['data']}, {source - value:.4g} below its source, more than "
            f"max_accuracy_drop {drop:g}"
        )


def _wanted_digest(request: Request, source: Mapping[str, Any]) -> str:
    if not request.source.exists():
        if request.digest is not None:
            return request.digest
        raise InputError(
            f"{request.source} does not exist",
            hint="Give the source's path relative to the YAML file, or pin what it held with `digest:`.",
        )
    external = source.get("external", ())
    names = tuple(str(name) for name in external) if isinstance(external, list) else ()
    try:
        found = source_digest(request.source, names)
    except FileNotFoundError:
        return ""  # the version had other external files
    except OSError as exc:
        raise InputError(f"{request.source} cannot be read: {exc.strerror or exc}") from exc
    return found


def _same_calibration(record: Any, request: Request) -> bool:
    if record is None or request.calibration is None:
        return record is None and request.calibration is None
    if not isinstance(record, dict):
        return False
    if request.calibration_digest is not None and not Path(request.calibration).exists():
        return bool(record.get("digest") == request.calibration_digest)
    found = calibration_record(request.calibration)
    if found["digest"] is None:
        return bool(record.get("path") == found["path"])
    return bool(record.get("digest") == found["digest"])


def _sparse(manifest: Manifest, request: Request) -> bool:
    """Whether a version made without the gate would pass it: the rule of `SparsityReport.not_valid`."""
    if request.sparsity != "require":
        return True
    layers = (manifest.sparsity or {}).get("layers", ()) if isinstance(manifest.sparsity, dict) else ()
    dense = [layer for layer in layers if isinstance(layer, dict) and layer.get("verdict") == "not 2:4"]
    valid = [layer for layer in layers if isinstance(layer, dict) and layer.get("verdict") == "valid"]
    return not [layer for layer in dense if layer.get("asp_eligible")] and bool(valid or not dense)


def _folder_digest(folder: Path) -> Digest:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    return Digest("sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest())
