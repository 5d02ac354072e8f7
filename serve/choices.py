"""One choice of an answer: an episode that is watched, cut at the client's stop strings, and told as events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from roro_ray.config import STEP_DELIMITER, EpisodeConfig
from roro_ray.engines.pool import EnginePool
from roro_ray.routing.episode import EpisodeSpec, run_episode
from roro_ray.routing.policies import Policy
from roro_ray.routing.watch import EpisodeOptions
from roro_ray.types import Decision, Step, Trajectory
from serve.policies import is_capped
from serve.responses import StepStart, StepTrace, StopFilter


@dataclass(frozen=True, slots=True)
class TextEvent:
    """More text of a choice: of its answer, or of the thinking before it."""

    choice: int
    text: str
    thinking: bool = False


@dataclass(frozen=True, slots=True)
class StartEvent:
    """A step begins."""

    start: StepStart


@dataclass(frozen=True, slots=True)
class StepEvent:
    """A step has ended."""

    trace: StepTrace


@dataclass(frozen=True, slots=True)
class EndEvent:
    """A choice has ended; `text` is all that the client gets of its answer, `thoughts` of what stood before it."""

    choice: int
    trajectory: Trajectory
    text: str
    thoughts: str | None = None


Event = TextEvent | StartEvent | StepEvent | EndEvent


@dataclass(slots=True)
class ChoiceWatcher:
    """Watches the episode of one choice. `emit` must not block; `on_step` is for whoever counts.

    Args:
        names: of the pool's models.
        stop: strings at which the answer ends.
        live: whether the client wants the text as it is made.
        thinks: whether the steps are thoughts, behind which the answer stands.
        given: number of steps that the client has already.
    """

    choice: int
    names: Sequence[str]
    emit: Callable[[Event], None]
    stop: tuple[str, ...] = ()
    live: bool = True
    thinks: bool = False
    on_step_done: Callable[[str, Step, float], None] = lambda model, step, seconds: None
    given: int = 0
    first_text_at: float | None = None
    text: str = ""
    thoughts: str = ""
    _filter: StopFilter = field(init=False)
    _thinking: bool = field(init=False)
    _joined: int = 0  # steps whose delimiter has gone out

    def __post_init__(self) -> None:
        self._filter = StopFilter(self.stop)
        self._thinking = self.thinks
        self._joined = self.given

    @property
    def wants_text(self) -> bool:
        """Token by token costs more, so only where somebody reads along."""
        return self.live

    def on_decision(self, index: int, decision: Decision, degraded: bool) -> None:
        """Tell who is going to write."""
        start = StepStart(
            choice=self.choice,
            index=index,
            model=self.names[decision.model],
            probability=decision.probabilities[decision.model],
            probabilities=dict(zip(self.names, decision.probabilities, strict=True)),
            router_version=decision.version,
            degraded=degraded,
        )
        self.emit(StartEvent(start))

    def on_text(self, index: int, text: str) -> None:
        """Tell what may be told of the text: up to a stop string, and not what may become one."""
        if index > self._joined:
            self._joined = index
            text = STEP_DELIMITER + text
        # Stop strings are the answer's: a thought that mentions one ends nothing.
        self._say(text if self._thinking else self._filter.feed(text))

    def on_close(self, index: int) -> None:
        """What follows is the answer."""
        self._thinking = False
        self._joined = index

    def on_step(self, index: int, step: Step, seconds: float) -> None:
        """Tell what the step was."""
        if not self.live:
            self.on_text(index, step.text)
        if STEP_DELIMITER in self.stop and step.finish == "delimiter" and not self._thinking:
            self._say(self._filter.feed(STEP_DELIMITER))  # the next step would only be written to be cut off
        model = self.names[step.model]
        self.on_step_done(model, step, seconds)
        decision = step.decision
        trace = StepTrace(
            choice=self.choice,
            index=index,
            model=model,
            probability=decision.probabilities[step.model],
            probabilities=dict(zip(self.names, decision.probabilities, strict=True)),
            router_version=decision.version,
            text=step.text,
            tokens=step.tokens,
            discarded=step.discarded,
            confidence=step.confidence,
            confidence_min=step.confidence_min,
            flops=step.usage.flops,
            milliseconds=1000 * seconds,
            degraded=step.degraded,
            capped=is_capped(decision),
        )
        self.emit(StepEvent(trace))

    def wants_more(self) -> bool:
        """Not once a stop string has come."""
        return not self._filter.stopped

    def finish(self, trajectory: Trajectory) -> None:
        """Tell the rest of the text and that the choice has ended."""
        self._say(self._filter.flush())
        self.emit(EndEvent(self.choice, trajectory, self.text, self.thoughts if self.thinks else None))

    def _say(self, text: str) -> None:
        if text:
            if self.first_text_at is None:
                self.first_text_at = time.perf_counter()
            if self._thinking:
                self.thoughts += text
            else:
                self.text += text
            self.emit(TextEvent(self.choice, text, self._thinking))


@dataclass(frozen=True, slots=True)
class ChoiceJob:
    """What to roll out for one choice."""

    spec: EpisodeSpec
    pool: EnginePool
    policy: Policy
    episode: EpisodeConfig
    top_p: float

    async def run(self, watcher: ChoiceWatcher) -> Trajectory:
        """Roll out the episode; the watcher is told of it and of its end.

        Raises:
            EngineError: no model of the pool could write a step.
        """
        options = EpisodeOptions(watcher, rescue=True, top_p=self.top_p)
        trajectory = await run_episode(self.spec, self.pool, self.policy, self.episode, options)
        watcher.finish(trajectory)
        return trajectory


class EventQueue:
    """Events of all choices on their way to the response; text that waits is joined, so that it stays short."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._news = asyncio.Event()
        self._error: BaseException | None = None

    def put(self, event: Event) -> None:
        """Add an event."""
        last = self._events[-1] if self._events else None
        if isinstance(event, TextEvent) and isinstance(last, TextEvent) and last.choice == event.choice:
            self._events[-1] = replace(last, text=last.text + event.text)
        else:
            self._events.append(event)
        self._news.set()

    def fail(self, error: BaseException) -> None:
        """Raise an error in whoever reads, after the events so far."""
        self._error = error
        self._news.set()

    async def take(self) -> list[Event]:
        """All events that wait, at least one."""
        while not self._events:
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        events, self._events = self._events, []
        return events
