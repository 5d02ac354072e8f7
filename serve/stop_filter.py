"""Stop strings over text that arrives in pieces.

The answer must end before the first stop string that is completed, and nothing of it may have been sent by then; so a
piece that may be the beginning of one is held back until more text decides.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Takes text in pieces and gives out what is certainly before any stop string.

    The stop string that is completed first ends the text; of several completed by the same character the longest. So
    the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come (`found` says which)."""
        return self.found is not None

    def feed(self, text: str) -> str:
        """Take more text; what may be emitted now. Nothing comes any more once a stop string was found."""
        if self.found is not None or not text:
            return ""
        if not self._stops:
            return text
        known = self._held + text
        ends = [(known.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in known]
        if ends:
            end, _, self.found = min(ends)
            self._held = ""
            return known[: end - len(self.found)]
        kept = self._count_held(known)
        self._held = known[len(known) - kept :]
        return known[: len(known) - kept]

    def flush(self) -> str:
        """The text is over: what was held back was no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _count_held(self, known: str) -> int:
        """Length of the longest end of `known` that a stop string begins with."""
        for length in range(min(len(known), self._longest - 1), 0, -1):
            tail = known[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """A whole text before its first stop string, and that stop string (None where there is none)."""
    stop_filter = StopFilter(stops)
    return stop_filter.feed(text) + stop_filter.flush(), stop_filter.found
