"""The likely meaning of a field or a value missing in Triton's schema."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from repo_manager.triton_messages import model_config_pb2

__all__ = ["meant_field", "meant_value"]

_NO_VALUE = re.compile(r'Enum type "(?:inference\.)?([\w.]+)" has no value named (\w+)')
_CLOSE = 0.75
# Names from other tools and formats, or common mistakes -> the field. Lower case.
_FIELDS = {
    "versions": "version_policy",
    "version": "version_policy",
    "batch_size": "max_batch_size",
    "inputs": "input",
    "outputs": "output",
    "shape": "dims",
    "dtype": "data_type",
    "type": "data_type",
    "filename": "default_model_filename",
    "model_filename": "default_model_filename",
    "warmup": "model_warmup",
    "batching": "dynamic_batching",
    "instances": "instance_group",
    "decoupled": "model_transaction_policy",
    "max_queue_delay_us": "max_queue_delay_microseconds",
    "max_queue_delay": "max_queue_delay_microseconds",
}
_TYPES = {
    "FLOAT": "FP32",
    "FLOAT16": "FP16",
    "FLOAT32": "FP32",
    "FLOAT64": "FP64",
    "HALF": "FP16",
    "DOUBLE": "FP64",
    "INT": "INT32",
    "LONG": "INT64",
    "BYTE": "UINT8",
    "BYTES": "STRING",
    "STR": "STRING",
    "BOOLEAN": "BOOL",
    "BFLOAT16": "BF16",
}


def meant_field(path: str) -> str:
    """Return the field an unknown one is a slip of. Empty when none is near.

    Args:
        path: as in `ModelConfig.unknown_fields`: `field`, or `field.field` for one anywhere inside the first.
    """
    top, _, inner = path.partition(".")
    fields = model_config_pb2.ModelConfig.DESCRIPTOR.fields_by_name
    if not inner:
        return _nearest(top, fields)
    found = _nearest(inner, _names_below(fields[top].message_type, set())) if top in fields else ""
    return f"{top}.{found}" if found else ""


def meant_value(error: str) -> str:
    """Return the value an unknown one in a parser's message is a slip of. Empty when none is near."""
    match = _NO_VALUE.search(error)
    if match is None:
        return ""
    kind, given = match.groups()
    outer, _, inner = kind.rpartition(".")
    module: Any = getattr(model_config_pb2, outer, None) if outer and "." not in outer else model_config_pb2
    enum = getattr(module, inner, None)
    if enum is None:
        return ""
    values = enum.keys()
    prefix = values[0].partition("_")[0]
    plain = given.upper().removeprefix(f"{prefix}_")
    return _nearest(f"{prefix}_{_TYPES.get(plain, plain)}", values)


def _names_below(message: Any, seen: set[str]) -> set[str]:
    """Return the names of all fields of a message and of the messages inside it."""
    if message is None or message.full_name in seen:
        return set()
    seen.add(message.full_name)
    names = set(message.fields_by_name)
    for field in message.fields:
        names |= _names_below(field.message_type, seen)
    return names


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    alias = _FIELDS.get(name.lower(), "")
    if alias in names:
        return alias
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=_CLOSE)), "")
