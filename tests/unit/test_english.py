"""Documents in plain English: few relative clauses and semicolons, no sentence or line too long, no archaic words.

The limits are those of the documentation of Kubernetes and httpx, rounded up.
"""

from __future__ import annotations

import re
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
    r"stands for|stands in|lies in|lies beside|comes about|brings about|by and by|anew|at most so many)\b",
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


def faults_of(text: str) -> list[str]:
    """What a document breaks."""
    prose = prose_of(text)
    words = re.findall(r"[A-Za-z][A-Za-z'-]*", prose)
    relative = 1000 * sum(word.lower() in RELATIVE for word in words) / len(words)
    semicolons = 1000 * prose.count(";") / len(words)
    found = []
    # A handful of words is no statistic: up to three of each are allowed in a short document.
    if relative > MOST_RELATIVE and relative * len(words) > 3000.5:
        found.append(f"{relative:.1f} that/which/what per 1,000 words")
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
