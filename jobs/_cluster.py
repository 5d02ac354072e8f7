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
        say(f"{'Started Ray' if facts.started else f'Joined the Ray at {facts.address}'}: {_format(facts.resources)}")
        yield facts


def _format(resources: dict[str, float]) -> str:
    """Such as `2 nodes, CPU 64, GPU 8`."""
    nodes = sum(name.startswith("node:") and not name.startswith("node:__") for name in resources)
    shown = {name: amount for name, amount in resources.items() if ":" not in name and "memory" not in name}
    return ", ".join([f"{nodes} node{'s' * (nodes != 1)}", *(f"{name} {shown[name]:g}" for name in sorted(shown))])
