"""Text of others made safe to show: a name in a repository must not speak to the terminal."""

from __future__ import annotations

import re

from repo_manager.errors import redacted

__all__ = ["plain"]

# Control characters (an escape sequence could rename the window or hide text), marks that change the direction of
# writing, and lone surrogates, used for bytes that are not UTF-8.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """Return the text with a terminal's control characters written out, such as `\\x1b`. Line breaks and tabs stay."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), redacted(text))
