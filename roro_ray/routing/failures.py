"""What a failed rollout costs: policies as objects, and the one loop that applies them in every stage.

A failed rollout is a value (`EpisodeFailure`). A policy says whether and when it is tried again, how many rollouts a
group must keep, and when so many are lost that going on would hide the cause. A rollout is a function of its spec, so
one that is tried again gives what it would have given at first: only rollouts that are lost for good change a result,
and those are counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol, TypeVar

from roro_ray.cluster_config import FaultsConfig
from roro_ray.errors import RolloutError
from roro_ray.routing.episode import EpisodeFailure, EpisodeSpec
from roro_ray.types import Trajectory

Outcome = Trajectory | EpisodeFailure
RunSpecs = Callable[[Sequence[EpisodeSpec]], Sequence[Outcome]]
Item = TypeVar("Item")
Result = TypeVar("Result")
_LEAST_GROUP = 2  # a rollout alone has nothing to be compared with
_ROUNDING = 1e-9  # 0.29 x 100 is a little less than 29


class FailurePolicy(Protocol):
    """What a failed rollout costs."""

    @property
    def least_group(self) -> int:
        """Rollouts that a group must keep to be used."""
        ...

    def pause_after(self, tries: int) -> float | None:
        """Seconds to wait before what failed `tries` times is tried again; None where it is given up."""
        ...

    def check(self, failures: Sequence[EpisodeFailure], total: int, what: str) -> None:
        """Raise RolloutError where `failures` of `total` rollouts, lost for good, are too many for `what` to go on."""
        ...


@dataclass(frozen=True, slots=True)
class FailFast:
    """The first failure ends the stage, as soon as the call that it came with is over."""

    @property
    def least_group(self) -> int:
        """No group loses a rollout."""
        return _LEAST_GROUP

    def pause_after(self, tries: int) -> float | None:
        """Nothing is tried again."""
        return None

    def check(self, failures: Sequence[EpisodeFailure], total: int, what: str) -> None:
        """No failure is borne."""
        if failures:
            raise RolloutError(
                f"{what}: {len(failures)} of {total} rollouts failed, and faults.rollouts=fail_fast bears none; the "
                f"first: {failures[0].spec_id}: {failures[0].error}. Mend the cause and run again (finished work is "
                "kept), or set faults.rollouts=retry."
            )


@dataclass(frozen=True, slots=True)
class Retry:
    """What failed is tried again, `attempts` times in all, the second time after `pause_s`, then twice as late.

    More than `max_share` lost for good, of the rollouts of a shard, an iteration or a sweep, ends the stage.
    """

    attempts: int = 2
    pause_s: float = 0.5
    max_share: float = 0.05

    @property
    def least_group(self) -> int:
        """What is left of a group is used, where two can be compared."""
        return _LEAST_GROUP

    def pause_after(self, tries: int) -> float | None:
        """Twice as long after every try."""
        return self.pause_s * 2 ** (tries - 1) if tries < self.attempts else None

    def check(self, failures: Sequence[EpisodeFailure], total: int, what: str) -> None:
        """A few may be lost."""
        if len(failures) > self.max_share * total + _ROUNDING:
            raise RolloutError(
                f"{what}: {len(failures)} of {total} rollouts failed for good, tried {self.attempts} times each; "
                f"expected at most a share of {self.max_share:g} (faults.max_failed_share). The first: "
                f"{failures[0].spec_id}: {failures[0].error}. Mend the cause and run again: finished work is kept."
            )


@dataclass(frozen=True, slots=True)
class MinimumViableGroup:
    """As `Retry`, but groups decide: one that keeps at least `size` rollouts is used, another is dropped whole.

    However many are lost, the stage goes on while a group is left.
    """

    size: int
    attempts: int = 2
    pause_s: float = 0.5

    @property
    def least_group(self) -> int:
        """The size."""
        return self.size

    def pause_after(self, tries: int) -> float | None:
        """Twice as long after every try."""
        return Retry(self.attempts, self.pause_s).pause_after(tries)

    def check(self, failures: Sequence[EpisodeFailure], total: int, what: str) -> None:
        """Something must be left."""
        if failures and len(failures) == total:
            raise RolloutError(
                f"{what}: all {total} rollouts failed for good; the first: {failures[0].spec_id}: "
                f"{failures[0].error}. Mend the cause and run again: finished work is kept."
            )


def make_policy(config: FaultsConfig, grouped: bool = True) -> FailurePolicy:
    """The policy of the settings; rollouts that form no groups (an evaluation's) are retried under `minimum_group`."""
    if config.rollouts == "fail_fast":
        return FailFast()
    if config.rollouts == "minimum_group" and grouped:
        return MinimumViableGroup(config.min_group, config.attempts, config.pause_s)
    return Retry(config.attempts, config.pause_s, config.max_failed_share)


@dataclass(slots=True)
class Tally:
    """Counts of rollouts asked for, of tries that failed, of rollouts tried again, and of those lost for good."""

    rollouts: int = 0
    failed_tries: int = 0
    retried: int = 0
    failed: int = 0

    def add(self, other: Tally) -> None:
        """Add another's counts to these."""
        for name in (each.name for each in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def try_again(
    items: Sequence[Item],
    run: Callable[[Sequence[Item]], Sequence[Result]],
    failed: Callable[[Result], bool],
    policy: FailurePolicy,
    tally: Tally,
    pause: Callable[[float], None] = time.sleep,
) -> list[Result]:
    """Run the items, those that fail again as the policy says; results in the order of the items."""
    results = list(run(items)) if items else []
    tally.rollouts += len(items)
    lost, tries = [i for i, result in enumerate(results) if failed(result)], 1
    tally.failed_tries += len(lost)
    while lost and (seconds := policy.pause_after(tries)) is not None:
        pause(seconds)
        tally.retried += len(lost)
        for i, result in zip(lost, run([items[i] for i in lost]), strict=True):
            results[i] = result
        lost, tries = [i for i in lost if failed(results[i])], tries + 1
        tally.failed_tries += len(lost)
    tally.failed += len(lost)
    return results


class SteadyRun:
    """Runs specs as its policy says, and counts over all its calls; may be called from several threads.

    Args:
        run: rolls specs out, results in their order.
        what: the stage, as an error should name it.
    """

    def __init__(self, run: RunSpecs, policy: FailurePolicy, what: str) -> None:
        self._run = run
        self._policy = policy
        self._what = what
        self._lock = threading.Lock()
        self.tally = Tally()

    def __call__(self, specs: Sequence[EpisodeSpec], what: str = "") -> list[Outcome]:
        """Results in the order of the specs; what is lost for good as an `EpisodeFailure`.

        Args:
            what: the part of the stage, in place of the stage's name.

        Raises:
            RolloutError: more is lost than the policy bears.
        """
        own = Tally()
        results = try_again(specs, self._run, _is_failure, self._policy, own)
        with self._lock:
            self.tally.add(own)
        self._policy.check([r for r in results if isinstance(r, EpisodeFailure)], len(specs), what or self._what)
        return results


def _is_failure(outcome: Outcome) -> bool:
    return isinstance(outcome, EpisodeFailure)
