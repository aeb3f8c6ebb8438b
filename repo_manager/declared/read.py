"""repository.yaml to a checked declaration, or to every problem in it with its line and column."""

from __future__ import annotations

import difflib
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import pydantic

from repo_manager.declared.document import Document, parse_document
from repo_manager.declared.schema import NOTES_PREFIX, Declaration
from repo_manager.errors import InputError, RepositoryError
from repo_manager.files import document
from repo_manager.lfs import refuse_lfs_pointer
from repo_manager.repository.layout import validate_model_name
from repo_manager.repository.tags import validate_tag
from repo_manager.types import StrPath

__all__ = ["parse_declaration", "read_declaration"]

MAX_BYTES = 4 << 20
STDIN = "-"
_KNOWN = "; known are "
_HINT = f"{document('apply.md')} shows every key; editors check it with {document('repository.schema.json')}."
Location = tuple[str | int, ...]


def read_declaration(path: StrPath) -> Declaration:
    """Read and check a file.

    Args:
        path: the file. `-` for standard input.

    Raises:
        InputError: it cannot be read, or contradicts the schema. Every problem is listed with its place.
    """
    path = Path(path)
    try:
        if str(path) == STDIN:
            text = _bounded(sys.stdin.buffer.read(MAX_BYTES + 1), "standard input")
            return parse_declaration(text, name="standard input")
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not a regular file; `-` reads standard input", hint=_HINT)
        refuse_lfs_pointer(path)
        with path.open("rb") as stream:
            text = _bounded(stream.read(MAX_BYTES + 1), str(path))
    except OSError as exc:
        raise InputError(f"{path} cannot be read: {exc.strerror or exc}", hint=_HINT) from exc
    except UnicodeDecodeError as exc:
        raise InputError(f"{path} is not UTF-8 text: {exc}") from exc
    return parse_declaration(text, name=str(path))


def _bounded(content: bytes, name: str) -> str:
    if len(content) > MAX_BYTES:
        raise InputError(f"{name} is larger than the limit of {MAX_BYTES} bytes", hint=_HINT)
    return content.decode()


def parse_declaration(text: str, *, name: str) -> Declaration:
    """Check a file's content.

    Args:
        text: content of a repository.yaml, of any size: only `read_declaration` has a limit.
        name: the file's path, or `standard input`. Errors put it before line and column.

    Raises:
        InputError: as `read_declaration`.
    """
    document = parse_document(text, name=name)
    if not isinstance(document.value, dict):
        if document.problems:
            raise _error(_told(document, {}))
        found = "nothing" if document.value is None else f"a {_kind(document.value)}"
        raise InputError(f"{document.where(())}: expected a mapping with `models:`, found {found}", hint=_HINT)
    content = {key: value for key, value in document.value.items() if not key.startswith(NOTES_PREFIX)}
    problems = dict(_names(content))
    declaration = None
    try:
        declaration = Declaration.model_validate(content)
    except pydantic.ValidationError as exc:
        problems.update(_problems(exc.errors(), document))
    if declaration is None or problems or document.problems:
        raise _error(_told(document, problems))
    return declaration


def _told(document: Document, problems: Mapping[Location, str]) -> list[str]:
    """All problems in the order of the file. Nothing further of a value YAML reads otherwise than it looks."""
    told = [(place, f"{document.name}:{place}: {what}") for _, place, what in document.problems]
    unread = [path for path, _, _ in document.problems]
    for path, what in problems.items():
        if not any(path[: len(other)] == other or other[: len(path)] == path for other in unread):
            told.append((document.place(path), f"{document.where(path)}: {_dotted(path)}{what}"))
    return _each_list_once([text for _, text in sorted(told, key=lambda item: item[0])])


def _each_list_once(problems: Sequence[str]) -> list[str]:
    """Leave a list of known keys out where a problem above it ends in the same one."""
    seen: set[str] = set()
    told = []
    for problem in problems:
        what, mark, known = problem.partition(_KNOWN)
        told.append(what if known in seen else problem)
        seen.update([known] if mark else ())
    return told


def _error(problems: Sequence[str]) -> InputError:
    if len(problems) == 1:
        return InputError(problems[0], hint=_HINT)
    return InputError(f"{len(problems)} problems:\n  " + "\n  ".join(problems), hint=_HINT)


def _names(content: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Names no mapping's type can check: of models and tags. Other forms are left to the schema."""
    models = content.get("models")
    for name, model in models.items() if isinstance(models, dict) else ():
        checks: list[tuple[Location, typing.Callable[[str], object], str]] = [
            (("models", name), validate_model_name, name)
        ]
        fields = model if isinstance(model, dict) else {}
        tags, serve = fields.get("tags"), fields.get("serve")
        checks += [
            (("models", name, "tags", tag), validate_tag, tag) for tag in (tags if isinstance(tags, dict) else ())
        ]
        if isinstance(serve, str) and serve != "newest":
            checks.append((("models", name, "serve"), validate_tag, serve))
        for path, check, text in checks:
            try:
                check(text)
            except RepositoryError as exc:
                yield path, exc.message


def _problems(errors: Sequence[Any], document: Document) -> Iterator[tuple[Location, str]]:
    """One sentence for each place. Of a value's possible forms, the closest one gives the message."""
    groups: dict[Location, list[tuple[Location, Any]]] = {}
    for error in errors:
        path, base = _data_path(error, document.value)
        groups.setdefault(base, []).append((path, error))
    for found in groups.values():
        deepest = max(len(path) for path, _ in found)
        closest = [(path, error) for path, error in found if len(path) == deepest]
        for path in dict.fromkeys(path for path, _ in closest):
            yield path, _sentence(path, [error for at, error in closest if at == path], document.value)


def _data_path(error: Any, value: Any) -> tuple[Location, Location]:
    """Return an error's path in the data, and the path up to where the validator tried several forms."""
    path: list[str | int] = []
    base: Location | None = None
    parts = list(error["loc"])
    for position, part in enumerate(parts):
        there = (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        )
        last = position == len(parts) - 1
        if there:
            value = value[part]
            path.append(part)
        elif last and error["type"] == "missing":
            path.append(part)
        elif base is None and isinstance(part, str) and not _is_field(part):
            base = tuple(path)
    return tuple(path), tuple(path) if base is None else base


def _is_field(part: str) -> bool:
    """Whether a part is a key a short form represents (`source: x` is `source: {path: x}`), not a form's name."""
    return part in ("path", "digest", "min", "opt", "max")


def _sentence(path: Location, errors: Sequence[Any], value: Any) -> str:
    first = errors[0]
    if first["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        close = difflib.get_close_matches(str(path[-1]), known, 1)
        return "unknown key" + (f"; did you mean {close[0]!r}?" if close else f"{_KNOWN}{', '.join(known)}")
    if first["type"] == "missing":
        return "is missing"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    for part in path:
        value = value[part]
    words = dict.fromkeys(_expected(error["msg"]) for error in errors)
    shown = "nothing" if value is None else repr(value) if not isinstance(value, dict | list) else f"a {_kind(value)}"
    return f"expected {', or '.join(words)}; found {shown[:100]}"


def _expected(message: str) -> str:
    text = message.removeprefix("Input should be ").removeprefix("Value should be ")
    for found, said in (
        ("a valid dictionary or instance of FileReference", "a path"),
        ("a valid dictionary or instance of Shape", "a list of sizes"),
        ("a valid dictionary", "a mapping"),
        ("a valid tuple", "a list"),
        ("a valid string", "a text"),
        ("a valid boolean", "true or false"),
        ("a valid integer", "a whole number"),
        ("a valid number", "a number"),
        ("string should have at least 1 character", "a non-empty text"),
        ("String should have at least 1 character", "a non-empty text"),
    ):
        if text.startswith(found):
            return said
    return text[0].lower() + text[1:]


def _known_keys(path: Location) -> list[str]:
    annotations: list[Any] = [Declaration]
    for part in path:
        annotations = [following for each in annotations for following in _below(each, part)]
    return sorted({key for each in annotations for model in _models(each) for key in model.model_fields})


def _below(annotation: Any, part: str | int) -> Iterator[Any]:
    """Return the type behind a key, or an index, of a type."""
    if _is_model(annotation):
        if part in annotation.model_fields:
            yield annotation.model_fields[str(part)].annotation
        return
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (dict, tuple):
        yield arguments[-1 if typing.get_origin(annotation) is dict else 0]
        return
    for argument in arguments:
        yield from _below(argument, part)


def _is_model(annotation: Any) -> TypeGuard[type[pydantic.BaseModel]]:
    # On Python 3.10, `dict[str, X]` is also an instance of type.
    return (
        isinstance(annotation, type) and not typing.get_args(annotation) and issubclass(annotation, pydantic.BaseModel)
    )


def _models(annotation: Any) -> Iterator[type[pydantic.BaseModel]]:
    if _is_model(annotation):
        yield annotation
    elif typing.get_origin(annotation) not in (dict, tuple):
        for argument in typing.get_args(annotation):
            yield from _models(argument)


def _dotted(path: Location) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return f"{text}: " if text else ""


def _kind(value: Any) -> str:
    return {dict: "mapping", list: "list", str: "text", bool: "true or false"}.get(type(value), "number")
