"""Refuses what the cluster can never give, and waits for what it may: before anything is started that would hang.

An actor that fits nowhere waits for ever and says nothing. So each stage first says here what its actors will ask for.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence

import ray
from ray.exceptions import RayActorError

from actors.resources import Bundle, Node, add_amounts, add_bundles, format_amounts, lacks
from roro_ray.config import RayConfig
from roro_ray.errors import ResourceError

logger = logging.getLogger(__name__)

_POLL_S = 0.5


def check_resources(bundles: Sequence[Bundle], what: str, settings: RayConfig) -> None:
    """Fail at once where a request can never fit: one bundle larger than every node, or all larger than the cluster.

    Where an autoscaler may add nodes, nothing is refused (and a request beyond today's cluster is logged).

    Raises:
        ResourceError: says what was asked for, what there is, and what to do.
    """
    nodes = list_nodes()
    total, asked = add_amounts([node.resources for node in nodes]), add_bundles(bundles)
    too_large = next((bundle for bundle in bundles if not any(node.holds(bundle) for node in nodes)), None)
    if too_large is None and not lacks(asked, total):
        return
    if settings.autoscaler or has_autoscaler():
        logger.warning(
            "%s asks for %s; the cluster has %s and has to grow",
            what,
            format_amounts(asked),
            format_amounts(total, asked),
        )
        return
    problem = (
        f"one of its parts asks for {too_large}, more than any node has"
        if too_large is not None
        else f"it asks for {format_amounts(asked)} in {len(bundles)} parts"
    )
    raise ResourceError(
        f"{what} can never start: {problem}; the cluster has {format_amounts(total, asked)} on {len(nodes)} node(s). "
        "Ask for less (ray.workers, ray.worker_cpus, ray.learner_cpus, router.workers), add nodes, or set "
        "ray.autoscaler=true where the cluster can grow."
    )


def wait_for_resources(bundles: Sequence[Bundle], what: str, settings: RayConfig) -> None:
    """`check_resources`, then wait until the request fits beside what is running now.

    Raises:
        ResourceError: it can never fit, or did not become free in `ray.timeout_s` seconds.
    """
    check_resources(bundles, what, settings)
    asked, deadline, told = add_bundles(bundles), time.monotonic() + settings.timeout_s, False
    while lacks(asked, available := ray.available_resources()):
        if time.monotonic() > deadline:
            raise ResourceError(
                f"{what} waited {settings.timeout_s:g} s for {format_amounts(asked)}; free are "
                f"{format_amounts(available, asked)} of {format_amounts(ray.cluster_resources(), asked)}: "
                "something else holds the rest. Stop it, or lower ray.workers, ray.worker_cpus, ray.reward_cpus or "
                "ray.learner_cpus."
            )
        if not told:
            logger.warning("%s waits for %s; free: %s", what, format_amounts(asked), format_amounts(available, asked))
            told = True
        time.sleep(_POLL_S)


def list_nodes() -> list[Node]:
    """The nodes of the cluster that are alive."""
    return [Node(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]


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
