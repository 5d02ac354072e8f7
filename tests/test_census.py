"""Deaths counted from Ray's records and from the board of the replicas, which may not answer at times."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from actors.census import Census

Facts = dict[str, dict[str, int]]


class Pool(SimpleNamespace):
    """A pool without workers, whose replicas tell `facts`."""

    workers: tuple[Any, ...] = ()
    facts: Facts

    def fleet_facts(self) -> Facts:
        return self.facts


def tell(restarts: int, requests: int) -> Facts:
    return {"large": {"restarts": restarts, "hangs": 0, "retried": 0, "moved": 0, "requests": requests}}


def test_a_board_that_does_not_answer_costs_no_count() -> None:
    pool = Pool(facts=tell(1, 100))
    census = Census(pool)
    pool.facts = tell(2, 150)
    assert census.take()["requests"] == 50
    pool.facts = {}
    assert not any(census.take().values())
    pool.facts = tell(3, 160)
    new = census.take()
    assert new["requests"] == 10 and new["engine_deaths"] == 1
    pool.facts = tell(3, 20)  # the board was started again, and not all holders have told yet
    assert census.take()["requests"] == 0
    pool.facts = tell(3, 170)
    assert census.take()["requests"] == 10 and census.total()["requests"] == 70


def test_a_board_that_answers_late_is_counted_from_then_on() -> None:
    pool = Pool(facts={})
    census = Census(pool)
    pool.facts = tell(2, 100)
    assert census.take()["requests"] == 0
    pool.facts = tell(2, 130)
    assert census.take()["requests"] == 30 and census.total()["engine_deaths"] == 0
