"""Options as the fields of frozen dataclasses: a command takes a group of options as one parameter.

A field made by `option` may be bound to a setting of the library: `sets=(RolloutOptions, "retries")`. The setting's
default is then the option's default, and `settings_of` gives the options' values to the library. So the option, the
setting it sets and the conversion between the two are one line, and no default is written twice.

    @dataclasses.dataclass(frozen=True)
    class How:
        PANEL: ClassVar[str] = "Roll-out"
        retries: int = option("--retries", sets=(RolloutOptions, "retries"), min=0, help="Times to ask again.")

    @app.command("deploy")
    @grouped
    def deploy_command(named_version: NamedVersion, how: How) -> None:
        options = RolloutOptions(**settings_of(RolloutOptions, how))
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import typer

__all__ = ["Binding", "argument", "bindings_of", "grouped", "option", "plain_help", "settings_of"]

_PARAMETER, _BINDING = "parameter", "binding"


@dataclasses.dataclass(frozen=True)
class Binding:
    """The setting an option sets.

    Attributes:
        owner: a dataclass of options, or a function.
        name: its field, or its parameter.
        read: makes the setting's value from the option's. `None` takes it as it is, a list as a tuple.
        show: makes the option's default from the setting's. `None` takes it as it is, nothing for an empty collection.
    """

    owner: Callable[..., Any]
    name: str
    read: Callable[[Any], Any] | None = None
    show: Callable[[Any], Any] | None = None

    @functools.cached_property
    def default(self) -> Any:
        """The setting's default.

        Raises:
            LookupError: there is no such setting, or it has no default.
        """
        if dataclasses.is_dataclass(self.owner):
            field = {field.name: field for field in dataclasses.fields(self.owner)}[self.name]
            found = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        else:
            found = inspect.signature(self.owner).parameters[self.name].default
        if found in (dataclasses.MISSING, inspect.Parameter.empty):
            raise LookupError(f"{self.owner.__name__}.{self.name} has no default")
        return found

    @property
    def shown_default(self) -> Any:
        """The default as the option has it."""
        if self.show is not None:
            return self.show(self.default)
        return None if self.default in ((), {}, []) else self.default

    def value(self, given: Any) -> Any:
        """Return the setting's value for a value of the command line."""
        if self.read is not None:
            return self.default if given is None else self.read(given)
        if given is None and isinstance(self.default, tuple | Mapping):
            return self.default
        return tuple(given) if isinstance(given, list) else given


def option(
    *names: str,
    help: str,
    sets: tuple[Callable[..., Any], str] | None = None,
    read: Callable[[Any], Any] | None = None,
    show: Callable[[Any], Any] | None = None,
    default: Any = None,
    **more: Any,
) -> Any:
    """Make a field of a group of options.

    Args:
        names: as they are written, the long one first: `--name`, `-n`.
        help: text on the effect of the option. Square brackets are text, no markup.
        sets: the library's setting with the default: a dataclass and its field, or a function and its parameter.
            `None`: the option sets nothing of the library.
        read: makes the setting's value from the option's, as in `Binding`. `None`: used unchanged.
        show: makes the option's default from the setting's, as in `Binding`. `None`: used unchanged.
        default: the default of an option without `sets`.
        **more: of `typer.Option`: `metavar`, `min`, `max`, `show_default`, `autocompletion`, `rich_help_panel`.
    """
    binding = None if sets is None else Binding(*sets, read, show)
    info = typer.Option(*names, help=plain_help(help), **more)
    value = default if binding is None else binding.shown_default
    if isinstance(value, bool) and info.metavar is None:
        info.metavar = ""  # a flag takes no value, but Typer would show <bool>
    return dataclasses.field(default=value, metadata={_PARAMETER: info, _BINDING: binding})


def argument(*, metavar: str, help: str, default: Any = ..., **more: Any) -> Any:
    """Make a field for an argument. It is required unless it has a default.

    Args:
        metavar: the argument's name in the usage line.
        help: one sentence. Square brackets are text, no markup.
        default: value without the argument. `...`: the argument is required.
    """
    info = typer.Argument(metavar=metavar, help=plain_help(help), show_default=False, **more)
    return dataclasses.field(default=default, metadata={_PARAMETER: info})


def plain_help(text: str) -> str:
    """Return a text shown by Rich as it is: square brackets are no markup."""
    return text.replace("[", "\\[")


def settings_of(owner: Callable[..., Any], *groups: Any) -> dict[str, Any]:
    """Return the settings groups of options hold for one dataclass or function, by name."""
    return {
        binding.name: binding.value(getattr(group, name))
        for group in groups
        for name, binding in bindings_of(type(group))
        if binding.owner is owner
    }


def bindings_of(group: type) -> Iterator[tuple[str, Binding]]:
    """Yield the fields of a group bound to the library, each with its setting."""
    for field in dataclasses.fields(group):
        if field.metadata.get(_BINDING) is not None:
            yield field.name, field.metadata[_BINDING]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command's parameters be dataclasses whose fields are options.

    Typer reads a command's signature: here each such parameter is replaced by the fields of its dataclass, and the
    command gets the dataclass. A field is made by `option` or `argument`, or declared as a parameter is:
    `x: Annotated[str, typer.Option(...)] = ""`. The dataclass may have a `PANEL`, the options' panel in the help, and
    a method `during`, whose context holds while the command runs.

    Args:
        command: its group parameters have no default.
    """
    # typing.get_type_hints wraps `Annotated[X, ...] = None` in Optional on Python 3.10, which hides the option.
    hints = inspect.get_annotations(command, eval_str=True)
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if not dataclasses.is_dataclass(kind):
            parameters.append(parameter.replace(annotation=kind))
            continue
        assert isinstance(kind, type)
        groups[parameter.name] = kind
        parameters += _parameters_of(kind)

    @functools.wraps(command)
    def call(**given: Any) -> None:
        with contextlib.ExitStack() as stack:
            for name, kind in groups.items():
                given[name] = kind(**{field.name: given.pop(field.name) for field in dataclasses.fields(kind)})
                if hasattr(kind, "during"):
                    stack.enter_context(given[name].during())
            command(**given)

    named = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    call.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]  # Typer reads it
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in named}
    call.__doc__ = plain_help(_paragraphs(command))
    call.__groups__ = tuple(groups.values())  # type: ignore[attr-defined]  # tells which setting an option sets
    return call


def _paragraphs(command: Callable[..., None]) -> str:
    """Return a command's documentation with each paragraph in one line: the help breaks lines by its own width."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split("\n")) for paragraph in paragraphs)


def _parameters_of(group: type) -> Iterator[inspect.Parameter]:
    """Yield a group's fields as parameters of a command."""
    hints = typing.get_type_hints(group, include_extras=True)
    panel = getattr(group, "PANEL", None)
    for field in dataclasses.fields(group):
        kind, info = hints[field.name], field.metadata.get(_PARAMETER)
        if info is not None:
            if panel is not None and isinstance(info, typer.models.OptionInfo):
                info.rich_help_panel = info.rich_help_panel or panel
            kind = Annotated[kind, info]
        default = inspect.Parameter.empty if field.default in (..., dataclasses.MISSING) else field.default
        yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
