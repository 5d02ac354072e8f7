"""How many processes of a stage died, as Ray's own records of their actors say.

Every restart stands in the cluster's table, whoever noticed the death and wherever the work was done again, so that the
count needs no message from the dead and none from those that waited for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from actors.waiting import find_actor


class Census:
    """Deaths of rollout workers, engines' actors and the reward service since it was made, and how requests fared.

    Args:
        pool: a RolloutPool, or None.
        reward: a RewardClient, or None.
        engine: a RemoteEngine outside a pool, or None.
    """

    def __init__(self, pool: Any = None, reward: Any = None, engine: Any = None) -> None:
        self._pool = pool
        self._reward = reward
        self._engine = engine
        self._before = self._count()
        self._total = dict.fromkeys(self._before, 0)
        self._taken = dict(self._total)

    def total(self) -> dict[str, int]:
        """`worker_deaths`, `engine_deaths`, `reward_restarts` and the like so far, of the kinds that there are."""
        for name, count in self._count().items():
            # Who keeps a count may not answer, or be started again and know less: no count ever falls.
            before = self._before.setdefault(name, count)
            self._total[name] = max(self._total.get(name, 0), count - before)
        return dict(self._total)

    def take(self) -> dict[str, int]:
        """The same since the last call."""
        total = self.total()
        new = {name: total[name] - self._taken.get(name, 0) for name in total}
        self._taken = total
        return new

    def _count(self) -> dict[str, int]:
        counts = {}
        if self._pool is not None:
            counts["worker_deaths"] = _count_deaths(self._pool.workers)
            counts |= _count_fleet(self._pool.fleet_facts())
        if self._engine is not None:
            counts["engine_deaths"] = _count_deaths([self._engine.actor])
        if self._reward is not None:
            counts["reward_restarts"] = _count_deaths([self._reward.actor])
        return counts


def _count_fleet(facts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Of the replicas of all models: deaths, hangs, requests that were tried again or given to another replica."""
    names = {"engine_deaths": "restarts", "engine_hangs": "hangs", "requests_retried": "retried"}
    names |= {"requests_moved": "moved", "requests": "requests"}
    return {name: sum(model.get(key, 0) for model in facts.values()) for name, key in names.items()} if facts else {}


def _count_deaths(actors: Iterable[Any]) -> int:
    """Restarts, and one for an actor that is not started again."""
    records = [find_actor(actor) for actor in actors]
    return sum(int(record.get("NumRestarts", 0)) + (record.get("State") == "DEAD") for record in records)
