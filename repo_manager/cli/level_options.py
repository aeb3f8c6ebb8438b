"""How a load test loads and measures: levels or a search, sequences, windows, and the client for it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from pathlib import Path
from typing import ClassVar

from repo_manager.cli.durations import seconds_option
from repo_manager.cli.option_groups import option
from repo_manager.errors import UsageError
from repo_manager.gates import Gate
from repo_manager.loadtest.judge import parse_slo
from repo_manager.loadtest.options import Arrival, Client, LoadTestOptions, parse_levels, parse_rates
from repo_manager.loadtest.search import check_gates

__all__ = ["LevelFlags", "MeasureFlags", "SequenceFlags"]


@dataclasses.dataclass(frozen=True)
class LevelFlags:
    """How much load."""

    PANEL: ClassVar[str] = "Load"
    concurrency: str | None = option(
        "--concurrency", "-c", help="Requests in flight: 8, 1,4,16 or 1:16 (doubling) [default: 1:16]."
    )
    rate: str | None = option(
        "--rate",
        sets=(LoadTestOptions, "rate"),
        read=parse_rates,
        show=lambda _: None,
        help="Requests a second, open loop: 200, or 100:500:100.",
    )
    arrival: Arrival = option("--arrival", sets=(LoadTestOptions, "arrival"), help="When the requests of --rate come.")
    burst_size: int = option(
        "--burst-size", sets=(LoadTestOptions, "burst_size"), min=1, help="Requests at once, of --arrival burst."
    )
    ramp_from: float = option(
        "--ramp-from",
        sets=(LoadTestOptions, "ramp_from_per_s"),
        min=0.0,
        help="Requests a second at which --arrival ramp begins.",
    )
    replay: Path | None = option(
        "--replay", sets=(LoadTestOptions, "replay"), help="JSON or CSV file of recorded send times."
    )
    until: str | None = option(
        "--until",
        metavar="saturation|GATES",
        sets=(LoadTestOptions, "until_saturation"),
        read=lambda text: text == "saturation",
        show=lambda _: None,
        help='saturation: double the concurrency until throughput rises by less than 5 %. "p99<20ms,errors<0.1%": '
        "search the largest concurrency, or --rate, that holds.",
    )
    resolution: float = option(
        "--resolution",
        sets=(LoadTestOptions, "resolution"),
        read=lambda percent: percent / 100,
        show=lambda share: share * 100,
        min=0.1,
        max=99.0,
        help="Percent between the load that holds and the one that fails at which --until ends.",
    )
    batch_size: int = option(
        "--batch-size", "-b", sets=(LoadTestOptions, "batch_size"), min=1, help="Samples in a request."
    )

    def searched(self) -> tuple[Gate, ...]:
        """Return the gates whose largest load is searched.

        Raises:
            UsageError: the text is neither `saturation` nor gates a search can hold.
        """
        if self.until is None or self.until == "saturation":
            return ()
        try:
            gates = tuple(parse_slo(part) for part in self.until.split(",") if part.strip())
        except UsageError as exc:
            raise UsageError(f"--until: {exc.message}; expected gates, or 'saturation'", hint=exc.hint) from exc
        if not gates:
            raise UsageError("--until has no gate, expected gates, or 'saturation'")
        check_gates(gates)
        return gates

    def levels(self) -> tuple[int, ...]:
        """Return the closed-loop levels: the option's, or 1 to 16 when no other level is asked for."""
        if self.concurrency is None and (self.rate or self.replay or self.until):
            return ()
        return parse_levels(self.concurrency or "1:16")


@dataclasses.dataclass(frozen=True)
class SequenceFlags:
    """Requests for a model of sequences."""

    PANEL: ClassVar[str] = "Sequences and streams"
    sequences: int = option(
        "--sequences",
        sets=(LoadTestOptions, "sequences"),
        min=1,
        help="Live sequences of --rate; of -c it is the level.",
    )
    sequence_length: str | None = option(
        "--sequence-length",
        metavar="LENGTH",
        sets=(LoadTestOptions, "sequence_length"),
        help="Requests of a sequence: 20, 10:30 (even) or mean:20 [default: recorded ones whole, else 16:24].",
    )
    streaming: bool | None = option(
        "--streaming/--no-streaming",
        sets=(LoadTestOptions, "streaming"),
        help="gRPC: keep one stream open per live sequence or request in flight [default: of decoupled models].",
    )


@dataclasses.dataclass(frozen=True)
class MeasureFlags:
    """Durations, and the client."""

    PANEL: ClassVar[str] = "Measurement"
    warmup: float = seconds_option(
        "--warmup", sets=(LoadTestOptions, "warmup_s"), least=0.0, help="Load before each measurement."
    )
    duration: float | None = seconds_option(
        "--duration", sets=(LoadTestOptions, "duration_s"), help="Of each level [default: until stable]."
    )
    request_count: int | None = option(
        "--request-count", sets=(LoadTestOptions, "request_count"), min=1, help="Requests per level instead."
    )
    window: float = seconds_option(
        "--window",
        sets=(LoadTestOptions, "window_s"),
        help="Of a measuring window; three have to agree.",
    )
    stability: float = option(
        "--stability",
        sets=(LoadTestOptions, "stability"),
        read=lambda percent: percent / 100,
        show=lambda share: share * 100,
        min=0.1,
        help="Percent by which agreeing windows may differ.",
    )
    client: Client = option(
        "--client", sets=(LoadTestOptions, "client"), help="Client for the requests; auto is native."
    )
    workers: int | None = option(
        "--workers",
        sets=(LoadTestOptions, "workers"),
        min=1,
        help="Processes of the native client [default: one per 4 CPUs].",
    )
    metrics: str | None = option(
        "--metrics-url", metavar="URL", help="Triton's metrics [default: port 8002 of the host]."
    )
    start_at: str | None = option(
        "--start-at",
        metavar="TIME",
        sets=(LoadTestOptions, "start_at"),
        read=lambda text: _moment(text),
        help="Begin at this moment: Unix seconds or ISO 8601 with a zone.",
    )


def _moment(text: str | None) -> float | None:
    """Read a moment: Unix seconds, or ISO 8601 with a time zone."""
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        return float(text)
    try:
        moment = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise UsageError(f"--start-at {text}: expected Unix seconds or ISO 8601 with a zone, as 2026-01-31T12:00:00Z")
    return moment.timestamp()
