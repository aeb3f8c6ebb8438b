"""Class labels of an output: the file Triton's classification extension reads."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from repo_manager.errors import ConfigError
from repo_manager.types import TensorSpec

__all__ = ["check_labels", "label_filename", "labels_text"]


def label_filename(output: str, position: int) -> str:
    """Return the name of an output's label file. It is beside the versions, as Triton requires.

    Args:
        output: name of the output. Other characters than ASCII letters, digits and `_` are replaced.
        position: its place among the outputs. Makes names unique when they differ in odd characters only.
    """
    plain = re.sub(r"[^A-Za-z0-9_]+", "_", output).strip("_")[:64]
    return f"labels_{position}_{plain}.txt" if plain else f"labels_{position}.txt"


def labels_text(labels: tuple[str, ...]) -> str:
    """Return a label file's content: one label a line."""
    return "".join(f"{label}\n" for label in labels)


def check_labels(labels: Mapping[str, tuple[str, ...]], outputs: tuple[TensorSpec, ...], *, batched: bool) -> None:
    """Check labels against the outputs they name.

    Args:
        labels: output name -> labels, one for each value of the output without the batch axis.
        outputs: the model's outputs, shapes with the batch axis.
        batched: whether the first axis is left out of the count.

    Raises:
        ConfigError: an unknown output, no label, a label other than one line, or a count other than the output's size.
    """
    specs = {spec.name: spec for spec in outputs}
    for name, values in labels.items():
        if name not in specs:
            raise ConfigError(f"labels for {name!r}: no such output; the outputs are {', '.join(specs)}")
        if not values:
            raise ConfigError(f"labels for {name!r}: there are none")
        for value in values:
            if not value.strip() or not value.isprintable():
                raise ConfigError(f"labels for {name!r}: {value!r} is not one printable line")
        shape = specs[name].shape or ()
        dims = shape[1:] if batched else shape
        sizes = [dim for dim in dims if isinstance(dim, int)]
        if len(sizes) == len(dims) and dims and math.prod(sizes) != len(values):
            raise ConfigError(f"labels for {name!r}: {len(values)} labels for {math.prod(sizes)} values a request")
