"""Opening a source: its kind, the folder it is fetched to, and the manifest's entry for it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from repo_manager.errors import InputError, RepoManagerError, UsageError
from repo_manager.files import kept_folder, sha256_bytes, sha256_file, url_parts
from repo_manager.sources.fetching import Fetch, Fetched, Receiver
from repo_manager.sources.mlflow import fetch_from_mlflow, model_file
from repo_manager.sources.objects import fetch_objects
from repo_manager.sources.web import fetch_web, without_query
from repo_manager.types import StrPath

__all__ = ["PLUGIN_GROUP", "Source", "open_source"]

PLUGIN_GROUP = "repo_manager.sources"

_OWN: Mapping[str, Fetch] = {
    "s3": fetch_objects,
    "gs": fetch_objects,
    "as": fetch_objects,
    "http": fetch_web,
    "https": fetch_web,
    "models": fetch_from_mlflow,
    "runs": fetch_from_mlflow,
    "mlflow-artifacts": fetch_from_mlflow,
}
_ONE_SLASH = ("models", "runs", "mlflow-artifacts")


@dataclasses.dataclass(frozen=True)
class Source:
    """A model's file or folder on this machine, and where it came from.

    Attributes:
        path: the model's file or folder. A fetched one is safe to use inside the block of `open_source` only.
        origin: the manifest's entry under `source.origin`. Empty for a path given as such.
    """

    path: Path
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """Return the given text: the URL, without possible credentials, or the path."""
        return str(self.origin.get("url", self.path))

    def record(self) -> dict[str, Any]:
        """Return the entries of the manifest's `source` beside path, digest and size."""
        return {"origin": dict(self.origin)} if self.origin else {}


@contextlib.contextmanager
def open_source(place: StrPath | Source, report: Callable[[str], None] = lambda _: None) -> Iterator[Source]:
    """Give a model a path or a URL names as a file or folder on this machine.

    Fetched files are in the user's cache while the block runs, and stays there when the fetch is interrupted: the same
    command then goes on where it was. Credentials are those of the environment, as the stores take them.

    Args:
        place: a path; s3://, gs:// or as:// with a file or a folder; a file by https://; models:/NAME/VERSION,
            models:/NAME@ALIAS or runs:/RUN/PATH of MLflow; a URL of a plugin's. A source already open stays so.
        report: told what is being done.

    Raises:
        UsageError: nothing knows such a URL.
        InputError: it is not there, does not fit on the disk, or is no model.
        RepositoryError: a store refuses it.
    """
    if isinstance(place, Source):
        yield place
        return
    text = os.fspath(place)
    fetch = _fetch_of(text)
    if fetch is None:
        path, flavor = model_file(Path(text))
        yield Source(path, {"path": Path(text).name, **flavor} if flavor else {})
        return
    shown = without_query(text)
    with kept_folder(text) as folder:
        fetched = fetch(text, Receiver(folder, report))
        path, flavor = model_file(fetched.path)
        size, digest = _measured(path)
        origin = {
            "url": shown,
            "fetched": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "digest": digest,
            "size_bytes": size,
            **fetched.facts,
            **flavor,
        }
        with _named(fetched, shown):
            yield Source(path, origin)


def _fetch_of(text: str) -> Fetch | None:
    """Return the fetcher of a URL, or `None` for a path.

    Raises:
        UsageError: it is a URL, and nothing fetches its kind.
    """
    match = url_parts(text)
    if match is None:
        return None
    scheme = match[1].lower()
    if scheme in _OWN and (match[2] == "//" or scheme in _ONE_SLASH):
        return _OWN[scheme]
    plugins = {each.name: each for each in importlib.metadata.entry_points(group=PLUGIN_GROUP)}
    if scheme in plugins:
        try:
            found: Fetch = plugins[scheme].load()
        except Exception as exc:  # a plugin may raise anything
            raise UsageError(
                f"the plugin {plugins[scheme].value} for {scheme}: cannot be loaded: {type(exc).__name__}: {exc}"
            ) from exc
        return found
    if match[2] != "//":
        return None
    known = ", ".join(f"{name}:{'/' if name in _ONE_SLASH else '//'}" for name in sorted({*_OWN, *plugins}))
    raise UsageError(
        f"{scheme}:// is no source of a model", hint=f"Expected a path, or {known}. A plugin can add others."
    )


def _measured(path: Path) -> tuple[int, str]:
    """Return size and digest of a file. Of a folder the digest of its list of names and digests.

    Raises:
        InputError: there is nothing.
    """
    if path.is_file():
        return path.stat().st_size, str(sha256_file(path))
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []
    if not files:
        raise InputError(f"{path.name}: the source holds no file")
    lines = [f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n" for file in files]
    return sum(file.stat().st_size for file in files), str(sha256_bytes("".join(lines).encode()))


@contextlib.contextmanager
def _named(fetched: Fetched, shown: str) -> Iterator[None]:
    """Replace temporary paths in error messages with the source."""
    here = str(fetched.path)
    try:
        yield
    except RepoManagerError as exc:
        if here not in f"{exc.message} {exc.hint}":
            raise
        hint = None if exc.hint is None else exc.hint.replace(here, shown)
        raise type(exc)(exc.message.replace(here, shown), hint=hint) from exc
