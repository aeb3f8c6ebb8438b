"""Documents name existing commands, options, settings and environment variables, and their claims hold."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from support.command_lines import ClickException, Exit, MissingParameter, parse

import repo_manager
from repo_manager.cli.commands import COMMANDS
from repo_manager.cli.main import app
from repo_manager.settings import Settings

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "repo_manager"
FOLDERS = ("benchmarks", "deploy", "docs", "examples", "model_repository", "repo_manager", "tests")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
NAMES = {name for entries in COMMANDS.values() for name in entries}
VARIABLE = r"REPO_MANAGER_[A-Z_]*[A-Z]"
READERS = (".py", ".sh", ".toml", ".yaml", ".yml")
# Placeholders a reader replaces: an example's tag.
EXAMPLES = {"stable"}


def spans(path: Path) -> Iterator[str]:
    """Yield the texts between backticks in a document's sentences and tables."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for found in re.findall(r"`([^`\n]+)`", prose):
        yield re.sub(r"\[[^\]]*\]|\\\|.*", "", found).strip()


COMMANDS_NAMED = sorted(
    {
        (str(path.relative_to(ROOT)), span)
        for path in DOCUMENTS
        for span in spans(path)
        if span.split()[:1] and span.split()[0] in NAMES and len(span.split()) > 1 and "*" not in span
    }
)


@pytest.mark.parametrize(("document", "span"), COMMANDS_NAMED)
def test_a_command_that_is_named_takes_what_follows_it(document: str, span: str) -> None:
    words = span.split()
    plain = {word for word in words[1:] if re.fullmatch(r"[a-z]+", word) and words[words.index(word) - 1][0] != "-"}
    assert plain <= EXAMPLES | {"make", "merge"}, f"{document}: `{span}`: there is no such sub-command"
    try:
        parse(words)
    except (Exit, MissingParameter):
        pass
    except ClickException as exc:
        if "requires an argument" not in exc.message:  # An option is named, not its value.
            pytest.fail(f"{document}: `{span}`: {exc.message}")


def options_of(command: object) -> Iterator[str]:
    for parameter in getattr(command, "params", ()):
        yield from (*parameter.opts, *parameter.secondary_opts)
    for each in getattr(command, "commands", {}).values():
        yield from options_of(each)


def texts_of(path: Path) -> Iterator[str]:
    """Yield the texts of a module, with X for filled-in values."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def docstrings_of(path: Path) -> Iterator[str | None]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node, clean=False)


def test_no_message_names_a_file_that_only_a_clone_has() -> None:
    """A wheel has the package and docs/, whose files `document` finds."""
    of_clones = re.compile(r"\b(examples|benchmarks|tools|tests|deploy)/\w")
    found = [
        (path.name, text)
        for path in PACKAGE.rglob("*.py")
        for text in {*texts_of(path)} - {*docstrings_of(path)}
        if of_clones.search(text)
    ]
    assert found == []


def test_every_command_that_a_message_names_has_the_options_beside_it() -> None:
    root = typer.main.get_command(app)
    options = {name: set(options_of(root.get_command(None, name))) for name in NAMES}  # type: ignore[attr-defined, arg-type]
    found = [
        (str(path.relative_to(ROOT)), name, option)
        for path in PACKAGE.rglob("*.py")
        for text in texts_of(path)
        for name, rest in re.findall(r"repo-manager ([a-z]+)( [^.;,()`\n]*)", text)
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", rest)
        if name in NAMES
    ]
    assert len(found) > 20
    assert [each for each in found if each[2] not in options[each[1]]] == []


@pytest.fixture(scope="module")
def known() -> tuple[set[str], str]:
    """The options of all commands, and the text of everything else here with options."""
    root = typer.main.get_command(app)
    own = (o for parameter in root.params for o in parameter.opts)
    options = {"--help", "--version", *own, *(o for name in NAMES for o in options_of(root.get_command(None, name)))}  # type: ignore[attr-defined, arg-type]
    ours = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    return options, "".join(path.read_text(encoding="utf-8") for path in ours)


# Options of other programs named in documents: tritonserver, docker, pip, kubectl, pre-commit, polygraphy.
OTHERS = {
    "--all-files",
    "--force-conflicts",
    "--build-arg",
    "--dist",
    "--find-links",
    "--from-file",
    "--gpus",
    "--ipc",
    "--load-model",
    "--metrics-config",
    "--model-config-name",
    "--model-control-mode",
    "--model-namespacing",
    "--model-repository",
    "--no-index",
    "--only-binary",
    "--polygraphy",
    "--python-version",
    "--query-gpu",
    "--rm",
    "--signature",
    "--strict-readiness",
    "--type",
    "--wait",
}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_option_that_is_named_exists(path: Path, known: tuple[set[str], str]) -> None:
    options, scripts = known
    text = re.sub(r"\(was `--[a-z-]+`\)", "", path.read_text(encoding="utf-8"))
    for option in sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?![\w*-])", text))):
        assert option in options | OTHERS or f'"{option}"' in scripts, f"{path.name} names {option}"


def test_an_environment_variable_that_is_named_is_read() -> None:
    fields = {field.name for field in dataclasses.fields(Settings)} | {"settings"}
    readers = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in READERS]
    read = {name for path in readers for name in re.findall(VARIABLE, path.read_text(encoding="utf-8"))}
    read |= {f"REPO_MANAGER_{field.upper()}" for field in fields}
    for path in DOCUMENTS:
        assert set(re.findall(VARIABLE, path.read_text(encoding="utf-8"))) <= read, path.name


def test_a_setting_that_is_named_exists() -> None:
    fields = {field.name for field in dataclasses.fields(Settings)}
    named: dict[str, set[str]] = {}
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        named[path.name] = set(re.findall(r"`(\w+)` in the settings", text))
        named[path.name] |= set(re.findall(r"REPO_MANAGER_\w+`, `(\w+)`", text))
        named[path.name] |= {name.lower() for name in re.findall(r"`\.\.\._([A-Z_]+)`", text)}
        for block in re.findall(r"^```.*?\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
            if "repo-manager/settings.yaml" in block:
                named[path.name] |= set(re.findall(r"^(\w+):", block, flags=re.MULTILINE))
    assert set().union(*named.values()) <= fields, named
    assert {"signed_by", "tls_ca", "token_file"} <= set().union(*named.values())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_operation_that_is_no_command_is_not_named_as_one(path: Path) -> None:
    """`repair` was: it is a function of the library, and `verify --repair` on the command line."""
    functions = {
        name
        for name, function in ((name, getattr(repo_manager, name)) for name in repo_manager.__all__ if name.isalpha())
        if name.islower() and function.__module__.startswith("repo_manager.repository.")
    }
    assert "repair" in functions
    assert not functions & set(spans(path)) - NAMES


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in PACKAGE.rglob("*.py"):
        yield str(path.relative_to(PACKAGE)), ast.parse(path.read_text(encoding="utf-8"))


def users_of(is_use: Callable[[ast.AST], bool]) -> set[str]:
    """The modules with an occurrence."""
    return {name for name, tree in modules() if any(is_use(node) for node in ast.walk(tree))}


def asks_what_a_library_has(node: ast.AST) -> bool:
    """`hasattr(library, ...)`, `library.__version__`: the differences between TensorRT's versions."""
    if isinstance(node, ast.Attribute):
        return node.attr == "__version__" and isinstance(node.value, ast.Name) and node.value.id in ("library", "trt")
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr"
    return called and ast.unparse(node.args[0]).split(".")[0] in ("library", "trt")  # type: ignore[attr-defined]


def names_a_store(node: ast.AST) -> bool:
    """`DiskStore(...)`, or the module of the store of objects by its name."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and node.value.endswith("stores.objects.store")
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("DiskStore", "ObjectStore")
    )


def requires_lightkube(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(".")[0] == "lightkube"


# A document's claim about a place -> the places in fact.
CLAIMS: dict[str, tuple[Callable[[], set[str]], set[str]]] = {
    "`engine/capabilities.py` and nowhere else": (
        lambda: {name for name in users_of(asks_what_a_library_has) if name.startswith("engine/")},
        {"engine/capabilities.py"},
    ),
    "`repository/stores/__init__.py` and nowhere else": (
        lambda: users_of(names_a_store),
        {"repository/stores/__init__.py"},
    ),
    "by lightkube, which one module of `rollout/` imports": (
        lambda: users_of(requires_lightkube) - {"optional.py"},
        {"rollout/targets/api.py"},
    ),
}
SAID = re.compile(r"`[^`]+` and nowhere else|by lightkube, which one module of `rollout/` imports")


def test_every_claim_of_one_place_has_a_check() -> None:
    said = {found for path in DOCUMENTS for found in SAID.findall(" ".join(path.read_text(encoding="utf-8").split()))}
    assert said == set(CLAIMS)


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_is_said_to_be_in_one_place_is_in_no_other(claim: str) -> None:
    find, expected = CLAIMS[claim]
    assert find() == expected


@pytest.mark.parametrize("words", [["config", "--sett", "a=b"], ["repair"], ["loadtest", "m", "--until-saturation"]])
def test_what_does_not_exist_is_seen(words: list[str]) -> None:
    with pytest.raises(ClickException):
        parse(words)
