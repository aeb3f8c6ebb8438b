"""Inference for applications: requests spread over a model's versions by weight or key, through every deployment."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from repo_manager.errors import InputError, RepoManagerError, ServerRefusedError
from repo_manager.files import reason_of
from repo_manager.server.client import TritonClient
from repo_manager.server.transport import ClientOptions, StreamRequest

__all__ = [
    "Answer",
    "VersionWeights",
    "VersionedClient",
    "WeightsSource",
    "published_name",
    "published_weights",
    "read_weights",
]


# The share of requests of each version, and where clients read it.
#
# By default, the server publishes the weights in the name of the model's first instance group. This name is free text,
# a change of it reloads nothing (docs/triton-reload.md), and every client can read it with the model's configuration. A
# canary writes `NAME@1=0.95,2=0.05` there. Otherwise a JSON file or a function of the application gives the weights.

_MARK = "@"


@dataclasses.dataclass(frozen=True)
class VersionWeights:
    """How the requests are spread.

    Attributes:
        shares: version -> its share of the requests, 0 to 1. They sum to 1.
    """

    shares: Mapping[int, float]

    @classmethod
    def of(cls, weights: Mapping[int, float]) -> VersionWeights:
        """Make shares of any weights.

        Raises:
            InputError: one is negative or no number, a version is below 1, or all are 0.
        """
        total = sum(weights.values())
        bad = [f"{version}: {weight}" for version, weight in weights.items() if version < 1 or not weight >= 0]
        if bad or not total > 0 or not math.isfinite(total):
            found = ", ".join(bad) or str(dict(weights))
            raise InputError(
                f"the weights {found} cannot be used: expected versions from 1 with weights from 0, and not all 0",
                hint='For instance {"1": 0.95, "2": 0.05}.',
            )
        return cls({version: weight / total for version, weight in sorted(weights.items())})

    def choose(
        self, draw: random.Random, *, key: str | bytes | None = None, without: Collection[int] = ()
    ) -> int | None:
        """Choose a version.

        The same key and weights always give the same version. When a version's share grows, keys only move to it,
        never between the others. This is weighted rendezvous hashing: Schindelhauer and Schomaker, "Weighted
        Distributed Hash Tables", SPAA 2005 (the logarithmic method).

        Args:
            draw: of the draws without a key.
            key: text behind the choice, a user's name for instance. `None` draws.
            without: versions that are not there.

        Returns:
            The version. `None` when none with a share is left.
        """
        left = {version: share for version, share in self.shares.items() if share > 0 and version not in without}
        if not left:
            return None
        if key is None:
            return draw.choices(list(left), list(left.values()))[0]
        data = key.encode() if isinstance(key, str) else key
        return min(left, key=lambda version: (_distance(data, version) / left[version], version))


WeightsSource = Mapping[int, float] | Path | Callable[[], Mapping[int, float]]
"""Fixed weights, a JSON file read again when it changes, or a function asked now and then."""


def _distance(key: bytes, version: int) -> float:
    """Return an exponentially distributed number, a function of key and version alone."""
    digest = hashlib.blake2b(key, digest_size=8, salt=version.to_bytes(8, "little")).digest()
    return -math.log((int.from_bytes(digest, "little") + 1) / 2.0**64)


def read_weights(path: Path, model: str) -> VersionWeights:
    """Read a weights file: `{"1": 0.95, "2": 0.05}`, or one such object a model under its name.

    Raises:
        InputError: it cannot be read or is of another form.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise InputError(f"the weights file {path} cannot be read: {reason_of(exc)}") from exc
    if isinstance(found, Mapping) and model in found:
        found = found[model]
    try:
        return VersionWeights.of(_numbers(found))
    except (TypeError, ValueError, AttributeError) as exc:
        raise InputError(
            f"the weights file {path} has another form: {exc}", hint='Expected {"1": 0.95, "2": 0.05}.'
        ) from exc


def _numbers(found: Any) -> dict[int, float]:
    return {int(version): float(weight) for version, weight in found.items()}


def published_name(base: str, weights: VersionWeights) -> str:
    """Return the instance group's name for the weights.

    Args:
        base: the name without them. The result can be passed here again.
        weights: share of the traffic of each version.
    """
    shares = ",".join(f"{version}={share:.6g}" for version, share in weights.shares.items())
    return f"{base.partition(_MARK)[0]}{_MARK}{shares}"


def published_weights(name: str) -> VersionWeights | None:
    """Return the weights an instance group's name tells, or `None` when it tells none."""
    _, mark, text = name.partition(_MARK)
    if not mark:
        return None
    try:
        pairs = (item.split("=") for item in text.split(","))
        return VersionWeights.of({int(version): float(weight) for version, weight in pairs})
    except (ValueError, InputError):
        return None  # a group name of another program with the same mark


# `VersionedClient`: inference with client-side weights and sticky versions, through every switch of versions.

# Messages of both protocols: `FindModel` and `GetModel` of triton-inference-server/core.
_NOT_THERE = re.compile(r"request for unknown model|is not at ready state|has no available versions", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answered request.

    Attributes:
        version: the version asked. `None` where the choice was left to the server.
        outputs: output name -> array. Strings as `object` arrays of bytes, bfloat16 as float32.
        not_there: versions found missing before (gone, or not there yet).
    """

    version: int | None
    outputs: Mapping[str, np.ndarray[Any, Any]]
    not_there: tuple[int, ...] = ()


class VersionedClient:
    """Asks one model on one server. Safe to share between threads.

    The weights are looked up again at most every `refresh_s`, in the thread whose request finds them due. A request
    for a missing version is sent again to another one, so a deployment, a roll-back or an ended canary costs no
    request. Without weights anywhere, the server chooses: the highest version served.
    """

    def __init__(
        self,
        url: str,
        model: str,
        weights: WeightsSource | None = None,
        *,
        options: ClientOptions | None = None,
        refresh_s: float = 1.0,
        seed: int | None = None,
    ) -> None:
        """Make a client. Nothing is sent yet.

        Args:
            url: `grpc://host:port`, `grpcs://...`, `http://...` or `https://...`.
            model: name of the model on the server.
            weights: version -> weight, a file of them, or a function for them. `None`: those a canary publishes on the
                server.
            options: deadlines, TLS and headers. `None` takes the defaults.
            refresh_s: how old the weights may become.
            seed: of the draws without a key. `None` takes a fresh one.

        Raises:
            UsageError: the URL is not understood or a certificate cannot be read.
            InputError: fixed weights that are none.
        """
        self.model, self._url, self._options = model, url, options
        self._source: WeightsSource | None = weights
        self._weights = VersionWeights.of(weights) if isinstance(weights, Mapping) else None
        self._refresh_s, self._draw = refresh_s, random.Random(seed)
        self._due = 0.0
        self._gone: dict[int, float] = {}
        self._lock, self._clients_lock = threading.Lock(), threading.Lock()
        first = TritonClient.connect(url, options)
        self._shared = first if first.endpoint.protocol == "grpc" else None
        self._clients = [first]
        self._local = threading.local()
        self._local.client = first

    def __enter__(self) -> VersionedClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections of all threads."""
        with self._clients_lock:
            for client in self._clients:
                client.close()
            self._clients.clear()

    @property
    def weights(self) -> VersionWeights | None:
        """The weights in use. `None` when the server chooses."""
        self._refresh()
        return self._weights

    def infer(
        self,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        *,
        key: str | bytes | None = None,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        """Run one inference on a version chosen by the weights.

        Args:
            inputs: name -> array, batch axis included.
            key: requests with the same key go to the same version for as long as it is there and its share does not
                shrink. `None` draws for each request.
            outputs: the outputs wanted. `None` for all.
            timeout_s: deadline of each attempt. `None` takes the options' `timeout_s`.

        Raises:
            ServerRefusedError: the server answered with an error other than a missing version, or it has no version of
                the model at all.
            ServerUnreachableError: no answer.
        """
        self._refresh()
        not_there: list[int] = []
        while True:
            version = self._choose(key, not_there)
            try:
                answer = self._client().infer(self.model, version, inputs, outputs=outputs, timeout_s=timeout_s)
            except ServerRefusedError as exc:
                self._pass_over(version, exc, not_there)
            else:
                return Answer(version, answer, tuple(not_there))

    def stream(
        self,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        *,
        key: str | bytes | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[Answer]:
        """Send one request to a decoupled model, on a version chosen by the weights. gRPC only.

        A version that is not there is replaced by another one, as in `infer`. No response is lost or repeated.

        Args:
            inputs: inputs of the one request: name -> array, batch axis included.
            key: as for `infer`. `None` draws for each request.
            timeout_s: deadline of each attempt, until its final response. `None` takes the options' `timeout_s`.

        Yields:
            One answer per response, as it arrives.

        Raises:
            UsageError: the URL is HTTP.
            ServerRefusedError: as `infer`.
            ServerUnreachableError: no final response.
        """
        self._refresh()
        not_there: list[int] = []
        while True:
            version = self._choose(key, not_there)
            responses = self._client().stream(self.model, version, [StreamRequest(inputs)], timeout_s=timeout_s)
            try:
                for outputs in responses:
                    yield Answer(version, outputs, tuple(not_there))
                return
            except ServerRefusedError as exc:
                self._pass_over(version, exc, not_there)

    def _pass_over(self, version: int | None, refusal: ServerRefusedError, not_there: list[int]) -> None:
        """Leave out a version that is not there. Raise any other refusal again."""
        if version is None or not _NOT_THERE.search(refusal.message):
            raise refusal
        not_there.append(version)
        self._gone[version] = time.monotonic() + self._refresh_s

    def _choose(self, key: str | bytes | None, not_there: list[int]) -> int | None:
        """Return a version. `None` leaves the choice to the server, which knows its versions."""
        if self._weights is None:
            return None
        now = time.monotonic()
        gone = {version for version, until in list(self._gone.items()) if until > now}
        return self._weights.choose(self._draw, key=key, without=gone | set(not_there))

    def _client(self) -> TritonClient:
        """Return the thread's client: the HTTP library's is for one thread only."""
        if self._shared is not None:
            return self._shared
        client: TritonClient | None = getattr(self._local, "client", None)
        if client is None:
            client = TritonClient.connect(self._url, self._options)
            with self._clients_lock:
                self._clients.append(client)
            self._local.client = client
        return client

    def _refresh(self) -> None:
        """Look the weights up when they are due. Only one thread at a time does, the others go on with the old ones."""
        if time.monotonic() < self._due or isinstance(self._source, Mapping):
            return
        # Only the first look waits. Later, old weights are better than a pause.
        if not self._lock.acquire(blocking=self._due == 0.0):
            return
        try:
            if time.monotonic() >= self._due:
                self._weights = self._look_up()
                self._due = time.monotonic() + self._refresh_s
        finally:
            self._lock.release()

    def _look_up(self) -> VersionWeights | None:
        """Ask the source. A failed read leaves the weights as they are."""
        try:
            if self._source is None:
                groups = self._client().model_config(self.model).instance_group
                return published_weights(groups[0].name) if groups else None
            if isinstance(self._source, Path):
                return read_weights(self._source, self.model)
            if callable(self._source):
                return VersionWeights.of(self._source())
        except RepoManagerError:
            return self._weights
        return self._weights
