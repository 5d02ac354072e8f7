"""A job that is stopped from outside unwinds like one that is stopped by Ctrl-C.

`ray job stop`, schedulers and a plain `kill` send SIGTERM, whose default is to end the process on the spot: what
`finally` blocks give back or write would be lost.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from jobs._terminal import stamp

# `timeout` and some shells signal both a process and its group: the second is then the same request.
_SAME_REQUEST_S = 1.0


class Stopped(KeyboardInterrupt):
    """SIGTERM arrived. Ray's waits turn it into a plain KeyboardInterrupt; `StopSignal.received` still tells."""


class StopSignal:
    """A context in which the first SIGTERM raises `Stopped` in the main thread, and the second ends the process.

    In other threads than the main one, where Python allows no handlers, it changes nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since = 0.0
        self._before: Any = None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    @property
    def name(self) -> str:
        """What stopped the job: SIGTERM, or SIGINT (Ctrl-C) where no other signal is known."""
        return (self.received or signal.SIGINT).name

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal, as shells tell it: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + (self.received or signal.SIGINT)

    def explains(self, error: BaseException) -> bool:
        """True where this is how a stop unwinds: while Ray starts, SIGTERM is its own `SystemExit`."""
        if isinstance(error, SystemExit) and error.code == signal.SIGTERM:
            self.received = self.received or signal.SIGTERM
        return isinstance(error, KeyboardInterrupt) or self.received is not None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
            _write("Stopping ... (a second SIGTERM ends the job at once)")
            raise Stopped
        if time.monotonic() - self._since > _SAME_REQUEST_S:
            os._exit(self.exit_code)


def _write(text: str) -> None:
    """Past the buffers: the signal may have come in the middle of a write to them."""
    try:
        os.write(sys.stderr.fileno(), f"{stamp(text)}\n".encode())
    except (OSError, ValueError):  # no stderr, or one without a file
        return
