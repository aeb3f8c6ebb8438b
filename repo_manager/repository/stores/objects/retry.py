"""Trying again: exponential backoff with jitter, a slow-down heeded, and one deadline over all of it."""

from __future__ import annotations

import dataclasses
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from repo_manager.errors import StoreUnreachableError
from repo_manager.sockets import without_number

__all__ = ["RetryOptions", "TransientError", "readable", "retried", "tls_refusal"]

R = TypeVar("R")

_SECRETS = re.compile(r"(?i)([?&](?:sig|signature|x-amz-[a-z-]+|x-goog-[a-z-]+|awsaccesskeyid|token)=)[^&\s\"'<]+")
_MAX_TEXT = 400
# rustls names its errors only in the debug text of obstore's exceptions.
_NO_TLS = "InvalidContentType"
_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(?:Other\(\s*OtherError\(\s*)?([^(){}]*\w)")


@dataclasses.dataclass(frozen=True)
class RetryOptions:
    """How long and how often to try.

    Attributes:
        deadline_s: over all attempts of one request.
        first_s: the longest wait before the second attempt. It doubles with each further one.
        longest_s: the longest wait of all.
        slow_down_s: the shortest wait after the store asked for fewer requests (503 SlowDown, 429).
    """

    deadline_s: float = 120.0
    first_s: float = 0.1
    longest_s: float = 10.0
    slow_down_s: float = 0.5


class TransientError(Exception):
    """A failed request. Sent again, it may succeed.

    Args:
        message: the reason, shown when no attempt succeeds in time.
        slow_down: whether the store asked for fewer requests.
    """

    def __init__(self, message: str, *, slow_down: bool = False) -> None:
        super().__init__(message)
        self.slow_down = slow_down


def retried(what: str, attempt: Callable[[], R], options: RetryOptions) -> R:
    """Call `attempt` until it does not fail transiently, or the deadline is over.

    The wait is drawn evenly between 0 and a doubling bound ("full jitter"), so many clients refused together do not
    come back together.

    Args:
        what: for the error: the action tried.
        attempt: makes the request. A `TransientError` from it leads to another try. Everything else ends it.
        options: number of attempts, waits and deadline.

    Raises:
        StoreUnreachableError: the deadline is over. With the last reason.
    """
    deadline = time.monotonic() + options.deadline_s
    tries = 0
    while True:
        tries += 1
        try:
            return attempt()
        except TransientError as exc:
            bound = min(options.longest_s, options.first_s * 2 ** min(tries - 1, 20))
            wait = random.uniform(0.0, bound)
            if exc.slow_down:
                wait += options.slow_down_s
            if time.monotonic() + wait >= deadline:
                raise StoreUnreachableError(
                    f"cannot {what}: {without_number(str(exc))} ({tries} attempts in {options.deadline_s:g} s)",
                    hint="Check the network and the store, then run the same command again: it goes on where it was.",
                ) from exc
            time.sleep(wait)


def readable(text: str) -> str:
    """Return a library's message on one line, shortened, without possible credentials."""
    said = text.partition("Debug source:")[0]
    flat = " ".join(_SECRETS.sub(r"\1***", said).split())
    return flat if len(flat) <= _MAX_TEXT else flat[:_MAX_TEXT] + "..."


def tls_refusal(text: str) -> tuple[str, str] | None:
    """Return the fault of a connection's TLS and the remedy, or `None` where another attempt may succeed."""
    if _NO_TLS in text:
        what = "the endpoint does not speak TLS, and its address says https"
        return what, "Write http:// for an endpoint without TLS, or name the port that speaks TLS."
    refused = _CERTIFICATE.search(text)
    if refused is None:
        return None
    hint = "It has to be for this host, valid today, and from an authority trusted by this machine."
    return f"the endpoint's certificate is refused: {' '.join(refused[1].split())}", hint
