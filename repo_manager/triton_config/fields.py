"""Setting single fields of a config.pbtxt from a typed text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from google.protobuf import text_format  # type: ignore[import-untyped]  # its stubs are a separate package

from repo_manager.errors import ConfigError
from repo_manager.triton_config.compare import changed_fields
from repo_manager.triton_config.config import ModelConfig, parse_config
from repo_manager.triton_config.slips import meant_field
from repo_manager.triton_config.text_edits import NotInPlaceError, edit_field
from repo_manager.triton_config.text_fields import replace_field, top_level_fields
from repo_manager.triton_messages import is_repeated

__all__ = ["get_field", "set_field", "set_fields"]

_NUMBER = re.compile(r"[0-9]{1,9}")
_STEP = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:\[(\d+)\])?")


def get_field(config: ModelConfig, path: str) -> str:
    """Return a field's text. A single value without its name, a message with its fields.

    Args:
        config: configuration of the model (config.pbtxt).
        path: path of the field, as in `set_fields`.

    Raises:
        ConfigError: there is no such field.
    """
    parent, field, key = _find(config.message(), path, create=False)
    if parent is None or field is None:
        return ""
    if key is not None:
        value = getattr(parent, field.name)
        if key not in value:
            return ""
        return str(value[key].string_value if _is_parameter(field) else value[key])
    if field.message_type is None and not is_repeated(field):
        value = getattr(parent, field.name)
        return field.enum_type.values_by_number[value].name if field.enum_type is not None else str(value)
    alone = type(parent)()
    alone.CopyFrom(parent)
    for other, _ in parent.ListFields():
        if other.name != field.name:
            alone.ClearField(other.name)
    return str(text_format.MessageToString(alone, as_utf8=True, use_short_repeated_primitives=True)).rstrip("\n")


def set_fields(text: str, changes: Mapping[str, str | None], *, where: str) -> str:
    """Return a config.pbtxt's text with some fields set or cleared.

    Only the change is rewritten, a single value where possible, else its top-level field. All other text, comments and
    unknown fields stay.

    Args:
        text: present content of the config.pbtxt. It may have fields unknown to our schema.
        changes: `field.field` -> the value in text format (quotes around a string may be left out), `None` to clear. A
            step into a repeated field is its first element, or the one given by `[i]`. A map's step is its key.
        where: the file's name in an error.

    Raises:
        ConfigError: the text or a change is broken, or a change would remove a field it does not name: protobuf keeps
            one field of a `oneof` (`dynamic_batching`, `sequence_batching` and `ensemble_scheduling`; `direct` and
            `oldest`). The three version policies are values of one choice: a new one replaces the old one.
    """
    before = parse_config(text, where=where)
    message = before.message()
    # Removals first: a removed field may exclude an added one.
    for path, value in sorted(changes.items(), key=lambda change: change[1] is not None):
        set_field(message, path, value)
    after = ModelConfig.from_message(message)
    changed = changed_fields(before, after)
    try:
        written = text
        for name in changed:
            written = _written(written, name, before, after, where)
        if _says(written, message, before.unknown_fields, where):
            return written
    except (NotInPlaceError, ConfigError):
        pass  # rewrite the whole field instead
    lost = [field for field in before.unknown_fields if field.partition(".")[0] in changed]
    if lost:
        raise ConfigError(
            f"{where}: {', '.join(lost)} would be lost by changing it through this repo-manager's schema",
            hint="Edit the file by hand, or update repo-manager.",
        )
    for name in changed:
        text = replace_field(text, name, _field_text(after, name), where=where)
    if not _says(text, message, before.unknown_fields, where):
        raise ConfigError(f"{where}: the change cannot be written without changing something else")
    return text


def _written(text: str, name: str, before: ModelConfig, after: ModelConfig, where: str) -> str:
    """Write a top-level field: within an existing one, only the change."""
    is_message = before.message().DESCRIPTOR.fields_by_name[name].message_type is not None
    if is_message and any(field.name == name for field in top_level_fields(text, where=where)):
        return edit_field(text, name, before.message(), after.message())
    return replace_field(text, name, _field_text(after, name), where=where)


def _says(text: str, message: Any, unknown: tuple[str, ...], where: str) -> bool:
    parsed = parse_config(text, where=where)
    return bool(parsed.message() == message) and parsed.unknown_fields == unknown


def set_field(message: Any, path: str, value: str | None) -> None:
    """Set or clear one field of a message, as `set_fields` does in a text.

    Args:
        message: the protobuf message. It is changed.
        path: path of the field, as in `set_fields`.
        value: new value, as config.pbtxt writes it. `None`: clear the field.

    Raises:
        ConfigError: there is no such field, or the value does not fit.
    """
    parent, field, key = _find(message, path, create=value is not None)
    if parent is None or field is None:
        return
    if key is not None:
        entries = getattr(parent, field.name)
        if value is None:
            entries.pop(key, None)
        elif _is_parameter(field):
            entries[key].string_value = value
        elif _value_of(field).message_type is not None:
            raise ConfigError(f"{path} is a whole entry; set its fields one by one")
        else:
            entries[key] = value
        return
    parent.ClearField(field.name)
    if value is None:
        return
    candidates = [
        f"{field.name}: {value}",
        f"{field.name} {value}",
        f'{field.name}: "{text_format.text_encoding.CEscape(value, True)}"',
    ]
    for candidate in candidates if field.cpp_type == field.CPPTYPE_STRING else candidates[:2]:
        scratch = type(parent)()
        try:
            text_format.Parse(candidate, scratch)
        except (text_format.ParseError, ValueError):
            continue
        if [found.name for found, _ in scratch.ListFields()] in ([field.name], []):
            if _is_map(field) and not all(getattr(scratch, field.name)):
                raise ConfigError(
                    f"{path} = {value!r} has no key, and each entry of a map needs one",
                    hint=f"Set one entry: {path}.KEY=VALUE. Or remove all: --clear {path}.",
                )
            parent.MergeFrom(scratch)
            return
    raise ConfigError(
        f"{path} = {value!r} is not a value of {field.full_name}",
        hint="Write it as in a config.pbtxt, for instance 8, true, KIND_CPU, [1, 2] or { count: 1 }.",
    )


def _find(message: Any, path: str, *, create: bool, start: int = 0) -> tuple[Any, Any, Any]:
    """Walk to a field: (its message, its descriptor, a map's key). (None, None, None) when a step does not exist.

    Args:
        message: message to start in: a `ModelConfig`, or a map's value. `create` changes it.
        path: whole path with dots, as errors show it. Steps before `start` are passed over.
        create: add what is missing on the way.
        start: the step of the path that is a field of `message`.
    """
    steps = path.split(".")
    current = message
    for position, step in enumerate(steps[start:], start=start):
        match = _STEP.fullmatch(step)
        field = current.DESCRIPTOR.fields_by_name.get(match.group(1)) if match else None
        if field is None or match is None:
            known = ", ".join(current.DESCRIPTOR.fields_by_name)
            meant = meant_field(".".join([*steps[:position], step]).partition("[")[0]) if position < 2 else ""
            raise ConfigError(
                f"{path}: {current.DESCRIPTOR.name} has no field {step!r}; it has {known}",
                hint=f"Did you mean {meant}?" if meant else None,
            )
        if create:
            _check_alone(current, field, steps[:position])
        rest = steps[position + 1 :]
        if _is_map(field) and rest:
            return _find_entry(current, field, path, position + 1, create=create)
        if not rest and match.group(2) is None:
            return current, field, None
        if field.message_type is None:
            raise ConfigError(f"{path}: {field.name} is a single value and has no fields or elements of its own")
        following = _enter(current, field, int(match.group(2) or 0), path, create)
        if following is None:
            return None, None, None
        if not rest:
            raise ConfigError(f"{path} is a whole element; set its fields one by one")
        current = following
    raise ConfigError("the path of the field is empty")


def _find_entry(message: Any, field: Any, path: str, start: int, *, create: bool) -> tuple[Any, Any, Any]:
    """Walk into a map, whose key begins at a step of the path. The longest key that is there counts: it may have dots.

    Raises:
        ConfigError: the key is of another type, or there is no such field behind it.
    """
    steps, entries = path.split("."), getattr(message, field.name)
    key: Any = ".".join(steps[start:])
    if _is_parameter(field) or _value_of(field).message_type is None:
        return message, field, key
    if field.message_type.fields_by_name["key"].cpp_type == field.CPPTYPE_STRING:
        ends = range(len(steps), start, -1)
        end = next((end for end in ends if ".".join(steps[start:end]) in entries), start + 1)
        key = ".".join(steps[start:end])
    elif _NUMBER.fullmatch(steps[start]):
        end, key = start + 1, int(steps[start])
    else:
        raise ConfigError(f"{path}: the keys of {field.name} are numbers, and {steps[start]!r} is none")
    if end == len(steps):
        return message, field, key
    if not create and key not in entries:
        return None, None, None
    return _find(entries[key], path, create=create, start=end)


def _is_map(field: Any) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _value_of(field: Any) -> Any:
    return field.message_type.fields_by_name["value"]


def _is_parameter(field: Any) -> bool:
    """Return whether a map's values are texts in a message of one field, as those of `parameters` are."""
    message = _value_of(field).message_type
    return message is not None and "string_value" in message.fields_by_name


def _check_alone(message: Any, field: Any, parents: list[str]) -> None:
    """Refuse to set a field of a `oneof` with another one set."""
    choice = field.containing_oneof
    other = None if choice is None else message.WhichOneof(choice.name)
    if other not in (None, field.name) and choice.name != "policy_choice":
        wanted, cleared = (".".join([*parents, name]) for name in (field.name, other))
        raise ConfigError(
            f"setting {wanted} would remove {cleared}: a configuration has only one of them",
            hint=f"If you want this, clear it in the same change: --clear {cleared}",
        )


def _enter(message: Any, field: Any, index: int, path: str, create: bool) -> Any:
    value = getattr(message, field.name)
    if not is_repeated(field):
        return value if create or message.HasField(field.name) else None
    if index > len(value):
        raise ConfigError(f"{path}: {field.name} has {len(value)} elements")
    if index == len(value):
        return value.add() if create else None
    return value[index]


def _field_text(config: ModelConfig, name: str) -> str:
    """Return one top-level field's text in canonical form. Empty when it is not set."""
    fields = [field for field in top_level_fields(config.text, where=name) if field.name == name]
    return "\n".join(config.text[field.start : field.end] for field in fields)
