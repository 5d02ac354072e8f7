"""What serving adds to an episode: somebody who watches it, and what to do when a model is gone.

Training hands in nothing of this, so that both run the same loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from roro_ray.config import STEP_DELIMITER
from roro_ray.types import Decision, Step

_UNFINISHED = (STEP_DELIMITER[0], "\ufffd")  # may become a delimiter or a whole character with the next token


class EpisodeWatcher(Protocol):
    """Is told of an episode as it happens; calls come from the event loop and must not block it.

    With `wants_text` false, steps are asked for whole, which costs less than token by token.
    """

    @property
    def wants_text(self) -> bool:
        """Whether `on_text` is to be called."""
        ...

    def on_decision(self, index: int, decision: Decision, degraded: bool) -> None:
        """Step `index` is going to be written by `decision.model`; a second call takes the first back."""
        ...

    def on_text(self, index: int, text: str) -> None:
        """More text of step `index`; what was told once is never taken back."""
        ...

    def on_close(self, index: int) -> None:
        """The thinking block is closed: what is written as `index` is the final answer, and no routed step."""
        ...

    def on_step(self, index: int, step: Step, seconds: float) -> None:
        """Step `index` is finished, `seconds` after the one before; its text was told to its end."""
        ...

    def wants_more(self) -> bool:
        """False ends the episode after the step just finished (`Trajectory.end` is `stop_string`)."""
        ...


@dataclass(frozen=True, slots=True)
class EpisodeOptions:
    """How an episode is served.

    `rescue`: a model that is unavailable is replaced by the nearest other one, and a router that is by the dearest
    model (such steps are marked `degraded`); else the error ends the episode. `top_p` is the nucleus where the
    temperature is above 0.
    """

    watcher: EpisodeWatcher | None = None
    rescue: bool = False
    top_p: float = 1.0


class ShownText:
    """Text of one step on its way to a watcher: told once, never part of a delimiter, never half a character."""

    def __init__(self, watcher: EpisodeWatcher, index: int) -> None:
        self._watcher = watcher
        self._index = index
        self._known = ""
        self._shown = 0

    def take_back(self) -> str:
        """Forget what was not told, since its writer is gone; gives what was told, which stays."""
        self._known = self._known[: self._shown]
        return self._known

    def feed(self, text: str) -> None:
        """Take more text of the step and tell what is certain of it."""
        self._known += text
        end = len(self._known)
        while end > self._shown and self._known[end - 1] in _UNFINISHED:
            end -= 1
        self._tell(end)

    def finish(self, text: str) -> None:
        """Tell what is missing of the step's whole text."""
        self._known = text
        self._tell(len(text))

    def _tell(self, end: int) -> None:
        if end > self._shown:
            self._watcher.on_text(self._index, self._known[self._shown : end])
            self._shown = end
