"""The server on a cluster of several nodes: replicas grow and shrink with the requests in hand, and a node is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from fake_cluster import Cluster, many_nodes
from serve_server import MODELS, Reply, Server, make_body, make_client, make_questions, running_server

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(400)]
QUESTIONS = make_questions(12)
BACK = ("model-small", "model-large", "router")
# The ingress stays on the head, as docs/cluster.md advises; models and routers are on nodes that may be lost.
SETTINGS = {
    "ingress": {"cpus": 0.1, "resources": {"front": 0.1}},
    "models": {
        **{"min_replicas": 1, "max_replicas": 2, "target_ongoing": 0.5, "upscale_s": 0.5, "downscale_s": 3.0},
        **{"per_node": 1, "cpus": 0.1, "labels": {"tier": "back"}},
    },
    "routers": {"min_replicas": 2, "max_replicas": 2, "per_node": 1, "cpus": 0.1, "resources": {"back": 0.1}},
    "rescue": {"step_timeout_s": 20.0, "failover_s": 10.0, "probe_s": 0.3},
    "answer": {"timeout_s": 60.0},
}


@dataclass
class Served:
    """A server on a head and two nodes."""

    cluster: Cluster
    server: Server
    nodes: dict[str, int]  # Ray's id of a node: its number in the cluster

    def places(self, deployment: str) -> list[str]:
        """The nodes of a deployment's replicas."""
        return list(self.server.order("nodes", deployment=deployment))


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with many_nodes(resources={"CPU": 1, "front": 1}) as cluster:
        head = {node["NodeID"] for node in cluster.list_nodes()}
        nodes: dict[str, int] = {}
        for _ in range(2):
            number = cluster.add_node({"CPU": 1, "back": 1}, {"tier": "back"})
            (new,) = {node["NodeID"] for node in cluster.list_nodes()} - head - nodes.keys()
            nodes[new] = number
        with running_server(SETTINGS, cluster.environment) as server:
            yield Served(cluster, server, nodes)


async def keep_asking(server: Server, seed: int, stop: asyncio.Event, replies: list[tuple[int, Reply]]) -> None:
    """A client that asks the same again and again."""
    async with make_client() as client:
        while not stop.is_set():
            replies.append((seed, await server.stream(client, make_body(QUESTIONS[seed], seed))))


async def test_replicas_come_and_go_with_the_requests_in_hand(served: Served) -> None:
    server = served.server
    assert len(served.places("model-large")) == 1
    stop, replies = asyncio.Event(), list[tuple[int, Reply]]()
    clients = [asyncio.create_task(keep_asking(server, seed, stop, replies)) for seed in range(6)]
    try:
        await server.wait(lambda: len(set(served.places("model-large"))) == 2, "a second replica, on another node", 120)
    finally:
        stop.set()
        await asyncio.gather(*clients)
    assert all(reply.whole for _, reply in replies), [reply for _, reply in replies if not reply.whole][:3]
    await server.wait(lambda: all(len(served.places(f"model-{m}")) == 1 for m in MODELS), "one replica again", 120)
    assert served.places("ingress") and not set(served.places("ingress")) & served.nodes.keys()


async def test_a_lost_node_costs_no_answer(served: Served) -> None:
    server = served.server
    expected = await server.ask_all([make_body(question, seed) for seed, question in enumerate(QUESTIONS)])
    assert all(reply.whole for reply in expected)
    assert all(any(reply.summary["steps"][model] for reply in expected) for model in MODELS)
    stop, replies = asyncio.Event(), list[tuple[int, Reply]]()
    clients = [asyncio.create_task(keep_asking(server, seed, stop, replies)) for seed in range(len(QUESTIONS))]
    try:
        await server.wait(lambda: all(len(set(served.places(name))) == 2 for name in BACK), "two of each", 120)
        lost = served.places("model-large")[0]
        before = len(replies)
        await asyncio.to_thread(served.cluster.kill_node, served.nodes[lost])
        await server.wait(lambda: len(replies) > before + 4 * len(QUESTIONS), "answers after the loss", 120)
        assert all(lost not in served.places(name) for name in BACK)
    finally:
        stop.set()
        await asyncio.gather(*clients)
    for seed, reply in replies:
        assert reply.whole, (seed, reply)
        assert reply.text == expected[seed].text
    await asyncio.to_thread(served.cluster.add_node, {"CPU": 1, "back": 1}, {"tier": "back"})
    await server.wait(lambda: len(set(served.places("router"))) == 2, "the router's second replica is back", 120)
    again = await server.ask_all([make_body(question, seed) for seed, question in enumerate(QUESTIONS)])
    assert [reply.text for reply in again] == [reply.text for reply in expected]
