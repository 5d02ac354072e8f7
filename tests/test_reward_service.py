"""The reward service: one rubric per query and version, bounded, and errors that are never scores."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.reward_service import RewardClient, RewardService
from actors.waiting import wait_for
from roro_ray.config import Config, RewardConfig
from roro_ray.errors import CheckpointError, ConfigError, DeadlineError, QueueFullError, ResourceError, RubricError
from roro_ray.types import Criterion, Query, Rubric, Trajectory, Usage, Verdict
from tests.scripted_world import make_scripted_config, make_scripted_queries

pytestmark = pytest.mark.slow


class ScriptedReward:
    """A reward model of known verdicts: a trajectory's seed / 10 + the version; some queries go wrong.

    Query 3's rubric cannot be written while others are (and never alone), query 4's Judge fails, query 5's score is
    not a number, query 6 takes some seconds.
    """

    def __init__(self, directory: str | None) -> None:
        self.version = int(directory.rpartition("-")[2]) if directory else 0
        self.directory = directory
        self.written: list[str] = []

    def write_rubrics(self, queries: list[Query], seed: int) -> list[Rubric]:
        if any(query.id == "scripted/3" for query in queries):
            raise RubricError("query 3 has no rubric")
        self.written += [query.id for query in queries]
        criterion = Criterion(f"from {self.directory}", 1.0)
        return [Rubric(query.id, (criterion,), f"written {len(self.written)}", self.version) for query in queries]

    def score(self, queries: list[Query], groups: Any, rubrics: list[Rubric]) -> list[tuple[Verdict, ...]]:
        ids = [query.id for query in queries]
        if "scripted/4" in ids:
            raise ValueError("the judge stumbled")
        if "scripted/6" in ids:
            time.sleep(2.5)  # the machine may stall for a second
        assert [rubric.query_id for rubric in rubrics] == ids
        return [
            tuple(Verdict(math.nan if q.id == "scripted/5" else t.seed / 10 + self.version) for t in group)
            for q, group in zip(queries, groups, strict=True)
        ]


def load_scripted(directory: str | None, config: RewardConfig) -> ScriptedReward:
    if directory and "missing" in directory:
        raise CheckpointError(f"no complete reward model in {directory!r}")
    return ScriptedReward(directory)


def make_group(query: Query, count: int = 2) -> tuple[Trajectory, ...]:
    return tuple(
        Trajectory(f"{query.id}/{i}", query.id, "scripted", "fixed:0", i, 0.0, (), None, False, "answer", Usage())
        for i in range(count)
    )


QUERIES = make_scripted_queries(8)


def make_config(queue_size: int = 100) -> Config:
    config = make_scripted_config()
    config.reward.queue_size = queue_size
    return config


@pytest.fixture(scope="module")
def client(local_ray: None) -> Iterator[RewardClient]:
    client = RewardClient.start(make_config(queue_size=10), load=load_scripted)
    yield client
    client.stop()


def test_scores_and_one_rubric_per_query_and_version(client: RewardClient) -> None:
    groups = [make_group(QUERIES[0]), make_group(QUERIES[1], 3)]
    verdicts = client.score(QUERIES[:2], groups)
    assert [[v.score for v in group] for group in verdicts] == [[0.0, 0.1], [0.0, 0.1, 0.2]]
    texts = [rubric.text for rubric in client.write_rubrics(QUERIES[:2])]
    client.score(QUERIES[:2], groups)
    assert [rubric.text for rubric in client.write_rubrics(QUERIES[:2])] == texts
    before = client.facts()
    assert before.rubrics == 2 and before.version == 0
    client.load("reward-2")
    assert client.score(QUERIES[:1], groups[:1])[0][1].score == pytest.approx(2.1)
    other = client.write_rubrics(QUERIES[:1])[0]
    assert other.version == 2 and other.criteria[0].text.endswith("reward-2")
    client.load("other/reward-2")  # another model of the same version: its own rubrics
    assert client.write_rubrics(QUERIES[:1])[0].criteria[0].text.endswith("other/reward-2")


def test_what_cannot_be_scored_is_an_error_value(client: RewardClient) -> None:
    chosen = [QUERIES[i] for i in (0, 3, 4, 5)]
    verdicts = client.score(chosen, [make_group(query) for query in chosen])
    good, no_rubric, no_verdict, no_number = verdicts
    assert all(verdict.error is None for verdict in good) and good[1].score == pytest.approx(
        0.1 + client.facts().version
    )
    for verdicts_of, told in ((no_rubric, "RubricError"), (no_verdict, "stumbled"), (no_number, "nan")):
        assert len(verdicts_of) == 2
        assert all(told in v.error and math.isnan(v.score) for v in verdicts_of)
    assert client.facts().errors >= 6


def test_the_queue_is_bounded(client: RewardClient) -> None:
    slow, group = [QUERIES[6]], [make_group(QUERIES[6], 6)]
    first = client.actor.score.remote(slow, group)
    second = client.actor.score.remote(slow, group)
    with pytest.raises(QueueFullError, match=r"has 6 trajectories waiting and was sent 6 more, expected at most 10"):
        wait_for(second, "the second", 20)
    # The client comes again until there is room; four at once go through one after the other.
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda _: client.score(slow, group), range(2)))
    assert results[0] == results[1] and len(results[0][0]) == 6
    wait_for(first, "the first", 20)
    facts = client.facts()
    assert facts.waiting == 0 and facts.refused >= 1


def test_more_than_the_queue_holds_is_sent_in_parts(client: RewardClient) -> None:
    chosen = [QUERIES[i] for i in (0, 1, 2, 7)]
    before = client.facts().requests
    verdicts = client.score(chosen, [make_group(query, 4) for query in chosen])
    assert [len(group) for group in verdicts] == [4] * 4
    assert client.facts().requests == before + 2
    with pytest.raises(ConfigError, match="a group of 11 trajectories can never enter a queue of 10"):
        client.score(QUERIES[:1], [make_group(QUERIES[0], 11)])


def test_a_full_queue_and_a_slow_judge_meet_the_deadline(client: RewardClient) -> None:
    impatient = RewardClient(client.actor, 0.3, client.queue_size)
    busy = client.actor.score.remote([QUERIES[6]], [make_group(QUERIES[6], 6)])
    with pytest.raises(QueueFullError):
        impatient.score([QUERIES[0]], [make_group(QUERIES[0], 6)])
    with pytest.raises(DeadlineError, match=r"verdicts on 4 trajectories.*RewardService.*ALIVE"):
        impatient.score([QUERIES[0]], [make_group(QUERIES[0], 4)])
    wait_for(busy, "the slow one", 20)


def test_a_killed_service_comes_back(client: RewardClient) -> None:
    pid = client.facts().pid
    threading.Timer(0.3, lambda: os.kill(pid, signal.SIGKILL)).start()
    verdicts = client.score([QUERIES[6]], [make_group(QUERIES[6], 2)])
    assert [verdict.error for verdict in verdicts[0]] == [None, None]
    assert client.facts().pid != pid


def test_starting_without_a_reward_model(local_ray: None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete reward model"):
        RewardClient.start(make_config(), tmp_path / "missing", load_scripted)


def test_a_service_that_can_never_fit(local_ray: None) -> None:
    config = make_config()
    config.ray.reward_cpus = 64
    with pytest.raises(ResourceError, match="the reward service can never start"):
        RewardClient.start(config, load=load_scripted)


def test_the_class_itself_needs_no_ray() -> None:
    service = RewardService(None, RewardConfig(), 0, load_scripted)
    assert service.facts().version == -1 and ray is not None
