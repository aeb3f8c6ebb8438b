"""Options for a duration: `90`, `90s`, `1.5m`, `2h`, `500ms` or `30d`; the library gets seconds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from repo_manager.cli.option_groups import option
from repo_manager.errors import UsageError

__all__ = ["parse_duration", "seconds_option"]

_SECONDS_OF = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_DURATION = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*(ms|[smhdw]|)")
_LEAST_S = 0.1
_SHOWN = ("h", "m", "s")


class _Seconds(float):
    """Seconds the help shows with a unit."""

    def __str__(self) -> str:
        unit = next((unit for unit in _SHOWN if self and self % _SECONDS_OF[unit] == 0), "s")
        return f"{float(self) / _SECONDS_OF[unit]:g}{unit}"


def seconds_option(
    name: str,
    *,
    help: str,
    sets: tuple[Callable[..., Any], str] | None = None,
    least: float = _LEAST_S,
    needs_unit: bool = False,
    **more: Any,
) -> Any:
    """Make a field of a group of options for seconds. See `option_groups.option`.

    Args:
        name: as it is written: `--timeout`.
        help: text of the option in `--help`.
        sets: setting of the library, in seconds: its owner and name. `None`: no setting.
        least: the shortest one allowed, in seconds.
        needs_unit: whether a number without a unit is refused: an age of 30 may be meant in days.
        **more: of `option`.
    """
    return option(
        name,
        help=help,
        sets=sets,
        read=None if sets is None else float,
        show=None if sets is None else lambda seconds: None if seconds is None else _Seconds(seconds),
        metavar="DURATION",
        parser=lambda given: parse_duration(given, name, least=least, needs_unit=needs_unit),
        **more,
    )


def parse_duration(given: str | float, option: str, *, least: float = _LEAST_S, needs_unit: bool = False) -> float:
    """Return seconds. A number (not a text) is a default, and is returned as it is.

    Args:
        given: text of the option, or its default in seconds.
        option: name of the option, for the message.
        least: smallest accepted duration in seconds.
        needs_unit: whether a text without a unit is refused.

    Raises:
        UsageError: it is no duration, or shorter than `least` seconds.
    """
    if isinstance(given, float | int):
        return given
    match = _DURATION.fullmatch(given.strip().lower())
    if match is None or (needs_unit and not match[2]):
        unit = "a number and a unit" if needs_unit else "a time"
        raise UsageError(f"{option} {given}: expected {unit} such as {'12h or 30d' if needs_unit else '30s, 5m or 1h'}")
    seconds = float(match[1]) * _SECONDS_OF[match[2] or "s"]
    if seconds < least:
        raise UsageError(f"{option} {given}: expected {_Seconds(least)} or longer")
    return seconds
