"""The Ray of a job, and a line that says which one it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jobs._terminal import say
from roro_ray.config import RayConfig

if TYPE_CHECKING:
    from actors.cluster import ClusterFacts


@contextmanager
def open_ray(config: RayConfig) -> Iterator[ClusterFacts]:
    """The cluster to work on (see `actors.cluster.open_cluster`)."""
    from actors.cluster import open_cluster

    with open_cluster(config) as facts:
        say(f"{'Started Ray' if facts.started else f'Joined the Ray at {facts.address}'}: {_format(facts)}")
        yield facts


def _format(facts: ClusterFacts) -> str:
    """Such as `2 nodes, CPU 64, GPU 8`."""
    shown = {name: amount for name, amount in facts.resources.items() if ":" not in name and "memory" not in name}
    nodes = f"{facts.nodes} node{'s' * (facts.nodes != 1)}"
    return ", ".join([nodes, *(f"{name} {shown[name]:g}" for name in sorted(shown))])
