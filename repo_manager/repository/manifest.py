"""`manifest.json` inside a version: its files, their source, and how they were made (docs/manifest.schema.json)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repo_manager.errors import RepositoryError
from repo_manager.files import read_regular, reason_of
from repo_manager.repository.layout import MANIFEST_FILENAME
from repo_manager.types import Digest, as_json

__all__ = [
    "MANIFEST_SCHEMA_VERSION",
    "FileRecord",
    "Manifest",
    "manifest_text",
    "no_manifest",
    "parse_manifest",
    "read_manifest",
]

MANIFEST_SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file as it was published.

    Attributes:
        sha256: `sha256:` and 64 hexadecimal digits.
        size_bytes: size in bytes. A file of another size is a changed one.
    """

    sha256: Digest
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.size_bytes} bytes with {self.sha256[:19]}"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The record of a version. Written once, never changed.

    Attributes:
        schema_version: of the format. A reader takes any version whose fields below it can find.
        model: name of the model it was published as. A copy has its own.
        version: number of the version, from 1.
        created: when the record was made, UTC, ISO 8601, such as `2026-01-31T12:00:00Z`.
        backend: name of the Triton backend, such as `onnxruntime` or `tensorrt`.
        precision: `fp32`, `fp16`, `int8`, .... `None` when not known.
        files: path in the version's folder -> record. Everything but the manifest itself.
        config: the text of the config.pbtxt derived for this version.
        source: name and digest of the model it was made from.
        conversion: the conversion's result (checks, drift, kept nodes, seconds).
        sparsity: the 2:4 report, with the counted parameters in `totals`. `None` when there is none.
        golden: names of the files with reference inputs and outputs, and their tolerances.
        tools: name -> version of the tools behind it.
        machine: CPU, GPU and system it was made on.
        extra: all other fields, those of a newer format included.
    """

    schema_version: int
    model: str
    version: int
    created: str
    backend: str
    precision: str | None
    files: Mapping[str, FileRecord]
    config: str = ""
    source: Mapping[str, Any] | None = None
    conversion: Any = None
    sparsity: Any = None
    golden: Any = None
    tools: Mapping[str, str] = dataclasses.field(default_factory=dict)
    machine: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(record.size_bytes for record in self.files.values())

    @property
    def digest(self) -> Digest:
        """One digest of names, sizes and digests of all files: equal for equal content, regardless of its number."""
        lines = [f"{name}\0{r.size_bytes}\0{r.sha256}\n" for name, r in sorted(self.files.items())]
        return Digest("sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest())


def manifest_text(manifest: Manifest) -> str:
    """Return the JSON text of a manifest. Unknown fields are among the others, as they came."""
    document = as_json(manifest)
    document.update({key: value for key, value in document.pop("extra").items() if key not in document})
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def parse_manifest(text: str, *, where: str) -> Manifest:
    """Parse a manifest's text. Fields this version does not know go to `extra`.

    Args:
        text: JSON text of a manifest.json, as `manifest_text` makes it.
        where: its path, for an error.

    Raises:
        RepositoryError: it is not JSON, or a required field is missing or has the wrong type.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise RepositoryError(f"{where} is not JSON: {exc}", hint=_ADOPT) from exc
    if not isinstance(document, dict):
        raise RepositoryError(f"{where} is not a JSON object", hint=_ADOPT)
    known = {field.name for field in dataclasses.fields(Manifest)} - {"extra", "files"}
    values = {key: value for key, value in document.items() if key in known}
    for key, (kind, required) in _KINDS.items():
        value = values.get(key)
        if (value is None and required) or (value is not None and not _is(value, kind)):
            raise RepositoryError(f"{where}: {key!r} is {value!r}; expected {kind.__name__}", hint=_ADOPT)
        if value is None:
            values.pop(key, None)
    values.setdefault("precision", None)
    extra = {key: value for key, value in document.items() if key not in known and key != "files"}
    return Manifest(**values, files=_files(document.get("files"), where), extra=extra)


def read_manifest(path: Path) -> Manifest:
    """Read a version's manifest.

    Args:
        path: the version's folder, or the file.

    Raises:
        RepositoryError: missing, unreadable or not a manifest.
    """
    file = path if path.name == MANIFEST_FILENAME else path / MANIFEST_FILENAME
    try:
        text = read_regular(file).decode()
    except FileNotFoundError:
        raise no_manifest(f"{file} does not exist") from None
    except (OSError, UnicodeDecodeError) as exc:
        raise no_manifest(f"{file} cannot be read: {reason_of(exc)}") from exc
    return parse_manifest(text, where=str(file))


def no_manifest(what: str) -> RepositoryError:
    """Return the error for a missing or unreadable manifest."""
    return RepositoryError(what, hint=_ADOPT)


_ADOPT = "`repo-manager verify` lists the faults; `repo-manager adopt` writes a manifest where there is none."
_KINDS: dict[str, tuple[type, bool]] = {
    "schema_version": (int, True),
    "model": (str, True),
    "version": (int, True),
    "created": (str, True),
    "backend": (str, True),
    "precision": (str, False),
    "config": (str, False),
    "source": (dict, False),
    "tools": (dict, False),
    "machine": (dict, False),
}


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _can_be_a_file(name: str) -> bool:
    """Whether a file system could hold the name: JSON can write a NUL, and half a character."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _files(value: object, where: str) -> dict[str, FileRecord]:
    if not isinstance(value, dict):
        raise RepositoryError(f"{where}: 'files' is {type(value).__name__}; expected an object", hint=_ADOPT)
    files: dict[str, FileRecord] = {}
    for name, record in value.items():
        if any(part in ("", ".", "..") for part in name.split("/")) or not _can_be_a_file(name):
            raise RepositoryError(f"{where}: {name!r} is no path inside the version", hint=_ADOPT)
        if (
            not isinstance(record, dict)
            or not isinstance(record.get("sha256"), str)
            or not _is(record.get("size_bytes"), int)
        ):
            raise RepositoryError(f"{where}: the record of file {name!r} has no sha256 and size_bytes", hint=_ADOPT)
        files[name] = FileRecord(Digest(record["sha256"]), record["size_bytes"])
    return files
