"""One operator as the batch analysis' rules see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from repo_manager.onnx_model.batch_values import UnknownError, Value, total
from repo_manager.optional import deferred

if TYPE_CHECKING:
    import onnx
else:
    onnx = deferred("onnx")

__all__ = ["Call", "Rule"]


@dataclass(frozen=True)
class Call:
    """A node and what is known of its inputs.

    Attributes:
        node: the node.
        inputs: `None` for an input that is left out.
        attributes: by name, subgraphs left out.
        opset: version of the node's domain.
        samples: how many samples are analysed.
    """

    node: onnx.NodeProto
    inputs: Sequence[Value | None]
    attributes: Mapping[str, Any]
    opset: int
    samples: int

    def value(self, index: int) -> Value:
        """Return an input that has to be there."""
        found = self.optional(index)
        if found is None:
            raise UnknownError(f"input {index} is missing")
        return found

    def optional(self, index: int) -> Value | None:
        """Return an input, or `None`."""
        return self.inputs[index] if index < len(self.inputs) else None

    @property
    def given(self) -> tuple[Value, ...]:
        """The inputs that are there."""
        return tuple(value for value in self.inputs if value is not None)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute; text as `str`."""
        found = self.attributes.get(name, default)
        return found.decode() if isinstance(found, bytes) else found

    def ints(self, index: int | None, name: str = "") -> tuple[int, ...] | None:
        """Return integers from an attribute or from an input; `None` when neither is there.

        Raises:
            UnknownError: the input's numbers are not known.
        """
        if name and name in self.attributes:
            found = self.attributes[name]
            return tuple(int(each) for each in found) if isinstance(found, list | tuple) else (int(found),)
        value = None if index is None else self.optional(index)
        if value is None:
            return None
        if value.numbers is None:
            raise UnknownError(f"input {index} is computed from data")
        return tuple(int(each) for each in np.broadcast_to(value.numbers, value.dims).reshape(-1))

    def integer(self, index: int | None, name: str = "", default: int | None = None) -> int:
        """Return one integer; see `ints`."""
        found = self.ints(index, name)
        if found:
            return found[0]
        if default is None:
            raise UnknownError("a number is missing")
        return default

    def extra(self, *, without: Sequence[int] = ()) -> int:
        """Return the marks of all inputs but some."""
        marks = 0
        for index, value in enumerate(self.inputs):
            if value is not None and index not in without:
                marks |= total(value)
        return marks


Rule = Callable[[Call], Sequence[Value]]
