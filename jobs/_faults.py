"""What failed in a stage: its counts and rates in metrics.jsonl, and those that are not zero in its last line."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from roro_ray.data.run_dir import RunDir

if TYPE_CHECKING:
    from roro_ray.routing.failures import Tally

# Each count, and what it is a share of; a count without one is told per hour.
_SHARES = {
    "failed_tries": ("rollouts", "retried"),
    "retried": ("rollouts",),
    "failed": ("rollouts",),
    "small_groups": ("groups",),
    "score_errors": ("scores",),
    "oracle_errors": ("searches",),
    "requests_retried": ("requests",),
    "requests_moved": ("requests",),
}
_DEATHS = ("worker_deaths", "engine_deaths", "engine_hangs", "reward_restarts", "learner_restarts")


@contextmanager
def count_faults(run: RunDir, stage: str, facts: dict[str, object]) -> Iterator[FaultLog]:
    """The log of a stage, written when the block ends, however it ends; what is not zero is added to `facts`."""
    log = FaultLog(run, stage)
    try:
        yield log
    except BaseException:
        with suppress(OSError):  # a full disk is perhaps what the error tells of
            log.close()
        raise
    facts.update(log.close())


class FaultLog:
    """Collects the counts of one stage and writes them as one record."""

    def __init__(self, run: RunDir, stage: str) -> None:
        self._run = run
        self._stage = stage
        self._began = time.monotonic()
        self.counts: dict[str, float] = {}

    def add(self, counts: Mapping[str, float]) -> None:
        """Add counts to those so far."""
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    def add_tally(self, tally: Tally) -> None:
        """Add what became of some rollouts."""
        self.add(dataclasses.asdict(tally))

    def close(self) -> dict[str, int]:
        """Write `{"event": "faults", ..counts, "rates": {..}}`; returns the counts of failures that are not zero."""
        counts = {name: int(count) for name, count in self.counts.items()}
        rates = make_rates(counts, time.monotonic() - self._began)
        self._run.log({"event": "faults", "stage": self._stage, **counts, "rates": rates})
        return {name: counts[name] for name in (*_SHARES, *_DEATHS) if counts.get(name)}


def make_rates(counts: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Shares of what was tried, and deaths per hour; a kind that was not counted has no rate.

    `failed_tries` are a share of all tries: rollouts and those tried again.
    """
    rates = {}
    for name, wholes in _SHARES.items():
        whole = sum(counts.get(each, 0) for each in wholes)
        if name in counts and whole:
            rates[name] = round(counts[name] / whole, 6)
    hours = max(seconds, 1e-9) / 3600
    return rates | {f"{name}_per_hour": round(counts[name] / hours, 3) for name in _DEATHS if name in counts}
