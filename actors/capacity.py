"""Refuses what the cluster can never give, and waits for what it may: before anything is started that would hang.

An actor that fits nowhere waits for ever and says nothing. So each stage first says here what its actors will ask for.
While it waits, a placement group asks Ray for all of it at once: that is what an autoscaler acts on, and what says that
everything fits side by side. The group is given up when it is there, for the actors to take its place.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from actors.autoscaler import Growth, find_growth
from actors.resources import Fleet, Node, add_amounts, add_bundles, find_impossible, pack
from roro_ray.config import RayConfig
from roro_ray.errors import ResourceError
from roro_ray.placement import Bundle, format_amounts

logger = logging.getLogger(__name__)

_POLL_S = 0.25
_TELL_S = 30.0  # between two lines of the log that say what is waited for


def check_resources(bundles: Sequence[Bundle], what: str, settings: RayConfig) -> Growth | None:
    """Fail at once where a request can never fit, on the nodes that run or that an autoscaler may launch.

    Returns:
        What an autoscaler may add, where the request does not fit today's cluster; else None.

    Raises:
        ResourceError: says what was asked for, what there is, and what to do.
    """
    nodes = list_nodes()
    problem = find_impossible(bundles, Fleet(list(nodes.values())))
    if problem is None:
        return None
    growth = find_growth(settings.autoscaler)
    if growth is not None and growth.kinds is None:
        return growth
    if growth is not None and growth.kinds is not None:
        launched = {kind.name for kind in growth.kinds if kind.count > 0}
        stay = [node for key, node in nodes.items() if growth.kind_of.get(key, "") not in launched]
        problem = find_impossible(bundles, Fleet(stay, growth.kinds, growth.most))
        if problem is None:
            return growth
    raise ResourceError(
        f"{what} can never start: {problem}; {_describe_cluster(bundles, list(nodes.values()), growth)}"
    )


def wait_for_resources(bundles: Sequence[Bundle], what: str, settings: RayConfig) -> None:
    """`check_resources`, then wait until the request fits beside what is running now.

    Raises:
        ResourceError: it can never fit, or did not become free in `ray.timeout_s` seconds (`ray.grow_timeout_s` where
            nodes have to be launched for it).
    """
    growth = check_resources(bundles, what, settings)
    if growth is None and pack(bundles, _list_free()):
        return
    growth = growth or find_growth(settings.autoscaler)
    limit = (settings.grow_timeout_s or settings.timeout_s) if growth is not None else settings.timeout_s
    started, told = time.monotonic(), 0.0
    with _asking(bundles) as group:
        logger.warning("%s waits for %s; %s", what, _describe_bundles(bundles), _describe_wait(bundles, growth))
        if blind := describe_blindness(bundles, growth):
            logger.warning("%s: %s", what, blind)
        while not group.wait(_POLL_S):
            waited = time.monotonic() - started
            if waited > limit:
                raise ResourceError(_describe_late(bundles, what, limit, growth, settings))
            if waited > told + _TELL_S:
                told = waited
                growth = growth and find_growth(True)
                logger.warning("%s still waits after %.0f s; %s", what, waited, _describe_wait(bundles, growth))


def list_nodes() -> dict[str, Node]:
    """The nodes of the cluster that are alive, by their ids."""
    return {node["NodeID"]: Node(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]}


def _list_free() -> list[Node]:
    """The nodes with what is free of them."""
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [Node(dict(free.get(key, {})), node.labels) for key, node in list_nodes().items()]


@contextmanager
def _asking(bundles: Sequence[Bundle]) -> Iterator[Any]:
    """A placement group of the bundles, given up at the end."""
    from ray.util.placement_group import placement_group, remove_placement_group

    asked = [bundle for bundle in bundles if any(bundle.resources.values())]
    group = placement_group(
        [{key: value for key, value in bundle.resources.items() if value} for bundle in asked],
        strategy="PACK",
        bundle_label_selector=[dict(bundle.labels) for bundle in asked],
    )
    try:
        yield group
    finally:
        remove_placement_group(group)


def _describe_bundles(bundles: Sequence[Bundle]) -> str:
    """`2 x (CPU 1, l4 1), 1 x (CPU 0.5)`."""
    texts = [str(bundle) for bundle in bundles]
    return ", ".join(f"{texts.count(text)} x ({text})" for text in dict.fromkeys(texts))


def _describe_wait(bundles: Sequence[Bundle], growth: Growth | None) -> str:
    free = format_amounts(ray.available_resources(), add_bundles(bundles))
    return f"free: {free}; " + (growth.describe() if growth is not None else "something else holds the rest")


def describe_blindness(bundles: Sequence[Bundle], growth: Growth | None) -> str:
    """What to do where labels alone tell nodes apart, and the autoscaler launches none for labels."""
    apart = any(bundle.labels and not bundle.resources.keys() - {"CPU", "GPU", "memory"} for bundle in bundles)
    if growth is None or growth.sees_labels or not apart:
        return ""
    return (
        "the autoscaler of `ray up` does not see labels, and launches nothing where nodes without them have room: give "
        "the node type a custom resource too, and ask for it in ray.resources"
    )


def _describe_cluster(bundles: Sequence[Bundle], nodes: Sequence[Node], growth: Growth | None) -> str:
    total = format_amounts(add_amounts([node.resources for node in nodes]), add_bundles(bundles))
    text = f"the cluster has {total} on {len(nodes)} node(s)"
    if growth is None or growth.kinds is None:
        advice = "add nodes, or set ray.autoscaler=true where the cluster can grow."
    else:
        kinds = [
            f"{kind.count} x {kind.name} ({format_amounts(kind.resources, {})})" for kind in growth.kinds if kind.count
        ]
        text += f", its autoscaler may launch {', '.join(kinds) or 'nothing'}, at most {growth.most} node(s) in all"
        advice = "raise max_workers or add a node type in the cluster file."
    return f"{text}. Ask for less (ray.workers, router.workers, ray.*_cpus, ray.resources, ray.labels), {advice}"


def _describe_late(
    bundles: Sequence[Bundle], what: str, limit: float, growth: Growth | None, settings: RayConfig
) -> str:
    asked = add_bundles(bundles)
    text = (
        f"{what} waited {limit:g} s for {format_amounts(asked)}; free are "
        f"{format_amounts(ray.available_resources(), asked)} of {format_amounts(ray.cluster_resources(), asked)}"
    )
    if growth is None:
        return (
            f"{text}: something else holds the rest. Stop it, or lower ray.workers, ray.worker_cpus, ray.reward_cpus "
            "or ray.learner_cpus."
        )
    if blind := describe_blindness(bundles, growth):
        return f"{text}, {growth.describe()}: {blind}."
    key = "ray.grow_timeout_s" if settings.grow_timeout_s else "ray.grow_timeout_s (now 0: ray.timeout_s)"
    return (
        f"{text}, {growth.describe()}. `ray status` tells what the autoscaler lacks; raise {key} if nodes merely take "
        "long."
    )
