"""Engines that take a real engine's time and none of its work: for measuring what the coordination of many costs.

The seconds of a step come from points that were measured on a real engine (`measure_latency`): seconds a token at a
number of requests in hand, straight lines between, and seconds a token read. `pace` stretches all of them alike, as a
larger model would. What is not modelled: a request that joins slows those under way (its own time is fixed when it
begins), and reading ahead of others in the queue.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from roro_ray.config import STEP_DELIMITER
from roro_ray.engines.protocol import ChoiceScores, Engine, EngineFacts, StepRequest, StepResult

_CHARS = 4  # of a token
_WORDS = "the value of this step follows from the one before and is checked once more "


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Seconds of a step.

    Args:
        in_hand: numbers of requests at which writing was measured, ascending.
        write_s: seconds of a token written at each of them.
        read_s: seconds of a token read that no cache knows.
    """

    in_hand: tuple[int, ...]
    write_s: tuple[float, ...]
    read_s: float

    def seconds(self, read: int, written: int, in_hand: int) -> float:
        """Of a step that reads and writes so many tokens while so many requests are in hand."""
        return read * self.read_s + written * float(np.interp(in_hand, self.in_hand, self.write_s))

    def stretch(self, pace: float) -> LatencyModel:
        """The same engine with a model that is `pace` times slower."""
        return LatencyModel(self.in_hand, tuple(pace * value for value in self.write_s), pace * self.read_s)


async def measure_latency(
    engine: Engine, prompts: Sequence[str], batches: Sequence[int] = (1, 8, 32), tokens: int = 32, rounds: int = 3
) -> LatencyModel:
    """Time steps of `tokens` tokens on an engine, by the number of requests in hand; the fastest of some rounds.

    Every request has a prompt of its own, so that no prefix cache helps.
    """
    fresh = iter(f"{number:06d} {prompts[number % len(prompts)]}" for number in range(10**6))

    async def run(count: int, length: int, stretch: int = 1) -> tuple[float, int]:
        requests = [
            StepRequest((next(fresh) + " ") * stretch + STEP_DELIMITER, length, min_tokens=length, delimiter="")
            for _ in range(count)
        ]
        began = time.perf_counter()
        results = await asyncio.gather(*(engine.generate_step(request) for request in requests))
        return time.perf_counter() - began, sum(result.prefix_tokens for result in results)

    await engine.ready()
    await run(max(batches), tokens)
    read_s, write_s = [], []
    for _ in range(rounds):
        short, short_read = await run(1, 1)
        long, long_read = await run(1, 1, stretch=4)
        read_s.append((long - short) / max(long_read - short_read, 1))
    reading = max(min(read_s), 0.0)
    for count in batches:
        seconds = [(await run(count, tokens))[0] for _ in range(rounds)]
        first = [(await run(count, 1))[0] for _ in range(rounds)]
        write_s.append(max(min(seconds) - min(first), 0.0) / (tokens - 1))
    return LatencyModel(tuple(batches), tuple(write_s), reading)


@dataclass(frozen=True, slots=True)
class Shape:
    """Episodes: how many steps, of about how many tokens each."""

    steps: int
    step_tokens: int


class SimulatedEngine:
    """One replica: at most `slots` steps at a time, each of the seconds that the latency model gives; others queue.

    A step's length varies between half and one and a half times the shape's, by its prefix alone; its text says
    nothing. `written` counts steps, `busy_s` their seconds.
    """

    def __init__(self, name: str, latency: LatencyModel, shape: Shape, slots: int, parameters: int = 10) -> None:
        self.name = name
        self.latency = latency
        self.shape = shape
        self.parameters = parameters
        self.in_hand = 0
        self.written = 0
        self.busy_s = 0.0
        self._slots = asyncio.Semaphore(slots)
        self._known: dict[int, int] = {}

    async def ready(self) -> EngineFacts:
        """There is nothing to load."""
        return EngineFacts(self.name, "simulated", "none", self.parameters, 2.0 * self.parameters, 0.0, self.name)

    async def generate_step(self, request: StepRequest) -> StepResult:
        """Sleep as long as the step would take; what was read before, by this replica, is read from its cache."""
        prefix = request.prefix
        index = prefix.count(STEP_DELIMITER) - 1
        digest = zlib.crc32(prefix.encode())
        tokens = max(self.shape.step_tokens * (50 + digest % 101) // 100, 1)
        read = len(prefix) // _CHARS
        cut = prefix.rfind(STEP_DELIMITER, 0, -len(STEP_DELIMITER))
        cached = self._known.pop(zlib.crc32(prefix[: cut + len(STEP_DELIMITER)].encode()), 0) if cut > 0 else 0
        async with self._slots:
            self.in_hand += 1
            seconds = self.latency.seconds(read - cached, tokens, self.in_hand)
            try:
                await asyncio.sleep(seconds)
            finally:
                self.in_hand -= 1
        self.written += 1
        self.busy_s += seconds
        self._known[digest] = read
        if len(self._known) > 20_000:
            self._known.clear()
        final = index >= self.shape.steps - 1
        text = f"Answer: {index}" if final else make_text(index, tokens)
        ids = make_ids(tokens)
        finish = "stop" if final else "delimiter"
        return StepResult(text, ids, make_log_probs(tokens), finish, read, 0.5, cached_tokens=cached)

    async def score_choices(self, prefix: str, choices: tuple[str, ...], adapter: str = "") -> ChoiceScores:
        """No method of the bench asks for it."""
        raise NotImplementedError("a simulated engine scores nothing")


@cache
def make_text(index: int, tokens: int) -> str:
    """A step's text of `tokens` tokens."""
    body = _WORDS * (tokens * _CHARS // len(_WORDS) + 1)
    return f"{index}: {body}"[: tokens * _CHARS - len(STEP_DELIMITER)].rstrip()


@cache
def make_ids(tokens: int) -> tuple[int, ...]:
    """Token ids that mean nothing."""
    return tuple(range(tokens))


@cache
def make_log_probs(tokens: int) -> tuple[float, ...]:
    """Log-probabilities that mean nothing."""
    return (-0.1,) * tokens
