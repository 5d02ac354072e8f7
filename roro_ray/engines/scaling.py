"""How many replicas of a model are wanted: at once more when there is much to do, fewer after a time of little."""

from __future__ import annotations

import math
from collections import deque


class Scaler:
    """Wanted replicas from the demand, between `least` and `most`.

    Args:
        target: requests in hand that a replica should have.
        idle_s: what was wanted within this many seconds is kept: shorter lulls cost no restart.
    """

    def __init__(self, least: int, most: int, target: float, idle_s: float) -> None:
        self.least, self.most = least, most
        self._target = target
        self._idle_s = idle_s
        self._recent: deque[tuple[float, int]] = deque()  # falling: each one is the most that was wanted since

    def decide(self, now: float, demand: int) -> int:
        """The replicas wanted at a time (seconds, never falling) under a demand (requests in hand or waiting)."""
        wanted = min(max(math.ceil(demand / self._target), self.least), self.most)
        while self._recent and self._recent[-1][1] <= wanted:
            self._recent.pop()
        self._recent.append((now, wanted))
        while self._recent[0][0] < now - self._idle_s:
            self._recent.popleft()
        return self._recent[0][1]
