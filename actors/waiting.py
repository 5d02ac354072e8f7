"""Every wait on Ray goes through here, and every wait has a deadline.

`wait_for` is the one place that calls `ray.get`. A wait that takes too long ends in a DeadlineError that says what
was waited for, for how long, and what state the actor is in; an error of this project that was raised in a remote
process comes back as itself, not as Ray's wrapper.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from roro_ray.errors import DeadlineError, RoroError
from roro_ray.placement import format_amounts

logger = logging.getLogger(__name__)

Refs = Any  # one ObjectRef or a sequence of them; Ray's own types are not generic enough to say so
Actors = Any  # one actor handle, a sequence of them, or None


def wait_for(refs: Refs, what: str, timeout_s: float, actors: Actors = None) -> Any:
    """The value of a reference, or the list of values of several.

    Args:
        refs: one object reference or a sequence; a sequence shares one deadline.
        what: what is waited for, as it should stand in an error ("rollout worker 1: ready").
        actors: whose state to tell when time runs out.

    Raises:
        DeadlineError: not there after `timeout_s` seconds.
        RoroError: what the remote side raised, where it is an error of this project.
        RayError: the actor died or the task failed otherwise.
    """
    try:
        return ray.get(refs if isinstance(refs, ray.ObjectRef) else list(refs), timeout=timeout_s)
    except GetTimeoutError:
        raise _deadline_error(what, timeout_s, actors) from None
    except RayTaskError as error:
        raise unwrap_error(error) from error


async def wait_async(ref: Any, what: str, timeout_s: float, actors: Actors = None) -> Any:
    """`wait_for` one reference inside an async actor, without blocking its loop."""
    try:
        return await asyncio.wait_for(ref, timeout_s)
    except TimeoutError as error:
        if isinstance(error, RayError):  # a TimeoutError of the remote side
            raise unwrap_error(error) from error
        raise _deadline_error(what, timeout_s, actors) from None
    except RayTaskError as error:
        raise unwrap_error(error) from error


def wait_some(refs: Sequence[Any], timeout_s: float) -> list[Any]:
    """Those of `refs` that are finished (perhaps with an error), after at least one is or `timeout_s` have passed."""
    if not refs or not ray.wait(list(refs), num_returns=1, timeout=max(timeout_s, 0.0))[0]:
        return []
    more, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
    return more


def unwrap_error(error: BaseException) -> BaseException:
    """The project's own error inside Ray's wrapper, or the wrapper itself where the cause is another."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, RoroError) else error


def describe_actor(actor: Any) -> str:
    """Name, process and state of an actor, such as `RolloutWorker 27ddfa pid 6643: ALIVE, 0 restarts`."""
    record = find_actor(actor)
    if not record:
        return "actor of unknown state (the cluster did not answer)"
    name, number = record.get("ActorClassName", "actor"), record.get("ActorID", "")[:6]
    text = f"{name} {number} pid {record.get('Pid', 0)}: {record['State']}, {record.get('NumRestarts', 0)} restarts"
    if record["State"] == "PENDING_CREATION":
        text += f"; waiting for resources, available now: {format_amounts(ray.available_resources(), {})}"
    return text


def find_actor(actor: Any) -> dict[str, Any]:
    """Ray's record of an actor (`State`, `Pid`, ..), or an empty dict where it cannot be had.

    The public state API needs the dashboard, which a local run does not start; this reads the same table.
    """
    from ray._private import state

    try:
        record = state.actors(actor._actor_id.hex())
    except (RayError, RuntimeError, ValueError, AttributeError) as error:
        logger.debug("no state of actor %r: %r", actor, error)
        return {}
    return dict(record) if record and "State" in record else {}


def is_alive(actor: Any) -> bool:
    """False while an actor is dead, being created or restarting."""
    return bool(find_actor(actor).get("State", "ALIVE") == "ALIVE")


def _deadline_error(what: str, timeout_s: float, actors: Actors) -> DeadlineError:
    handles = [] if actors is None else actors if isinstance(actors, Sequence) else [actors]
    states = "; ".join(describe_actor(actor) for actor in handles) or "no actor is known for it"
    return DeadlineError(
        f"{what}: no answer in {timeout_s:g} s ({states}). "
        "Look at the actor's log in Ray's session directory; raise the timeout if the work is merely slow."
    )
