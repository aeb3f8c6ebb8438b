"""What all one-file HTML pages share: the templates' environment, and a chart with its caption."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from repo_manager.optional import deferred

if TYPE_CHECKING:
    import jinja2
else:
    jinja2 = deferred("jinja2")

__all__ = ["Figure", "environment"]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart and what stands below it."""

    title: str
    svg: Markup
    caption: str


@functools.cache
def environment() -> jinja2.Environment:
    """Return the environment that renders the templates beside this module; everything is escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("repo_manager.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
