"""Rules of the backends and of the plug-ins of Triton's core: parameters, accelerators, batching strategies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from repo_manager.triton_config.problems import Severity
from repo_manager.triton_config.rules.rule import Fault, Rule

__all__ = ["BACKEND_RULES"]

_ONNXRUNTIME = "onnxruntime"
_FLAGS = {"true", "on", "1", "false", "off", "0"}
"""The words `ParseBoolValue` of triton-inference-server/backend takes, in lower case."""
_WHOLE = re.compile(r"\s*[+-]?\d+")
_CHOICES: dict[str, tuple[str, ...]] = {"execution_mode": ("0", "1")}
_COUNTS = ("intra_op_thread_count", "inter_op_thread_count")
_GPU_CHOICES: dict[str, tuple[str, ...]] = {
    "cudnn_conv_algo_search": ("0", "1", "2"),
    "arena_extend_strategy": ("0", "1"),
}
_STRATEGY = "TRITON_BATCH_STRATEGY_PATH"
_FORCE_CPU, _ENVIRONMENT = "FORCE_CPU_ONLY_INPUT_TENSORS", "EXECUTION_ENV_PATH"


def _is_onnxruntime(message: Any) -> bool:
    return bool(_ONNXRUNTIME in (message.backend, message.platform.partition("_")[0]))


def _onnxruntime_parameters(message: Any) -> Iterator[Fault]:
    """The onnxruntime backend's parameters are numbers and flags it can read."""
    if not _is_onnxruntime(message):
        return
    given = {name: message.parameters[name].string_value for name in sorted(message.parameters)}
    for name in _COUNTS:
        if name in given and not _WHOLE.match(given[name]):
            yield Fault(f"parameter {name} is {given[name]!r}; expected a whole number")
    for name, values in _CHOICES.items():
        if name in given and given[name].strip() not in values:
            yield Fault(f"parameter {name} is {given[name]!r}; expected {' or '.join(values)}")
    for name in ("enable_mem_arena", "enable_mem_pattern"):
        if name in given and given[name].lower() not in _FLAGS:
            yield Fault(f"parameter {name} is {given[name]!r}; expected 0 or 1, true or false")
    for name, values in _GPU_CHOICES.items():
        if name in given and given[name].strip() not in values:
            text = f"parameter {name} is {given[name]!r}; expected {', '.join(values)}"
            yield Fault(text, Severity.WARNING, "a server with a GPU refuses the model")


def _accelerators(message: Any) -> Iterator[Fault]:
    """The onnxruntime backend knows its execution accelerators."""
    if not _is_onnxruntime(message):
        return
    accelerators = message.optimization.execution_accelerators
    for each in accelerators.cpu_execution_accelerator:
        if each.name != "openvino":
            yield Fault(f"cpu_execution_accelerator {each.name!r} is unknown to the backend; expected 'openvino'")
    for each in accelerators.gpu_execution_accelerator:
        if each.name not in ("tensorrt", "cuda"):
            text = f"gpu_execution_accelerator {each.name!r} is unknown to the backend; expected 'tensorrt' or 'cuda'"
            yield Fault(text, Severity.WARNING, "a server with a GPU refuses the model")
        mode = each.parameters.get("precision_mode", "FP32")
        if each.name == "tensorrt" and mode not in ("FP32", "FP16", "BF16", "INT8"):
            text = f"precision_mode of gpu_execution_accelerator 'tensorrt' is {mode!r}; expected FP32, FP16 or INT8"
            yield Fault(text, Severity.WARNING, "a server with a GPU refuses the model")


def _python_model(message: Any) -> Iterator[Fault]:
    """The python backend takes its model's file and the values of its parameters."""
    if message.backend != "python":
        return
    named = message.default_model_filename
    if named and not named.endswith(".py"):
        yield Fault(f"default_model_filename is {named!r}, and the python backend takes a file that ends in .py only")
    if _FORCE_CPU in message.parameters:
        value = message.parameters[_FORCE_CPU].string_value
        if value not in ("yes", "no"):
            yield Fault(f"parameter {_FORCE_CPU} is {value!r}; expected 'yes' or 'no'")
    if _ENVIRONMENT in message.parameters:
        path = message.parameters[_ENVIRONMENT].string_value
        if "$$TRITON_MODEL_DIRECTORY" not in path:
            text = f"parameter {_ENVIRONMENT} is {path!r}, a path on the server"
            yield Fault(text, Severity.WARNING, "a server without it refuses the model")


def _batching_strategy(message: Any) -> Iterator[Fault]:
    """A batching strategy of one's own goes with the dynamic batcher only."""
    if _STRATEGY not in message.parameters:
        return
    if message.HasField("sequence_batching"):
        yield Fault(f"parameter {_STRATEGY} is given, and a model with sequence_batching cannot use one")
        return
    text = f"parameter {_STRATEGY} is {message.parameters[_STRATEGY].string_value!r}, a path on the server"
    yield Fault(text, Severity.WARNING, "a server without it refuses the model")


def _agents(message: Any) -> Iterator[Fault]:
    """Repository agents are libraries of the server."""
    for agent in message.model_repository_agents.agents:
        if not agent.name:
            yield Fault("an agent of model_repository_agents has no name")
        else:
            text = f"model_repository_agents names the agent {agent.name!r}, a library on the server"
            yield Fault(text, Severity.WARNING, "a server without it refuses the model")


BACKEND_RULES = (
    Rule("onnxruntime-parameters", "onnxruntime_backend: ModelState::ModelState", _onnxruntime_parameters),
    Rule("execution-accelerators", "onnxruntime_backend: ModelState::LoadModel", _accelerators),
    Rule("python-model", "python_backend: ModelState::ModelState, ModelInstanceState", _python_model),
    Rule("batching-strategy", "TritonModel::Create", _batching_strategy),
    Rule("repository-agents", "CreateAgentModelListWithLoadAction", _agents),
)
