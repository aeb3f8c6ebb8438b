"""The pages of the documentation that are made from the code: mkdocs calls this file as a hook (mkdocs.yml).

Commands and options come from the command line itself, settings, rules, schemas and the public API from what defines
them, so that no page can say what the code does not do. `python tools/site.py FOLDER` writes the pages without mkdocs.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
import typer.main

import repo_manager
from repo_manager import settings
from repo_manager.cli.commands import COMMANDS
from repo_manager.cli.main import app
from repo_manager.triton_config.rules import RULES

__all__ = ["generated_pages", "on_config", "on_files", "on_page_markdown", "on_post_build"]

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
    lines.append("Every command takes `--json` and `--quiet`; [exit codes](../../exit-codes.md) are the same for all.")
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
