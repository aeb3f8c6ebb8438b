"""The pages of the documentation that are made from the code: mkdocs calls this file as a hook (mkdocs.yml).

Commands and options come from the command line itself, settings, rules, schemas and the public API from what defines
them, so that no page can say what the code does not do. `python tools/site.py FOLDER` writes the pages without mkdocs.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import enum
import importlib
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import onnx
import typer
import typer.main
from packaging.requirements import Requirement

import repo_manager
from repo_manager import settings
from repo_manager.cli.commands import COMMANDS
from repo_manager.cli.main import app
from repo_manager.engine.capabilities import Capabilities, StrongTyping, capabilities_of
from repo_manager.engine.fit import Release, releases
from repo_manager.precision import candidate
from repo_manager.triton_config.rules import RULES
from repo_manager.types import Precision, _json_fields

__all__ = ["generated_pages", "json_forms", "on_config", "on_files", "on_page_markdown", "on_post_build"]

ROOT = Path(__file__).parents[1]
BRANCH = "blob/main"
_MARKUP = re.compile(r"\[/?(?:bold|dim|italic|cyan|green|red|yellow)\]")


def generated_pages() -> dict[str, str]:
    """Return every page that is made from the code: path in the site -> Markdown."""
    pages = {f"reference/commands/{name}.md": page for name, page in _command_pages()}
    pages["reference/commands/index.md"] = _commands_index()
    pages["reference/settings.md"] = _settings_page()
    pages["reference/rules.md"] = _rules_page()
    pages["reference/api.md"] = _api_page()
    pages["reference/compatibility.md"] = _compatibility_page()
    pages["reference/json.md"] = _json_page()
    for name, title in (("repository", "repository.yaml"), ("manifest", "manifest.json")):
        pages[f"reference/{name}.md"] = _schema_page(json.loads((ROOT / f"docs/{name}.schema.json").read_text()), title)
    return pages


def _command_pages() -> Iterator[tuple[str, str]]:
    table: Any = typer.main.get_command(app)
    context = table.make_context("repo-manager", [], resilient_parsing=True)
    for names in COMMANDS.values():
        for name in names:
            command = table.get_command(context, name)
            yield name, "\n".join(_command(command, f"repo-manager {name}", level=1)).rstrip() + "\n"


def _command(command: Any, path: str, *, level: int) -> Iterator[str]:
    """Describe a command and, below it, the commands of a group."""
    context = command.make_context(path, [], resilient_parsing=True)
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"{'#' * level} {path}\n"
    yield f"```\n{path} {usage}\n```\n"
    yield _text(inspect.cleandoc(command.help or "")) + "\n"
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [
        each for each in command.params if each.param_type_name == "option" and not getattr(each, "hidden", False)
    ]
    if arguments:
        yield "| argument | meaning |\n|---|---|"
        yield from (_row(each, context) for each in arguments)
        yield ""
    by_panel: dict[str, list[Any]] = {}
    for each in options:
        by_panel.setdefault(getattr(each, "rich_help_panel", None) or "Options", []).append(each)
    for panel, members in by_panel.items():
        yield f"{'#' * (level + 1)} {panel}\n"
        yield "| option | meaning |\n|---|---|"
        yield from (_row(each, context) for each in members)
        yield ""
    for name, inner in getattr(command, "commands", {}).items():
        yield from _command(inner, f"{path} {name}", level=level + 1)


def _row(parameter: Any, context: Any) -> str:
    """Return an argument's or an option's line: the same two columns as `--help` has."""
    names, meaning = parameter.get_help_record(context) or (parameter.name, "")
    return f"| `{' '.join(names.split())}` | {_cell(meaning)} |"


def _commands_index() -> str:
    lines = ["# Commands\n"]
    for group, names in COMMANDS.items():
        lines += [f"## {group}\n", "| command | what it does |", "|---|---|"]
        lines += [f"| [`{name}`]({name}.md) | {entry.help} |" for name, entry in names.items()]
        lines.append("")
    lines.append("Every command takes `--json` ([the documents](../../reference/json.md)) and `--quiet`.")
    lines.append("[Exit codes](../../exit-codes.md) are the same for all.")
    return "\n".join(lines) + "\n"


def _settings_page() -> str:
    """Describe the settings by the strings below the fields."""
    source = inspect.getsource(settings.Settings)
    found = re.findall(r"^    (\w+): ([^\n]*?) = [^\n]*\n    \"\"\"(.*?)\"\"\"", source, re.MULTILINE | re.DOTALL)
    lines = [
        "# Settings\n",
        "Defaults for all commands: the settings file (`~/.config/repo-manager/settings.yaml`, or what",
        "`REPO_MANAGER_SETTINGS` names), then the environment, then the options of the command.\n",
        "| key of the file | environment variable | type | meaning |",
        "|---|---|---|---|",
    ]
    for name, kind, text in found:
        variable = f"`REPO_MANAGER_{name.upper()}`"
        lines.append(f"| `{name}` | {variable} | `{_cell(kind)}` | {_cell(' '.join(text.split()))} |")
    return "\n".join(lines) + "\n"


def _rules_page() -> str:
    lines = [
        "# Rules of config.pbtxt\n",
        "`verify`, `config`, `add` and `deploy` judge a configuration by these rules. Each is Triton's own. The last",
        "column says where Triton checks it.\n",
        "| rule | what must hold | Triton's source |",
        "|---|---|---|",
    ]
    lines += [f"| `{rule.name}` | {_cell(inspect.getdoc(rule.check) or '')} | `{rule.source}` |" for rule in RULES]
    return "\n".join(lines) + "\n"


def _api_page() -> str:
    """List the public names by the module that defines them, for mkdocstrings to fill in."""
    lines = [f"# Python API\n\n{_text(inspect.cleandoc(repo_manager.__doc__ or ''))}\n", "## Names\n"]
    lines += [f"::: repo_manager.{repo_manager._MODULE_OF[name]}.{name}\n" for name in repo_manager.__all__]
    return "\n".join(lines)


def _compatibility_page() -> str:
    """List Triton's releases, TensorRT's abilities, Python and opsets from the data that the code uses."""
    parts = (_python_lines(), _release_lines(), _tensorrt_lines(), _opset_lines())
    start = [
        "# Compatibility\n",
        "Which versions of Python, Triton, TensorRT and ONNX go together. The code takes the same data to decide.\n",
    ]
    return "\n".join([*start, *(line for part in parts for line in part)]) + "\n"


def _requirements() -> dict[str, list[Requirement]]:
    """Read from pyproject.toml what the package needs: `""` for always, else an extra (Python 3.10 has no tomllib)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    always = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    extras = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", text, re.DOTALL | re.MULTILINE)
    if always is None or extras is None:
        raise ValueError("pyproject.toml has no dependencies or no extras where this tool looks for them")
    lists = {"": always[1], **dict(re.findall(r"^([\w-]+) = \[(.*)\]$", extras[1], re.MULTILINE))}
    found = {name: re.findall(r'"([^"]+)"', items) for name, items in lists.items()}
    return {name: [Requirement(item) for item in items] for name, items in found.items()}


def _python_lines() -> Iterator[str]:
    """List the versions of Python, and what each extra needs."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    versions = re.findall(r"Python :: (3\.\d+)", project)
    needed = _requirements()
    (wheel,) = needed["server"]
    bounds = re.search(r'^requires-python = "(.*)"', project, re.MULTILINE)
    yield f"## Python\n\nPython `{bounds[1] if bounds else ''}`, on Linux.\n"
    yield "| Python | the embedded server comes from |\n|---|---|"
    for version in versions:
        has_wheel = wheel.marker is None or wheel.marker.evaluate({"python_version": version})
        way = "the extra `[server]`" if has_wheel else "`repo-manager doctor --install-tritonserver`"
        yield f"| {version} | {way} |"
    yield "\n| extra | packages |\n|---|---|"
    for name, packages in needed.items():
        if name != "docs":
            listed = ", ".join(f"`{each.name}{each.specifier}`" for each in packages)
            yield f"| {f'`{name}`' if name else '(always)'} | {listed} |"
    yield ""


def _release_lines() -> Iterator[str]:
    yield (
        "## Triton and TensorRT\n\n"
        "The container `tritonserver:RELEASE-py3` and its contents, newest first. `add --for-server`,\n"
        "`doctor --for-server` and `deploy` compare an engine with this table.\n\n"
        "- A plan loads in the TensorRT version of its build. A version-compatible plan also loads in later\n"
        "  versions of the same major version.\n"
        "- `(unverified)`: no source was read. Such a value causes a warning and never a refusal. `unknown` is not\n"
        "  compared. [TensorRT versions](../tensorrt-versions.md#triton-container-releases) lists the sources.\n"
        "- The driver is the smallest one listed for the release. Data-centre GPUs may use older branches.\n"
    )
    yield "| release | Triton | TensorRT | CUDA | driver |\n|---|---|---|---|---|"
    for release in reversed(releases()):
        cells = (_release_cell(release, name) for name in ("triton", "tensorrt", "cuda", "driver"))
        yield f"| {release.release} | {' | '.join(cells)} |"
    yield ""


def _release_cell(release: Release, column: str) -> str:
    value = getattr(release, column)
    return "unknown" if not value else value if release.is_verified(column) else f"{value} (unverified)"


def _tensorrt_lines() -> Iterator[str]:
    """Compare what the recorded APIs of TensorRT's versions can do."""
    found = [_recorded_library(path) for path in sorted((ROOT / "tests/data/tensorrt_api").glob("*.json"))]
    yield (
        "## Abilities of TensorRT\n\n"
        "From the recorded Python APIs. The installed library is asked in the same way, by the presence of names.\n"
        "[TensorRT versions](../tensorrt-versions.md) also covers the versions that are not recorded.\n"
    )
    yield f"| | {' | '.join(f'`{each.backend}` {each.version}' for each in found)} |\n|{'---|' * (len(found) + 1)}"
    rows = [_abilities(each) for each in found]
    for title in rows[0]:
        yield f"| {title} | {' | '.join(row[title] for row in rows)} |"
    yield ""


def _abilities(each: Capabilities) -> dict[str, str]:
    typing = {StrongTyping.ABSENT: "no", StrongTyping.ASK: "on request", StrongTyping.ALWAYS: "always"}
    return {
        "builds without a GPU": _yes(not each.needs_gpu),
        "strongly typed networks": typing[each.strong_typing],
        "precision flags": ", ".join(sorted(each.precision_flags)) or "none",
        "sparse weights": _yes("SPARSE_WEIGHTS" in each.builder_flags),
        "timing cache": _yes(each.timing_cache),
        "progress and cancelling": _yes(each.progress_monitor),
        "parser names the failing node": _yes(each.parser_names_nodes),
        "target compute capabilities": ", ".join(each.compute_capabilities) or "GPU at hand",
        "hardware compatibility levels": ", ".join(each.hardware_levels).lower() or "none",
        "strip the weights": each.strip_flag or "no",
    }


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _recorded_library(path: Path) -> Capabilities:
    """Look up the abilities of a recorded API: a module with its names and nothing behind them."""
    record = json.loads(path.read_text(encoding="utf-8"))
    module = ModuleType(record["module"])
    module.__dict__["__version__"] = record["version"]
    for name, members in record["enums"].items():
        setattr(module, name, enum.Enum(name, {member: index for index, member in enumerate(members)}))
    for name, words in record["classes"].items():
        setattr(module, name, type(name, (), dict.fromkeys(words)))
    return capabilities_of(module)


def _opset_lines() -> Iterator[str]:
    """Say which opsets are read, and which one each precision needs."""
    oldest = next(each for each in _requirements()[""] if each.name == "onnx")
    yield (
        "## ONNX opset\n\n"
        f"The installed onnx (`{oldest.name}{oldest.specifier}`) decides: every opset of its own from 1 on is read.\n"
        "A newer opset is refused.\n"
    )
    yield "| onnx | newest opset |\n|---|---|"
    # Rows of the table: onnx's version, IR version, opset of ONNX's own operators, ...
    known = {row[0]: row[2] for row in onnx.helper.VERSION_TABLE if oldest.specifier.contains(row[0])}
    yield from (f"| {version} | {opset} |" for version, opset in reversed(known.items()))
    yield (
        "\nA conversion raises a lower opset to the one its precision needs, and keeps a higher one. It compares the\n"
        "results before and after ([how](../precision.md#the-model-before-its-precision-changes)).\n"
    )
    yield "| precision | smallest opset of the result |\n|---|---|"
    for precision in Precision:
        facts = precision.facts
        least = max(candidate._QUANTIZED_OPSET if facts.quantizes else 1, candidate._LOW_OPSET.get(facts.low, 1))
        yield f"| `{precision}` | {'the opset of the source' if least == 1 else least} |"


class _Form(NamedTuple):
    """One form of a command's `--json` document.

    Attributes:
        when: the options that choose it; empty for the usual one.
        parts: key of the document -> the function of `repo_manager/cli/` whose result is below it. The key `""` is a
            result that is the document itself. `MODULE.function` names another module, `#1` one of several results,
            `?` one that may be null, and `:string` a plain value.
    """

    when: str
    parts: Mapping[str, str]


_ROLLOUT = {"deploy": "deploy", "rollback": "rollback", "undeploy": "undeploy"}
_DOCUMENTS: Mapping[str, tuple[_Form, ...]] = {
    "quickstart": (_Form("", {"result": "quickstart", "report": ":string"}),),
    "doctor": (_Form("", {"": "examine_machine"}),),
    "inspect": (_Form("", {"": "inspect_model"}),),
    "prune": (_Form("", {"": "prune_with_data#1"}),),
    "calibrate": (_Form("`calibrate make`", {"": "make_calibration"}),),
    "convert": (_Form("", {"": "convert"}),),
    "add": (
        _Form("an ONNX file that is converted", {"": "add"}),
        _Form("files that are published as they are", {"": "add_files"}),
        _Form("`--preprocess`", {"": "add_with_images"}),
    ),
    "ensemble": (_Form("", {"": "make_ensemble"}),),
    "show": (_Form("`show NAME`", {"model": "find_model", "state": "model_state"}),),
    "verify": (_Form("", {"repairs": "repair", "signatures": "signing.check_signatures#0", "problems": "verify"}),),
    "config": (_Form("", {"": "change_config"}),),
    "labels": (_Form("with `--file`", {"": "set_labels"}),),
    "remove": (_Form("", {"": "remove"}),),
    "gc": (_Form("of versions", {"": "gc"}),),
    "adopt": (_Form("", {"repository": ":string", "adopted": "adopt"}),),
    "sign": (_Form("", {"": "sign_version"}),),
    "apply": (
        _Form("", {"": "carry_out"}),
        _Form("`--check`, `--dry-run`, or nothing to change", {"changes": ":boolean", "models": "plan_declaration"}),
    ),
    "snapshot": (_Form("", {"": "snapshot"}),),
    "fetch": (_Form("", {"": "fetch"}),),
    "serve": (_Form("`--detach`", {"": "start_detached"}), _Form("`--stop`", {"stopped": "stop_running"})),
    **{command: (_Form("", {"rollout": function}),) for command, function in _ROLLOUT.items()},
    "traffic": (_Form("", {"": "shift_traffic"}),),
    "status": (_Form("", {"": "status"}),),
    "loadtest": (_Form("", {"": "run_load_test", "verdict": "load_options.judge?"}),),
    "compare": (_Form("", {"comparisons": "compare_all"}),),
    "tune": (_Form("", {"": "tune"}),),
}
"""Commands whose document is the result of a function, as it is or below a key. The others are left out."""


def json_forms(command: str) -> dict[str, set[str]]:
    """Return the keys of each form of a command's `--json` document: when -> keys at the top."""
    return {
        form.when: {key for part in _parts(command, form) for key in _keys_of(*part)} for form in _DOCUMENTS[command]
    }


def _keys_of(key: str, kind: Any) -> tuple[str, ...]:
    return (key,) if key else _json_fields(kind) or ()


def _parts(command: str, form: _Form) -> list[tuple[str, Any]]:
    """Return a form's keys, each with the type of what is below it (a text: a plain value).

    Raises:
        ValueError: the command's module does not name the key.
    """
    own = next(names[command].module for names in COMMANDS.values() if command in names)
    found: list[tuple[str, Any]] = []
    for key, source in form.parts.items():
        if source.startswith(":"):
            found.append((key, source[1:]))
        else:
            path, _, index = source.removesuffix("?").partition("#")
            module, _, function = path.rpartition(".")
            place = importlib.import_module(f"repo_manager.cli.{module or own}")
            kind = typing.get_type_hints(getattr(place, function))["return"]
            if typing.get_origin(kind) is collections.abc.Iterator:  # a context manager gives one result
                (kind,) = typing.get_args(kind)
            kind = typing.get_args(kind)[int(index)] if index else kind
            found.append((key, kind | None if source.endswith("?") else kind))
        modules = {own, *(part.partition(".")[0] for part in form.parts.values() if "." in part)}
        texts = (inspect.getsource(importlib.import_module(f"repo_manager.cli.{name}")) for name in modules)
        if key and not any(f'"{key}":' in text for text in texts):
            raise ValueError(f"{command}: no module of {sorted(modules)} has the key {key!r}")
    return found


def _json_page() -> str:
    """List the keys of `--json` documents, from the classes of the results."""
    names = [name for entries in COMMANDS.values() for name in entries]
    missing = ", ".join(f"[`{name}`](commands/{name}.md)" for name in names if name not in _DOCUMENTS)
    lines = [
        "# JSON documents\n",
        "`--json` prints one document to stdout. The tables list its keys, from the classes of the results. The",
        "classes of nested values follow [below](#classes).\n",
        "- A key is always there. A value that is not known is `null`, and so is a float that is not finite.",
        "- Most units are in the names: `latency_ns`, `workspace_bytes`.",
        "- `status --watch` prints one document a line.",
        "- With a [context](../contexts.md), a document also has the key `context`.",
        "- An error is a document, too: `error` holds `type`, `message`, `hint` and `exit_code`",
        "  ([exit codes](../exit-codes.md)).\n",
        f"Not on this page, because the command puts its document together itself: {missing}.",
        "Of the commands below, these forms are missing for the same reason: `show NAME:VERSION`, `labels` without",
        "`--file`, `gc --snapshots`, `serve` in the foreground.\n",
    ]
    classes: dict[str, type] = {}
    for name in names:
        for form in _DOCUMENTS.get(name, ()):
            lines += [f"## {name}\n"] if form is _DOCUMENTS[name][0] else []
            lines += [f"{form.when[0].upper()}{form.when[1:]}:\n"] if form.when else []
            lines += ["| key | type | meaning |", "|---|---|---|"]
            for key, kind in _parts(name, form):
                lines += _json_rows(kind, classes) if not key else [f"| `{key}` | {_json_type(kind, classes)} | |"]
            lines.append("")
    lines.append("## Classes\n")
    written: list[str] = []
    while rest := sorted(set(classes) - set(written)):
        kind = classes[rest[0]]
        written.append(rest[0])
        rows = _json_rows(kind, classes)
        summary = (inspect.getdoc(kind) or "").partition("\n\n")[0]
        lines += [f"### {rest[0]}\n", f"{_cell(summary)}\n", "| key | type | meaning |", "|---|---|---|", *rows, ""]
    return "\n".join(lines) + "\n"


def _json_rows(kind: Any, classes: dict[str, type]) -> list[str]:
    """Return a line for each key of a dataclass; the classes of its values are added to `classes`."""
    hints, meanings = typing.get_type_hints(kind, localns=_deferred_names(kind)), _meanings(kind)
    texts = {name: _cell(text).replace("`None`", "`null`") for name, text in meanings.items()}
    return [
        f"| `{name}` | {_json_type(hints[name], classes)} | {texts.get(name, '')} |"
        for name in _json_fields(kind) or ()
    ]


def _deferred_names(kind: type) -> dict[str, Any]:
    """Return what a class's module imports for type checkers only, by name."""
    module = inspect.getmodule(kind)
    tree = ast.parse(inspect.getsource(module)) if module is not None else ast.Module([], [])
    found = [
        (node.module, alias.name)
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    ]
    ours = [(path, name) for path, name in found if path.startswith("repo_manager")]
    return {name: vars(importlib.import_module(path)).get(name) or _submodule(path, name) for path, name in ours}


def _submodule(path: str, name: str) -> ModuleType:
    return importlib.import_module(f"{path}.{name}")


def _meanings(kind: type) -> dict[str, str]:
    """Return what the docstrings of a class, and of those it extends, say of its attributes."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        _, _, section = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")
        section = section.partition("\n\n")[0]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, re.MULTILINE):
            found[name] = text
    return found


_PLAIN_TYPES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
    Any: "any",
    object: "any",
}


def _json_type(kind: Any, classes: dict[str, type]) -> str:
    """Name the JSON type of an annotation, as `as_json` writes it."""
    if isinstance(kind, str):
        return kind
    if kind in _PLAIN_TYPES:
        return _PLAIN_TYPES[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_json_type(each, classes) for each in arguments))
    if origin is typing.Literal:
        return ", ".join(f"`{json.dumps(each)}`" for each in arguments)
    if origin is not None and issubclass(origin, collections.abc.Mapping):
        return f"mapping to {_json_type(arguments[1], classes)}"
    if origin is tuple and Ellipsis not in arguments:
        return f"[{', '.join(_json_type(each, classes) for each in arguments)}]"
    if origin is not None and issubclass(origin, collections.abc.Iterable):
        return f"list of {_json_type(arguments[0], classes)}"
    if hasattr(kind, "__supertype__"):
        return _json_type(kind.__supertype__, classes)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return ", ".join(f"`{json.dumps(each.value)}`" for each in kind)
    if isinstance(kind, type) and _json_fields(kind) is not None and dataclasses.is_dataclass(kind):
        name = kind.__name__
        if classes.get(name, kind) is not kind or any(name.lower() in entries for entries in COMMANDS.values()):
            name = f"{name} of {kind.__module__.rpartition('.')[2]}"
        if classes.setdefault(name, kind) is not kind:
            raise ValueError(f"two classes of results are called {name}")
        return f"[{name}](#{name.lower().replace(' ', '-')})"
    return "string"  # a path, a place, or another value that is written as text


def _schema_page(schema: Mapping[str, Any], title: str) -> str:
    lines = [f"# {title}\n", f"{schema.get('description', '')}\n", "The same as a [JSON schema](../"]
    lines[-1] += f"{'repository' if title == 'repository.yaml' else 'manifest'}.schema.json).\n"
    for name, part in ((None, schema), *schema.get("$defs", {}).items()):
        properties = part.get("properties", {})
        if name is not None:
            lines += [f"## {name}\n", f"{_cell(part.get('description', ''))}\n"]
        if not properties:
            continue
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, value in properties.items():
            needed = " (required)" if key in part.get("required", ()) else ""
            default = f"`{json.dumps(value['default'])}`" if "default" in value else ""
            lines.append(f"| `{key}`{needed} | {_type_of(value)} | {default} | {_cell(value.get('description', ''))} |")
        lines.append("")
    return "\n".join(lines) + "\n"


def _type_of(value: Mapping[str, Any]) -> str:
    """Name a schema's type; a definition becomes a link to its heading."""
    if reference := value.get("$ref"):
        name = reference.rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for word in ("anyOf", "oneOf"):
        if word in value:
            return " or ".join(_type_of(each) for each in value[word])
    if "enum" in value or "const" in value:
        return ", ".join(f"`{json.dumps(each)}`" for each in value.get("enum", [value.get("const")]))
    kind = value.get("type", "any")
    if kind == "array":
        return f"list of {_type_of(value.get('items', {}))}"
    if kind == "object" and isinstance(value.get("additionalProperties"), dict):
        return f"mapping to {_type_of(value['additionalProperties'])}"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _text(text: str) -> str:
    """Return a help text as Markdown."""
    return _MARKUP.sub("", text).replace("\x08", "").replace("\\[", "[")


def _cell(text: str) -> str:
    """Return a text as a cell of a table."""
    return " ".join(_text(str(text)).split()).replace("|", "\\|").replace("<", "&lt;")


# What mkdocs calls.


def on_config(config: Any) -> Any:
    """Put a page of each command into the navigation."""
    pages = [f"reference/commands/{name}.md" for names in COMMANDS.values() for name in names]
    reference = next(part["Reference"] for part in config["nav"] if "Reference" in part)
    reference.insert(0, {"Commands": ["reference/commands/index.md", *pages]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and README.md and CHANGELOG.md, which stand at the root for GitHub."""
    from mkdocs.structure.files import File

    pages = {**generated_pages(), "index.md": _at_docs("README.md"), "changelog.md": _at_docs("CHANGELOG.md")}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def _at_docs(name: str) -> str:
    """Return a document of the root with its links as from docs/."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"\]\((?!https?:|#)([^)\s]+)\)", lambda match: f"]({_from_docs(match[1])})", text)


def _from_docs(target: str) -> str:
    return target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links to files outside the documentation lead to the repository, where its address is known.

    Raises:
        FileNotFoundError: there is no such file.
    """
    del page, files
    address = config["repo_url"]

    def replace(match: re.Match[str]) -> str:
        text, path, anchor = match.groups(default="")
        if (ROOT / "docs" / path).exists() or path.startswith("reference/"):
            return match[0]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"a link leads to {path}, which does not exist")
        return f"[{text}]({address}/{BRANCH}/{path}{anchor})" if address else f"{text} (`{path}` of the repository)"

    return re.sub(r"\[([^\]]*)\]\(\.\./((?!\.\./)[^)#\s]+)(#[^)\s]*)?\)", replace, markdown)


def on_post_build(config: Any) -> None:
    """Write llms.txt: what the project is, and every page with its first sentence."""
    site = Path(config["site_dir"])
    lines = ["# repo-manager\n", f"> {config['site_description']}\n"]
    for source in sorted((ROOT / "docs").rglob("*.md")):
        text = source.read_text(encoding="utf-8")
        title = text.partition("\n")[0].lstrip("# ")
        lines.append(f"- [{title}]({source.relative_to(ROOT / 'docs').with_suffix('')}/)")
    lines += [f"- [{path}]({path.removesuffix('.md')}/)" for path in generated_pages()]
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Write the generated pages into a folder."""
    folder = Path(sys.argv[1])
    for path, text in generated_pages().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
