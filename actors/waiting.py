"""Every wait on Ray goes through here, and every wait has a deadline.

`wait_for` is the one place that calls `ray.get`. A wait that takes too long ends in a DeadlineError that says what
was waited for, for how long, and what state the actor is in; an error of this project that was raised in a remote
process comes back as itself, not as Ray's wrapper. `check_resources` refuses what the cluster can never give,
before anything is started that would wait for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from roro_ray.errors import DeadlineError, ResourceError, RoroError

logger = logging.getLogger(__name__)

Refs = Any  # one ObjectRef or a sequence of them; Ray's own types are not generic enough to say so
Actors = Any  # one actor handle, a sequence of them, or None
Bundle = dict[str, float]
_POLL_S = 0.5


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
        text += f"; waiting for resources, available now: {format_resources(ray.available_resources())}"
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


def format_resources(resources: Bundle) -> str:
    """`CPU 4, GPU 1`: only what a person asks for."""
    shown = {key: value for key, value in sorted(resources.items()) if key in ("CPU", "GPU") or ":" not in key}
    shown = {key: value for key, value in shown.items() if key not in ("memory", "object_store_memory")}
    return ", ".join(f"{key} {value:g}" for key, value in shown.items()) or "nothing"


def add_bundles(bundles: Sequence[Bundle]) -> Bundle:
    """The sum of several resource requests."""
    total: Bundle = {}
    for bundle in bundles:
        for key, value in bundle.items():
            total[key] = total.get(key, 0.0) + value
    return total


def _lacks(bundle: Bundle, resources: Bundle) -> bool:
    return any(value > resources.get(key, 0.0) + 1e-9 for key, value in bundle.items())


def check_resources(bundles: Sequence[Bundle], what: str, autoscaler: bool = False) -> None:
    """Fail at once where a request can never fit: one bundle larger than every node, or all larger than the cluster.

    Where an autoscaler may add nodes, nothing is refused (and a request beyond today's cluster is logged).

    Raises:
        ResourceError: says what was asked for, what there is, and what to do.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total, asked = add_bundles(nodes), add_bundles(bundles)
    too_large = next((bundle for bundle in bundles if all(_lacks(bundle, node) for node in nodes)), None)
    if too_large is None and not _lacks(asked, total):
        return
    if autoscaler or has_autoscaler():
        logger.warning(
            "%s asks for %s; the cluster has %s and has to grow", what, format_resources(asked), format_resources(total)
        )
        return
    problem = (
        f"one of its parts asks for {format_resources(too_large)}, more than any node has"
        if too_large is not None
        else f"it asks for {format_resources(asked)} in {len(bundles)} parts"
    )
    raise ResourceError(
        f"{what} can never start: {problem}; the cluster has {format_resources(total)} on {len(nodes)} node(s). "
        "Ask for less (ray.workers, ray.worker_cpus, ray.learner_cpus, router.workers), add nodes, or set "
        "ray.autoscaler=true where the cluster can grow."
    )


def wait_for_resources(bundles: Sequence[Bundle], what: str, timeout_s: float, autoscaler: bool = False) -> None:
    """`check_resources`, then wait until the request fits beside what is running now.

    Raises:
        ResourceError: it can never fit, or did not become free in `timeout_s` seconds.
    """
    check_resources(bundles, what, autoscaler)
    asked, deadline, told = add_bundles(bundles), time.monotonic() + timeout_s, False
    while _lacks(asked, available := ray.available_resources()):
        if time.monotonic() > deadline:
            raise ResourceError(
                f"{what} waited {timeout_s:g} s for {format_resources(asked)}; free are {format_resources(available)} "
                f"of {format_resources(ray.cluster_resources())}: something else holds the rest. Stop it, or lower "
                "ray.workers, ray.worker_cpus, ray.reward_cpus or ray.learner_cpus."
            )
        if not told:
            logger.warning("%s waits for %s; free: %s", what, format_resources(asked), format_resources(available))
            told = True
        time.sleep(_POLL_S)


def has_autoscaler() -> bool:
    """True where an autoscaler is seen to manage the cluster (a cluster without one is merely mirrored by Ray).

    The status that Ray's monitor publishes names node types: the configured ones under an autoscaler, and types made
    up from node ids (`node_..`) otherwise.
    """
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_initialized

    if not _internal_kv_initialized():
        return False
    try:
        raw = _internal_kv_get("__autoscaling_status")
        report = json.loads(raw).get("autoscaler_report") or {} if raw else {}
    except (RayActorError, RuntimeError, ValueError) as error:
        logger.debug("no autoscaler status: %r", error)
        return False
    types = {*(report.get("active_nodes") or {}), *(report.get("pending_launches") or {})}
    return any(not name.startswith("node_") for name in types)
