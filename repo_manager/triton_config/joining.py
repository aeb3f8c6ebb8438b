"""An ensemble's configuration from the models it consists of: tensors are matched by name, type and dims.

A tensor flows from an earlier model to a later one. An input takes the output of its own name if it fits, else the
only output of fitting type and dims, else it is an input of the ensemble. An optional input takes a tensor of its
name, else nothing. Where more than one answer is left, none is guessed: the error lists them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from repo_manager.errors import ConfigError, UsageError
from repo_manager.triton_config.config import ModelConfig
from repo_manager.triton_config.ensembles import dims_match
from repo_manager.triton_messages import model_config_pb2

__all__ = ["Edge", "EnsemblePart", "Joined", "TensorMap", "join_models"]

_OWN = "input:"


@dataclasses.dataclass(frozen=True)
class EnsemblePart:
    """One model of the ensemble to be.

    Attributes:
        model: name of the model in the repository.
        version: the version the ensemble asks for. `None`: the newest served.
        config: its configuration, with the inputs and outputs listed.
    """

    model: str
    version: int | None
    config: ModelConfig


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """A decision about one input.

    Attributes:
        source: `OUTPUT` or `MODEL.OUTPUT` of an earlier model. `input:NAME` is an input of the ensemble.
        target: `INPUT` or `MODEL.INPUT` of a later model. A model the ensemble has twice is `MODEL#1`, `MODEL#2`.
    """

    source: str
    target: str

    @classmethod
    def parse(cls, text: str) -> TensorMap:
        """Read `SOURCE=TARGET`.

        Raises:
            UsageError: it has another form.
        """
        source, _, target = text.partition("=")
        if not source or not target:
            raise UsageError(f"--map {text}: expected OUTPUT=INPUT, MODEL.OUTPUT=MODEL.INPUT or input:NAME=MODEL.INPUT")
        return cls(source, target)


@dataclasses.dataclass(frozen=True)
class Edge:
    """The source of one model's input.

    Attributes:
        source: `MODEL.OUTPUT`, or `input:NAME` for an input of the ensemble.
        model: the receiving model, with `#1`, `#2` where the ensemble has it twice.
        input: name of the model's input.
        by: `map`, `name`, `type and dims`, or `input` for an input of the ensemble, without another fit.
    """

    source: str
    model: str
    input: str
    by: str


@dataclasses.dataclass(frozen=True)
class Joined:
    """An ensemble's configuration, and how it came about.

    Attributes:
        config: the configuration, with the labels of the models' outputs.
        edges: the source of each input, in the order of the models.
        left_out: optional inputs without a source, as `MODEL.INPUT`.
    """

    config: ModelConfig
    edges: tuple[Edge, ...]
    left_out: tuple[str, ...]


def join_models(
    name: str, parts: Sequence[EnsemblePart], maps: Sequence[TensorMap] = (), outputs: Sequence[str] = ()
) -> Joined:
    """Write the configuration of an ensemble.

    Args:
        name: name of the new ensemble, written into its configuration.
        parts: its models, in the order of the data flow.
        maps: decisions taken from the matching.
        outputs: the tensors the ensemble returns, as `OUTPUT` or `MODEL.OUTPUT`. None: every output no later model
            takes.

    Raises:
        UsageError: more than one tensor fits an input, or a name in `maps` or `outputs` is unknown or represents
            several tensors.
        ConfigError: a model's configuration lists no inputs or outputs.
    """
    for part in parts:
        message = part.config.message()
        if not message.input or not message.output:
            kind = "inputs" if not message.input else "outputs"
            raise ConfigError(
                f"{part.model}: its config.pbtxt lists no {kind}, so nothing can be matched with it",
                hint="Publish it with repo-manager add, which lets the backend complete it, or list them by hand.",
            )
    return _Joining(name, parts, maps).run(outputs)


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensor:
    """A tensor of the ensemble.

    Attributes:
        place: the number of the model behind it. -1 for an input of the ensemble.
        step: the model's name, with `#1`, `#2` where the ensemble has it twice. Empty for an input of the ensemble.
        name: as the model, or the ensemble, calls it.
        data_type: number of its element type in `model_config_pb2.DataType`.
        dims: without the batch axis added by `max_batch_size`.
        batched: whether it has the batch axis.
        labels: its file of labels and their content.
    """

    place: int
    step: str
    name: str
    data_type: int
    dims: tuple[int, ...]
    batched: bool
    labels: tuple[str, tuple[str, ...]] | None = None

    @property
    def text(self) -> str:
        return f"{_OWN}{self.name}" if self.place < 0 else f"{self.step}.{self.name}"

    @property
    def full_dims(self) -> tuple[int, ...]:
        return (-1, *self.dims) if self.batched else self.dims

    def shown(self) -> str:
        kind = model_config_pb2.DataType.Name(self.data_type).removeprefix("TYPE_")
        return f"{self.text} ({kind} {list(self.dims)})"

    def fits(self, other: _Tensor) -> bool:
        """Return whether Triton takes one for the other (`ValidateTensorConsistency` of core)."""
        return self.data_type == other.data_type and (
            dims_match(self.dims, other.dims) or dims_match(self.full_dims, other.full_dims)
        )


class _Joining:
    """The tensors so far, model after model."""

    def __init__(self, name: str, parts: Sequence[EnsemblePart], maps: Sequence[TensorMap]) -> None:
        self._name = name
        self._parts = parts
        self._batch = min(part.config.max_batch_size for part in parts)
        models = [part.model for part in parts]
        called = [
            f"{model}#{models[: place + 1].count(model)}" if models.count(model) > 1 else model
            for place, model in enumerate(models)
        ]
        self._wanted = [_tensors(place, called[place], part.config, "input") for place, part in enumerate(parts)]
        self._made = [_tensors(place, called[place], part.config, "output") for place, part in enumerate(parts)]
        self._optional = {
            (place, str(entry.name))
            for place, part in enumerate(parts)
            for entry in part.config.message().input
            if entry.optional
        }
        self._own: dict[str, _Tensor] = {}
        self._takes: dict[_Tensor, _Tensor] = {}
        self._by: dict[_Tensor, str] = {}
        self._mapped = dict(self._decided(each) for each in maps)

    def run(self, outputs: Sequence[str]) -> Joined:
        unclear: list[tuple[_Tensor, list[_Tensor]]] = []
        left_out: list[str] = []
        for place, wanted in enumerate(self._wanted):
            found: dict[_Tensor, list[_Tensor]] = {}
            for each in wanted:
                if each in self._mapped:
                    self._take(each, self._mapped_source(each), "map")
                else:
                    found[each] = self._choices(each, place)
            taken = [choices[0] for each, choices in found.items() if len(choices) == 1 and not _named(each, choices)]
            for each, choices in found.items():
                if not choices and (place, each.name) in self._optional:
                    left_out.append(each.text)
                elif not choices:
                    self._take(each, self._own_input(each.name, each), "input")
                elif len(choices) > 1 or (not _named(each, choices) and taken.count(choices[0]) > 1):
                    unclear.append((each, choices))
                else:
                    self._take(each, choices[0], "name" if _named(each, choices) else "type and dims")
        if unclear:
            raise self._ambiguous(unclear)
        returned = self._returned(outputs)
        edges = tuple(
            Edge(self._takes[each].text, each.step, each.name, self._by[each])
            for wanted in self._wanted
            for each in wanted
            if each in self._takes
        )
        return Joined(self._config(returned), edges, tuple(left_out))

    def _choices(self, wanted: _Tensor, place: int) -> list[_Tensor]:
        """Return the candidates for an input. None: a new input of the ensemble."""
        earlier = [each for made in self._made[:place] for each in made if each.fits(wanted)]
        named = [each for each in earlier if each.name == wanted.name]
        own = self._own.get(wanted.name)
        shared = [own] if own is not None and own.fits(wanted) else []
        if (place, wanted.name) in self._optional:
            return named
        return named or [*earlier, *shared]

    def _take(self, wanted: _Tensor, source: _Tensor, by: str) -> None:
        if not source.fits(wanted):
            raise UsageError(f"{self._name}: {source.shown()} does not fit {wanted.shown()}")
        self._takes[wanted], self._by[wanted] = source, by

    def _own_input(self, name: str, like: _Tensor) -> _Tensor:
        """Return an input of the ensemble, new where none of its name fits."""
        known = self._own.get(name)
        if known is not None and not known.fits(like):
            name = f"{like.step}_{name}"
            known = self._own.get(name)
        if known is None:
            known = dataclasses.replace(like, place=-1, step="", name=name)
            self._own[name] = known
        return known

    def _decided(self, decision: TensorMap) -> tuple[_Tensor, TensorMap]:
        """Return the input a decision is about."""
        where = f"--map {decision.source}={decision.target}"
        return self._one(decision.target, self._wanted, where, "input"), decision

    def _mapped_source(self, wanted: _Tensor) -> _Tensor:
        decision = self._mapped[wanted]
        where = f"--map {decision.source}={decision.target}"
        if decision.source.startswith(_OWN):
            name = decision.source.removeprefix(_OWN)
            known = self._own.get(name)
            return known if known is not None else self._own_input(name, wanted)
        earlier = self._made[: wanted.place]
        is_earlier = any(decision.source in (each.name, each.text) for made in earlier for each in made)
        source = self._one(decision.source, earlier if is_earlier else self._made, where, "output")
        if source.place >= wanted.place:
            raise UsageError(
                f"{where}: {source.text} is made at step {source.place + 1} and {wanted.text} is taken at step "
                f"{wanted.place + 1}",
                hint="Name the models in the order of the data flow.",
            )
        return source

    def _one(self, text: str, tensors: Sequence[Sequence[_Tensor]], where: str, kind: str) -> _Tensor:
        known = [each for group in tensors for each in group]
        found = [each for each in known if text in (each.name, each.text)]
        if len(found) == 1:
            return found[0]
        listed = ", ".join(each.text for each in found or known)
        if not found:
            raise UsageError(f"{where}: no model has the {kind} {text!r}", hint=f"Their {kind}s: {listed}.")
        raise UsageError(f"{where}: {text!r} matches {len(found)} {kind}s", hint=f"Choose one: {listed}.")

    def _ambiguous(self, unclear: Sequence[tuple[_Tensor, list[_Tensor]]]) -> UsageError:
        lines, hints = [], []
        for wanted, choices in unclear:
            new = [] if any(each.text == f"{_OWN}{wanted.name}" for each in choices) else [f"{_OWN}{wanted.name}"]
            lines.append(f"  {wanted.shown()} may take " + ", ".join([*(c.shown() for c in choices), *new]))
            hints += [f"--map {text}={wanted.text}" for text in (*(choice.text for choice in choices), *new)]
        return UsageError(
            f"{self._name}: it is not clear what these inputs take:\n" + "\n".join(lines),
            hint=f"Choose one for each: {'  '.join(hints)}",
        )

    def _returned(self, outputs: Sequence[str]) -> list[_Tensor]:
        if outputs:
            return [self._one(text, self._made, f"--output {text}", "output") for text in outputs]
        used = set(self._takes.values())
        return [each for made in self._made for each in made if each not in used]

    def _config(self, returned: Sequence[_Tensor]) -> ModelConfig:
        names = self._tensor_names(returned)
        message = model_config_pb2.ModelConfig(name=self._name, platform="ensemble", max_batch_size=self._batch)
        whole = self._whole_batches()
        for own in self._own.values():
            taken_by = [wanted.place for wanted, source in self._takes.items() if source is own]
            message.input.add(
                name=names[own], data_type=own.data_type, dims=self._own_dims(own, any(p in whole for p in taken_by))
            )
        labels: dict[str, tuple[str, ...]] = {}
        for each in returned:
            entry = message.output.add(
                name=names[each], data_type=each.data_type, dims=self._own_dims(each, each.place in whole)
            )
            if each.labels is not None:
                entry.label_filename = f"{each.step}_{each.labels[0]}" if each.labels[0] in labels else each.labels[0]
                labels[entry.label_filename] = each.labels[1]
        for place, part in enumerate(self._parts):
            step = message.ensemble_scheduling.step.add(model_name=part.model, model_version=part.version or -1)
            for wanted in self._wanted[place]:
                if wanted in self._takes:
                    step.input_map[wanted.name] = names[self._takes[wanted]]
            for made in self._made[place]:
                if made in names:
                    step.output_map[made.name] = names[made]
        return ModelConfig.from_message(message, labels=labels)

    def _own_dims(self, tensor: _Tensor, whole: bool) -> tuple[int, ...]:
        """Return the dims of an input or output of the ensemble.

        An ensemble without batching has models with it where not all have it: such a model gets and gives one sample,
        unless an unbatched model hands it a whole batch.
        """
        return tensor.full_dims if self._batch == 0 and whole else tensor.dims

    def _whole_batches(self) -> set[int]:
        """Return the batching models whose batch is one tensor of a model without batching, or of another one."""
        found: set[int] = set()
        for wanted, source in self._takes.items():  # in the order of the models
            alone = wanted.batched and not source.batched and not dims_match(wanted.dims, source.dims)
            if alone or (wanted.batched and source.place in found):
                found.add(wanted.place)
        return found

    def _tensor_names(self, returned: Sequence[_Tensor]) -> dict[_Tensor, str]:
        """Give each tensor in use a name of its own. Inputs and outputs of the ensemble keep theirs first."""
        used = [*self._own.values(), *returned, *self._takes.values()]
        names: dict[_Tensor, str] = {}
        taken: set[str] = set()
        for tensor in dict.fromkeys(used):
            name = next(each for each in self._name_ideas(tensor) if each not in taken)
            taken.add(name)
            names[tensor] = name
        return names

    def _name_ideas(self, tensor: _Tensor) -> Iterator[str]:
        yield tensor.name
        yield f"{tensor.step}_{tensor.name}"
        number = 2
        while True:
            yield f"{tensor.step}_{tensor.name}_{number}"
            number += 1


def _named(wanted: _Tensor, choices: Sequence[_Tensor]) -> bool:
    return len(choices) == 1 and choices[0].name == wanted.name


def _tensors(place: int, step: str, config: ModelConfig, kind: str) -> list[_Tensor]:
    message = config.message()
    entries: Any = message.input if kind == "input" else message.output
    return [
        _Tensor(
            place,
            step,
            str(entry.name),
            int(entry.data_type),
            tuple(entry.dims),
            config.max_batch_size > 0,
            (str(entry.label_filename), config.labels[entry.label_filename])
            if kind == "output" and entry.label_filename in config.labels
            else None,
        )
        for entry in entries
    ]
