"""Options as Python callers give them: fields become values of their types, and others are refused by name."""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import numbers
import os
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from repo_manager.errors import UsageError

__all__ = ["check_fields", "check_range", "choice"]

E = TypeVar("E", bound=enum.Enum)


class _Misfit(Exception):  # noqa: N818 - it never leaves this module
    """A value does not fit a type. The text names the expected type."""


def choice(kind: type[E], value: E | str, what: str) -> E:
    """Return the member of an enumeration a value names.

    Args:
        kind: class of the enumeration. The values of its members are the accepted texts.
        value: a member, or a member's value.
        what: the option, for the message.

    Raises:
        UsageError: no member has the value. The message lists them.
    """
    try:
        return typing.cast(E, _member(kind, value))
    except _Misfit as exc:
        raise UsageError(f"{what} is {value!r}, expected {exc}") from exc


def check_range(what: str, value: float | None, *, least: float = 0.0, most: float = float("inf")) -> None:
    """Check whether a number is within its limits, both included. `None` is.

    Args:
        what: subject of the message: name of the number, for the message.
        value: the number. `None` is accepted.
        least: the smallest accepted number. By default negative ones are refused.
        most: the largest accepted number. By default there is no such limit.

    Raises:
        UsageError: it is not, or is not a number (NaN).
    """
    if value is not None and not least <= value <= most:
        limits = f"{least:g} or more" if most == float("inf") else f"{least:g} to {most:g}"
        raise UsageError(f"{what} is {value}, expected {limits}")


def check_fields(options: Any) -> None:
    """Let the fields of a frozen dataclass be of their types. Call it first in `__post_init__`.

    A text becomes the enumeration's member it names, or a path where only a path is expected, and a path becomes a
    text. A list becomes a tuple, a number of NumPy's becomes Python's. Fields of other types must be instances.

    Raises:
        UsageError: a value fits its field's type in no way. The message names class and field, and lists the choices.
    """
    kind = type(options)
    for name, hint in _hints(kind).items():
        value = getattr(options, name)
        try:
            fitted = _fitted(hint, value)
        except _Misfit as exc:
            is_secret = not kind.__dataclass_fields__[name].repr
            found = f"a {type(value).__name__}" if is_secret else _shown(value)
            raise UsageError(f"{kind.__name__}.{name} is {found}, expected {exc}") from exc
        if fitted is not value:
            object.__setattr__(options, name, fitted)


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(kind: type) -> dict[str, Any]:
    """Return field -> type. `Any` for a type its module imports for type checkers only."""
    if kind in _HINTS:
        return _HINTS[kind]
    hints: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        names = vars(sys.modules[base.__module__])
        for name, text in vars(base).get("__annotations__", {}).items():
            try:
                hints[name] = typing.get_type_hints(types.SimpleNamespace(__annotations__={name: text}), names)[name]
            except NameError:
                hints[name] = Any
    _HINTS[kind] = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return _HINTS[kind]


def _fitted(hint: Any, value: Any) -> Any:
    """Return a value as its type has it.

    Raises:
        _Misfit: it cannot be of the type.
    """
    origin = get_origin(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return value
    if origin in (Union, types.UnionType):
        return _one_of(get_args(hint), value)
    if origin is Literal:
        return _literal(get_args(hint), value)
    if origin is tuple:
        return _tuple(get_args(hint), value)
    if origin is not None:
        return _generic(origin, value)
    return _plain(hint, value)


def _one_of(hints: tuple[Any, ...], value: Any) -> Any:
    """Take the first type a value is of already, else the first it can become."""
    for hint in hints:
        if isinstance(hint, type) and type(value) is hint:
            return value
    wanted = []
    for hint in hints:
        try:
            return _fitted(hint, value)
        except _Misfit as exc:
            wanted.append(str(exc))
    raise _Misfit(" or ".join(dict.fromkeys(wanted)))


def _literal(choices: tuple[Any, ...], value: Any) -> Any:
    if value in choices:
        return value
    raise _Misfit(_listed(choices))


def _tuple(hints: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    is_sequence = isinstance(value, collections.abc.Sequence) and not isinstance(value, str | bytes)
    if not is_sequence:
        raise _Misfit("a list or a tuple")
    if len(hints) == 2 and hints[1] is Ellipsis:
        fitted = tuple(_fitted(hints[0], item) for item in value)
    elif len(hints) != len(value):
        raise _Misfit(f"{len(hints)} values")
    else:
        fitted = tuple(_fitted(hint, item) for hint, item in zip(hints, value, strict=True))
    is_same = isinstance(value, tuple) and all(a is b for a, b in zip(fitted, value, strict=True))
    return typing.cast("tuple[Any, ...]", value) if is_same else fitted


def _generic(origin: Any, value: Any) -> Any:
    is_text = origin is collections.abc.Sequence and isinstance(value, str | bytes)
    if is_text or (isinstance(origin, type) and not isinstance(value, origin)):
        names = {"Mapping": "a mapping", "Sequence": "a list or a tuple", "Callable": "a function"}
        raise _Misfit(names.get(origin.__name__, f"a {origin.__name__}"))
    return value


def _plain(kind: Any, value: Any) -> Any:
    if not isinstance(kind, type):
        return value
    if issubclass(kind, enum.Enum):
        return _member(kind, value)
    if issubclass(kind, Path):
        if isinstance(value, str | os.PathLike):
            return value if isinstance(value, kind) else kind(value)
        raise _Misfit("a path")
    if getattr(kind, "_is_protocol", False):
        return value
    if kind in (int, float):
        return _number(kind, value)
    if isinstance(value, kind):
        return value
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    names = {bool: "True or False", str: "a text", type(None): "None"}
    raise _Misfit(names.get(kind, f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"))


def _number(kind: type[int] | type[float], value: Any) -> Any:
    """Return a number as it is. One of NumPy's as Python's. A truth value is none."""
    is_one = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    if not is_one:
        raise _Misfit("a whole number" if kind is int else "a number")
    return value if isinstance(value, (int, kind)) else kind(value)


def _member(kind: type[enum.Enum], value: Any) -> enum.Enum:
    if isinstance(value, kind):
        return value
    for member in kind:
        if member.value == value:
            return member
    raise _Misfit(_listed([member.value for member in kind]))


def _listed(values: typing.Iterable[Any]) -> str:
    return f"one of {', '.join(str(value) for value in values)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
