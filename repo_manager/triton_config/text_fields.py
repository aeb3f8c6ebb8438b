"""The top-level fields of a protobuf text file, by position.

Editing the text between two positions keeps everything else as a person wrote it: comments, order, layout, and
fields that a newer Triton knows and our copy of the schema does not. Reparsing and printing keeps none of these.
"""

from __future__ import annotations

import dataclasses
import re

from repo_manager.errors import ConfigError

__all__ = ["TextField", "canonical_values", "replace_field", "top_level_fields"]

_TOKEN = re.compile(
    r"""(?P<skip>[\s,;]+|\#[^\n]*)
      | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<open>[{<\[]) | (?P<close>[}>\]]) | (?P<colon>:)
      | (?P<word>[^\s,;\#"'{}<>\[\]:]+)""",
    re.VERBOSE,
)
_CLOSES = {"{": "}", "<": ">", "[": "]"}


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
        name: the field's name.
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
        text: the file's content.
        where: what to call it in an error.

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
        `None` when the text is laid out in any other way; it may then still be a good message.
    """
    values: dict[str, str] = {}
    position = 0
    while match := _PRINTED_FIELD.match(text, position):
        name, scalar, block = match.groups()
        values[name] = block if scalar is None else scalar
        position = match.end()
    return values if position == len(text) else None


def replace_field(text: str, name: str, replacement: str, *, where: str) -> str:
    """Put `replacement` where the top-level field `name` stands; append it where there is none.

    Args:
        text: the file's content.
        name: a top-level field; all its occurrences are replaced by one.
        replacement: the field's new text with its name; empty removes the field.
        where: what to call the file in an error.

    Raises:
        ConfigError: the text cannot be read.
    """
    found = [field for field in top_level_fields(text, where=where) if field.name == name]
    if not found:
        if not replacement:
            return text
        return text + ("" if text.endswith("\n") or not text else "\n") + replacement + "\n"
    for field in reversed(found[1:]):
        text = _cut(text, field)
    first = found[0]
    return text[: first.start] + replacement + text[first.end :] if replacement else _cut(text, first)


def _cut(text: str, field: TextField) -> str:
    """Remove a field, with its line when nothing else stands there."""
    before, after = text[: field.start], text[field.end :]
    rest = after.lstrip(" \t,;")
    if (not before or before.endswith("\n")) and rest.startswith("\n"):
        return before + rest[1:]
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
