"""How far a stage has come: a bar with rate and time left on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from typing import Never

from tqdm import tqdm

from jobs._terminal import has_terminal, say

# Lines in a log: often at first, and in a job of hours once a minute.
_LINE_EVERY_S = (5.0, 60.0)
_LINE_SHARE = 0.05


class Progress:
    """Counts done work of a known total; use as a context and call `advance`.

    Args:
        done: what an earlier, interrupted run had finished; it does not count towards the rate.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self._before = done
        self._told = done > 0
        self._label = ""
        self._began = self._last_line = time.monotonic()
        self._bar: tqdm[Never] | None = None
        if has_terminal():
            self._bar = tqdm(total=total, initial=done, desc=what, unit=unit, dynamic_ncols=True, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Tell that `count` more units are done."""
        self.move_to(self.done + count)

    def start_at(self, done: int, label: str = "") -> None:
        """Tell how many units are done in all; what the first call tells was done by an earlier run.

        Args:
            label: of what comes next, shown beside the bar or as a line.
        """
        if self._told:
            self.move_to(done)
        else:
            self._before, self._told = done, True
            self._count_to(done)
        if label:
            self._label = label
            self.note("")
            if self._bar is None:
                say(f"  {self.what}: {label} ({done}/{self.total})")

    def note(self, text: str) -> None:
        """Show a few words beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(" ".join(part for part in (self._label, text) if part), refresh=False)
            self._bar.total = self.total

    def move_to(self, done: int) -> None:
        """Tell how many units are done in all."""
        count, now = self._count_to(done), time.monotonic()
        often, seldom = _LINE_EVERY_S
        pause = min(max(often, _LINE_SHARE * (now - self._began)), seldom)
        if self._bar is None and count and now - self._last_line >= pause:
            self._last_line = now
            say(self.line())

    def _count_to(self, done: int) -> int:
        count, self.done = done - self.done, done
        if self._bar is not None:
            self._bar.update(count)
        return count

    def line(self) -> str:
        """`collect: 320/3200 episodes (10%), 210/s, 14 s left`."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = (self.done - self._before) / seconds
        left = f"{_format_time((self.total - self.done) / rate)} left" if rate > 0 else "time left unknown"
        share = 100 * self.done / max(self.total, 1)
        return f"  {self.what}: {self.done}/{self.total} {self.unit} ({share:.0f}%), {rate:.3g}/s, {left}"


def _format_time(seconds: float) -> str:
    """`30 s`, `12 min`, `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
