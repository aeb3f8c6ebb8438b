"""Tables on a narrow terminal, on a wide one, without a terminal and without colours."""

from __future__ import annotations

import datetime
import io
import re

import pytest
from rich.console import Console, RenderableType

from repo_manager.report.layout import Moment, make_table
from repo_manager.report.load_tables import comparison_view, load_view, verdict_view
from repo_manager.report.rollout_tables import status_view
from repo_manager.report.terminal import WIDE
from repo_manager.rollout.status import ModelStatus, RepositoryStatus

STATUS = RepositoryStatus(
    (
        ModelStatus(
            "resnet50", "grpc://10.20.30.40:8001", (3,), (4,), 3, "2026-01-02T03:04:05.678Z", (),
            "2026-01-02T03:05:00.000Z", 2, True, ("version 3 is ready, the policy selects 4",),
        ),
    ),
    {},
)  # fmt: skip


def shown(views: list[RenderableType], width: int, *, terminal: bool = True, colour: str | None = None) -> list[str]:
    stream = io.StringIO()
    console = Console(
        file=stream, width=width, force_terminal=terminal, color_system=colour, legacy_windows=False,
        no_color=colour is None,
    )  # fmt: skip
    for view in views:
        console.print(view, highlight=False)
    return [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in stream.getvalue().splitlines()]


STATUS_AT = {
    50: """
 model     ready  differs
 ────────────────────────────────────────────────
 resnet50  3      version 3 is ready, the policy
                  selects 4

Not shown here: restarts, selected, last
deployed, server (--wide, --json)
""",
    80: """
 model     server                   ready  last deployed  differs
 ──────────────────────────────────────────────────────────────────────────────
 resnet50  grpc://10.20.30.40:8001  3      3, 2026-01-02  version 3 is ready,
                                                          the policy selects 4

Not shown here: restarts, selected (--wide, --json)
""",
}


def test_status_at_fifty_and_eighty_columns() -> None:
    found = {width: shown(status_view(STATUS), width) for width in STATUS_AT}
    words = {width: " ".join(lines).split() for width, lines in found.items()}
    for width, text in STATUS_AT.items():
        assert [word for word in words[width] if "─" not in word] == [w for w in text.split() if "─" not in w], width
        assert max(map(len, found[width])) <= width


@pytest.mark.parametrize("how", ["wide", "piped"])
def test_where_nothing_is_left_out_times_are_whole(how: str) -> None:
    lines = shown(status_view(STATUS), WIDE if how == "wide" else 140, terminal=how == "wide")
    text = " ".join(" ".join(lines).split())
    assert "3, 2026-01-02T03:04:05.678Z" in text
    assert "grpc://10.20.30.40:8001" in text
    assert "Not shown" not in text


def test_without_colours_the_text_is_the_same() -> None:
    assert shown(status_view(STATUS), 80) == shown(status_view(STATUS), 80, colour="truecolor")


@pytest.mark.parametrize("width", [50, 60, 70, 80, 100, 120, 140])
def test_no_number_is_folded(width: int, report, verdict, comparisons) -> None:  # type: ignore[no-untyped-def]
    whole = shown([*load_view(report)[:1], *comparison_view(comparisons[:1])[:1]], WIDE)
    numbers = {word for line in whole for word in line.split() if re.fullmatch(r"[0-9.,]{3,}", word)}
    lines = shown([*load_view(report)[:1], *comparison_view(comparisons[:1])[:1]], width)
    seen = {word for line in lines for word in line.split() if re.fullmatch(r"[0-9.,]+", word)}
    assert {word for word in seen if len(word) > 2} <= numbers
    assert all(len(line) <= width for line in lines)
    assert all(len(line) <= width for line in shown(verdict_view(verdict), width))


def test_a_narrow_load_test_keeps_the_load_its_outcome_throughput_and_percentiles(report) -> None:  # type: ignore[no-untyped-def]
    head = next(line for line in shown(load_view(report), 50) if "outcome" in line)
    assert head.split() == ["load", "outcome", "inf/s", "p50", "p99"]


def test_words_fold_before_columns_go_and_columns_go_before_words_become_slivers() -> None:
    rows = [["a-name", "some words that take their room in this row", "1.19e-05"]]
    table = make_table(None, ["name", "words", "number"], rows, right="number", drop="name")
    assert "1.19e-05" in " ".join(shown([table], 60))
    assert "a-name" in " ".join(shown([table], 44))
    narrow = " ".join(shown([table], 36))
    assert ("a-name" in narrow, "1.19e-05" in narrow) == (False, True)
    assert "Not shown here: name" in narrow


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (5, "just now"),
        (185, "3 min ago"),
        (3 * 3600, "3 h ago"),
        (3 * 86400, "3 d ago"),
        (40 * 86400, "2026-01-02"),
        (-60, "2026-01-02"),
    ],
)
def test_how_long_ago(seconds: int, text: str) -> None:
    then = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)
    moment = Moment(then.isoformat(), "1, ")
    assert moment.ago(then + datetime.timedelta(seconds=seconds)) == f"1, {text}"
    assert Moment("no time").ago() == "no time"
