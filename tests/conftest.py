"""What holds for all tests."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Let Ctrl-C mean what it means in a terminal.

    A shell starts a job in the background (`pytest &`, `nohup`) with SIGINT ignored, and what is ignored stays so in
    the programs that the tests start and interrupt.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
