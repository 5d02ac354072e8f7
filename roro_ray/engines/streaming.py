"""A step on its way to its reader while it is written: tokens from the decode thread, text in the reader's event loop.

The decode thread only appends token ids and wakes a loop whose reader has taken all that came before; text is made
where it is read. A slow reader, or a busy loop, therefore costs the batch nothing: what it has not taken grows by
token ids, at most the step's own, and comes as one delta.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from roro_ray.engines.protocol import StepDelta
from roro_ray.engines.rows import Row
from roro_ray.engines.text import HALF_CHARACTER, Ending, StepText

_SETTLED_AT_ONCE = 64  # tokens


class StepStream:
    """The tokens of one step between decode thread and reader; made in the reader's event loop.

    `kept_ids` are the beginning that the reader knows: neither they nor their text are told again. `ending` says what
    ends the step (None: what ends any other).
    """

    def __init__(self, text: StepText, kept_ids: tuple[int, ...], ending: Ending | None = None):
        self.loop = asyncio.get_running_loop()
        self._text = text
        self._ending = ending
        self._ids = list(kept_ids)
        self._told = len(text.render(kept_ids).rstrip(HALF_CHARACTER)) if kept_ids else 0
        self._put = len(kept_ids)
        self._lock = threading.Lock()
        self._arrived: list[int] = []
        self._wake = asyncio.Event()
        self._watched = False
        self._before, self._settled = "", 0  # text of the first tokens that ends with a whole character, their number

    def put(self, row: Row) -> bool:
        """Take the row's new tokens (decode thread); True where the reader must be woken for them."""
        tokens = row.ids[row.start + self._put :]
        if not tokens:
            return False
        self._put += len(tokens)
        with self._lock:
            is_first = not self._arrived
            self._arrived += tokens
        return is_first

    def wake(self) -> None:
        """There is something to read (event loop)."""
        self._wake.set()

    async def next_delta(self, answer: asyncio.Future[Any]) -> StepDelta | None:
        """What came since the last call, as soon as there is any, or None once the whole answer is there."""
        if not self._watched:
            self._watched = True
            answer.add_done_callback(lambda _: self._wake.set())
        while not answer.done():
            tokens = self._take()
            if tokens:
                return self._make_delta(tokens)
            self._wake.clear()
            await self._wake.wait()
        return None

    def _take(self) -> list[int]:
        with self._lock:
            tokens, self._arrived = self._arrived, []
        return tokens

    def _make_delta(self, tokens: list[int]) -> StepDelta:
        self._ids += tokens
        certain = self._text.certain(self._ids, self._ending, self._render())
        new = certain[self._told :]
        self._told += len(new)
        return StepDelta(tuple(tokens), new)

    def _render(self) -> str | None:
        """The text of all tokens, most of it rendered before: a long answer would cost the square of its length."""
        if not self._text.concatenates:
            return None
        tail = self._text.render(self._ids[self._settled :])
        whole = self._before + tail
        if len(self._ids) - self._settled >= _SETTLED_AT_ONCE and not tail.endswith(HALF_CHARACTER):
            self._before, self._settled = whole, len(self._ids)
        return whole


def hand_over(streams: Sequence[tuple[StepStream, Row]]) -> None:
    """Give unfinished rows' new tokens to their readers, with one call for each event loop (decode thread)."""
    woken: dict[asyncio.AbstractEventLoop, list[StepStream]] = {}
    for stream, row in streams:
        if row.finish is None and stream.put(row):
            woken.setdefault(stream.loop, []).append(stream)
    for loop, readers in woken.items():
        with contextlib.suppress(RuntimeError):  # a closed loop reads nothing
            loop.call_soon_threadsafe(_wake_all, readers)


def _wake_all(streams: Iterable[StepStream]) -> None:
    for stream in streams:
        stream.wake()
