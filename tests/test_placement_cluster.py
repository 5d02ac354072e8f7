"""Placement under an autoscaler: nodes come for what is asked, and what no node will ever hold is refused at once."""

from __future__ import annotations

from typing import Any

import pytest
from fake_cluster import FakeType, fake_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
CHEAP = FakeType({"CPU": 1, "slot": 1}, {"tier": "cheap"}, most=3)
TIER = {"tier": "in(cheap, spot)"}


def make_config(**ray: Any) -> Any:
    from tests.scripted_world import make_scripted_config

    config = make_scripted_config()
    config.ray.workers, config.ray.worker_cpus, config.ray.timeout_s, config.ray.grow_timeout_s = 2, 0.5, 120.0, 90.0
    config.ray.resources, config.ray.labels = {"rollout": {"slot": 1.0}}, {"rollout": TIER}
    for key, value in ray.items():
        setattr(config.ray, key, value)
    return config


def run_pool() -> dict[str, Any]:
    """In the driver: what is refused, and a rollout pool whose nodes do not exist yet."""
    import ray

    from actors.rollout import RolloutPool
    from roro_ray.errors import ResourceError
    from tests.scripted_world import make_scripted_runner, make_specs

    ray.init(log_to_driver=False)
    refused = []
    for settings in ({"worker_cpus": 8.0}, {"workers": 7}, {"labels": {"rollout": {"tier": "dear"}}}):
        with pytest.raises(ResourceError) as error:
            RolloutPool.start(make_config(**settings), make_scripted_runner)
        refused.append(str(error.value))
    nodes_then = len(ray.nodes())
    pool = RolloutPool.start(make_config(), make_scripted_runner)
    results = pool.run(make_specs(2))
    labels = {node["NodeID"]: node["Labels"].get("tier") for node in ray.nodes() if node["Alive"]}
    seen = {
        "refused": refused,
        "nodes_then": nodes_then,
        "tiers": [labels[facts.node] for facts in pool.facts],
        "nodes": len({facts.node for facts in pool.facts}),
        "results": [type(result).__name__ for result in results],
    }
    pool.stop()
    return seen


def test_nodes_come_for_a_pool_and_go_and_what_never_fits_is_refused() -> None:
    with fake_cluster({"cheap": CHEAP}, idle_s=4) as cluster:
        seen = cluster.call("test_placement_cluster:run_pool", timeout_s=240)
        cluster.wait_for_nodes(1)
    assert seen["nodes_then"] == 1, "nothing was launched for what was refused"
    large, many, labelled = seen["refused"]
    assert "CPU 8, slot 1 on a node with tier=in(cheap, spot), more than any node has" in large
    assert "the largest node type, cheap, has CPU 1, slot 1, tier=cheap; the cluster has CPU 1 on 1 node(s)" in large
    assert "7 parts of CPU 0.5" in many and "at most 3 of them fit" in many
    assert "its autoscaler may launch 3 x cheap (CPU 1, slot 1), at most 8 node(s) in all" in many
    assert "tier=dear, and no node has such labels: the nearest node type, cheap, has" in labelled
    assert seen["tiers"] == ["cheap", "cheap"] and seen["nodes"] == 2
    assert seen["results"] == ["Trajectory", "Trajectory"]


class Actor:
    """Tells the label of its node."""

    def tier(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_labels()["tier"])


def run_actors() -> dict[str, Any]:
    """In the driver: actors that ask for a label alone."""
    import ray

    from actors.capacity import wait_for_resources
    from actors.placement import bundle_options
    from actors.resources import Bundle
    from actors.waiting import wait_for
    from roro_ray.config import RayConfig
    from roro_ray.errors import ResourceError

    ray.init(log_to_driver=False)
    settings, bundle = RayConfig(timeout_s=90.0), Bundle({"CPU": 0.5}, TIER)
    with pytest.raises(ResourceError) as error:
        wait_for_resources([bundle] * 7, "the test", settings)
    nodes_then = len(ray.nodes())
    wait_for_resources([bundle] * 2, "the test", settings)
    actors = [ray.remote(Actor).options(**bundle_options(bundle)).remote() for _ in range(2)]
    tiers = wait_for([actor.tier.remote() for actor in actors], "their tiers", 60.0)
    return {"refused": str(error.value), "nodes_then": nodes_then, "tiers": tiers}


def test_the_autoscaler_of_kuberay_also_minds_labels() -> None:
    with fake_cluster({"cheap": CHEAP}, version=2) as cluster:
        seen = cluster.call("test_placement_cluster:run_actors")
    assert "7 parts of CPU 0.5 on a node with tier=in(cheap, spot) each, and at most 6 of them fit" in seen["refused"]
    assert seen["nodes_then"] == 1 and seen["tiers"] == ["cheap", "cheap"]
