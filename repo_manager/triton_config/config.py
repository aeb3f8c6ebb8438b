"""`ModelConfig`: a config.pbtxt as a frozen value, read and written through protobuf."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from google.protobuf import text_format  # type: ignore[import-untyped]  # its stubs are a separate package

from repo_manager.errors import ConfigError
from repo_manager.files import read_regular
from repo_manager.lfs import LFS_HINT, LFS_MOST_BYTES, LFS_POINTER, is_lfs_pointer
from repo_manager.triton_config.slips import meant_value
from repo_manager.triton_config.text_fields import top_level_fields
from repo_manager.triton_messages import is_repeated, model_config_pb2

__all__ = [
    "CONFIG_FILENAME",
    "DEFAULT_FILENAMES",
    "VARIANTS_FOLDER",
    "ModelConfig",
    "format_config",
    "parse_config",
    "read_config",
    "takes_sequences",
]

CONFIG_FILENAME = "config.pbtxt"

# triton-inference-server/core, src/constants.h. Triton has no default for tensorrt_rtx, so ours is always written.
DEFAULT_FILENAMES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "tensorrt_rtx": "model.engine"}
# Next to the versions: tritonserver --model-config-name=NAME reads NAME.pbtxt here instead of config.pbtxt.
VARIANTS_FOLDER = "configs"
_PLATFORM_BACKENDS = {"onnxruntime_onnx": "onnxruntime", "tensorrt_plan": "tensorrt"}

_NO_FIELD = re.compile(r'has no field named "([^"]*)"')
# Represents 0 while printing. It is never valid, because max_batch_size must not be negative.
_ZERO_STAND_IN = -(2**31)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model's configuration.

    Attributes:
        text: protobuf's text form, in the fields' order. Two equal configurations have equal texts.
        labels: content of the label files the outputs name: file name -> one label a line.
        variants: configurations for tritonserver's `--model-config-name`: name -> text of `configs/NAME.pbtxt`.
        unknown_fields: fields of the parsed text unknown to our copy of Triton's schema (of a newer Triton, or
            misspelt), as `field` or `field.field`. They are not in `text`.
    """

    text: str
    labels: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    variants: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unknown_fields: tuple[str, ...] = ()
    _message: Any = dataclasses.field(default=None, repr=False, compare=False, metadata={"json": False})

    @classmethod
    def from_message(
        cls,
        message: Any,
        *,
        labels: Mapping[str, tuple[str, ...]] | None = None,
        variants: Mapping[str, str] | None = None,
    ) -> ModelConfig:
        """Wrap a copy of a `model_config_pb2.ModelConfig`.

        Args:
            message: the protobuf message. Later changes to it do not reach the copy.
            labels: file name -> labels of the label files. `None`: no files.
            variants: name -> text of the variants, as in the attribute. `None`: none.
        """
        copy = model_config_pb2.ModelConfig()
        copy.CopyFrom(message)
        return cls(text=_print(copy), labels=dict(labels or {}), variants=dict(variants or {}), _message=copy)

    def message(self) -> Any:
        """Return a copy of the protobuf message, free to change."""
        copy = model_config_pb2.ModelConfig()
        copy.CopyFrom(self._message)
        return copy

    @property
    def name(self) -> str:
        """The model's name. Empty where Triton takes the folder's."""
        return str(self._message.name)

    @property
    def backend(self) -> str:
        """The backend's name, also when only the older `platform` is given. Empty when neither is."""
        return str(self._message.backend) or _PLATFORM_BACKENDS.get(self._message.platform, "")

    @property
    def max_batch_size(self) -> int:
        """The largest batch. 0 when the tensors have no batch axis of Triton's."""
        return int(self._message.max_batch_size)

    @property
    def is_ragged(self) -> bool:
        """Whether requests are joined flat, so the model's first axis need not be the batch axis."""
        return bool(self._message.batch_input) or any(each.allow_ragged_batch for each in self._message.input)

    @property
    def model_filename(self) -> str:
        """The model file's name in a version's folder. Empty when Triton has no default for the backend."""
        return str(self._message.default_model_filename) or DEFAULT_FILENAMES.get(self.backend, "")

    @property
    def label_filenames(self) -> tuple[str, ...]:
        """The label files the outputs name, each once."""
        return tuple(dict.fromkeys(str(o.label_filename) for o in self._message.output if o.label_filename))


def takes_sequences(message: Any) -> bool:
    """Return whether a `ModelConfig`'s clients send sequences of requests.

    Of an iterative sequence they do not: Triton makes a sequence of each request, and the model schedules it again.
    """
    return message.HasField("sequence_batching") and not message.sequence_batching.iterative_sequence


def format_config(config: ModelConfig) -> str:
    """Return the text to write into config.pbtxt, `max_batch_size: 0` included."""
    return config.text


def parse_config(text: str, *, where: str = CONFIG_FILENAME) -> ModelConfig:
    """Parse a config.pbtxt.

    A field missing in our copy of the schema (of a newer Triton, or misspelt) is named in `unknown_fields`, and is not
    in `text`. To rewrite the file, edit its text instead of printing the result.

    Args:
        text: content of a config.pbtxt, without a byte order mark. Empty gives an empty configuration.
        where: its name in an error, normally its path.

    Raises:
        ConfigError: the text is not a model configuration. The message has the line.
    """
    if text.startswith("\ufeff"):
        raise ConfigError(
            f"{where} starts with a byte order mark, which Triton does not take",
            hint="Save it as UTF-8 without a byte order mark (sed -i '1s/^\\xEF\\xBB\\xBF//' FILE).",
        )
    if is_lfs_pointer(text[:LFS_MOST_BYTES].encode(errors="replace")):
        raise ConfigError(f"{where} is {LFS_POINTER}", hint=LFS_HINT)
    message = model_config_pb2.ModelConfig()
    unknown: tuple[str, ...] = ()
    try:
        text_format.Parse(text, message)
    except (text_format.ParseError, ValueError, RecursionError) as exc:
        unknown = _unknown_fields(text, where) if "has no field named" in str(exc) else ()
        message = model_config_pb2.ModelConfig()
        try:
            if not unknown:
                raise
            text_format.Parse(text, message, allow_unknown_field=True)
        except (text_format.ParseError, ValueError, RecursionError) as reason:
            meant = meant_value(str(reason))
            raise ConfigError(
                f"{where} is not a Triton model configuration: {reason}",
                hint=f"Did you mean {meant}?"
                if meant
                else "Correct the file; the fields are in Triton's model_config.proto.",
            ) from exc
    for path, field, value in _enum_values(message, ""):
        if value not in field.enum_type.values_by_number:
            known = ", ".join(each.name for each in field.enum_type.values)
            raise ConfigError(f"{where} has {path}: {value}, which is none of its values", hint=f"They are: {known}.")
    return dataclasses.replace(ModelConfig.from_message(message), unknown_fields=unknown)


def _enum_values(message: Any, parent: str) -> Iterator[tuple[str, Any, int]]:
    """Yield path, field and number of every enum value: protobuf accepts numbers without a meaning."""
    for field, value in message.ListFields():
        path = f"{parent}{field.name}"
        if field.enum_type is not None:
            yield from ((path, field, number) for number in (value if is_repeated(field) else (value,)))
        elif field.message_type is None:
            continue
        elif not is_repeated(field):
            yield from _enum_values(value, f"{path}.")
        elif not field.message_type.GetOptions().map_entry:
            for index, item in enumerate(value):
                yield from _enum_values(item, f"{path}[{index}].")
        elif field.message_type.fields_by_name["value"].message_type is not None:
            for key in value:
                yield from _enum_values(value[key], f"{path}.{key}.")


def _unknown_fields(text: str, where: str) -> tuple[str, ...]:
    """Name the fields the schema lacks: those at the top, and the first one inside each other field."""
    known = model_config_pb2.ModelConfig.DESCRIPTOR.fields_by_name
    names: list[str] = []
    for field in top_level_fields(text, where=where):
        if field.name not in known:
            names.append(field.name)
            continue
        try:
            text_format.Parse(text[field.start : field.end], model_config_pb2.ModelConfig())
        except (text_format.ParseError, ValueError, RecursionError) as exc:
            found = _NO_FIELD.search(str(exc))
            names.append(field.name + (f".{found.group(1)}" if found else ""))
    return tuple(dict.fromkeys(names))


def read_config(path: Path) -> ModelConfig:
    """Read and parse a config.pbtxt.

    Args:
        path: the file, or the model's folder.

    Raises:
        ConfigError: missing, unreadable, not UTF-8 or not a model configuration.
    """
    file = path / CONFIG_FILENAME if path.is_dir() else path
    return parse_config(read_config_text(file), where=str(file))


def read_config_text(path: Path) -> str:
    """Read a config.pbtxt's text.

    Raises:
        ConfigError: missing, unreadable or not UTF-8.
    """
    try:
        return read_regular(path).decode()
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", hint="Every model needs a config.pbtxt in its folder.") from None
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path} is not UTF-8 text: {exc}") from exc


def _print(message: Any) -> str:
    """Print a message with `max_batch_size` written out also when it is 0.

    Text format leaves out fields with their default. A missing max_batch_size and 0 mean the same to Triton once it is
    loaded, but not to a reader, and auto-completion may fill a missing one in.
    """
    is_zero = message.max_batch_size == 0
    if is_zero:
        message.max_batch_size = _ZERO_STAND_IN
    text: str = text_format.MessageToString(message, as_utf8=True, use_short_repeated_primitives=True)
    if is_zero:
        message.max_batch_size = 0
        # Match a whole line: text format escapes newlines inside strings.
        text = ("\n" + text).replace(f"\nmax_batch_size: {_ZERO_STAND_IN}\n", "\nmax_batch_size: 0\n", 1)[1:]
    return text
