"""Plain English: documents with few relative clauses and semicolons, no sentence or line too long, no archaic words.

The limits are those of the documentation of Kubernetes and httpx, rounded up. Docstrings and messages of the package
keep to the same limits, except for semicolons, and public functions document their arguments. Its comments have few
relative clauses and no archaic words.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("*.md"),
        *(ROOT / folder / "README.md" for folder in ("benchmarks", "benchmarks/gpu", "deploy", "examples")),
    ]
)
DOCUMENTS = [path for path in DOCUMENTS if path.exists()]
MOST_RELATIVE, MOST_SEMICOLONS, MOST_WORDS, MOST_COLUMNS = 12.0, 4.0, 35, 120
RELATIVE = {"that", "which", "what"}
ARCHAIC = re.compile(
    r"\b(likewise|meanwhile|mends?|mended|hitherto|thereof|whereof|wherein|henceforth|beforehand|is told|are told|"
    r"stands|lies|whoever|comes about|brings about|by and by|anew|at most so many)\b",
    re.IGNORECASE,
)


def prose_of(text: str) -> str:
    """The text without code, links and comments."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "X", text))


def blocks_of(prose: str) -> Iterator[str]:
    """Paragraphs, list items, headings and cells of tables."""
    block: list[str] = []
    for line in (*prose.splitlines(), ""):
        text = line.strip()
        if not text or text.startswith("|") or re.match(r"([-*]|\d+\.|#+)\s", text):
            yield " ".join(block)
            block = []
        if text.startswith("|"):
            yield from (cell.strip() for cell in text.strip("|").split("|"))
        elif text:
            block.append(re.sub(r"^([-*]|\d+\.|#+)\s+", "", text))


def words_of(prose: str) -> list[str]:
    return re.findall(r"[A-Za-z][A-Za-z'-]*", prose)


def relative_fault(words: list[str]) -> list[str]:
    """A handful of words is no statistic: up to three relative pronouns are allowed in a short text."""
    count = sum(word.lower() in RELATIVE for word in words)
    rate = 1000 * count / max(len(words), 1)
    return [f"{rate:.1f} that/which/what per 1,000 words"] if rate > MOST_RELATIVE and count > 3 else []


def faults_of(text: str) -> list[str]:
    """The faults of a document."""
    prose = prose_of(text)
    words = words_of(prose)
    semicolons = 1000 * prose.count(";") / len(words)
    found = relative_fault(words)
    if semicolons > MOST_SEMICOLONS and semicolons * len(words) > 3000.5:
        found.append(f"{semicolons:.1f} semicolons per 1,000 words")
    for block in blocks_of(prose):
        for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z\"(X])", block):
            if len(sentence.split()) > MOST_WORDS:
                found.append(f"{len(sentence.split())} words: {sentence[:60]}...")
    is_code = False
    for number, line in enumerate(text.splitlines(), 1):
        is_code ^= line.startswith("```")
        if not is_code and len(line) > MOST_COLUMNS and not line.startswith("|"):
            found.append(f"line {number} has {len(line)} columns")
    found += [f"archaic: {match[0]}" for match in ARCHAIC.finditer(prose)]
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_is_plain(path: Path) -> None:
    assert faults_of(path.read_text(encoding="utf-8")) == []


def test_the_check_finds_each_fault() -> None:
    plain = "The server loads the model. You see it in the list.\n"
    assert faults_of(plain * 20) == []
    assert faults_of(plain * 20 + "It is what it is, that which is what. ") != []
    assert faults_of("Run; it; works; now; " + plain * 20) != []
    assert faults_of("word " * 36 + ".") != []
    assert faults_of("word " * 30 + "\n") != []
    assert faults_of(plain * 20 + "\nIt lies in a folder.\n") != []
    assert faults_of("| " + "word " * 30 + "|\n" + plain * 20) == []
    assert relative_fault(["that"] * 3) == []
    assert relative_fault(["that"] * 4 + ["word"] * 300) != []
    assert relative_fault(["that"] * 4 + ["word"] * 400) == []


# The package: docstrings, messages, the arguments of public functions, and comments.

MODULES = sorted((ROOT / "repo_manager").rglob("*.py"))


def package_of(path: Path) -> str:
    """The package below `repo_manager`. Its own modules count as one."""
    below = path.relative_to(ROOT / "repo_manager").parts
    return below[0] if len(below) > 1 else "repo_manager"


PACKAGES = sorted({package_of(path) for path in MODULES})
MOST_UNDOCUMENTED, FEWEST_WORDS = 2, 3
SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes|Notes?|Examples?):$")
ITEM = re.compile(r"\*{0,2}([\w, *]+):(\s|$)")
PREFORMATTED = re.compile(r"\S {3,}\S|[├└│►─|]")
# "Load a model, as `Transport.load`": the arguments are the other function's.
SAME_ARGUMENTS = re.compile(r"\b([Aa]s|[Ss]ee) `\w+(\.\w+)?`")
EXPLAINS_NONE = re.compile(r"`None`|\bnone\b|default", re.IGNORECASE)
DIRECTIVE = re.compile(r"# (noqa(: [A-Z0-9, ]*\d)?|type: ignore(\[[^\]]*\])?|pragma: [\w ]+|fmt: \w+)")


def text_of(node: ast.AST) -> str | None:
    """A literal text, with X for the values of an f-string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) or "X" for value in node.values)
    return None


def docstrings_of(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.Constant]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # Docstrings below attributes count, too.
            for statement in node.body if isinstance(node, ast.Module | ast.ClassDef) else node.body[:1]:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    yield node, statement.value


def texts_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Docstrings by paragraph and argument, without tables and drawings; and messages."""
    for _, text in docstrings_of(tree):
        block: list[str] = []
        for line in (*str(text.value).splitlines(), ""):
            starts = not line.strip() or ITEM.match(line.strip()) or re.match(r"([-*]|\d+\.?) ", line.strip())
            if starts or PREFORMATTED.search(line):
                yield text.lineno, " ".join(block)
                block = []
            if not PREFORMATTED.search(line):
                block.append(line.strip())
    yield from messages_of(tree)


def messages_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Literal texts of several words, except for docstrings, with their lines."""
    skipped = {id(text) for _, text in docstrings_of(tree)}
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    skipped |= {id(part) for node in joined for part in ast.walk(node) if part is not node}
    for node in ast.walk(tree):
        message = text_of(node)
        if message and " " in message and id(node) not in skipped:
            yield getattr(node, "lineno", 0), message


def comments_of(source: str) -> Iterator[tuple[int, str]]:
    """Comments with their lines. Of a directive to a tool, only the reason counts."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], DIRECTIVE.sub("", token.string).strip("#:- ")


def arguments_of(docstring: str) -> dict[str, str] | None:
    """The lines below `Args:` by argument. `None` without such a section."""
    found: dict[str, str] = {}
    names, is_inside, has_section = [""], False, False
    for line in docstring.splitlines():
        indent = len(line) - len(line.lstrip())
        if SECTION.match(line.strip()):
            is_inside = line.strip() == "Args:"
            has_section |= is_inside
        elif is_inside and line.strip():
            item = ITEM.match(line.strip())
            if item and indent == 4:
                names = [name.strip(" *") for name in item[1].split(",")]
                found.update(dict.fromkeys(names, line.strip()[item.end() :]))
            else:
                found.update({name: f"{found.get(name, '')} {line.strip()}" for name in names})
    return found if has_section else None


def public_functions(tree: ast.AST, above: ast.ClassDef | None = None) -> Iterator[tuple[ast.FunctionDef, str]]:
    """Functions and methods with their docstring. The one of `__init__` is the class's as well."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node, node)
        elif isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node) or ""
            is_command = any(
                "grouped" in ast.unparse(each) or ".command(" in ast.unparse(each) for each in node.decorator_list
            )
            if above is not None and node.name == "__init__":
                yield node, docstring if "Args:" in docstring else ast.get_docstring(above) or ""
            elif not node.name.startswith("_") and docstring and not is_command:
                yield node, docstring


def undocumented(function: ast.FunctionDef, docstring: str) -> Iterator[str]:
    """The arguments the docstring does not describe."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    arguments = [each for each in arguments if each.arg not in ("self", "cls") and not each.arg.startswith("_")]
    said = arguments_of(docstring)
    if SAME_ARGUMENTS.search(docstring.split("\n\n")[0]):
        return
    if said is None and len(arguments) > MOST_UNDOCUMENTED:
        yield "has no Args"
    for each in arguments:
        kind = "" if each.annotation is None else ast.unparse(each.annotation)
        line = docstring if said is None else said.get(each.arg)
        if line is None:
            yield f"{each.arg} has no line"
        elif said is not None and len(line.split()) < FEWEST_WORDS:
            yield f"{each.arg}: {line}"
        elif kind.endswith("| None") and not kind.startswith("Callable") and not EXPLAINS_NONE.search(line):
            yield f"{each.arg}: what does None do? {line}"


def test_docstrings_and_messages_are_plain() -> None:
    found = []
    for path in MODULES:
        for line, text in texts_of(ast.parse(path.read_text(encoding="utf-8"))):
            prose = prose_of(text)
            found += [f"{path.name}:{line}: archaic: {match[0]}" for match in ARCHAIC.finditer(prose)]
            for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z0-9\"(X])", prose):
                if len(sentence.split()) > MOST_WORDS:
                    found.append(f"{path.name}:{line}: {len(sentence.split())} words: {sentence[:60]}...")
    assert found == []


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_and_messages_have_few_relative_clauses(package: str) -> None:
    """Per package, and for docstrings and messages each: a text of many hides no package of relative clauses."""
    docstrings, messages = [], []
    for path in MODULES:
        if package_of(path) == package:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            docstrings += [str(text.value) for _, text in docstrings_of(tree)]
            messages += [text for _, text in messages_of(tree)]
    found = {"docstrings": docstrings, "messages": messages}
    assert {kind: relative_fault(words_of(prose_of("\n".join(texts)))) for kind, texts in found.items()} == {
        "docstrings": [],
        "messages": [],
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_comments_are_plain(package: str) -> None:
    comments = [
        (f"{path.name}:{line}", prose_of(text))
        for path in MODULES
        if package_of(path) == package
        for line, text in comments_of(path.read_text(encoding="utf-8"))
    ]
    found = [f"{place}: archaic: {match[0]}" for place, text in comments for match in ARCHAIC.finditer(text)]
    assert found + relative_fault(words_of("\n".join(text for _, text in comments))) == []


def test_public_functions_document_their_arguments() -> None:
    found = [
        f"{path.name}:{function.lineno} {function.name}: {fault}"
        for path in MODULES
        for function, docstring in public_functions(ast.parse(path.read_text(encoding="utf-8")))
        for fault in undocumented(function, docstring)
    ]
    assert found == []


def test_the_check_of_docstrings_finds_each_fault() -> None:
    def faults(arguments: str, docstring: str) -> list[str]:
        (function,) = ast.parse(f"def f({arguments}): pass").body
        assert isinstance(function, ast.FunctionDef)
        return list(undocumented(function, docstring))

    section = "Run.\n\nArgs:\n    a: the first of three numbers.\n    b: the second of three numbers.\n    c: {}"
    assert faults("a, b, c", section.format("the third\n        of three.")) == []
    assert faults("a, b, c", "Run, as `other`.") == []
    assert faults("a, b, c", "Run.") == ["has no Args"]
    assert faults("a, b, c", section.format("likewise.")) == ["c: likewise."]
    assert faults("a, b, c, d", section.format("the third of three.")) == ["d has no line"]
    assert faults("a, b, c: int | None", section.format("the third of three.")) != []
    assert faults("a, b, c: int | None", section.format("the third. `None`: there is none.")) == []
    tree = ast.parse(f'def f():\n    """It {"word " * 40}.\n\n    Args:\n        a: one.\n    """\n    g(f"a {{b}} c")')
    assert [len(text.split()) for _, text in texts_of(tree) if text] == [42, 1, 2, 3]


def test_comments_are_found_without_directives() -> None:
    source = 'a = "# no"  # yes\n# : two\nb = 1  # type: ignore[a]  # noqa: E501, N8 - a reason\nc = 2  # noqa\n'
    assert list(comments_of(source)) == [(1, "yes"), (2, "two"), (3, "a reason"), (4, "")]
