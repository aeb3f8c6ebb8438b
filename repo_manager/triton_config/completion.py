"""A server's completion of a configuration with missing fields, or of none at all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from repo_manager.errors import ConfigError
from repo_manager.optional import deferred
from repo_manager.triton_config.backend_io import ConfigMismatch, complete, needs_completion
from repo_manager.triton_config.compare import as_document, tensors_by_name
from repo_manager.triton_config.config import DEFAULT_FILENAMES, ModelConfig
from repo_manager.triton_config.served_signature import ServedSignature
from repo_manager.triton_messages import model_config_pb2

json_format = deferred("google.protobuf.json_format")

__all__ = ["backend_of_files", "completed_config", "config_as_written", "described"]

# In the order of `AutoCompleteBackendFields` of triton-inference-server/core.
_FILES = {
    "model.savedmodel": "tensorflow",
    "model.graphdef": "tensorflow",
    "model.plan": "tensorrt",
    "model.onnx": "onnxruntime",
    "model.xml": "openvino",
    "model.pt": "pytorch",
    "model.pt2": "pytorch",
    "model.py": "python",
}
_FILLED_IN = ("name", "runtime", "instance_group", "version_policy", "optimization")


def backend_of_files(names: Iterable[str], model: str = "") -> str:
    """Return the backend Triton takes for a model without a configuration. Empty when it cannot tell.

    Args:
        names: the files and folders in a version's folder.
        model: the model's name. For any other backend it is NAME.BACKEND, for instance `video.dali`.
    """
    present = set(names)
    for file, backend in _FILES.items():
        if file in present:
            return backend
    return model.partition(".")[2]


def completed_config(config: ModelConfig, signature: ServedSignature) -> ModelConfig:
    """Return a configuration as completed by the onnxruntime backends, the native one and the embedded one.

    Args:
        config: the configuration. An empty one where there is none.
        signature: inputs and outputs of the ONNX model. They fill in those `config` lacks.

    Raises:
        ConfigError: it asks for batches, and the model has no batch axis, or a tensor has a type Triton lacks.
    """
    document = as_document(config)
    document.setdefault("backend", "onnxruntime")
    if needs_completion(document):
        try:
            complete(
                document,
                tensors_by_name("input", signature.inputs),
                tensors_by_name("output", signature.outputs),
            )
        except ConfigMismatch as exc:
            raise ConfigError(str(exc)) from None
    message = model_config_pb2.ModelConfig()
    json_format.ParseDict(document, message)
    return ModelConfig.from_message(message, labels=config.labels, variants=config.variants)


def config_as_written(message: Any) -> ModelConfig:
    """Return a running server's configuration without the fields every server fills in on its own.

    Args:
        message: a `model_config_pb2.ModelConfig` as a server shows it, of a model with no config.pbtxt.
    """
    plain = model_config_pb2.ModelConfig()
    plain.CopyFrom(message)
    for field in _FILLED_IN:
        plain.ClearField(field)
    if plain.backend:
        plain.ClearField("platform")
    if plain.default_model_filename == DEFAULT_FILENAMES.get(plain.backend, "model.py"):
        plain.ClearField("default_model_filename")
    if list(plain.dynamic_batching.preferred_batch_size) == [plain.max_batch_size]:
        del plain.dynamic_batching.preferred_batch_size[:]
    return ModelConfig.from_message(plain)


def described(config: ModelConfig) -> str:
    """Describe a configuration in one line: `max_batch_size 4, x TYPE_FP32 [3] -> y TYPE_FP32 [2]`."""
    message = config.message()
    sides = [
        ", ".join(f"{each.name} {model_config_pb2.DataType.Name(each.data_type)} {list(each.dims)}" for each in tensors)
        for tensors in (message.input, message.output)
    ]
    return f"max_batch_size {config.max_batch_size}, {sides[0]} -> {sides[1]}"
