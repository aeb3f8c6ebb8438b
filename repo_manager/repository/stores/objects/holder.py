"""Lease records: who holds an object in a store, and whether the holder is alive. No kernel drops a lock here."""

from __future__ import annotations

import dataclasses
import functools
import os
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["LEASE_S", "Holder", "parse_holder"]

LEASE_S = 900.0
"""How long a silent holder counts as alive, in seconds. A transfer renews its claim after a third of it."""

_MOST_S = 2 * LEASE_S
"""Nobody writes a later end, unless their clock is a quarter of an hour ahead. Then it counts as ended."""
_STARTED_AT = 19  # index of `starttime` among the fields after the command's name in /proc/PID/stat


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process at work on an object.

    Attributes:
        host: its machine's name, for people.
        machine: its boot and its process namespace. The process's id means something only there.
        pid: its process id. Another machine may use the same one.
        started: its start time in clock ticks since boot, so a reused id is recognised.
        token: random text, new for each claim.
        expires_at: seconds since 1970, 0 when it was released. On another machine nobody holds it later than this, by
            the reader's clock; nor where it is further ahead than anybody's lease reaches.
    """

    host: str
    machine: str
    pid: int
    started: int
    token: str
    expires_at: float

    @staticmethod
    def me(lease_s: float = LEASE_S) -> Holder:
        """Return this process, with a new token."""
        pid = os.getpid()
        host = socket.gethostname()
        return Holder(host, _machine(), pid, _started(pid) or 0, secrets.token_hex(8), time.time() + lease_s)

    def renewed(self, lease_s: float = LEASE_S) -> Holder:
        """Return it with a later end."""
        return dataclasses.replace(self, expires_at=time.time() + lease_s)

    def released(self) -> Holder:
        """Return it ended: anybody may go on with the work."""
        return dataclasses.replace(self, expires_at=0.0)

    @property
    def alive(self) -> bool:
        """Whether it may still be at work: known for a process of this machine, else by its end."""
        if self.is_known:
            return self.expires_at > 0 and _started(self.pid) == self.started
        return 0 < self.expires_at - time.time() <= _MOST_S

    @property
    def is_known(self) -> bool:
        """Whether it is of this machine, so no clock is needed to tell whether it lives."""
        return self.machine == _machine()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def parse_holder(fields: Mapping[str, Any]) -> Holder:
    """Read a holder as `dataclasses.asdict` wrote it.

    Raises:
        TypeError, ValueError, KeyError: it is damaged.
    """
    return Holder(
        host=str(fields["host"]),
        machine=str(fields["machine"]),
        pid=int(fields["pid"]),
        started=int(fields["started"]),
        token=str(fields["token"]),
        expires_at=float(fields["expires_at"]),
    )


@functools.cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        # Without these files, only the end of a lease shows whether its holder is alive.
        return f"{socket.gethostname()}:{secrets.token_hex(8)}"


def _started(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(stat.rpartition(")")[2].split()[_STARTED_AT])
    except (OSError, ValueError, IndexError):
        return None
