"""Imports point one way (docs/architecture.md); this walks the syntax trees and holds the code to it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import repo_manager

PACKAGE = Path(repo_manager.__file__).parent
LAYERS = [
    {"errors", "types", "files", "lfs", "optional", "samples", "sockets", "summary"}
    | {"tls", "triton_messages", "validation"},
    {"settings", "stats"},
    {"gates", "request_data"},
    {"onnx_model"},
    {"sparsity"},
    {"precision"},
    {"accuracy"},
    {"pruning"},
    {"engine"},
    {"triton_config"},
    {"repository"},
    {"server"},
    {"client"},
    {"rollout", "loadtest"},
    {"declared", "tuning"},
    {"report"},
    {"sources"},
    {"pipeline"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SETTINGS_USERS = {"settings", "pipeline", "cli"}
# The backends run inside Triton's stub process, with only the standard library, NumPy and their engine.
STANDALONE = PACKAGE / "server" / "backends"
SHARED_WITH_BACKENDS = PACKAGE / "triton_config" / "backend_io.py"


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[tuple[str, int, bool]]:
    """Every import of ours in a file: (top-level unit, line, inside a function)."""
    found: list[tuple[str, int, bool]] = []

    def visit(node: ast.AST, in_function: bool) -> None:
        for child in ast.iter_child_nodes(node):
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                names = [f"{base}.{alias.name}" for alias in child.names] if base == "repo_manager" else [base]
                if child.level:
                    names = ["repo_manager." + unit_of(path)]
            for name in names:
                parts = name.split(".")
                if parts[0] == "repo_manager" and len(parts) > 1 and not parts[1].startswith("_"):
                    found.append((parts[1], child.lineno, in_function))
            visit(child, in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or not p.name.startswith("__"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    unit = unit_of(path)
    for imported, line, in_function in imports_of(path):
        where = f"{path}:{line}"
        if STANDALONE in path.parents or path == SHARED_WITH_BACKENDS:
            raise AssertionError(f"{where}: a backend runs without repo_manager")
        assert imported in RANK, f"{where}: {imported} has no place in the layers"
        assert not in_function, f"{where}: import at the top of the file"
        if imported == unit:
            continue
        assert RANK[imported] < RANK[unit] or unit == imported or RANK[unit] == 0 == RANK[imported], (
            f"{where}: {unit} may not import {imported}"
        )
        assert imported != "settings" or unit in SETTINGS_USERS, f"{where}: only pipeline and cli read settings"


def test_every_unit_has_a_layer() -> None:
    units = {unit_of(p) for p in MODULES}
    assert units <= set(RANK)


def test_no_modules_import_each_other() -> None:
    """Not even for their types, and not in a circle of several."""
    names = {".".join(("repo_manager", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in MODULES}
    needs = {
        name: {
            full if (full := f"{node.module}.{alias.name}") in names else node.module
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        & names.keys()
        for name, path in names.items()
    }
    while free := {name for name, needed in needs.items() if not needed}:
        needs = {name: needed - free for name, needed in needs.items() if name not in free}
    assert not needs, "imports in a circle, and what needs it"


def test_a_breach_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = PACKAGE / "errors.py"
    monkeypatch.setattr(ast, "parse", lambda _: compile("from repo_manager.cli import main", "x", "exec", 1024))
    with pytest.raises(AssertionError, match="may not import cli"):
        test_imports_point_down_only(bad)


def test_one_module_answers_for_names_that_it_does_not_have() -> None:
    """Only the public API imports lazily: every other arrow is an import visible to tools and people."""
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
    }
    assert found == {"__init__.py"}


def test_a_module_of_ours_is_named_by_a_string_in_two_places() -> None:
    """The public API and the command table."""
    named = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")
    }
    # The others import packages of other distributions by a given name, or packages that may be missing.
    others = {
        "__main__.py",
        "engine/control.py",
        "optional.py",
        "precision/calibration/load.py",
        "server/backends/tensorrt/rm_trt_engine.py",
        "settings.py",
    }
    assert named - others == {"__init__.py", "cli/commands.py"}


def test_few_things_of_ours_wait_for_their_use() -> None:
    """What most commands do without.

    On a disk: the store of objects; of `verify`: how a graph is judged, by onnx and NumPy; of a deploy to a server:
    clusters, canaries, Grafana, a GPU's memory, the other protocol, the start of one, and how a model without a
    recorded answer is run; of `inspect` on a file that lies in no version: the repository; of `diff`: load tests,
    which few versions keep; of `serve`, and of every command with `--json`: the tables and what draws them.
    """
    waiting = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "deferred"
        and ast.unparse(node.args[0]).strip("'").startswith("repo_manager")
    }
    assert waiting == {
        "cli/serve.py",
        "cli/versions.py",
        "pipeline/annotating.py",
        "pipeline/deploying.py",
        "pipeline/inspect.py",
        "repository/stores/__init__.py",
        "declared/servers.py",
        "report/terminal.py",
        "rollout/deploy.py",
        "rollout/reference.py",
        "rollout/server_checks.py",
        "rollout/status.py",
        "server/client.py",
        "triton_config/joined_requests.py",
    }


def header_of(text: str) -> int:
    """The lines of a module's docstring and of its imports, up to the first line of its own."""
    body = ast.parse(text).body
    end = 0
    for node in body:
        docstring = node is body[0] and isinstance(node, ast.Expr)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not (docstring or typing_only or isinstance(node, ast.Import | ast.ImportFrom)):
            break
        end = node.end_lineno or 0
    return sum(bool(line.strip()) for line in text.splitlines()[:end])


def test_headers_are_a_small_share_of_the_lines() -> None:
    """A house of many small files is mostly imports: below 9 %, where httpx has 5 %."""
    texts = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")]
    assert sum(map(header_of, texts)) < 0.09 * sum(len(text.splitlines()) for text in texts)


def test_a_small_module_with_one_importer_says_why_it_stands_apart() -> None:
    importers: dict[str, set[Path]] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                    importers.setdefault(name, set()).add(path)
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        name = ".".join(("repo_manager", *path.relative_to(PACKAGE).with_suffix("").parts))
        small = len(text.splitlines()) < 100 and path.name != "__init__.py" and STANDALONE not in path.parents
        one = next(iter(importers[name])) if len(importers.get(name, ())) == 1 else None
        # A layer of its own cannot fold into the one above: a table of `report/` has one command, for instance.
        if small and one is not None and unit_of(one) == unit_of(path) and one.name != "__main__.py":
            said = ast.get_docstring(ast.parse(text)) or ""
            assert "apart" in said or "separate" in said.lower(), f"{path}: fold it into {importers[name]}"


def test_only_the_repository_asks_what_kind_of_place_it_has() -> None:
    """Elsewhere `local_folder` and a store's traits answer; a `Path` in a union of other types is no place."""
    others = {"client.py", "engine/fit_check.py"}
    asking = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "isinstance"
        and ast.unparse(node.args[1]) in ("Path", "ObjectRepository")
        and unit_of(path) != "repository"
    }
    assert asking == others


SAME_MEANING = {
    "Answer": "of a server to one request",
    "Check": "of one thing looked at, with its finding",
    "Conversion": "its options in repository.yaml, and its result. The schema of the file has the name",
    "Journal": "what a stopped run goes on from",
    "Model": "of ONNX, and declared in repository.yaml. The schema of the file has the name",
    "Reference": "answers that others are held against",
    "SequenceFlags": "of a command whose requests form sequences",
    "Weight": "a constant of a graph",
}


def test_a_class_has_a_name_of_its_own() -> None:
    """Two classes share a name only where the word means the same in both."""
    homes: dict[str, set[Path]] = {}
    for path in set(MODULES) - {SHARED_WITH_BACKENDS}:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and STANDALONE not in path.parents:
                homes.setdefault(node.name, set()).add(path.relative_to(PACKAGE))
    assert {name: places for name, places in homes.items() if len(places) > 1}.keys() == SAME_MEANING.keys()


MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 60, 8
LONGER = {
    "pruning/distill.py": "one class: a graph in PyTorch is compared, trained and measured by the same run",
    "repository/stores/disk.py": "one class: a store's verbs on folders, which share the operation's lock and staging",
    "repository/stores/objects/client.py": "one class: requests to one place, each with the same retries and errors",
    "triton_config/backend_io.py": "one file, copied as it is beside the backends that run in Triton's stub process",
    "tuning/run.py": "one class: a run's steps share its budget, its journal and its server",
}


def test_files_are_read_at_a_sitting() -> None:
    """A longer file holds two ideas: split it by them, or say in `LONGER` why it is one."""
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    long = {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES}
    assert long.keys() <= LONGER.keys(), f"above {MAX_FILE_LINES} lines: {long}; LONGER names {sorted(LONGER)}"
    assert all(0.9 * MAX_FILE_LINES < lengths[name] < 1.5 * MAX_FILE_LINES for name in LONGER)


def test_functions_are_short_and_take_few_parameters() -> None:
    """A step of a long function has a name of its own; many parameters are a frozen dataclass of options."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            where = f"{path}:{node.lineno} {node.name}"
            lines = (node.end_lineno or 0) - node.lineno + 1
            names = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            given = [name for name in names if name not in ("self", "cls")]
            assert lines <= MAX_FUNCTION_LINES, f"{where} has {lines} lines: give its steps functions of their own"
            assert len(given) <= MAX_PARAMETERS, f"{where} takes {len(given)} parameters: make them a frozen dataclass"
