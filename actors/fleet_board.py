"""The board of a fleet: rollout workers tell what they need of each model, and learn which replicas there are.

Its state is soft. What a worker told counts for some seconds, so that one that died needs nothing; which replicas there
are is told again by the driver (`actors.fleet`) after the board's process was started anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from actors.waiting import wait_async, wait_for
from roro_ray.engines.replicas import Counts, Roster
from roro_ray.errors import DeadlineError

logger = logging.getLogger(__name__)

_HELD_S = 10.0  # what a holder told counts this long
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class GroupState:
    """The replicas of one model, as the driver sees them.

    Attributes:
        now: replicas that are ready.
        wanted: replicas that the demand asks for.
        starts: replicas started since the beginning, restarts of the same ones apart.
        releases: replicas ended because they were needed no more.
        restarts: processes that were started again in place of one that died or was killed because it hung.
    """

    now: int
    wanted: int
    starts: int = 0
    releases: int = 0
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class Listing:
    """A roster on the board: its version, and its reference, in a tuple so that Ray hands it on instead of fetching it
    (and what it takes to unpickle it) for whoever is called."""

    version: int
    refs: tuple[Any, ...]


class FleetBoard:
    """The actor behind `BoardRegistry`."""

    def __init__(self) -> None:
        self._rosters: dict[str, Listing] = {}
        self._states: dict[str, GroupState] = {}
        self._demands: dict[tuple[str, str], tuple[float, int]] = {}  # by model and holder: when, how much
        self._counts: dict[tuple[str, str], Counts] = {}

    def exchange(self, model: str, holder: str, demand: int, counts: Counts, version: int) -> Listing | None:
        """Take what a holder of a model's engine needs; the listing, where the holder knows another version."""
        self._demands[model, holder] = (time.monotonic(), demand)
        self._counts[model, holder] = counts
        roster = self._rosters.get(model)
        return None if roster is None or roster.version == version else roster

    def steer(self, rosters: Mapping[str, Listing], states: Mapping[str, GroupState]) -> dict[str, int]:
        """Take over the driver's view; the demand by model."""
        self._rosters.update(rosters)
        self._states.update(states)
        oldest = time.monotonic() - _HELD_S
        self._demands = {key: told for key, told in self._demands.items() if told[0] > oldest}
        demand: dict[str, int] = {}
        for (model, _), (_, needed) in self._demands.items():
            demand[model] = demand.get(model, 0) + needed
        return demand

    def facts(self) -> dict[str, dict[str, int]]:
        """State and counts by model."""
        return {
            model: asdict(state) | asdict(sum((c for (m, _), c in self._counts.items() if m == model), Counts()))
            for model, state in self._states.items()
        }


class BoardRegistry:
    """The `Registry` of a worker's engine, on the board."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._version = -1

    def __reduce__(self) -> tuple[Any, ...]:
        return BoardRegistry, (self._board,)

    async def exchange(self, model: str, holder: str, demand: int, counts: Counts) -> Roster | None:
        """Report, and get the roster where it has changed; None where it has not, or the board cannot be asked."""
        ref = self._board.exchange.remote(model, holder, demand, counts, self._version)
        try:
            answer: Listing | None = await wait_async(ref, f"replicas of model {model}", _TIMEOUT_S, self._board)
            if answer is None:
                return None
            roster: Roster = await wait_async(answer.refs[0], f"the list of replicas of model {model}", _TIMEOUT_S)
        except (DeadlineError, RayError) as error:
            logger.debug("no answer of the board: %r", error)
            return None
        self._version = answer.version
        return roster


def start_board() -> Any:
    """A board's actor; it asks for no CPU."""
    return ray.remote(FleetBoard).options(num_cpus=0, max_restarts=-1, max_task_retries=1).remote()


def steer(board: Any, rosters: Mapping[str, Listing], states: Mapping[str, GroupState]) -> dict[str, int]:
    """`FleetBoard.steer`, waited for."""
    demand: dict[str, int] = wait_for(board.steer.remote(rosters, states), "the fleet's board", _TIMEOUT_S, board)
    return demand


def read_facts(board: Any) -> dict[str, dict[str, int]]:
    """`FleetBoard.facts`, waited for; empty where the board cannot be asked."""
    try:
        facts: dict[str, dict[str, int]] = wait_for(board.facts.remote(), "the fleet's facts", _TIMEOUT_S, board)
    except (DeadlineError, RayError) as error:
        logger.warning("no facts of the replicas: %s", error)
        return {}
    return facts
