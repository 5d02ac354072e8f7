"""Replicas of engines come with demand, and their nodes with them, and go again when nobody needs them."""

from __future__ import annotations

import pytest
from fake_cluster import FakeType, fake_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(200)]


def test_replicas_and_nodes_from_none_to_three_and_back() -> None:
    kinds = {"accelerated": FakeType({"CPU": 1, "accelerator": 1}, most=3)}
    with fake_cluster(kinds, idle_s=2, head_cpus=2) as cluster:
        seen = cluster.call("replica_cluster:run_from_nothing", 3, 40, timeout_s=110)
        cluster.wait_for_nodes(1)
    # Loading asked for one replica (its facts are needed); the rollouts then found none.
    assert seen["idle"]["starts"] == seen["idle"]["releases"] >= 1
    assert seen["right"] == 40
    most = max(now for now, _ in seen["sizes"])
    assert most == 3 and max(nodes for now, nodes in seen["sizes"] if now == 3) == 4
    facts = seen["facts"]
    assert facts["now"] == facts["wanted"] == 0
    assert facts["starts"] == facts["releases"] >= 3  # one that was on its way out may come back
    assert facts["restarts"] == facts["hangs"] == 0
    assert facts["requests"] >= 40
