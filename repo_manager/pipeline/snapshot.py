"""`snapshot`: freeze the models for pods, and write the chart's values for it, for Argo CD or Flux."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import yaml

from repo_manager.declared.document import parse_document
from repo_manager.errors import InputError, UsageError
from repo_manager.files import read_regular, reason_of, write_atomic
from repo_manager.repository.location import LocationLike, as_location, local_folder
from repo_manager.repository.tags import resolve_version
from repo_manager.rollout.options import RolloutOptions
from repo_manager.rollout.pinning import Pin, pin_snapshot
from repo_manager.rollout.rollout_context import Report
from repo_manager.rollout.snapshot_cache import CachedSnapshot, fetch_snapshot
from repo_manager.settings import load_settings
from repo_manager.types import StrPath

__all__ = ["Pinned", "fetch", "pinned_by", "snapshot", "values_text"]

_HEAD = "# Written by `repo-manager snapshot`; it holds only the pin, and is rewritten each time."


@dataclasses.dataclass(frozen=True)
class Pinned:
    """A snapshot, and its values file.

    Attributes:
        pin: the snapshot, with the models in it.
        values: the chart's values, as YAML.
        file: where they were written. `None`: nowhere.
        changed: whether the file had to change.
    """

    pin: Pin
    values: str
    file: Path | None
    changed: bool


def snapshot(
    repository: LocationLike,
    targets: tuple[str, ...] = (),
    *,
    values: StrPath | None = None,
    mounted: str | None = None,
    options: RolloutOptions | None = None,
    report: Report = lambda _: None,
) -> Pinned:
    """Write a snapshot, and pin it in a values file.

    Args:
        repository: the model repository: a folder, or a URL of object storage.
        targets: models to change, each `NAME` or `NAME:VERSION`. Empty takes every model as its policy serves it.
        values: a YAML file for the pin alone. Its present pins stay, except for `targets`. `None` writes no file. The
            other models are then taken as the repository's policies serve them.
        mounted: the repository's URL or path, as the pods see it. `None`: as in the file, else as this machine sees
            it.
        options: see `pin_snapshot`. `None` takes the defaults.
        report: called with a line of text for each step.

    Raises:
        UsageError: a model is named twice.
        InputError: the file holds more than a pin, or cannot be read.
        RepositoryError: as `pin_snapshot`.
    """
    repository, values = as_location(repository), None if values is None else Path(values)
    options = RolloutOptions() if options is None else options
    chosen: dict[str, int] = {}
    for text in targets:
        name, version = resolve_version(repository, text)
        if name in chosen:
            raise UsageError(f"{name} is named twice", hint="A snapshot gets one new version of a model.")
        chosen[name] = version
    url, pinned = (None, None) if values is None else _pinned_in(values)
    made = pin_snapshot(repository, chosen, mounted=mounted or url, pinned=pinned, options=options, report=report)
    if local_folder(repository) is not None and mounted is None and url is None:
        report(
            f"the values name a folder of this machine; where pods mount it elsewhere, say so: --mounted ({made.url})"
        )
    text = values_text(made)
    changed = values is not None and made.url != pinned
    if values is not None and changed and not options.dry_run:
        write_atomic(values, text.encode())
    return Pinned(made, text, values, changed)


def fetch(
    url: LocationLike,
    cache: StrPath,
    *,
    signed_by: Sequence[StrPath] = (),
    keep: int = 2,
    link: StrPath | None = None,
    report: Report = lambda _: None,
) -> CachedSnapshot:
    """Bring a snapshot into a cache on this machine, unless it is there, and check every file and signature of it.

    Args:
        url: place of the snapshot, `<repository>.snapshots/<id>`.
        cache: the folder, shared by the pods of one machine.
        signed_by: public keys, of which one must vouch for each version. Empty takes the settings'.
        keep: number of snapshots kept beside it and served by no process.
        link: is made a symbolic link to the snapshot's folder. `None`: none is made.
        report: called with a line of text for each step.

    Returns:
        The snapshot. Nobody removes it until it is closed.

    Raises:
        UsageError: the URL names no snapshot.
        RepositoryError: there is no such snapshot, its content does not fit its id, a signature does not hold, or
            there is no room for it.
    """
    return fetch_snapshot(
        as_location(url),
        Path(cache),
        signed_by=tuple(map(Path, signed_by)) or load_settings().signed_by,
        keep=keep,
        link=None if link is None else Path(link),
        report=report,
    )


def values_text(pin: Pin) -> str:
    """Return the chart's values for a snapshot, as YAML. Its models are a comment, for a diff to show."""
    held = [f"#   {name}: {', '.join(map(str, versions))}" for name, versions in sorted(pin.models.items())]
    return "\n".join([_HEAD, "# It holds:", *held, yaml.safe_dump(pin.values, sort_keys=False)])


def pinned_by(files: Sequence[Path]) -> dict[str, str]:
    """Return the pins of values files: file -> URL of the snapshot.

    Raises:
        InputError: one cannot be read, or pins nothing: a mistyped name must not count as a file without pins.
    """
    found = {}
    for file in files:
        url = _pinned_in(file)[1]
        if url is None:
            raise InputError(f"{file} pins no snapshot", hint="Name the files written by `repo-manager snapshot`.")
        found[str(file)] = url
    return found


def _pinned_in(file: Path) -> tuple[str | None, str | None]:
    """Return a values file's `repository.url` and `repository.snapshot`. Nothing when it does not exist.

    Raises:
        InputError: it holds other values, which would be lost, or cannot be read.
    """
    try:
        text = read_regular(file).decode()
    except FileNotFoundError:
        return None, None
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"{file}: the values cannot be read: {reason_of(exc)}") from exc
    found = parse_document(text, name=str(file)).value or {}
    section = found.get("repository") if isinstance(found, dict) else None
    if not found:
        return None, None
    if not isinstance(section, dict) or set(found) != {"repository"} or not set(section) <= {"url", "snapshot"}:
        raise InputError(
            f"{file} holds more than repository.url and repository.snapshot, and would be overwritten",
            hint="Give the pin a file of its own: helm, Argo CD and Flux take several values files.",
        )
    url, pinned = (None if section.get(key) is None else str(section[key]) for key in ("url", "snapshot"))
    return url, pinned or None
