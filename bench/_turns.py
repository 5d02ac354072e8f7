"""Arms of a benchmark that take turns within one run, and what their times say of each other."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens that an arm's models wrote, and those of their prompts that they computed (cheap model first)."""

    written: tuple[int, ...]
    read: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """One timed run of an arm: seconds on the clock, and of processor time in this process and its children."""

    wall_s: float
    cpu_s: float
    counts: Counts


@dataclass(frozen=True, slots=True)
class Range:
    """A median and the extremes."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


# Is told a name that no other turn has, to make prompts of its own with. Only what it gives to await is timed.
Arm = Callable[[str], Awaitable[Counts]]


async def take_turns(arms: Mapping[str, Arm], rounds: int, warmups: int = 1) -> dict[str, list[Turn]]:
    """Run every arm once a round, each round beginning with another one; the first rounds are not counted."""
    turns: dict[str, list[Turn]] = {name: [] for name in arms}
    names = list(arms)
    for index in range(-warmups, rounds):
        start = index % len(names)
        for name in names[start:] + names[:start]:
            work = arms[name](f"{index + warmups:03d}{names.index(name):03d}")
            wall, cpu = time.perf_counter(), _measure_cpu()
            counts = await work
            turn = Turn(time.perf_counter() - wall, _measure_cpu() - cpu, counts)
            if index >= 0:
                turns[name].append(turn)
    return turns


def check_counts(turns: Mapping[str, Sequence[Turn]], written: tuple[int, ...], arms: Sequence[str]) -> None:
    """See that arms wrote what they should, turn by turn.

    Raises:
        ValueError: names the arm and the numbers of tokens.
    """
    for name in arms:
        for turn in turns[name]:
            if turn.counts.written != written:
                raise ValueError(
                    f"arm {name!r} wrote {turn.counts.written} tokens (cheap model first), expected {written}: the "
                    "arms do not do the same work, so that their times cannot be compared"
                )


def compare(arm: Sequence[Turn], *parts: Sequence[Turn], by: str = "wall_s") -> Range:
    """How many times the time of some arms together another one takes, round by round."""
    return spread(
        [
            getattr(turn, by) / sum(getattr(part, by) for part in others)
            for turn, *others in zip(arm, *parts, strict=True)
        ]
    )


def subtract(arm: Sequence[Turn], other: Sequence[Turn], unit: Sequence[Turn], by: str = "wall_s") -> Range:
    """By how much an arm takes longer than another, in times of a third one's, round by round."""
    rounds = zip(arm, other, unit, strict=True)
    return spread([(getattr(a, by) - getattr(b, by)) / getattr(u, by) for a, b, u in rounds])


def spread(values: Sequence[float]) -> Range:
    """Median and extremes."""
    return Range(statistics.median(values), min(values), max(values))


def tell_machine() -> str:
    """What else the machine does, in words."""
    loads = " ".join(f"{load:.1f}" for load in os.getloadavg())
    return f"{os.cpu_count()} cores, load {loads}"


def _measure_cpu() -> float:
    family = psutil.Process().children(recursive=True)
    seconds = time.process_time()
    for child in family:
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system
    return seconds
