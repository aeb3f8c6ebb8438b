"""The pages of the documentation made from the code: mkdocs calls this file as a hook (mkdocs.yml).

Commands and options come from the command line itself; settings, rules, schemas and the public API from their
definitions. So no page can disagree with the code. `python tools/site.py FOLDER` writes the pages without mkdocs.
"""

from __future__ import annotations

import enum
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import typer
import typer.main
from json_page import JSON_VERSION, json_page, json_schemas
from packaging.requirements import Requirement
from schema_page import cell, plain_text, schema_page

import repo_manager
from repo_manager import settings
from repo_manager.cli.commands import COMMANDS
from repo_manager.cli.main import app
from repo_manager.engine.capabilities import Capabilities, StrongTyping, capabilities_of
from repo_manager.engine.fit import ContainerRelease, releases
from repo_manager.precision import candidate
from repo_manager.triton_config.rules import RULES
from repo_manager.types import Precision

__all__ = ["generated_pages", "on_config", "on_files", "on_page_markdown", "on_post_build"]

ROOT = Path(__file__).parents[1]
BRANCH = "blob/main"
SEARCH_BOOSTS = {
    "exit-codes": 4,
    "how-to/": 3,
    "tutorials/": 2,
    "reference/commands/": 1.5,
    "reference/compatibility": 3,
    "deprecation": 2,
    "reference/json": 0.5,
    "reference/api": 0.2,
    "changelog": 0.2,
}
"""Start of a page's path -> its weight in the search: a question should find how a thing is done before its parts."""


def generated_pages() -> dict[str, str]:
    """Return every page made from the code: path in the site -> Markdown."""
    pages = {f"reference/commands/{name}.md": page for name, page in _command_pages()}
    pages["reference/commands/index.md"] = _commands_index()
    pages["reference/settings.md"] = _settings_page()
    pages["reference/rules.md"] = _rules_page()
    pages["reference/api.md"] = _api_page()
    pages["reference/compatibility.md"] = _compatibility_page()
    pages["reference/json.md"] = json_page()
    for name, title in (("repository", "repository.yaml"), ("manifest", "manifest.json")):
        pages[f"reference/{name}.md"] = schema_page(json.loads((ROOT / f"docs/{name}.schema.json").read_text()), title)
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
    yield plain_text(inspect.cleandoc(command.help or "")) + "\n"
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
    return f"| `{' '.join(names.split())}` | {cell(meaning)} |"


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
        lines.append(f"| `{name}` | {variable} | `{cell(kind)}` | {cell(' '.join(text.split()))} |")
    return "\n".join(lines) + "\n"


def _rules_page() -> str:
    lines = [
        "# Rules of config.pbtxt\n",
        "`verify`, `config`, `add` and `deploy` judge a configuration by these rules. Each is Triton's own. The last",
        "column says where Triton checks it.\n",
        "| rule | what must hold | Triton's source |",
        "|---|---|---|",
    ]
    lines += [f"| `{rule.name}` | {cell(inspect.getdoc(rule.check) or '')} | `{rule.source}` |" for rule in RULES]
    return "\n".join(lines) + "\n"


def _api_page() -> str:
    """List the public names by their defining module, for mkdocstrings to fill in."""
    lines = [f"# Python API\n\n{plain_text(inspect.cleandoc(repo_manager.__doc__ or ''))}\n", "## Names\n"]
    lines += [f"::: repo_manager.{repo_manager._MODULE_OF[name]}.{name}\n" for name in repo_manager.__all__]
    return "\n".join(lines)


def _compatibility_page() -> str:
    """List Triton's releases, TensorRT's abilities, Python and opsets from the code's own data."""
    parts = (_python_lines(), _release_lines(), _tensorrt_lines(), _opset_lines())
    start = [
        "# Compatibility\n",
        "Which versions of Python, Triton, TensorRT and ONNX go together. The code takes the same data to decide.\n",
    ]
    return "\n".join([*start, *(line for part in parts for line in part)]) + "\n"


def _requirements() -> dict[str, list[Requirement]]:
    """Read the requirements from pyproject.toml: `""` for always, else an extra (Python 3.10 has no tomllib)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    always = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    extras = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", text, re.DOTALL | re.MULTILINE)
    if always is None or extras is None:
        raise ValueError("pyproject.toml has no dependencies or no extras where this tool looks for them")
    lists = {"": always[1], **dict(re.findall(r"^([\w-]+) = \[(.*)\]$", extras[1], re.MULTILINE))}
    found = {name: re.findall(r'"([^"]+)"', items) for name, items in lists.items()}
    return {name: [Requirement(item) for item in items] for name, items in found.items()}


def _python_lines() -> Iterator[str]:
    """List the versions of Python, and the requirements of each extra."""
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


def _release_cell(release: ContainerRelease, column: str) -> str:
    value = getattr(release, column)
    return "unknown" if not value else value if release.is_verified(column) else f"{value} (unverified)"


def _tensorrt_lines() -> Iterator[str]:
    """Compare the abilities in the recorded APIs of TensorRT's versions."""
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
    """List the opsets read, and the one each precision needs."""
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


# mkdocs calls these.


def on_config(config: Any) -> Any:
    """Put a page of each command into the navigation."""
    pages = [f"reference/commands/{name}.md" for names in COMMANDS.values() for name in names]
    reference = next(part["Reference"] for part in config["nav"] if "Reference" in part)
    reference.insert(0, {"Commands": ["reference/commands/index.md", *pages]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and README.md and CHANGELOG.md from the root, their place for GitHub."""
    from mkdocs.structure.files import File

    pages = {**generated_pages(), "index.md": _at_docs("README.md"), "changelog.md": _at_docs("CHANGELOG.md")}
    for name, schema in json_schemas().items():
        pages[f"reference/json/v{JSON_VERSION}/{name}.schema.json"] = json.dumps(schema, indent=2) + "\n"
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
    """Weigh the page in the search, and let links to files outside the documentation lead to the repository.

    Where the address of the repository is not known, such a link becomes the path of the file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    del files
    place = page.file.src_uri
    boosts = [boost for start, boost in SEARCH_BOOSTS.items() if place.startswith(start)]
    page.meta.setdefault("search", {"boost": boosts[0] if boosts else 1})
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
    """Write llms.txt: the project in a sentence, and every page with its first sentence."""
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
