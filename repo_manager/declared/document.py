"""YAML text to plain values, with the place of each: errors name line and column."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import yaml

from repo_manager.errors import InputError

__all__ = ["Document", "TextPlace", "parse_document"]

_MAX_VALUES = 200_000
_MAX_DEPTH = 50
_MERGE = "tag:yaml.org,2002:merge"
_SCALAR_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")}
# YAML 1.1 gives these scalars an unexpected value: 010 is 8, 1_0 is 10, 1:30 is 90, and a date is not a string.
_ODD = {"timestamp": "a date", "binary": "binary data", "set": "a set", "omap": "an ordered map", "pairs": "pairs"}

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True, order=True)
class TextPlace:
    """A place in the text. Both numbers count from 1."""

    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.line}:{self.column}"


@dataclasses.dataclass(frozen=True)
class Document:
    """A parsed file.

    Attributes:
        name: name of the file in messages.
        value: mappings, lists, strings, numbers, booleans, `None`.
        places: path from the top -> place of the key or of the list's element.
        problems: values read otherwise than they look, and doubled keys: path, place and sentence. The value there is
            `None`, or the first of the two.
    """

    name: str
    value: Any
    places: Mapping[Path, TextPlace]
    problems: tuple[tuple[Path, TextPlace, str], ...] = ()

    def where(self, path: Path) -> str:
        """Return `NAME:LINE:COLUMN` of a path. Of the nearest one above it when it is not there itself."""
        return f"{self.name}:{self.place(path)}" if self.places else self.name

    def place(self, path: Path) -> TextPlace:
        """Return the place of a path. Of the nearest one above it when it is not there itself."""
        while path not in self.places and path:
            path = path[:-1]
        return self.places.get(path, TextPlace(1, 1))


def parse_document(text: str, *, name: str) -> Document:
    """Parse YAML. Anchors, aliases and merge keys (`<<`) are fine.

    A doubled key, and a value YAML reads otherwise than it looks, are among the document's problems.

    Args:
        text: content of the YAML file.
        name: the file's path, or `standard input`. Errors put it before line and column.

    Raises:
        InputError: it is not YAML, holds a value other than a plain one, or is nested or repeated beyond any
            handwritten file. With line and column.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        place = "" if mark is None else f":{mark.line + 1}:{mark.column + 1}"
        words = " ".join(filter(None, (exc.context, exc.problem)))
        raise InputError(f"{name}{place}: not valid YAML: {words}", hint=_hint(text)) from exc
    except yaml.YAMLError as exc:
        raise InputError(f"{name}: not valid YAML: {' '.join(str(exc).split())}") from exc
    except RecursionError as exc:
        raise InputError(f"{name}: nested too deeply") from exc
    reader = _Reader(name)
    value = None if node is None else reader.value(node, ())
    return Document(name, value, reader.places, tuple(dict.fromkeys(reader.problems)))


class _Reader:
    def __init__(self, name: str) -> None:
        self.name = name
        self.places: dict[Path, TextPlace] = {}
        self.problems: list[tuple[Path, TextPlace, str]] = []
        self.count = 0
        self.scalars = yaml.SafeLoader("")

    def value(self, node: yaml.Node, path: Path) -> Any:
        """Return a node's value. Aliases are read once for each place where they are."""
        self.count += 1
        if self.count > _MAX_VALUES or len(path) > _MAX_DEPTH:
            raise self.error(node, "more values, or deeper nesting, than anybody writes; an alias inside itself?")
        self.places.setdefault(path, _place(node))
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        if node.tag in _SCALAR_TAGS and isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        kind = node.tag.rpartition(":")[2]
        if kind in _ODD:
            said = f"{node.value!r} is {_ODD[kind]}" if isinstance(node, yaml.ScalarNode) else f"this is {_ODD[kind]}"
            return self.problem(node, path, f"{said} in YAML; put it in quotes if a text is meant")
        raise self.error(node, f"the tag {node.tag} has no meaning here")

    def scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        try:
            value = self.scalars.construct_object(node)
        except (ValueError, yaml.YAMLError, KeyError, OverflowError) as exc:
            why = " ".join(str(exc).split())[:200]
            return self.problem(node, path, f"{node.value[:80]!r} cannot be read: {why}")
        if isinstance(value, int) and not isinstance(value, bool) and str(value) != node.value.lstrip("+"):
            said = f"{node.value!r} is the number {value} in YAML; write {value}, or put it in quotes"
            return self.problem(node, path, said)
        return value

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        begin = len(self.places)
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                for key, value in self.merge(value_node, path).items():
                    merged.setdefault(key, value)
                continue
            key = self.key(key_node)
            here = (*path, key)
            if key in found:
                line = self.places[here].line
                said = f"the key {key!r} is here a second time; the first is in line {line}"
                self.problem(key_node, (*here, key), said)
                continue
            if key in merged:
                self.drop((*path, key), begin)
            self.places[here] = _place(key_node)
            found[key] = self.value(value_node, here)
        return {**merged, **found}

    def merge(self, node: yaml.Node, path: Path) -> dict[str, Any]:
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        result: dict[str, Any] = {}
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                raise self.error(source, "`<<` takes a mapping, or a list of mappings")
            for key, value in self.value(source, path).items():
                result.setdefault(key, value)
        return result

    def drop(self, prefix: Path, begin: int) -> None:
        """Forget places a merge brought for a key given here itself: only places since the mapping began."""
        since = list(itertools.islice(reversed(self.places), len(self.places) - begin))
        for place in since:
            if place[: len(prefix)] == prefix:
                del self.places[place]

    def key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(node, "a key has to be a text")
        if node.tag not in _SCALAR_TAGS or node.value == "":
            raise self.error(node, f"{node.value!r} cannot be a key; put it in quotes")
        return str(node.value)

    def problem(self, node: yaml.Node, path: Path, what: str) -> None:
        """Keep a problem that lets the rest of the file be read. It is reported with the others."""
        self.problems.append((path, _place(node), what))

    def error(self, node: yaml.Node, what: str) -> InputError:
        return InputError(f"{self.name}:{_place(node)}: {what}")


def _place(node: yaml.Node) -> TextPlace:
    return TextPlace(node.start_mark.line + 1, node.start_mark.column + 1)


def _hint(text: str) -> str | None:
    return "YAML is indented with blanks, never with tabs." if "\n\t" in text else None
