"""Recorded requests of a trial, with the batch axis that the model has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from repo_manager.errors import InputError
from repo_manager.request_data.read import read_rows
from repo_manager.request_data.tensors import Array, InputFacts
from repo_manager.triton_config import ModelConfig
from repo_manager.triton_messages import model_config_pb2

__all__ = ["Array", "Request", "read_requests"]

Request = Mapping[str, Array]
"""Input name -> array, batch axis included where the model has one."""

_DATA_TYPE = model_config_pb2.DataType.DESCRIPTOR


def read_requests(path: Path, config: ModelConfig) -> tuple[Request, ...]:
    """Read recorded requests for a model; see `request_data.read.read_rows` for the forms of the file.

    A request without batch axis gets one of size 1 where the model batches.

    Args:
        path: the file.
        config: what the server runs the model with: names, types and dims come from it.

    Raises:
        InputError: the file cannot be read, holds no request, or one does not fit the model; with its number.
    """
    inputs = {entry.name: _facts(entry) for entry in config.message().input}
    batched = config.max_batch_size > 0
    return tuple(
        {name: _fitted(array, inputs[name], batched, f"{path}, request {number}") for name, array in row.items()}
        for number, row in enumerate(read_rows(path, list(inputs.values())), start=1)
    )


def _facts(entry: model_config_pb2.ModelInput) -> InputFacts:
    kind = _DATA_TYPE.values_by_number[entry.data_type].name.removeprefix("TYPE_")
    return InputFacts(
        entry.name, "BYTES" if kind == "STRING" else kind, tuple(int(size) for size in entry.dims), entry.optional
    )


def _fitted(array: Array, item: InputFacts, batched: bool, where: str) -> Array:
    """Return the array with its batch axis.

    Raises:
        InputError: its shape is not the input's.
    """
    wanted = (-1, *item.shape) if batched else item.shape
    if batched and array.ndim == len(item.shape):
        array = array[None]
    fits = array.ndim == len(wanted) and all(
        size in (-1, found) for size, found in zip(wanted, array.shape, strict=True)
    )
    if not fits:
        raise InputError(f"{where}, input {item.name}: the shape is {list(array.shape)}, expected {list(wanted)}")
    return array
