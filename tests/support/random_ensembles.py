"""Random ensembles over a fixed set of models, valid ones and mutated ones, and the real server's verdicts."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from repo_manager.errors import ServerRefusedError
from repo_manager.server.client import TritonClient
from repo_manager.triton_config.config import ModelConfig, parse_config
from repo_manager.triton_config.ensembles import Member, check_ensembles
from repo_manager.triton_config.problems import Severity
from repo_manager.triton_config.rules import check_rules
from repo_manager.triton_config.version_policy import served_versions

MODEL = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse(error=pb_utils.TritonError("not asked for")) for _ in requests]
"""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor: its type and its shape with the batch axis (-1)."""

    data_type: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of the set."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    batch: int = 8
    versions: tuple[int, ...] = (1,)
    policy: str = ""
    extra: str = ""
    optional: tuple[str, ...] = ()

    def text(self) -> str:
        lines = [f'backend: "python" max_batch_size: {self.batch} {self.policy} {self.extra}']
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            lines += [entry(kind, name, each, self.batch, name in self.optional) for name, each in tensors.items()]
        return "\n".join(lines) + "\n"


def entry(kind: str, name: str, tensor: Tensor, batch: int, optional: bool = False) -> str:
    dims = tensor.shape[1:] if batch else tensor.shape
    more = " optional: true" if optional else ""
    return f'{kind} {{ name: "{name}" data_type: TYPE_{tensor.data_type} dims: {list(dims)}{more} }}'


A, B = Tensor("FP32", (-1, 4)), Tensor("FP32", (-1, -1))
C, D = Tensor("INT32", (-1, 4)), Tensor("FP32", (-1, 4, 2))
MODELS = {
    "same": Model({"x": A}, {"y": A}),
    "any": Model({"x": B}, {"y": B}),
    "ints": Model({"x": A}, {"y": C}),
    "back": Model({"x": C}, {"y": A}),
    "wide": Model({"x": A}, {"y": D}),
    "flat": Model({"x": D}, {"y": A}),
    "two": Model({"x": A, "z": C}, {"y": A, "w": D}),
    "maybe": Model({"x": A, "z": C}, {"y": A}, optional=("z",)),
    "small": Model({"x": A}, {"y": A}, batch=2),
    "whole": Model({"x": A}, {"y": A}, batch=0),
    "old": Model({"x": A}, {"y": A}, versions=(1, 2, 3), policy="version_policy { specific { versions: [ 1, 2 ] } }"),
    "stream": Model({"x": A}, {"y": A}, extra="model_transaction_policy { decoupled: true }"),
    "broken": Model({"x": A}, {"y": A}, extra="dynamic_batching { preferred_batch_size: [ 99 ] }"),
}
_LOADABLE = tuple(name for name in MODELS if name != "broken")


@dataclasses.dataclass
class Step:
    """A step open to mutations."""

    model: str
    version: int
    inputs: dict[str, str]
    outputs: dict[str, str]

    def text(self) -> str:
        maps = [f'input_map {{ key: "{key}" value: "{value}" }}' for key, value in self.inputs.items()]
        maps += [f'output_map {{ key: "{key}" value: "{value}" }}' for key, value in self.outputs.items()]
        return f'step {{ model_name: "{self.model}" model_version: {self.version} {" ".join(maps)} }}'


@dataclasses.dataclass
class Ensemble:
    """An ensemble open to mutations."""

    batch: int
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    steps: list[Step]

    def text(self) -> str:
        lines = [f'platform: "ensemble" max_batch_size: {self.batch}']
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            lines += [entry(kind, name, each, self.batch) for name, each in tensors.items()]
        return "\n".join([*lines, f"ensemble_scheduling {{ {' '.join(step.text() for step in self.steps)} }}", ""])


def random_ensemble(draw: random.Random) -> Ensemble:
    """Make an ensemble, most likely valid: each step takes tensors of its inputs' shapes and types."""
    tensors = {"in0": A, **({"in1": C} if draw.random() < 0.4 else {})}
    inputs = dict(tensors)
    steps: list[Step] = []
    for index in range(draw.randint(1, 4)):
        fitting = [
            name
            for name in _LOADABLE
            if all(fit in tensors.values() for key, fit in MODELS[name].inputs.items() if key != "z" or name == "two")
        ]
        name = draw.choice([each for each in fitting if each != "small" or draw.random() < 0.3] or ["any"])
        model = MODELS[name]
        sources = {
            key: draw.choice([tensor for tensor, each in tensors.items() if each == wanted] or ["in0"])
            for key, wanted in model.inputs.items()
            if key not in model.optional or draw.random() < 0.5
        }
        made = {key: f"t{index}{key}" for key in model.outputs}
        tensors.update({made[key]: each for key, each in model.outputs.items()})
        steps.append(Step(name, draw.choice([-1, -1, -1, 1]), sources, made))
    used = {tensor for step in steps for tensor in step.inputs.values()}
    inputs = {name: each for name, each in inputs.items() if name in used}
    outputs = {name: each for name, each in tensors.items() if name not in used and name not in ("in0", "in1")}
    return Ensemble(draw.choice([8, 8, 4, 2]), inputs, outputs, steps)


def mutate(ensemble: Ensemble, draw: random.Random) -> None:
    """Change one thing; the result may still be right."""
    step = draw.choice(ensemble.steps)
    tensors = [
        *ensemble.inputs,
        *ensemble.outputs,
        *(name for each in ensemble.steps for name in each.outputs.values()),
    ]
    kind = draw.randrange(14)
    if kind == 0:
        step.model = draw.choice(["nobody", "broken"])
    elif kind == 1:
        step.version = draw.choice([2, 3, 9])
    elif kind == 2:
        step.model = draw.choice(_LOADABLE)
    elif kind == 3 and step.inputs:
        step.inputs[draw.choice(list(step.inputs))] = draw.choice([*tensors, "nowhere"])
    elif kind == 4 and step.outputs:
        step.outputs[draw.choice(list(step.outputs))] = draw.choice([*tensors, "new"])
    elif kind == 5 and step.inputs:
        del step.inputs[draw.choice(list(step.inputs))]
    elif kind == 6 and step.outputs:
        del step.outputs[draw.choice(list(step.outputs))]
    elif kind == 7:
        step.inputs["unknown"] = draw.choice(tensors)
    elif kind == 8:
        step.outputs["unknown"] = "extra"
    elif kind == 9:
        ensemble.batch = draw.choice([0, 1, 16])
    elif kind == 10:
        side = draw.choice([ensemble.inputs, ensemble.outputs])
        if side:
            side[draw.choice(list(side))] = draw.choice([A, B, C, D])
    elif kind == 11:
        draw.choice([ensemble.inputs, ensemble.outputs])["spare"] = A
    elif kind == 12 and len(ensemble.steps) > 1:
        ensemble.steps.remove(step)
    elif kind == 13:
        ensemble.steps.reverse()


def texts_of(count: int, seed: int) -> dict[str, str]:
    """Return name -> config.pbtxt of random ensembles. Later ones may contain earlier ones.

    None contains a cyclic one: Triton 2.51 recurses without end when it enters a cycle from outside.
    """
    draw = random.Random(seed)
    made: dict[str, Ensemble] = {}
    for index in range(count):
        name, ensemble = f"e{index}", random_ensemble(draw)
        for _ in range(draw.choice([0, 0, 1, 2])):
            mutate(ensemble, draw)
        if draw.random() < 0.02:
            draw.choice(ensemble.steps).model = name
        elif made and draw.random() < 0.15:
            inner = draw.choice([each for each in made if each not in {step.model for step in made[each].steps}])
            _nest(inner, made[inner], ensemble, draw)
        made[name] = ensemble
    return {name: ensemble.text() for name, ensemble in made.items()}


def _nest(name: str, inner: Ensemble, ensemble: Ensemble, draw: random.Random) -> None:
    """Add a step with another ensemble, most often with all of its inputs from tensors of the same name."""
    outputs = {tensor: f"inner_{tensor}" for tensor in inner.outputs}
    sources = {tensor: tensor for tensor in inner.inputs}
    ensemble.steps.append(Step(name, draw.choice([-1, -1, 1, 2]), sources, outputs))
    ensemble.inputs.update(inner.inputs)
    ensemble.outputs.update({made: inner.outputs[tensor] for tensor, made in outputs.items()})


def write(root: Path, texts: dict[str, str]) -> None:
    """Write the set of models and the ensembles."""
    for name, model in MODELS.items():
        for version in model.versions:
            (root / name / str(version)).mkdir(parents=True)
            (root / name / str(version) / "model.py").write_text(MODEL)
        (root / name / "config.pbtxt").write_text(model.text())
    for name, text in texts.items():
        (root / name / "1").mkdir(parents=True)
        (root / name / "config.pbtxt").write_text(text)


def our_verdict(name: str, configs: dict[str, ModelConfig]) -> list[str]:
    """Return the objections to an ensemble, or to an ensemble inside it.

    Args:
        name: the ensemble.
        configs: of all ensembles and all models of the set.
    """
    members = {each: Member(config, served_versions(config, versions_of(each))) for each, config in configs.items()}
    own = [problem for problem in check_rules(configs[name]) if problem.severity is Severity.ERROR]
    return [str(problem) for problem in (*own, *check_ensembles([name], members))]


def versions_of(name: str) -> tuple[int, ...]:
    return MODELS[name].versions if name in MODELS else (1,)


def configs_of(texts: dict[str, str]) -> dict[str, ModelConfig]:
    """Return the configurations of ensembles and of all models of the set."""
    return {name: parse_config(text) for name, text in {**{n: m.text() for n, m in MODELS.items()}, **texts}.items()}


def server_verdict(name: str, client: TritonClient) -> str:
    """Return why the server refuses an ensemble; empty when it loads it."""
    try:
        client.load(name)
    except ServerRefusedError as exc:
        return exc.message
    client.unload(name)
    return ""
