"""Changing a field in a protobuf text value by value: unchanged parts stay as a person wrote them.

People put comments inside the fields of config.pbtxt, and newer servers know fields missing in our copy of the schema.
Writing the whole field again would lose both.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

from google.protobuf import text_format  # type: ignore[import-untyped]  # its stubs are a separate package

from repo_manager.triton_config.text_fields import TextField, cut_field, list_elements, top_level_fields
from repo_manager.triton_messages import is_repeated

__all__ = ["NotInPlaceError", "edit_field"]

_INDENT = re.compile(r"\n([ \t]*)[^\s#]")


_Span = tuple[TextField, int, int]
"""A field, and where one of its messages is."""


class NotInPlaceError(Exception):
    """The text, or the change, has a form not edited value by value."""


def edit_field(text: str, name: str, before: Any, after: Any) -> str:
    """Change one field of a text. Values both messages share, comments and unknown fields stay.

    Args:
        text: the fields of a message, without braces around them.
        name: the field. It is in the text.
        before: the message in the text.
        after: the one it is to say.

    Raises:
        NotInPlaceError: a changed value is written in several parts, a list becomes longer or shorter, ...
        ConfigError: the text cannot be read.
    """
    field = before.DESCRIPTOR.fields_by_name[name]
    found = [each for each in top_level_fields(text, where=name) if each.name == name]
    printed = _printed(after, name)
    if not found:
        return _appended(text, printed)
    if not printed:
        for each in reversed(found):
            text = cut_field(text, each)
        return text
    if field.message_type is None:
        each = _only(found)
        return text[: each.value_start] + printed.partition(":")[2].strip() + text[each.end :]
    old, new = getattr(before, name), getattr(after, name)
    if not is_repeated(field):
        each = _only(found)
        return text[: each.value_start] + _inside(each.value(text), old, new) + text[each.end :]
    spans = [(each, *span) for each in found for span in list_elements(text, each)]
    if field.message_type.GetOptions().map_entry:
        return _with_entries(text, spans, field, old, new)
    if not old or len(spans) != len(old) or len(new) < len(old):
        raise NotInPlaceError(name)
    text = _with_more(text, spans[-1], name, new[len(old) :])
    for (_, start, end), a, b in reversed(list(zip(spans, old, new[: len(old)], strict=True))):
        text = text[:start] + _inside(text[start:end], a, b) + text[end:]
    return text


def _with_entries(text: str, spans: list[_Span], field: Any, old: Any, new: Any) -> str:
    """Change a map's entries, each in its place. New ones follow the last."""
    entry = field.message_type._concrete_class
    bodies = [text[start + 1 : end - 1] for _, start, end in spans]
    keys = [text_format.Parse(body, entry(), allow_unknown_field=True).key for body in bodies]
    if not keys or sorted(keys) != sorted(old):
        raise NotInPlaceError(field.name)  # a duplicate key
    added = [entry(key=key, value=new[key]) for key in sorted(set(new) - set(old))]
    text = _with_more(text, spans[-1], field.name, added)
    for key, (each, start, end) in reversed(list(zip(keys, spans, strict=True))):
        if key in new:
            a, b = (entry(key=key, value=values[key]) for values in (old, new))
            text = text[:start] + _inside(text[start:end], a, b) + text[end:]
        elif each.end == end:
            text = cut_field(text, each)
        else:
            raise NotInPlaceError(field.name)  # an element of a list
    return text


def _with_more(text: str, last: _Span, name: str, messages: Sequence[Any]) -> str:
    """Put more messages behind the last one of a field: into its list, or as fields of their own."""
    each, start, end = last
    place = start if each.end != end else each.start
    margin = text[text.rfind("\n", 0, place) + 1 : place]
    indent = margin if not margin.strip() else ""
    for message in reversed(messages):
        body = text_format.MessageToString(message, as_utf8=True, use_short_repeated_primitives=True)
        block = f"{{\n{textwrap.indent(body, '  ')}}}"
        if each.end != end:
            text = f"{text[:end]},\n{textwrap.indent(block, indent)}{text[end:]}"
        else:
            text = f"{text[:end]}\n{textwrap.indent(f'{name} {block}', indent)}{text[end:]}"
    return text


def _inside(braced: str, before: Any, after: Any) -> str:
    """Change the text of a message, its braces included."""
    inner = braced[1:-1]
    for field in before.DESCRIPTOR.fields:
        if _printed(before, field.name) != _printed(after, field.name):
            inner = edit_field(inner, field.name, before, after)
    return braced[0] + inner + braced[-1]


def _appended(inner: str, printed: str) -> str:
    """Put a field behind the others of a message, on a line of its own where the others have lines."""
    head = inner.rstrip()
    tail = inner[len(head) :]
    if "\n" not in inner:
        return f"{head} {' '.join(line.strip() for line in printed.splitlines())}{tail or ' '}"
    first = _INDENT.search(inner)
    indent = first[1] if first else f"{tail.rpartition(chr(10))[2]}  "
    return f"{head}\n{textwrap.indent(printed.rstrip(), indent)}{tail if chr(10) in tail else chr(10)}"


def _only(found: list[TextField]) -> TextField:
    if len(found) != 1:
        raise NotInPlaceError(found[0].name)
    return found[0]


def _printed(message: Any, name: str) -> str:
    """Return one field as protobuf prints it. Empty where it is not set, or has its default."""
    alone = type(message)()
    alone.CopyFrom(message)
    for field, _ in message.ListFields():
        if field.name != name:
            alone.ClearField(field.name)
    return str(text_format.MessageToString(alone, as_utf8=True, use_short_repeated_primitives=True))
