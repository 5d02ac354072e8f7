"""The router's learner: it learns, any split into ranks gives the same gradient, and a stopped run is the same run."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.learner import train_router
from actors.reward_service import RewardService, load_model
from actors.rollout import RolloutPool, make_runner
from roro_ray.config import Config
from roro_ray.errors import CheckpointError, ConfigError, ResourceError, RoroError, TrainingError
from roro_ray.learning.grpo import EmptyBatchWarning
from roro_ray.learning.router_plan import make_plan
from roro_ray.learning.router_rewards import collect_rollouts, score_rollouts, weigh_rollouts
from roro_ray.learning.router_run import RouterRun, list_snapshots, make_train_queries, read_metrics
from roro_ray.learning.router_training import RouterTrainer, Share
from roro_ray.routing.episode import EpisodeFailure, EpisodeSpec
from roro_ray.routing.router import make_router
from roro_ray.routing.router_files import load_router
from roro_ray.types import Verdict
from tests.scripted_world import make_scripted_config, make_scripted_queries, make_scripted_runner

QUERIES = make_scripted_queries()
State = dict[str, torch.Tensor]


class LocalRollouts:
    """What the rollout pool and the board do, in this process: every published version can be rolled out under."""

    def __init__(self, config: Config) -> None:
        self._runner = make_scripted_runner(config)
        self._states: dict[int, State] = {}
        self._lock = threading.Lock()
        self.asked: list[tuple[int, int]] = []

    def publish(self, state: State, version: int) -> None:
        self._states[version] = {name: value.detach().clone() for name, value in state.items()}

    def run(self, specs: Sequence[EpisodeSpec], version: int) -> list[Any]:
        with self._lock:  # as the gate of a worker does
            self.asked.append((int(specs[0].id.split("-")[2]), version))
            self._runner.load_router(self._states[version], version)
            return asyncio.run(self._runner.run(specs))


def make_trainer(config: Config, share: Share | None = None, score: Any = None) -> RouterTrainer:
    torch.manual_seed(1)
    rollouts = LocalRollouts(config)
    network = make_router(config.router, 2)
    trainer = RouterTrainer(config, network, QUERIES, rollouts.run, score, rollouts.publish, share)
    trainer.begin()
    trainer.rollouts = rollouts
    return trainer


def run_to(config: Config, directory: Path, stop_after: int | None = None) -> State:
    """Train in a directory, to the end or until it is stopped after some iterations as by a kill; its weights."""
    rollouts = LocalRollouts(config)
    run = RouterRun(config, directory, QUERIES, rollouts.run, None, rollouts.publish)
    for metrics in run.iterate():
        if metrics["iteration"] == stop_after:
            break
    return run.trainer.network.state_dict()


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def saved_weights(directory: Path) -> State:
    return load_router(directory).state_dict()


def test_the_plan_depends_on_seed_and_iteration_only() -> None:
    config = make_scripted_config().router
    plan = make_plan(QUERIES, config, 3, 5)
    assert plan == make_plan(QUERIES, config, 3, 5)
    assert len({group.query.id for group in plan}) == config.queries
    specs = [spec for group in plan for spec in group.specs]
    assert len({spec.id for spec in specs}) == len({spec.seed for spec in specs}) == len(specs) == 32
    assert all(config.cost_weight_low <= group.cost_weight <= config.cost_weight_high for group in plan)
    assert all(spec.cost_weight == group.cost_weight for group in plan for spec in group.specs)
    assert plan != make_plan(QUERIES, config, 3, 6) and plan != make_plan(QUERIES, config, 4, 5)
    with pytest.raises(ConfigError, match=r"router\.queries is 4, but there are only 3"):
        make_plan(QUERIES[:3], config, 0, 0)


@pytest.mark.parametrize("normalisation", ["dr_grpo", "group", "dapo"])
def test_it_learns_the_one_hard_step(normalisation: str) -> None:
    config = make_scripted_config()
    config.router.normalisation = normalisation
    config.router.head_lr, config.router.queries, config.router.iterations = 0.02, 8, 40
    config.router.cost_weight_low, config.router.cost_weight_high = 0.9, 1.0
    trainer = make_trainer(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EmptyBatchWarning)  # once it is learned, every rollout is the same
        history = [trainer.step() for _ in range(40)]
    assert history[0]["outcome"] < 0.4
    assert history[-1]["outcome"] > 0.95 and history[-1]["large_share"] == pytest.approx(0.25, abs=0.03)
    greedy = [EpisodeSpec("greedy-0-40", QUERIES[0], "router_greedy", cost_weight=0.95)]
    assert trainer.rollouts.run(greedy, 40)[0].models == (0, 1, 0, 0)


def test_metrics_of_an_iteration() -> None:
    trainer = make_trainer(make_scripted_config())
    row = trainer.step()
    assert row["iteration"] == 1 and row["episodes"] == 32 and row["steps"] == 4.0 and row["lag"] == 0
    assert row["failed"] == row["stale"] == row["dropped_errors"] == 0 and row["empty"] == 0
    assert math.isnan(row["process"]) and 0 < row["entropy"] <= math.log(2)
    assert row["learned"] + row["dropped"] == row["episodes"] and row["dropped"] == 8 * row["constant_groups"]
    assert row["log_prob_gap"] < 1e-5 and row["grad_norm"] > 0
    assert row["reward"] == pytest.approx(row["outcome"], abs=0.6 * row["large_share"])
    assert {"seconds_rollout", "seconds_score", "seconds_learn", "seconds_publish", "seconds"} <= row.keys()


def test_failures_and_errors_are_dropped_and_counted_never_scored_0() -> None:
    config = make_scripted_config()
    config.router.beta = 1.0
    trainer = make_trainer(config)
    plan = make_plan(QUERIES, config.router, 0, 0)
    results = trainer.rollouts.run([spec for group in plan for spec in group.specs], 0)
    results[0] = EpisodeFailure(plan[0].specs[0].id, "EngineError: it broke")
    rollouts = collect_rollouts(plan, results, version=0)
    assert len(rollouts.trajectories) == 31 and rollouts.failures[0].endswith("it broke")

    def score(queries: Any, groups: Any) -> list[tuple[Verdict, ...]]:
        assert [len(group) for group in groups] == [7, 8, 8, 8]
        assert all(t.query_id == q.id for q, group in zip(queries, groups, strict=True) for t in group)
        verdicts = [tuple(Verdict(0.5, step_scores=(0.1,) * len(t.steps)) for t in group) for group in groups]
        verdicts[1] = tuple(Verdict(math.nan, error="no rubric") for _ in groups[1])
        return verdicts

    weighed = weigh_rollouts(rollouts, score_rollouts(rollouts, score), config.router)
    assert weighed.sums["failed"] == 1 and weighed.sums["unscored"] == weighed.sums["dropped_errors"] == 8
    assert weighed.sums["scored"] == weighed.sums["rewarded"] == 23
    learned = {query.id for query in weighed.queries}
    assert plan[1].query.id not in learned and learned
    with pytest.raises(
        RoroError, match=r"of 32 rollouts 1 failed \(the first: .*it broke\) and 31 were made by another"
    ):
        collect_rollouts(plan, results, version=1)


def test_credit_per_step_tells_steps_apart() -> None:
    config = make_scripted_config()
    config.router.beta, config.router.credit = 1.0, "step"

    def score(queries: Any, groups: Any) -> list[tuple[Verdict, ...]]:
        return [
            tuple(Verdict(0.0, step_scores=tuple(1.0 if step.model else 0.0 for step in t.steps)) for t in group)
            for group in groups
        ]

    trainer = make_trainer(config, score=score)
    plan = make_plan(QUERIES, config.router, 0, 0)
    rollouts = collect_rollouts(plan, trainer.rollouts.run([s for g in plan for s in g.specs], 0), 0)
    weighed = weigh_rollouts(rollouts, score_rollouts(rollouts, score), config.router)
    assert any(len(set(values)) > 1 for values in weighed.values)
    assert trainer.step()["grad_norm"] > 0


def test_nothing_to_learn_from_is_said() -> None:
    config = make_scripted_config()
    config.router.prior = 1e-9  # always the small model: every reward is the same
    trainer = make_trainer(config)
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    with pytest.warns(EmptyBatchWarning, match="iteration 0"):
        row = trainer.step()
    assert row["empty"] == 1 and row["learned"] == 0 and row["constant_groups"] == 4
    assert equal(before, trainer.network.state_dict())


def run_ranks(config: Config, world: int) -> tuple[State, list[dict[str, float]]]:
    """One update by several ranks, as threads that add their tensors up at a barrier."""
    barrier, slots, rows = threading.Barrier(world), [torch.zeros(0)] * world, [{}] * world
    trainers: list[Any] = [None] * world

    def work(rank: int) -> None:
        rows[rank] = trainers[rank].step()

    def make_add(rank: int) -> Any:
        def add(tensor: torch.Tensor) -> torch.Tensor:
            slots[rank] = tensor
            barrier.wait(20)
            total = sum(slots[1:], slots[0].clone())
            barrier.wait(20)
            return total

        return add

    for rank in range(world):
        trainers[rank] = make_trainer(config, Share(rank, world, make_add(rank)))
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    states = [trainer.network.state_dict() for trainer in trainers]
    assert all(equal(states[0], state) for state in states)
    return states[0], rows


@pytest.mark.parametrize("normalisation", ["dr_grpo", "group", "dapo"])
def test_ranks_and_micro_batches_do_not_change_the_gradient(normalisation: str) -> None:
    config = make_scripted_config()
    config.router.queries, config.router.normalisation = 5, normalisation  # 3 groups for one rank, 2 for the other
    alone, [row] = run_ranks(config, 1)
    together, rows = run_ranks(config, 2)
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], atol=1e-6, rtol=0)
    for each in rows:
        for name in ("episodes", "learned", "reward", "outcome", "large_share", "entropy", "loss", "grad_norm"):
            assert each[name] == pytest.approx(row[name], abs=1e-5), name
    config.router.micro_batch = 3
    split, _ = run_ranks(config, 1)
    for name in alone:
        torch.testing.assert_close(split[name], alone[name], atol=1e-6, rtol=0)


def test_more_ranks_than_groups() -> None:
    config = make_scripted_config()
    config.router.queries = 1
    alone, _ = run_ranks(config, 1)
    together, _ = run_ranks(config, 2)
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], atol=1e-6, rtol=0)


def test_lag_is_exact_and_bounded() -> None:
    config = make_scripted_config()
    config.router.max_lag = 2
    trainer = make_trainer(config)
    rows = [trainer.step() for _ in range(config.router.iterations)]
    trainer.close()
    assert sorted(trainer.rollouts.asked) == [(i, max(i - 2, 0)) for i in range(8)]
    assert [row["lag"] for row in rows] == [0, 1, 2, 2, 2, 2, 2, 2]
    assert all(
        row["log_prob_gap"] < 1e-5 for row in rows
    )  # the old log-probabilities are those of the version that acted
    assert sorted(trainer.past) == [6, 7]


@pytest.mark.parametrize("max_lag", [0, 2])
@pytest.mark.parametrize("stop_after", [4, 7, 8])
def test_a_stopped_run_ends_as_a_straight_one(tmp_path: Path, stop_after: int, max_lag: int) -> None:
    config = make_scripted_config()
    config.router.max_lag, config.router.epochs = max_lag, 1 + max_lag
    straight = run_to(config, tmp_path / "straight")
    run_to(config, tmp_path / "stopped", stop_after)
    resumed = run_to(config, tmp_path / "stopped")
    assert equal(resumed, straight)
    assert equal(saved_weights(tmp_path / "stopped"), straight)
    rows = read_metrics(tmp_path / "stopped" / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(1, 9))
    assert list(list_snapshots(tmp_path / "stopped")) == [0, 4, 8]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(saved_weights(tmp_path / "stopped" / "snapshots" / "iteration_000004"), _after(config, 4))


def _after(config: Config, iterations: int) -> State:
    rollouts = LocalRollouts(config)
    run = RouterRun(config, Path("/nonexistent"), QUERIES, rollouts.run, None, rollouts.publish)
    run.trainer.begin()
    for _ in range(iterations):
        run.trainer.step()
    return run.trainer.network.state_dict()


def run_world(directory: Path, concurrency: int, stop_after: int | None = None) -> State:
    """Train on the embedded world's models with Rubricor and Judge, in this process; as `run_to`."""
    config = make_scripted_config()
    config.pool = Config().pool
    for model in config.pool.models:
        model.dtype = "float64"
    config.router.encoder, config.router.iterations, config.router.checkpoint_every = "world:encoder", 3, 2
    config.router.beta, config.data.suites, config.data.router_queries = 1.0, ["chain", "word"], 3
    config.ray.concurrency = concurrency
    runner = make_runner(config, ())
    service = RewardService(None, config.reward, 0, load_model)
    loop = asyncio.new_event_loop()
    states: dict[int, State] = {}

    def run(specs: Sequence[EpisodeSpec], version: int) -> list[Any]:
        runner.load_router(states[version], version)
        return loop.run_until_complete(runner.run(specs))

    def score(queries: Any, groups: Any) -> Any:
        return loop.run_until_complete(service.score(queries, groups))

    def publish(state: State, version: int) -> None:
        states[version] = {name: value.detach().clone() for name, value in state.items()}

    training = RouterRun(config, directory, make_train_queries(config), run, score, publish)
    for metrics in training.iterate():
        assert metrics["failed"] == metrics["unscored"] == 0 and metrics["log_prob_gap"] < 1e-5
        if metrics["iteration"] == stop_after:
            break
    loop.close()
    return training.trainer.network.state_dict()


def test_the_worlds_models_in_float64_resume_to_the_bit(tmp_path: Path) -> None:
    straight = run_world(tmp_path / "straight", concurrency=64)
    run_world(tmp_path / "stopped", concurrency=64, stop_after=2)
    resumed = run_world(tmp_path / "stopped", concurrency=5)  # nothing remembered, and batches of another make-up
    assert equal(resumed, straight)


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    config = make_scripted_config()
    run_to(config, tmp_path, 4)
    config.router.head_lr = 0.5
    with pytest.raises(CheckpointError, match=r"head_lr: 0\.01 there, 0\.5 now"):
        run_to(config, tmp_path)
    config = make_scripted_config()
    config.router.hidden = 8
    with pytest.raises(CheckpointError, match=r"expected \[8, 11\]"):
        run_to(config, tmp_path)


# Below: on Ray.


@pytest.fixture(scope="module")
def pool(local_ray: None) -> Any:
    config = make_scripted_config()
    pool = RolloutPool.start(config, make_scripted_runner)
    yield pool
    pool.stop()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_train_worker_goes_on_to_the_same_weights(pool: RolloutPool, tmp_path: Path) -> None:
    config = make_scripted_config()
    config.router.max_lag = 1  # it dies with a batch in the air
    straight = run_to(config, tmp_path / "straight")
    told: list[int] = []
    killed: list[int] = []

    def kill_once(done: int, total: int, metrics: dict[str, float]) -> None:
        told.append(done)
        assert total == 8
        if done == 5 and not killed:
            killed.append(int(metrics["pid"]))
            os.kill(killed[0], signal.SIGKILL)

    config.ray.workers = 2
    result = train_router(config, "killed", pool, None, tmp_path, kill_once, QUERIES)
    assert killed and result.restarts == 1 and told[-1] == 8
    assert equal(saved_weights(result.router_dir), straight)
    assert [row["iteration"] for row in result.metrics] == list(range(1, 9))
    assert list(result.snapshots) == [0, 4, 8]
    again = train_router(config, "killed", pool, None, tmp_path, kill_once, QUERIES)  # finished: only read
    assert again.metrics == result.metrics and again.restarts == 0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_train_workers_learn_as_one(pool: RolloutPool, tmp_path: Path) -> None:
    config = make_scripted_config()
    config.router.iterations, config.router.queries = 1, 5  # 3 groups and 2
    alone = run_to(config, tmp_path / "alone")
    config.router.workers = 2
    result = train_router(config, "two", pool, None, tmp_path, queries=QUERIES)
    weights = saved_weights(result.router_dir)
    for name in alone:
        torch.testing.assert_close(weights[name], alone[name], atol=1e-6, rtol=0)
    assert result.metrics[0]["episodes"] == 40 and len(result.metrics) == 1


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_what_no_restart_cures_is_raised_as_itself(pool: RolloutPool, tmp_path: Path) -> None:
    config = make_scripted_config()
    config.pool.models.append(config.pool.models[1])  # a router for three models, workers with two
    with pytest.raises(CheckpointError, match=r"head\.2\.bias is \[3\], expected \[2\]"):
        train_router(config, "three", pool, None, tmp_path, queries=QUERIES)


class BrokenReward:
    """A reward service whose every call fails in a way that nobody foresaw."""

    def score(self, queries: Any, groups: Any) -> Any:
        raise ZeroDivisionError("the judge divided by zero")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_workers_that_keep_failing(pool: RolloutPool, tmp_path: Path) -> None:
    config = make_scripted_config()
    config.router.max_failures, config.router.beta = 0, 1.0
    with pytest.raises(TrainingError, match=r"'bad' failed 1 times.*the judge divided by zero.*run it again to go on"):
        train_router(config, "bad", pool, BrokenReward(), tmp_path, queries=QUERIES)


@pytest.mark.slow
def test_refusals_before_anything_starts(pool: RolloutPool, tmp_path: Path) -> None:
    config = make_scripted_config()
    run_to(config, tmp_path / "router" / "other", 4)
    config.router.head_lr = 0.5
    with pytest.raises(CheckpointError, match="head_lr"):
        train_router(config, "other", pool, None, tmp_path, queries=QUERIES)
    config.router.workers = 50
    with pytest.raises(ResourceError, match="router training 'x' can never start"):
        train_router(config, "x", pool, None, tmp_path, queries=QUERIES)
    config.router.beta = 1.0
    with pytest.raises(ConfigError, match=r"router\.beta is 1\.0 and there is no reward service"):
        train_router(config, "x", pool, None, tmp_path, queries=QUERIES)
