"""The nouns of a fleet: a replica of a model, the list of those that there are, and what is asked of them.

A replica is whatever answers calls: an actor (`actors.engines.ActorReplica`), or an object of this process in a test or
a simulation. `replica_engine.ReplicaEngine` makes one `Engine` of many replicas and knows of nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from roro_ray.engines.protocol import ChoiceScores, EngineFacts, StepRequest, StepResult
from roro_ray.errors import EngineUnavailableError

Item = StepRequest | tuple[str, tuple[str, ...], str]  # a step to write, or (prefix, choices, adapter) to score
Answer = StepResult | ChoiceScores | BaseException


class ReplicaLostError(EngineUnavailableError):
    """A replica died, hangs, or is being started again: another one may still answer."""


class ReplicaGoneError(ReplicaLostError):
    """A replica is gone for good: it was released, or nobody starts it again."""


class NotSentError(ReplicaLostError):
    """A request was taken from a replica before it got there, so that this says nothing of the request."""


class Replica(Protocol):
    """One copy of a model. Whatever it cannot do because it is dead or starting raises ReplicaLostError at once."""

    async def ready(self) -> EngineFacts:
        """Wait until it has loaded its model.

        Raises:
            EngineError: it cannot be loaded.
        """
        ...

    async def call(self, items: Sequence[Item], parcels: Sequence[Any]) -> list[Answer]:
        """An answer or an exception for each item, under the adapters in `parcels`. Cancelling it gives them up."""
        ...

    async def load_adapters(self, parcels: Sequence[Any]) -> None:
        """Serve adapters."""
        ...

    async def is_well(self, stuck_s: float) -> bool:
        """Whether it answers at all, and has finished something in the last `stuck_s` seconds if it had to."""
        ...

    def end(self) -> None:
        """Kill it, so that whoever starts it does so anew; does not wait."""
        ...


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """How the replicas of a model are asked.

    Attributes:
        timeout_s: deadline of a request in all, waiting for a replica and retries included.
        step_timeout_s: of one call; then the replica is suspected, and the request goes elsewhere if it can.
        load_timeout_s: of a replica's return after it died.
        gathers: send the requests of a moment in one call. Right where a step takes about as long as a call; where it
            takes seconds, a shared call would hold back all its steps until the longest of them is written.
        elastic: replicas come and go, so that none is no failure.
        attempts: replicas that a request is given to in all.
        ready_timeout_s: of the first replica, where they come and go: a node may have to be launched for it.
    """

    timeout_s: float = 600.0
    step_timeout_s: float = 150.0
    load_timeout_s: float = 120.0
    gathers: bool = True
    elastic: bool = False
    attempts: int = 4
    ready_timeout_s: float = 600.0


@dataclass(slots=True)
class Counts:
    """What happened to requests of one holder of an engine.

    `retried`: given to a replica again, after one was lost; `moved`: sent elsewhere than where their prefix is known,
    because that replica was busy, slow or down; `hangs`: replicas that were killed because they did not answer.
    """

    requests: int = 0
    retried: int = 0
    moved: int = 0
    hangs: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.requests + other.requests,
            self.retried + other.retried,
            self.moved + other.moved,
            self.hangs + other.hangs,
        )


@dataclass(frozen=True, slots=True)
class Roster:
    """The replicas of a model that may be asked, its facts once one has loaded, and what keeps others from it."""

    replicas: Mapping[str, Replica] = field(default_factory=dict)
    facts: EngineFacts | None = None
    trouble: str = ""


class Registry(Protocol):
    """Where holders of an engine tell what they need, and learn which replicas there are."""

    async def exchange(self, model: str, holder: str, demand: int, counts: Counts) -> Roster | None:
        """Report, and get the present roster; None where it cannot be had now, or never changes."""
        ...


def get_prefix(item: Item) -> str:
    """The text that an item continues."""
    return item.prefix if isinstance(item, StepRequest) else item[0]


def measure_work(items: Sequence[Item], answers: Sequence[Answer]) -> tuple[str, int]:
    """The kind of a call and its length: the new tokens of its longest step, or one where it only scores."""
    if not any(isinstance(item, StepRequest) for item in items):
        return "score", 1
    tokens = [
        len(answer.token_ids) - len(item.kept_ids)
        for item, answer in zip(items, answers, strict=False)
        if isinstance(item, StepRequest) and isinstance(answer, StepResult)
    ]
    return "step", max([1, *tokens])
