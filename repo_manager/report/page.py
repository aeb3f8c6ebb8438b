"""Common parts of all one-file HTML pages: one design, tables fit for a phone, and a chart with its caption."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from repo_manager.optional import deferred
from repo_manager.report.plain import plain

if TYPE_CHECKING:
    import jinja2
else:
    jinja2 = deferred("jinja2")

__all__ = ["Figure", "render_page", "render_part"]

_WIDE = 8
_TABLE = re.compile(r"<table>(.*?)</table>", re.DOTALL)
_HEAD = re.compile(r"<th\b[^>]*>(.*?)</th>", re.DOTALL)
_ROW = re.compile(r"<tr\b[^>]*>.*?</tr>", re.DOTALL)
_CELL = re.compile(r"<td\b(?![^>]*\bcolspan)")
_JOINT = re.compile(r"(?<=[^/._])[/._]+(?=[^/._])")
_TAG = re.compile(r"<[^>]*>")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart and the text below it."""

    title: str
    svg: Markup
    caption: str


@functools.cache
def _environment() -> jinja2.Environment:
    """Return the environment for the templates beside this module. Everything is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("repo_manager.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["wrapped"] = _wrapped
    return environment


def _wrapped(name: object) -> Markup:
    """Return a name a browser breaks after `/`, `.` and `_` first, not inside its words."""
    return Markup(_JOINT.sub(r"\g<0><wbr>", str(escape(name))))


def render_page(template: str, **values: Any) -> str:
    """Render a template beside this module.

    Args:
        template: file name of the template.
        **values: values for the template's names. Every text is escaped, and control characters are written out.

    Returns:
        A complete HTML document without references to the outside. Each cell of a table knows its column's title, so a
        narrow window can show a row as a list.
    """
    return plain(_TABLE.sub(_labelled, _environment().get_template(template).render(**values)))


def render_part(template: str, **values: Any) -> Markup:
    """Render a part of a page, for use in `render_page`. Every text is escaped."""
    return Markup(_environment().get_template(template).render(**values))


def _labelled(table: re.Match[str]) -> str:
    """Give each cell its column's title. Texts in cells are escaped, so a tag in them is one of the template's."""
    head, separator, body = table[1].partition("<tbody>")
    titles = [_TAG.sub("", title).strip() for title in _HEAD.findall(head)]

    def row(found: re.Match[str]) -> str:
        left = iter(titles)
        return _CELL.sub(lambda _: f'<td data-label="{next(left, "")}"', found[0])

    opening = '<table class="wide">' if len(titles) > _WIDE else "<table>"
    return f"{opening}{head}{separator}{_ROW.sub(row, body)}</table>"
