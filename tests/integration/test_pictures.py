"""The pictures in the tutorials show the reports as they look now, as far as words can tell."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from support.json_documents import tool

pytest.importorskip("PIL")
pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]
TUTORIALS = Path(__file__).parents[2] / "docs/tutorials"


def test_each_picture_is_recorded_in_light_and_dark_and_small() -> None:
    pictures = tool("pictures")
    record = json.loads(pictures.RECORD.read_text())
    assert record.keys() == pictures.PICTURES.keys()
    for name, each in record.items():
        assert list(each["files"]) == [f"{name}-light.png", f"{name}-dark.png"]
        for file, digest in each["files"].items():
            content = (pictures.IMAGES / file).read_bytes()
            assert hashlib.sha256(content).hexdigest() == digest, file
            assert len(content) < 100_000, file


def test_the_tutorials_show_every_picture_in_both_schemes() -> None:
    texts = "".join(path.read_text() for path in TUTORIALS.glob("*.md"))
    shown = set(re.findall(r"\(\.\./images/(report-[a-z]+)-(light|dark)\.png#only-(?:light|dark)\)", texts))
    assert shown == {(name, scheme) for name in tool("pictures").PICTURES for scheme in ("light", "dark")}


def test_the_pages_have_the_words_of_the_pictures(tmp_path: Path) -> None:
    """After a change of the reports: `python tools/pictures.py`, and look at the pictures."""
    pictures = tool("pictures")
    record = json.loads(pictures.RECORD.read_text())
    for name, page in pictures.make_pages(tmp_path, seconds=0.5).items():
        assert pictures.words_of_page(page.read_text()) == record[name]["words"], name
