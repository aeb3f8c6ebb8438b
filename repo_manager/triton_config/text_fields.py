"""The top-level fields of a protobuf text file, by position.

Editing the text between two positions keeps everything else as a person wrote it: comments, order, layout, and fields
a newer Triton knows and our copy of the schema does not. Reparsing and printing keeps none of these.
"""

from __future__ import annotations

import dataclasses
import re

from repo_manager.errors import ConfigError

__all__ = [
    "TextField",
    "canonical_values",
    "cut_field",
    "line_of",
    "list_elements",
    "replace_field",
    "top_level_fields",
]

_TOKEN = re.compile(
    r"""(?P<skip>[\s,;]+|\#[^\n]*)
      | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<open>[{<\[]) | (?P<close>[}>\]]) | (?P<colon>:)
      | (?P<word>[^\s,;\#"'{}<>\[\]:]+)""",
    re.VERBOSE,
)
_CLOSES = {"{": "}", "<": ">", "[": "]"}
_PLACE = re.compile(r"\b(\d+):\d+ ?: |, line (\d+): ")  # position in a parser's message
_NAMED = re.compile(r"'([^']+)'|\"([^\"]+)\"|([A-Za-z_]\w*)")


_SCALAR = r'(?:"(?:[^"\\\n]|\\.)*"|\[[^\]\n"\'#{}<>]*\]|[^\s,;#"\'{}<>\[\]]+)'


def _line(depth: int) -> str:
    """One field as protobuf prints it, two spaces a level: no line can be read in another way."""
    indent = "  " * depth
    if depth > _MAX_PRINTED_DEPTH:
        return rf"{indent}\w+: {_SCALAR}\n"
    return rf"{indent}\w+(?:: {_SCALAR}| \{{\n(?:{_line(depth + 1)})*{indent}\}})\n"


_MAX_PRINTED_DEPTH = 7
_PRINTED_FIELD = re.compile(rf"(\w+)(?:: ({_SCALAR})| (\{{\n(?:{_line(1)})*\}}))\n")


@dataclasses.dataclass(frozen=True)
class TextField:
    """One occurrence of a top-level field.

    Attributes:
        name: the field's name as written in the text, known to the schema or not.
        start: offset of the name's first character.
        end: offset after the value's last character.
        value_start: offset of the value's first character (after the colon, when there is one).
    """

    name: str
    start: int
    end: int
    value_start: int

    def value(self, text: str) -> str:
        """Return the value's text, a message with its braces."""
        return text[self.value_start : self.end]


def top_level_fields(text: str, *, where: str) -> tuple[TextField, ...]:
    """Find every top-level field of a text-format message.

    Args:
        text: content of a config.pbtxt, or another text-format message.
        where: its name in an error.

    Raises:
        ConfigError: brackets or quotes do not match, or a field has no value.
    """
    fields: list[TextField] = []
    stack: list[str] = []
    name, start, value_start, end = "", 0, -1, 0
    has_colon = False
    for kind, token, position in _tokens(text, where):
        top = not stack
        if top and name and value_start >= 0 and not (kind == "string" and text[end - 1] in "\"'"):
            fields.append(TextField(name, start, end, value_start))
            name, value_start, has_colon = "", -1, False
        if top and not name:
            if kind != "word":
                raise _broken(text, position, where, f"found {token!r} where a field's name was expected")
            name, start = token, position
            continue
        if kind == "open":
            stack.append(_CLOSES[token])
        elif kind == "close":
            if not stack or stack.pop() != token:
                raise _broken(text, position, where, f"{token!r} closes nothing")
        elif kind == "colon" and top:
            has_colon = True
            continue
        if top:
            if kind in ("word", "string") and not has_colon:
                raise _broken(text, position, where, f"expected ':' or '{{' after {name!r}, found {token!r}")
            value_start = position if value_start < 0 else value_start
        end = position + len(token)
    if stack:
        raise _broken(text, len(text), where, f"{stack[-1]!r} is missing at the end")
    if name:
        if value_start < 0:
            raise _broken(text, len(text), where, f"the field {name!r} has no value")
        fields.append(TextField(name, start, end, value_start))
    return tuple(fields)


def canonical_values(text: str) -> dict[str, str] | None:
    """Return the last value of each top-level field of a text exactly as protobuf prints it.

    Ten times as fast as `top_level_fields`, for listing thousands of files.

    Returns:
        `None` when the text is laid out in any other way. It may then still be a good message.
    """
    values: dict[str, str] = {}
    position = 0
    while match := _PRINTED_FIELD.match(text, position):
        name, scalar, block = match.groups()
        values[name] = block if scalar is None else scalar
        position = match.end()
    return values if position == len(text) else None


def replace_field(text: str, name: str, replacement: str, *, where: str) -> str:
    """Put `replacement` in the place of the top-level field `name`. Append it where there is none.

    Args:
        text: present content of the config.pbtxt, with or without the field.
        name: a top-level field. All its occurrences are replaced by one.
        replacement: the field's new text with its name. Empty removes the field.
        where: name of the file in an error.

    Raises:
        ConfigError: the text cannot be read.
    """
    found = [field for field in top_level_fields(text, where=where) if field.name == name]
    if not found:
        if not replacement:
            return text
        return text + ("" if text.endswith("\n") or not text else "\n") + replacement + "\n"
    for field in reversed(found[1:]):
        text = cut_field(text, field)
    first = found[0]
    return text[: first.start] + replacement + text[first.end :] if replacement else cut_field(text, first)


@dataclasses.dataclass
class _Outlined:
    """A field at any depth: its line, the field around it, and the strings in it."""

    name: str
    line: int
    parent: _Outlined | None
    strings: set[str] = dataclasses.field(default_factory=set)


def _outline(text: str) -> list[_Outlined]:
    """Return every field of a text-format message. A message in a list is a field of the list's name.

    Raises:
        ConfigError: a string does not end.
    """
    tokens = _tokens(text, "config.pbtxt")
    fields: list[_Outlined] = []
    around: list[_Outlined | None] = [None]
    field: _Outlined | None = None
    line, counted = 1, 0
    for place, (kind, token, position) in enumerate(tokens):
        line, counted = line + text.count("\n", counted, position), position
        following = tokens[place + 1][0] if place + 1 < len(tokens) else ""
        if kind == "word" and following in ("colon", "open"):
            field = _Outlined(token, line, around[-1])
            fields.append(field)
        elif kind == "string" and field is not None:
            for each in (field, around[-1]):
                if each is not None:
                    each.strings.add(token[1:-1])
        elif kind == "open" and field is not None:
            listed = around[-1]
            if token != "[" and listed is not None and tokens[place - 1][0] in ("open", "close"):
                field = _Outlined(listed.name, line, listed.parent)  # an element of a list
                fields.append(field)
            around.append(field)
        elif kind == "close" and len(around) > 1:
            field = around.pop()
    return fields


def line_of(text: str, what: str) -> int | None:
    """Return the line of a configuration a finding is about, or `None` when it names nothing present.

    A parser's message has its line. Candidates are the fields a finding names, or, if it names none, those with a
    string of it. The finding also names enclosing fields, tensors and models. The field with the most of them counts,
    and among equals the first one.

    Args:
        text: the configuration as a person wrote it.
        what: subject of the error message.
    """
    if match := _PLACE.search(what):
        return int(match[1] or match[2])
    words = [next(filter(None, match.groups())) for match in _NAMED.finditer(what)]
    order = {word: place for place, word in reversed(list(enumerate(words)))}
    try:
        fields = _outline(text)
    except ConfigError:
        return None
    best: tuple[bool, int, int, int] | None = None
    for number, field in enumerate(fields):
        if field.name not in order and not field.strings & order.keys():
            continue
        score = 0
        each: _Outlined | None = field
        while each is not None:
            score += (each.name in order) + 2 * bool(each.strings & order.keys())
            each = each.parent
        key = (field.name in order, score, -order.get(field.name, len(words)), -number)
        if best is None or key > best:
            best = key
    return None if best is None else fields[-best[3]].line


def list_elements(text: str, field: TextField) -> list[tuple[int, int]]:
    """Return where the messages of a field are, braces included: of `[{...}, {...}]` each, else the one."""
    if text[field.value_start] != "[":
        return [(field.value_start, field.end)]
    found: list[tuple[int, int]] = []
    depth = start = 0
    for kind, _, position in _tokens(text[field.value_start + 1 : field.end - 1], field.name):
        if kind == "open":
            start = position if depth == 0 else start
            depth += 1
        elif kind == "close":
            depth -= 1
            if depth == 0:
                found.append((field.value_start + 1 + start, field.value_start + 2 + position))
    return found


def cut_field(text: str, field: TextField) -> str:
    """Remove a field, with its line when nothing else is there."""
    before, after = text[: field.start], text[field.end :]
    bare, rest = before.rstrip(" \t"), after.lstrip(" \t,;")
    if (not bare or bare.endswith("\n")) and rest.startswith("\n"):
        return bare + rest[1:]
    return before + after


def _tokens(text: str, where: str) -> list[tuple[str, str, int]]:
    tokens: list[tuple[str, str, int]] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _broken(text, position, where, f"a string that starts with {text[position]!r} does not end")
        position = match.end()
        if match.lastgroup is not None and match.lastgroup != "skip":
            tokens.append((match.lastgroup, match.group(), match.start()))
    return tokens


def _broken(text: str, position: int, where: str, what: str) -> ConfigError:
    line = text.count("\n", 0, position) + 1
    return ConfigError(f"{where}, line {line}: {what}", hint="Correct the file; it is protobuf's text format.")
