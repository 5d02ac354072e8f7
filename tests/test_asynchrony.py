"""Rollouts, scoring and learning overlap as far as `max_lag` allows, and no timing changes what is learned."""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from roro_ray.config import Config
from roro_ray.errors import ConfigError, RoroError
from roro_ray.learning.grpo import EmptyBatchWarning, LossInputs, make_loss
from roro_ray.learning.lag import correct_lag
from roro_ray.learning.router_run import RouterRun
from roro_ray.learning.router_training import RouterTrainer
from roro_ray.routing.episode import EpisodeSpec
from roro_ray.routing.router import make_router
from roro_ray.settings import load_config
from roro_ray.types import Verdict
from tests.scripted_world import make_scripted_config, make_scripted_queries, make_scripted_runner

QUERIES = make_scripted_queries()
_PATIENCE_S = 30.0  # of an event that a working overlap sets at once
State = dict[str, torch.Tensor]
Hook = Callable[["Cluster", int], None]


class Cluster:
    """Rollout workers, Judge and board in this process: any number of batches at once, each with its own weights.

    `log` tells what happened in which order, `hold` and `release` run at the beginning and end of an iteration's
    rollouts, `judge` before its scoring.
    """

    def __init__(self, config: Config, **hooks: Hook) -> None:
        self._runner = make_scripted_runner(config)
        self._states: dict[int, State] = {}
        self._hooks = hooks
        self._change = threading.Condition()
        self.log: list[str] = []

    def say(self, what: str) -> None:
        with self._change:
            self.log.append(what)
            self._change.notify_all()

    def wait_until(self, what: str) -> None:
        """Hold this thread until something has happened."""
        with self._change:
            assert self._change.wait_for(lambda: what in self.log, _PATIENCE_S), f"{what!r} never came: {self.log}"

    def publish(self, state: State, version: int) -> None:
        self._states[version] = {name: value.detach().clone() for name, value in state.items()}
        self.say(f"version {version}")

    def run(self, specs: Sequence[EpisodeSpec], version: int) -> list[Any]:
        iteration = int(specs[0].id.split("-")[2])
        self.say(f"roll {iteration} by {version}")
        self._call("hold", iteration)
        runner = self._runner.copy()
        runner.load_router(self._states[version], version)
        results = asyncio.run(runner.run(specs))
        self._call("release", iteration)
        self.say(f"rolled {iteration}")
        return list(results)

    def score(self, queries: Any, groups: Any) -> list[tuple[Verdict, ...]]:
        iteration = int(groups[0][0].id.split("-")[2])
        self.say(f"score {iteration}")
        self._call("judge", iteration)
        self.say(f"scored {iteration}")
        return [tuple(Verdict(0.1 * sum(step.model for step in t.steps)) for t in group) for group in groups]

    def _call(self, hook: str, iteration: int) -> None:
        if hook in self._hooks:
            self._hooks[hook](self, iteration)


def make_config(max_lag: int, **settings: Any) -> Config:
    config = make_scripted_config()
    config.router.max_lag, config.router.beta = max_lag, 0.3
    for name, value in settings.items():
        assert hasattr(config.router, name)
        setattr(config.router, name, value)
    return config


def train(config: Config, **hooks: Hook) -> tuple[State, list[dict[str, float]], Cluster]:
    """All iterations without a directory: weights, metrics, and what happened."""
    cluster = Cluster(config, **hooks)
    torch.manual_seed(1)
    network = make_router(config.router, 2)
    trainer = RouterTrainer(config, network, QUERIES, cluster.run, cluster.score, cluster.publish)
    trainer.begin()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EmptyBatchWarning)
            rows = [trainer.step() for _ in range(config.router.iterations)]
    finally:
        trainer.close()
    return network.state_dict(), rows, cluster


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("max_lag", [1, 2, 3])
def test_rollouts_and_scoring_overlap_learning(max_lag: int) -> None:
    """No batch ends before the update after the one that it acts with: without overlap this would never end."""

    def wait_for_learner(cluster: Cluster, iteration: int) -> None:
        version = iteration - max_lag
        if version >= 0:
            cluster.wait_until(f"version {version + 1}")

    config = make_config(max_lag)
    for hook in ("release", "judge"):
        _, rows, cluster = train(config, **{hook: wait_for_learner})
        assert [row["lag"] for row in rows] == [min(i, max_lag) for i in range(8)]
        assert all(
            cluster.log.index(f"version {i - max_lag + 1}") < cluster.log.index(f"scored {i}")
            for i in range(max_lag, 8)
        )


def test_a_batch_does_not_wait_for_the_last_episodes_of_the_one_before() -> None:
    """With a lag of 1 two batches, under two versions, are in the air: the first ends when the second has begun."""

    def wait_for_next(cluster: Cluster, iteration: int) -> None:
        if iteration + 1 < 8:
            cluster.wait_until(f"roll {iteration + 1} by {iteration}")

    config = make_config(1)
    cluster = Cluster(config, release=wait_for_next)
    trainer = RouterTrainer(config, make_router(config.router, 2), QUERIES, cluster.run, cluster.score, cluster.publish)
    trainer.begin()
    for _ in range(8):
        trainer.step()
    trainer.close()


def test_on_policy_everything_happens_in_turn() -> None:
    _, rows, cluster = train(make_config(0))
    turn = [
        f"{what}"
        for i in range(8)
        for what in (f"roll {i} by {i}", f"rolled {i}", f"score {i}", f"scored {i}", f"version {i + 1}")
    ]
    assert cluster.log == ["version 0", *turn]
    assert all(row["overlap"] == row["lag_kl"] == row["lag_cut"] == 0 for row in rows)


@pytest.mark.parametrize("max_lag", [1, 3])
def test_no_timing_changes_the_weights(max_lag: int) -> None:
    config = make_config(max_lag, iterations=6)
    straight, rows, _ = train(config)
    for seed in range(3):
        draw = random.Random(seed)
        delays = {(hook, i): draw.random() / 100 for hook in ("hold", "release", "judge") for i in range(6)}

        def delay(hook: str, delays: dict[Any, float] = delays) -> Hook:
            return lambda cluster, iteration: time.sleep(delays[hook, iteration])

        weights, other, cluster = train(config, **{hook: delay(hook) for hook in ("hold", "release", "judge")})
        assert equal(weights, straight)
        assert [_timeless(row) for row in other] == [_timeless(row) for row in rows]
        scored = [line for line in cluster.log if line.startswith("score ")]
        assert scored == [f"score {i}" for i in range(6)]


def test_batches_that_end_in_the_wrong_order_give_the_same_weights() -> None:
    config = make_config(2)
    straight, _, _ = train(config)

    def after_the_next(cluster: Cluster, iteration: int) -> None:
        if iteration % 2 == 0 and iteration + 1 < 8:
            cluster.wait_until(f"rolled {iteration + 1}")

    weights, _, cluster = train(config, release=after_the_next)
    assert cluster.log.index("rolled 1") < cluster.log.index("rolled 0")
    assert equal(weights, straight)


def _timeless(row: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in row.items() if not k.startswith("seconds") and k != "overlap" and not math.isnan(v)}


@pytest.mark.parametrize(("max_lag", "objective"), [(1, "ppo"), (3, "decoupled")])
def test_a_run_stopped_after_any_iteration_ends_as_a_straight_one(tmp_path: Path, max_lag: int, objective: str) -> None:
    config = make_config(max_lag, iterations=6, checkpoint_every=1, objective=objective, epochs=2)

    def run_to(directory: Path, stop_after: int | None) -> State:
        cluster = Cluster(config)
        run = RouterRun(config, directory, QUERIES, cluster.run, cluster.score, cluster.publish)
        asked_before = run.trainer.iteration
        for metrics in run.iterate():
            if metrics["iteration"] == stop_after:
                break
        rolled = sorted(tuple(map(int, line.split()[1::2])) for line in cluster.log if line.startswith("roll "))
        assert all(version == max(iteration - max_lag, 0) for iteration, version in rolled)
        assert not rolled or rolled[0][0] == asked_before
        return run.trainer.network.state_dict()

    straight = run_to(tmp_path / "straight", None)
    for stop_after in range(1, 6):
        run_to(tmp_path / "stopped", stop_after)  # from where the last one stopped: one iteration each
    assert equal(run_to(tmp_path / "stopped", None), straight)


def test_a_failure_is_raised_in_the_iteration_that_it_belongs_to() -> None:
    def fail(cluster: Cluster, iteration: int) -> None:
        if iteration == 4:
            raise RoroError("the workers are gone")

    config = make_config(2)
    cluster = Cluster(config, hold=fail)
    trainer = RouterTrainer(config, make_router(config.router, 2), QUERIES, cluster.run, cluster.score, cluster.publish)
    trainer.begin()
    for _ in range(4):
        trainer.step()
    with pytest.raises(RoroError, match="the workers are gone"):
        trainer.step()
    trainer.close()
    assert trainer.iteration == 4


@pytest.mark.parametrize("objective", ["ppo", "decoupled"])
def test_it_learns_the_one_hard_step_with_a_lag(objective: str) -> None:
    config = make_config(2, beta=0.0, objective=objective, head_lr=0.02, queries=8, iterations=40)
    config.router.cost_weight_low, config.router.cost_weight_high = 0.9, 1.0
    _, rows, _ = train(config)
    assert rows[0]["outcome"] < 0.4
    assert rows[-1]["outcome"] > 0.95 and rows[-1]["large_share"] == pytest.approx(0.25, abs=0.05)
    assert max(row["lag"] for row in rows) == 2 and max(row["lag_kl"] for row in rows) > 1e-3
    assert all(row["log_prob_gap"] < 1e-5 for row in rows)  # old log-probabilities are those of the weights that acted
    assert all(row["stale"] == 0 for row in rows)


def test_without_a_lag_both_objectives_are_one() -> None:
    ppo, _, _ = train(make_config(0, epochs=2, objective="ppo"))
    decoupled, _, _ = train(make_config(0, epochs=2, objective="decoupled"))
    assert equal(ppo, decoupled)


def test_trajectories_of_another_version_are_dropped_and_counted() -> None:
    class Mixed(Cluster):
        def run(self, specs: Sequence[EpisodeSpec], version: int) -> list[Any]:
            results = super().run(specs, version)
            stale = super().run(specs[:8], max(version - 1, 0))
            return [*stale, *results[8:]]

    config = make_config(1)
    cluster = Mixed(config)
    trainer = RouterTrainer(config, make_router(config.router, 2), QUERIES, cluster.run, cluster.score, cluster.publish)
    trainer.begin()
    rows = [trainer.step() for _ in range(5)]
    trainer.close()
    assert [row["stale"] for row in rows] == [0, 0, 8, 8, 8]  # versions 0, 0, 1, 2, 3
    assert [row["episodes"] for row in rows] == [32, 32, 24, 24, 24]


def test_weights_of_the_lag_by_hand() -> None:
    acting = torch.tensor([[0.5, 0.2, 0.4]]).log()
    present = torch.tensor([[0.6, 0.8, 0.9]]).log()
    mask = torch.tensor([[True, True, False]])
    ppo = correct_lag(acting, present, mask, "ppo", 2.0)
    assert torch.equal(ppo.reference_BD, acting) and torch.equal(ppo.weights_BD, torch.ones(1, 3))
    found = correct_lag(acting, present, mask, "decoupled", 2.0)
    assert torch.equal(found.reference_BD, present)
    torch.testing.assert_close(found.weights_BD, torch.tensor([[1.2, 2.0, 1.0]]))  # 4 was cut; no weight off the mask
    assert found.sums["lag_cut"] == 1 and ppo.sums["lag_cut"] == 0
    kl = (1.2 - 1 - math.log(1.2)) + (4 - 1 - math.log(4))
    assert found.sums["lag_kl"] == ppo.sums["lag_kl"] == pytest.approx(kl)


def _gradient(objective: str, cap: float, clip: float) -> torch.Tensor:
    """Of the first step on decisions that were made by other weights, with respect to the log-probabilities."""
    acting = torch.tensor([[0.5, 0.2, 0.9]]).log()
    present = torch.tensor([[0.6, 0.8, 0.3]]).log().requires_grad_()
    mask, advantages = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[1.0, 1.0, -1.0]])
    lagged = correct_lag(acting, present.detach(), mask, objective, cap)
    inputs = LossInputs(present, lagged.reference_BD, advantages * lagged.weights_BD, mask)
    make_loss(inputs, clip, clip, denominator=1.0).loss.backward()
    assert present.grad is not None
    return -present.grad


def test_the_clip_of_ppo_silences_what_has_moved_and_decoupling_does_not() -> None:
    importance = torch.tensor([[1.2, 4.0, -1 / 3]])  # present / acting, times the advantage
    wide = 1e6
    torch.testing.assert_close(_gradient("ppo", wide, wide), importance)
    torch.testing.assert_close(_gradient("decoupled", wide, 0.2), importance)
    torch.testing.assert_close(_gradient("decoupled", 2.0, 0.2), torch.tensor([[1.2, 2.0, -1 / 3]]))
    torch.testing.assert_close(_gradient("ppo", wide, 0.25), torch.tensor([[1.2, 0.0, 0.0]]))


def test_settings_of_the_lag() -> None:
    with pytest.raises(ConfigError, match=r"router\.objective.*decoupled"):
        load_config(["router.objective=decoupeld"])
    with pytest.raises(ConfigError, match=r"router\.weight_cap"):
        load_config(["router.max_lag=1", "router.objective=decoupled", "router.weight_cap=0"])
    with pytest.warns(match=r"router\.objective=decoupled will be ignored \(router\.max_lag=0"):
        load_config(["router.objective=decoupled"])
    with pytest.warns(match=r"router\.max_lag=2 with router\.objective=ppo learns too little"):
        load_config(["router.max_lag=2"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_config(["router.max_lag=1"])
        load_config(["router.max_lag=2", "router.objective=decoupled"])
