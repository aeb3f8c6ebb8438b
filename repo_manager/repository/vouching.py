"""Checks by signatures beyond a version's own files: config.pbtxt and the files beside the versions.

The facts of config.pbtxt decide on the code to run. Triton looks for libraries, environments, warm-up data and labels
beside the versions.

The facts are those of the signed manifest. Files beside the versions belong to all of them, so they have a signature
of their own: `.repo-manager.NAME.VERSION.beside.sig.json`, made whenever a version is signed. It is in the same
format, over a folder with these files and with `about.json`, which has the model's name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from repo_manager.errors import ConfigError, RepositoryError
from repo_manager.files import work_folder
from repo_manager.repository.layout import MANIFEST_FILENAME, version_number
from repo_manager.repository.look import walk
from repo_manager.repository.manifest import Manifest
from repo_manager.repository.signing_files import beside_signature_name, beside_signatures
from repo_manager.repository.signing_format import MAX_SIGNATURE_BYTES, SigningKey, make_signature, verify_signature
from repo_manager.repository.stores.base import Store
from repo_manager.repository.view import ModelView
from repo_manager.triton_config.config import CONFIG_FILENAME, VARIANTS_FOLDER, ModelConfig, parse_config

__all__ = ["beside_files", "check_beside", "check_facts", "differing_facts", "fingerprint", "sign_beside"]

_ABOUT = "about.json"
# Fields of config.pbtxt that select code and its files. The other fields are tuning and may change.
_FACTS = (
    "runtime",
    "cc_model_filenames",
    "model_operations",
    "model_repository_agents",
    "ensemble_scheduling",
)
# Fields with names of tensors and models. These names may look like paths.
_NAMES = ("name", "kind", "input_map", "output_map", "control_input", "source")
# Parameters for files with code: environments of the Python backend, and core's batching libraries.
_CODE_PARAMETERS = ("EXECUTION_ENV_PATH", "TRITON_BATCH_STRATEGY_PATH")
# Values a parameter may change to without a signature. Any other value may name a file or code.
_TUNING = re.compile(r"[+-]?\d+(\.\d+)?|true|false", re.IGNORECASE)


def check_facts(view: ModelView, manifest: Manifest) -> None:
    """Compare the use of the files by config.pbtxt, and by each of its variants, with the signed manifest.

    Raises:
        RepositoryError: it would run them by other code or other files, or there is nothing to compare.
    """
    if not manifest.config:
        raise RepositoryError(
            f"{view.name}:{manifest.version} says nothing in its {MANIFEST_FILENAME} of what runs it, so no signature "
            "vouches for that",
            hint="Publish it again with repo-manager add or copy, and sign the version.",
        )
    if not view.has_config:
        raise RepositoryError(
            f"{view.place} has no {CONFIG_FILENAME}, so the server would choose what runs the signed files",
            hint=f"Put it back as {MANIFEST_FILENAME} has it.",
        )
    texts = {CONFIG_FILENAME: view.config_text}
    for file, content in view.beside.items():
        if file.startswith(f"{VARIANTS_FOLDER}/"):
            texts[file] = lambda content=content: content.decode()  # type: ignore[misc]
    for file, text in texts.items():
        try:
            signed = parse_config(manifest.config, where=MANIFEST_FILENAME)
            current = parse_config(text(), where=str(view.place / file))
        except (ConfigError, UnicodeDecodeError) as exc:
            raise RepositoryError(str(exc), hint=getattr(exc, "hint", None)) from exc
        odd = differing_facts(signed, current)
        if file != CONFIG_FILENAME and current.model_filename in manifest.files:
            odd = tuple(each for each in odd if each not in ("default_model_filename", "cc_model_filenames"))
        if odd:
            raise RepositoryError(
                f"{view.place / file} would run the signed files by other code than their manifest says: "
                f"{', '.join(odd)}",
                hint=f"Put these fields back as manifest.json has them: repo-manager config {view.name} --set ...",
            )
        _check_inside(view, current)


def _check_inside(view: ModelView, config: ModelConfig) -> None:
    """Refuse code in the repository that is outside the model's folder: no signature of the model covers it."""
    if not isinstance(view.place, Path):
        return
    place, message = view.place.resolve(), config.message()
    texts = [message.parameters[key].string_value for key in _CODE_PARAMETERS if key in message.parameters]
    for text in (*texts, *message.model_operations.op_library_filename):
        path = Path(os.path.normpath(place / text.replace("$$TRITON_MODEL_DIRECTORY", str(place))))
        if path.is_relative_to(place.parent) and not path.is_relative_to(place):
            raise RepositoryError(
                f"{view.place / CONFIG_FILENAME} runs {text}, which is in the repository and outside the model's "
                "folder, so no signature covers it",
                hint=f"Put it into {view.place}, or outside the repository.",
            )


def differing_facts(signed: ModelConfig, current: ModelConfig, *, loaded: bool = False) -> tuple[str, ...]:
    """Return the differing fields among those that decide on the running code, as config.pbtxt names them.

    Args:
        signed: the configuration of a signed manifest.
        current: the configuration in use: of config.pbtxt, a variant, or a server.
        loaded: it comes from the server, which fills in `runtime` and the model's file.
    """
    old, new = signed.message(), current.message()
    if loaded and not old.runtime:
        new.runtime = ""
    if loaded and not old.default_model_filename:
        new.default_model_filename = ""
        current = ModelConfig.from_message(new)
    odd = ["backend"] if signed.backend != current.backend else []
    if _platform_of(signed) != _platform_of(current):
        odd.append("platform")
    odd += ["default_model_filename"] if signed.model_filename != current.model_filename else []
    odd += [field for field in _FACTS if getattr(old, field, None) != getattr(new, field, None)]
    if old.optimization.execution_accelerators != new.optimization.execution_accelerators:
        odd.append("optimization.execution_accelerators")
    odd += [f"parameters.{key}" for key in _odd_parameters(old, new)]
    odd += [f"model_warmup.{each.name}" for each in new.model_warmup if each not in old.model_warmup and _reads(each)]
    known = set(_paths(old))
    odd += [f"the path {path}" for path in dict.fromkeys(_paths(new)) if path not in known]
    return tuple(dict.fromkeys(odd))


def _paths(message: Any) -> Iterator[str]:
    """Yield every path in a configuration that leads out of the folder where Triton looks for files."""
    for field, value in message.ListFields():
        if field.name in _NAMES or field.name == "parameters":  # parameters are compared one by one
            continue
        entries = value.values() if hasattr(value, "values") else value if hasattr(value, "__len__") else (value,)
        for each in (value,) if isinstance(value, str) else entries:
            if isinstance(each, str) and ("/" in each or each.startswith(".")):
                yield each
            elif hasattr(each, "ListFields"):
                yield from _paths(each)


def _platform_of(config: ModelConfig) -> str:
    """Return the platform where it says more than the backend: a TensorFlow one names the format of the files."""
    platform = str(config.message().platform)
    return platform if platform.startswith("tensorflow") else ""


def _odd_parameters(old: Any, new: Any) -> list[str]:
    before, after = (
        {key: str(value.string_value) for key, value in message.parameters.items()} for message in (old, new)
    )
    differing = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    return [key for key in differing if not all(_is_tuning(values.get(key)) for values in (before, after))]


def _is_tuning(value: str | None) -> bool:
    return value is None or _TUNING.fullmatch(value) is not None


def _reads(warmup: Any) -> bool:
    """Return whether a warm-up reads a file."""
    return any(each.WhichOneof("input_data_type") == "input_data_file" for each in warmup.inputs.values())


def sign_beside(store: Store, view: ModelView, version: int, key: SigningKey) -> tuple[str, bytes | None]:
    """Sign the files beside a model's versions.

    Args:
        store: the repository's open store. The files are read from it, and nothing is written.
        view: the model as it was read, with the files beside its versions.
        version: number in the signature's file name. The files belong to every version.
        key: private key and its certificates.

    Returns:
        The signature's file, and its content. `None` when there is nothing beside the versions.

    Raises:
        RepositoryError: there are links, or a file cannot be read.
    """
    name = beside_signature_name(view.name, version)
    files = beside_files(store, view)
    if not files:
        return name, None
    with _folder(store, view, files) as folder:
        return name, make_signature(folder, key)


def check_beside(store: Store, view: ModelView, keys: Sequence[Path]) -> None:
    """Check the signatures of all Triton may read beside the versions and config.pbtxt.

    Args:
        store: the repository's open store, with the files and their signatures.
        view: the model as it was read, with the files beside its versions.
        keys: public keys and root certificates, as PEM files.

    Raises:
        RepositoryError: a file is not signed, with its name.
    """
    files = beside_files(store, view)
    if not files:
        return
    reasons: list[str] = []
    with _folder(store, view, files) as folder:
        for name in beside_signatures((each.name for each in store.list_level().files), view.name):
            content = store.read(name, limit_bytes=MAX_SIGNATURE_BYTES)
            for key in keys if content is not None else ():
                try:
                    verify_signature(folder, content, key)  # type: ignore[arg-type]
                except RepositoryError as exc:
                    reasons.append(f"{name}, {key.name}: {exc.message}")
                else:
                    return
    listed = ", ".join(files)
    raise RepositoryError(
        f"{view.place} holds unsigned files beside its versions, and Triton may run or read them: {listed}"
        + "".join(f"\n  {reason}" for reason in reasons),
        hint=f"Remove foreign files; else sign a version again: repo-manager sign {view.name}:VERSION.",
    )


def beside_files(store: Store, view: ModelView) -> tuple[str, ...]:
    """Return the paths, below the model's folder, of everything but config.pbtxt and the versions.

    Raises:
        RepositoryError: there is a link or a special file: no signature can vouch for it.
    """
    entries = [(entry.name, entry) for entry in view.level.files if entry.name != CONFIG_FILENAME]
    odd = list(view.level.links)
    for folder in view.level.folders:
        if version_number(folder) is None and folder not in view.level.links:
            entries += [(f"{folder}/{entry.name}", entry) for entry in walk(store, f"{view.name}/{folder}")[0]]
    odd += [name for name, entry in entries if entry.link is not None or not entry.regular]
    odd += [entry.name for entry in view.level.files if entry.name == CONFIG_FILENAME and entry.link is not None]
    if odd:
        raise RepositoryError(
            f"{view.place} holds links or special files, which no signature can cover: {', '.join(sorted(odd))}",
            hint="Put the content itself there, or remove them.",
        )
    return tuple(sorted(name for name, _ in entries))


@contextlib.contextmanager
def _folder(store: Store, view: ModelView, files: Sequence[str]) -> Iterator[Path]:
    """Give a folder with the files beside the versions, as they are signed."""
    with work_folder("repo-manager-beside-") as work:
        folder = Path(work) / "beside"
        folder.mkdir()
        for file in files:
            content = store.read(f"{view.name}/{file}")
            if content is None:
                raise RepositoryError(f"{view.place / file} was removed at this moment", hint="Run the command again.")
            target = folder / "files" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        (folder / _ABOUT).write_text(json.dumps({"model": view.name}), encoding="utf-8")
        yield folder


def fingerprint(view: ModelView, version: int) -> Mapping[str, tuple[int, ...]] | None:
    """Return inodes and times of a version's files and those beside it, or `None` for object storage.

    Anyone who exchanges a file, even for a moment, changes its inode or the time of its last change. No user can set
    either. config.pbtxt is left out: a roll-out writes it.
    """
    if not isinstance(view.place, Path):
        return None
    found: dict[str, tuple[int, ...]] = {}
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(view.place):
            number = version_number(entry.name)
            if entry.name == CONFIG_FILENAME or (number is not None and number != version):
                continue
            for path in (Path(entry.path), *(Path(entry.path).rglob("*") if entry.is_dir() else ())):
                state = path.lstat()
                folder = path.is_dir() and not path.is_symlink()
                found[str(path.relative_to(view.place))] = (
                    (state.st_ino,) if folder else (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
                )
    return found
