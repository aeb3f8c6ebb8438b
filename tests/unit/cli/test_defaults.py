"""Each default is written once: an option takes it from its setting, or has none."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer

from repo_manager.cli.commands import COMMANDS
from repo_manager.cli.option_groups import Binding, bindings_of, option, settings_of
from repo_manager.cli.rollout_options import RolloutFlags
from repo_manager.loadtest.options import LoadTestOptions
from repo_manager.rollout.options import RolloutOptions

ABSENT = (None, False, ..., inspect.Parameter.empty)


def callbacks() -> Iterator[tuple[str, Callable[..., None]]]:
    """Every command's function, `loadtest merge` among them."""
    for module in sorted({entry.module for entries in COMMANDS.values() for entry in entries.values()}):
        app = importlib.import_module(f"repo_manager.cli.{module}").app
        apps = [app, *(group.typer_instance for group in app.registered_groups)]
        for info in (info for one in apps for info in one.registered_commands):
            yield (
                {"run": "loadtest", "merge": "loadtest merge", "make": "calibrate"}.get(info.name, info.name),
                info.callback,
            )


CALLBACKS = dict(callbacks())
FIELDS = [
    (name, group, field)
    for name, callback in CALLBACKS.items()
    for group in callback.__groups__  # type: ignore[attr-defined]
    for field in dataclasses.fields(group)
]
BOUND = [(name, group, field) for name, group, field in FIELDS if field.name in dict(bindings_of(group))]


def test_every_command_is_looked_at() -> None:
    names = {name for entries in COMMANDS.values() for name in entries}
    assert set(CALLBACKS) == names | {"loadtest merge"}
    assert len(BOUND) > 100


@pytest.mark.parametrize(("name", "group", "field"), BOUND, ids=lambda value: getattr(value, "name", str(value)))
def test_an_option_that_sets_something_has_its_default(name: str, group: type, field: dataclasses.Field[Any]) -> None:
    binding = dict(bindings_of(group))[field.name]
    given = binding.value(field.default)
    assert given == pytest.approx(binding.default) if isinstance(given, float) else given == binding.default


@pytest.mark.parametrize("name", CALLBACKS)
def test_an_option_that_sets_nothing_has_no_default(name: str) -> None:
    bound = {field.name for command, _, field in BOUND if command == name}
    for parameter in inspect.signature(CALLBACKS[name]).parameters.values():
        if parameter.name not in bound:
            assert parameter.default in ABSENT, f"{name}: {parameter.name}: bind it to the setting of the library"


def test_the_parser_has_the_same_defaults() -> None:
    """Typer's default of a field is the field's own, for every option of every command."""
    for entries in COMMANDS.values():
        for entry in entries.values():
            group = typer.main.get_group(importlib.import_module(f"repo_manager.cli.{entry.module}").app)
            for name, command in group.commands.items():
                fields = {field.name: field.default for one, _, field in FIELDS if one == name}
                for parameter in command.params if name not in ("loadtest", "calibrate") else ():
                    if parameter.name in fields and fields[parameter.name] is not ...:
                        assert parameter.default == fields[parameter.name], f"{name}: {parameter.name}"


def test_no_setting_is_set_by_two_options_of_a_command() -> None:
    for name in CALLBACKS:
        sets = [
            (binding.owner, binding.name)
            for command, group, field in BOUND
            if command == name
            for binding in [dict(bindings_of(group))[field.name]]
        ]
        assert len(sets) == len(set(sets)), name


@dataclasses.dataclass(frozen=True)
class Settings:
    rate: float = 0.1
    names: tuple[str, ...] = ("a",)
    none: int | None = None


@dataclasses.dataclass(frozen=True)
class Flags:
    percent: float = option(
        "--percent", sets=(Settings, "rate"), read=lambda value: value / 100, show=lambda value: value * 100, help="x"
    )
    names: list[str] | None = option("--names", sets=(Settings, "names"), help="x")
    none: int | None = option("--none", sets=(Settings, "none"), help="x")


def test_settings_are_read_from_what_was_given() -> None:
    assert Flags().percent == 10
    assert Settings(**settings_of(Settings, Flags(percent=20.0, names=["b", "c"], none=0))) == Settings(
        0.2, ("b", "c"), 0
    )
    assert settings_of(LoadTestOptions, Flags()) == {}


def test_a_setting_that_is_not_there_is_an_error() -> None:
    with pytest.raises(KeyError, match="speed"):
        _ = Binding(Settings, "speed").default
    with pytest.raises(LookupError, match="has no default"):
        _ = Binding(LoadTestOptions, "model").default


def test_a_deadline_that_is_given_holds_for_each_load() -> None:
    assert RolloutOptions(**RolloutFlags().settings()) == RolloutOptions()
    for seconds in (5.0, 7200.0):
        given = RolloutOptions(**RolloutFlags(timeout=seconds).settings())
        assert (given.deadline_s, given.load_timeout_s) == (seconds, seconds)
    text = (inspect.signature(CALLBACKS["deploy"]).parameters["timeout"].annotation.__metadata__[0]).help
    assert f"default: {RolloutOptions.deadline_s:g}s, a load {RolloutOptions.load_timeout_s:g}s" in text


def test_every_option_in_seconds_is_a_duration() -> None:
    """An option in seconds takes `3s` and `2m`, whatever the command."""
    in_seconds = {
        (name, field.name)
        for name, group, field in BOUND
        if dict(bindings_of(group))[field.name].name.endswith("_s")
        and not dict(bindings_of(group))[field.name].name.endswith("_per_s")
    }
    takes_units = {(name, field.name) for name, _, field in BOUND if field.metadata["parameter"].metavar == "DURATION"}
    assert in_seconds == takes_units
    assert ("loadtest", "duration") in in_seconds
