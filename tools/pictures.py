"""Pictures of the reports in the tutorials, taken by a browser in light and dark.

    python tools/pictures.py        # writes docs/images/ and docs/images/pictures.json (needs chromium and pillow)

The record pictures.json holds the digest of each picture and the words of its page. A test makes the pages again and
compares, so a picture of an older page is found.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tutorial import environment_in, run

__all__ = ["IMAGES", "PICTURES", "RECORD", "make_pages", "words_of_page"]

IMAGES = Path(__file__).parents[1] / "docs/images"
RECORD = IMAGES / "pictures.json"
COLORS = 128
SCHEMES = {"light": "1", "dark": "0"}  # of Blink: preferredColorScheme


class Picture(NamedTuple):
    """A report to show.

    Attributes:
        page: the file written by the commands.
        size: of the window in pixels.
    """

    page: str
    size: tuple[int, int]


PICTURES = {
    "report-sparsity": Picture("sparsity.html", (1280, 800)),
    "report-card": Picture("card.html", (1280, 900)),
    "report-load": Picture("load.html", (1280, 1000)),
}
COMMANDS = (
    "cp \"$(python -c 'from repo_manager import samples; print(samples.sample_model().parent)')\"/digits_* .",
    "repo-manager inspect digits_dense.onnx --html sparsity.html",
    "repo-manager add digits_sparse.onnx --name digits --precision int8 --calibration digits_calibration.npz",
    "repo-manager deploy digits",
    'repo-manager loadtest digits --concurrency 1,2,4 --duration {seconds} --slo "p99<500ms" --report load.html',
    "repo-manager report digits:1 -o card.html",
)


class _Words(HTMLParser):
    """Collects the headings of a page and of its tables."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._open = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in ("h1", "h2", "h3", "th"):
            self._open = tag
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._open:
            self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self.found[-1] += data


def words_of_page(page: str) -> list[str]:
    """Return the headings of a page and of its tables, without numbers and without repeats."""
    words = _Words()
    words.feed(page)
    texts = (" ".join(re.sub(r"[\d.,:]+", "", text).split()) for text in words.found)
    return sorted({text for text in texts if text})


def make_pages(folder: Path, *, seconds: float) -> dict[str, Path]:
    """Run the commands; return picture -> page.

    Args:
        folder: an empty folder for the work and the environment.
        seconds: how long each level of the load test takes.
    """
    environment = environment_in(folder)
    (folder / "work").mkdir()
    try:
        for command in COMMANDS:
            run(command.format(seconds=seconds), folder, environment)
    finally:
        stop = ["repo-manager", "serve", "--stop"]
        subprocess.run(stop, cwd=folder / "work", env=environment, capture_output=True, check=False)
    return {name: folder / "work" / picture.page for name, picture in PICTURES.items()}


def shot(page: Path, size: tuple[int, int], scheme: str) -> bytes:
    """Return a small PNG of a page in a browser."""
    target = page.with_suffix(f".{scheme}.png")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", f"--screenshot={target}"]
    command += ["--hide-scrollbars", f"--window-size={size[0]},{size[1]}", page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    small = io.BytesIO()
    Image.open(target).convert("RGB").quantize(COLORS).save(small, "PNG", optimize=True)
    return small.getvalue()


def main() -> None:
    """Make the pages, take the pictures, and write the record."""
    record: dict[str, Mapping[str, object]] = {}
    with tempfile.TemporaryDirectory(prefix="pictures-") as name:
        for picture, page in make_pages(Path(name), seconds=4).items():
            digests = {}
            for scheme in SCHEMES:
                file = IMAGES / f"{picture}-{scheme}.png"
                file.write_bytes(shot(page, PICTURES[picture].size, scheme))
                digests[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
            record[picture] = {"files": digests, "words": words_of_page(page.read_text(encoding="utf-8"))}
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
