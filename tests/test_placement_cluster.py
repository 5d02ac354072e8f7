"""Placement under an autoscaler: nodes come for what is asked, and what no node will ever hold is refused at once."""

from __future__ import annotations

from typing import Any

import pytest
from fake_cluster import FakeType, fake_cluster

pytestmark = pytest.mark.slow


def make_config(version: int, **ray: Any) -> Any:
    from tests.scripted_world import make_scripted_config

    config = make_scripted_config()
    config.ray.workers, config.ray.worker_cpus, config.ray.timeout_s = 2, 0.5, 60.0
    config.ray.labels = {"rollout": {"tier": "in(cheap, spot)"}}
    if version == 1:  # the autoscaler of `ray up` sees resources only
        config.ray.resources = {"rollout": {"slot": 1.0}}
    for key, value in ray.items():
        setattr(config.ray, key, value)
    return config


def refuse(config: Any) -> str:
    from actors.rollout import RolloutPool
    from roro_ray.errors import ResourceError
    from tests.scripted_world import make_scripted_runner

    try:
        RolloutPool.start(config, make_scripted_runner)
    except ResourceError as error:
        return str(error)
    raise AssertionError("it was started")


def grow_and_run(version: int) -> dict[str, Any]:
    """In the driver: what is refused, and a pool whose nodes do not exist yet."""
    import ray

    from actors.rollout import RolloutPool
    from tests.scripted_world import make_scripted_runner, make_specs

    ray.init(log_to_driver=False)
    refused = [
        refuse(make_config(version, worker_cpus=8.0)),
        refuse(make_config(version, workers=7)),
        refuse(make_config(version, labels={"rollout": {"tier": "dear"}})),
    ]
    nodes_then = len(ray.nodes())
    pool = RolloutPool.start(make_config(version), make_scripted_runner)
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


@pytest.mark.parametrize("version", [1, 2])
def test_nodes_come_for_a_pool_and_go_and_what_never_fits_is_refused(version: int) -> None:
    types = {"cheap": FakeType({"CPU": 1, "slot": 1}, {"tier": "cheap"}, most=3)}
    with fake_cluster(types, idle_s=2, version=version) as cluster:
        seen = cluster.call("test_placement_cluster:grow_and_run", version)
        print(seen)
        cluster.wait_for_nodes(1)
    assert seen["nodes_then"] == 1, "nothing was launched for what was refused"
    large, many, labelled = seen["refused"]
    assert "CPU 8" in large and "the largest node type, cheap, has CPU 1" in large
    assert "7 parts of CPU 0.5" in many and "3 x cheap" in many
    assert "tier=dear, and no node has such labels: the nearest node type, cheap, has" in labelled
    assert set(seen["tiers"]) == {"cheap"}
    assert set(seen["results"]) == {"Trajectory"}
