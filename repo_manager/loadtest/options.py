"""Options of a load test."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from repo_manager.errors import UsageError
from repo_manager.gates import Gate
from repo_manager.loadtest.wire.sequences import drawn_lengths
from repo_manager.loadtest.worker.schedule import ARRIVALS
from repo_manager.request_data.tensors import Sample
from repo_manager.server.transport import ClientOptions, ServerUrl
from repo_manager.tls import TlsFiles
from repo_manager.validation import check_fields

__all__ = [
    "Arrival",
    "Client",
    "Compression",
    "LoadTestOptions",
    "Parameter",
    "Protocol",
    "SharedMemory",
    "parse_levels",
    "parse_rates",
]

_SCHEMES = {"grpc": "grpc", "grpcs": "grpc", "http": "http", "https": "http"}
Protocol = Literal["grpc", "http"]
Arrival = Literal["constant", "poisson", "burst", "ramp"]
Client = Literal["auto", "native", "perf_analyzer"]
SharedMemory = Literal["none", "system", "cuda"]
Parameter = str | int | float | bool
Compression = Literal["none", "gzip", "deflate"]
SHARED_MEMORY = get_args(SharedMemory)


@dataclasses.dataclass(frozen=True)
class LoadTestOptions:
    """One load test: where, with its data, levels and way of measuring.

    Attributes:
        url: `grpc://host:port`, `grpcs://`, `http://`, `https://`, or `host:port` with `protocol`.
        model: the model's name on the server.
        version: its version. `None` leaves the choice to the server.
        protocol: `grpc` or `http`. `None` takes the URL's scheme, else `grpc`.
        concurrency: closed-loop levels (requests kept in flight), measured in this order.
        rate: open-loop levels in requests a second, measured after the closed-loop ones.
        arrival: open loop: `constant`, `poisson`, `burst` or `ramp`.
        burst_size: requests sent at once by the arrival `burst`. The mean rate stays `rate`.
        ramp_from_per_s: requests a second at the beginning of a ramp. Its length is the warm-up plus `duration_s`.
        replay: JSON or CSV file of recorded moments in seconds. One more level, run once.
        until_saturation: double the concurrency, from the first level on (or 1), until throughput saturates.
        until: search the largest load that holds these gates, upper limits, harder to hold under more load. The search
            is over the concurrency, or over the rate when `rate` is given. One level is where it begins, several bound
            it. `duration_s` is then the longest a level takes.
        resolution: the search ends when the passing load and the failing one are this close, as a share.
        batch_size: samples in a request. Needs a model with a batch axis when above 1.
        shapes: input name -> shape without the batch axis, for dynamic dimensions.
        data: .npz, .npy, perf_analyzer JSON, an image, or a folder of images with the inputs. `None` makes random
            ones.
        distinct: how many different requests are sent in rotation.
        allow_zeros: accept input data of zeros only.
        int_range: random integers are drawn from `[low, high)`.
        int_ranges: input name -> the same for that input, with better knowledge of it (rows of a table, a mask).
        seed: of random inputs, sequence lengths, arrivals and bootstraps. Equal seeds repeat them.
        warmup_s: seconds of load before each level, not measured.
        window_s: length of a measuring window.
        stable_windows: how many consecutive windows must agree.
        stability: largest deviation of a window from their mean, as a share.
        max_windows: number of windows after which a level without agreement is called unstable.
        duration_s: measure for a fixed time instead of until stable.
        request_count: measure a fixed number of requests instead.
        client: `native`, `perf_analyzer`, or `auto` (native).
        workers: processes of the native client. `None` takes one per four CPUs.
        connections: gRPC connections of each worker. `None` takes two for 8 or more requests kept in flight, else one.
        max_in_flight: open loop: requests open at once. Further due requests wait, and their waiting is latency.
        timeout_s: a request without an answer for this long is an error. A connection, and a question about the model,
            takes no longer either.
        metrics_url: Triton's metrics (`http://host:8002/metrics`). `None` tries port 8002 of the same host.
        access: headers, token and TLS files of the connections.
        shared_memory: `none`: inputs travel in each request. `system`: they are in POSIX shared memory registered with
            the server on this machine, and so are outputs of known size.
        start_at: begin of the load by the Unix clock, in seconds, so several machines begin together. `None` begins at
            once.
        image: how images become inputs: `resize`, `mean`, `std`, `scale`, `color`, `layout` -> value.
        compression: of requests: `none`, `gzip` or `deflate`. Over HTTP the answers are compressed, too.
        parameters: of each request, such as `priority` and `timeout` (microseconds), or others for the backend.
        sequences: open loop, sequence models: live sequences. The requests go round among them. In a closed loop the
            concurrency is the number of live sequences.
        sequence_length: requests of a sequence: `20`, `10:30` (each equally likely) or `mean:20` (geometric). `None`
            sends recorded sequences whole, and random ones of 16 to 24 requests.
        streaming: gRPC: send the requests of each live sequence, or of each place in flight, on a lasting stream.
            `False` sends each request to a decoupled model as a call of its own. `None` keeps streams open for
            decoupled models only.
        recorded: requests to send where there is no `data`, batch axis included: of a sequence model one recorded
            sequence, else samples.
        fallback: requests to send instead, as `recorded` ones, when the model refuses random ones.
        command: the command line, quoted in the report.
    """

    url: str
    model: str
    version: int | None = None
    protocol: str | None = None
    concurrency: tuple[int, ...] = ()
    rate: tuple[float, ...] = ()
    arrival: str = "constant"
    burst_size: int = 10
    ramp_from_per_s: float = 0.0
    replay: Path | None = None
    until_saturation: bool = False
    until: tuple[Gate, ...] = ()
    resolution: float = 0.05
    batch_size: int = 1
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    data: Path | None = None
    distinct: int = 64
    allow_zeros: bool = False
    int_range: tuple[int, int] = (0, 10)
    int_ranges: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    seed: int = 0
    warmup_s: float = 1.0
    window_s: float = 1.0
    stable_windows: int = 3
    stability: float = 0.1
    max_windows: int = 10
    duration_s: float | None = None
    request_count: int | None = None
    client: str = "auto"
    workers: int | None = None
    connections: int | None = None
    max_in_flight: int = 4096
    timeout_s: float = 30.0
    metrics_url: str | None = None
    access: ClientOptions = dataclasses.field(default=ClientOptions(), repr=False, metadata={"json": False})
    shared_memory: str = "none"
    start_at: float | None = None
    image: Mapping[str, str] = dataclasses.field(default_factory=dict)
    compression: str = "none"
    parameters: Mapping[str, Parameter] = dataclasses.field(default_factory=dict)
    sequences: int = 4
    sequence_length: str | None = None
    streaming: bool | None = None
    recorded: tuple[Sample, ...] = dataclasses.field(default=(), repr=False, metadata={"json": False})
    fallback: tuple[Sample, ...] = dataclasses.field(default=(), repr=False, metadata={"json": False})
    command: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        _check_address(self)
        _check_levels(self)
        _check_search(self)
        _check_measuring(self)

    @property
    def wire(self) -> str:
        """The protocol in use: `grpc` or `http`."""
        scheme, mark, _ = self.url.partition("://")
        return self.protocol or (_SCHEMES[scheme] if mark else "grpc")

    @property
    def tls(self) -> TlsFiles | None:
        """The parts of an encrypted connection. `None` when the URL's scheme asks for none."""
        return self.access.tls if self.url.startswith(("grpcs://", "https://")) else None

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request as the protocol names them, the token among them. Never to be shown."""
        return self.access.all_headers(self.wire)

    @property
    def server_url(self) -> str:
        """The server's URL with its scheme and port, and with its path where it has one."""
        return str(ServerUrl.parse(self.url if "://" in self.url else f"{self.wire}://{self.url}"))

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the server."""
        return ServerUrl.parse(self.server_url).host_and_port

    @property
    def path(self) -> str:
        """The part of a request's path before `/v2`: of a server behind a gateway, else empty."""
        return ServerUrl.parse(self.server_url).path


def _check_address(options: LoadTestOptions) -> None:
    scheme, mark, rest = options.url.partition("://")
    if mark and scheme not in _SCHEMES:
        raise UsageError(
            f"the URL {options.url!r} has the scheme {scheme!r}, expected grpc://, grpcs://, http:// or https://",
        )
    if options.protocol not in (None, "grpc", "http"):
        raise UsageError(f"the protocol is {options.protocol!r}, expected grpc or http")
    if mark and options.protocol is not None and options.protocol != _SCHEMES[scheme]:
        raise UsageError(f"the URL {options.url!r} contradicts the protocol {options.protocol!r}")
    port = (rest if mark else options.url).split("/", 1)[0].rpartition(":")[2]
    if ":" in (rest if mark else options.url) and not port.rstrip("]").isdigit() and "]" not in port:
        raise UsageError(f"the URL {options.url!r} has the port {port!r}, expected a number")
    _ = options.server_url  # checks the other parts of the URL
    if options.client not in ("auto", "native", "perf_analyzer"):
        raise UsageError(f"the client is {options.client!r}, expected native, perf_analyzer or auto")
    if options.compression not in get_args(Compression):
        raise UsageError(
            f"the compression is {options.compression!r}, expected one of {', '.join(get_args(Compression))}"
        )
    if options.streaming and options.wire == "http":
        raise UsageError("streams of requests (--streaming) are part of gRPC", hint="Give a grpc:// URL.")
    if options.shared_memory not in SHARED_MEMORY:
        raise UsageError(f"shared memory is {options.shared_memory!r}, expected one of {', '.join(SHARED_MEMORY)}")


def _check_levels(options: LoadTestOptions) -> None:
    if options.arrival not in ARRIVALS or options.arrival == "replay":
        raise UsageError(f"the arrival is {options.arrival!r}, expected constant, poisson, burst or ramp")
    if any(level < 1 for level in options.concurrency):
        raise UsageError(f"concurrency levels {options.concurrency}: each has to be at least 1")
    if any(not 0 < level < float("inf") for level in options.rate):
        raise UsageError(f"rates {options.rate}: each has to be more than 0 requests/s")
    if not (options.concurrency or options.rate or options.replay or options.until_saturation or options.until):
        raise UsageError("no load level is given", hint="Give concurrency (such as 1:16), a rate, or a replay file.")
    if options.sequence_length is not None:
        drawn_lengths(options.sequence_length, options.seed)
    if options.batch_size < 1 or options.distinct < 1:
        raise UsageError(
            f"batch size {options.batch_size} and {options.distinct} distinct requests: both have to be at least 1"
        )


def _check_search(options: LoadTestOptions) -> None:
    if not options.until:
        return
    given = {
        "a replay": options.replay is not None,
        "the search for saturation": options.until_saturation,
        "a fixed number of requests": options.request_count is not None,
        "a ramp": options.arrival == "ramp",
        "both concurrency and rate": bool(options.concurrency and options.rate),
    }
    unfit = [name for name, is_given in given.items() if is_given]
    if unfit:
        raise UsageError(f"a search for the largest load does not go with {' or '.join(unfit)}")
    if not 0 < options.resolution < 1:
        raise UsageError(f"resolution is {options.resolution}, expected a share between 0 and 1")


def _check_measuring(options: LoadTestOptions) -> None:
    if options.duration_s is not None and options.request_count is not None:
        raise UsageError("both a duration and a number of requests are given", hint="Give one of them, or none.")
    positive = {
        "window_s": options.window_s,
        "timeout_s": options.timeout_s,
        "stability": options.stability,
        "stable_windows": options.stable_windows,
        "connections": options.connections,
        "max_in_flight": options.max_in_flight,
        "duration_s": options.duration_s,
        "request_count": options.request_count,
        "workers": options.workers,
        "sequences": options.sequences,
    }
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise UsageError(f"{name} is {value}, expected more than 0")
    if options.warmup_s < 0:
        raise UsageError(f"warmup_s is {options.warmup_s}, expected 0 or more")
    if options.max_windows < options.stable_windows:
        raise UsageError(
            f"max_windows is {options.max_windows}, less than the {options.stable_windows} that have to agree"
        )


def parse_levels(text: str) -> tuple[int, ...]:
    """Parse concurrency levels: `8`, `1,4,16`, `1:16` (doubling, the end included), `2:10:4` (steps of 4).

    Raises:
        UsageError: anything else.
    """
    try:
        levels: list[int] = []
        for part in text.split(","):
            numbers = [int(number) for number in part.split(":")]
            if not 1 <= len(numbers) <= 3 or numbers[0] < 1 or (len(numbers) == 3 and numbers[2] < 1):
                raise ValueError(part)
            start, end = numbers[0], numbers[-1] if len(numbers) == 1 else numbers[1]
            if end < start:
                raise ValueError(part)
            if len(numbers) == 3:
                levels += range(start, end + 1, numbers[2])
                continue
            while start < end:
                levels.append(start)
                start *= 2
            levels.append(end)
    except ValueError:
        raise UsageError(
            f"the levels {text!r} cannot be read", hint="Expected 8, 1,4,16, 1:16 (doubling) or 2:10:4 (steps of 4)."
        ) from None
    return tuple(dict.fromkeys(levels))


def parse_rates(text: str) -> tuple[float, ...]:
    """Parse rates in requests a second: `200`, `100,200.5`, `100:500:100`.

    Raises:
        UsageError: anything else.
    """
    try:
        rates: list[float] = []
        for part in text.split(","):
            numbers = [float(number) for number in part.split(":")]
            if len(numbers) == 1:
                rates += numbers
                continue
            start, end, step = numbers
            if step <= 0 or end < start:
                raise ValueError(part)
            rates += [start + step * place for place in range(int((end - start) / step + 1e-9) + 1)]
    except ValueError:
        raise UsageError(f"the rates {text!r} cannot be read", hint="Expected 200, 100,200 or 100:500:100.") from None
    return tuple(dict.fromkeys(rates))
