"""The stages as the jobs chain them: read what the stage before left, work, write, record.

A stage that is finished is not done again, and one that was interrupted goes on. The algorithms are in `roro_ray`, the
placement in `actors`; what is here is the order of things and what is shown while they happen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jobs._cli import run_stage
from jobs._cluster import open_ray
from jobs._faults import count_faults
from jobs._progress import Progress
from jobs._replicas import log_replicas
from jobs._terminal import say
from roro_ray.config import Config
from roro_ray.data.run_dir import RunDir

if TYPE_CHECKING:
    from actors.reward_service import RewardClient
    from actors.rollout import Results, RolloutPool
    from roro_ray.routing.episode import EpisodeSpec

# The ways to train a router that are compared, and what is theirs in the settings.
ROUTER_SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "roro": {},
    "roro_step": {"router": {"credit": "step"}},
    "grpo_outcome": {"router": {"beta": 0.0, "credit": "trajectory"}},
    "random_rubrics": {"reward": {"rubric_source": "random"}},
    "fixed_rubric": {"reward": {"rubric_source": "fixed"}},
}


def method_config(config: Config, method: str) -> Config:
    """The settings of one way to train the router, from those of the run."""
    changes = ROUTER_SETTINGS[method]
    router = replace(config.router, **changes.get("router", {}))
    return replace(config, router=router, reward=replace(config.reward, **changes.get("reward", {})))


def import_before_threads() -> None:
    """Import what stages that run side by side would import at once: transformers' lazy modules break under that."""
    import roro_ray.reward.alternate  # noqa: F401


@contextmanager
def open_pool(config: Config) -> Iterator[RolloutPool]:
    """A Ray (started here unless one is joined) and the rollout workers on it."""
    from actors.rollout import RolloutPool

    with open_ray(config.ray):
        say("Starting the rollout workers ...")
        pool = RolloutPool.start(config)
        try:
            yield pool
        finally:
            pool.stop()


def collect_stage(config: Config, run: RunDir, pool: RolloutPool) -> None:
    """Stage 1: roll out every strategy on the training queries."""
    from actors.census import Census
    from roro_ray.data.collection import collect, plan_shards

    if is_done(run, "collect"):
        return
    total = sum(len(shard.specs) for shard in plan_shards(config))
    with (
        run_stage(run, "collect", "Collect trajectories") as facts,
        count_faults(run, "collect", facts) as faults,
        log_replicas(run, "collect", pool),
        Progress("collect", total, "episodes") as bar,
    ):
        over, census = 0, Census(pool)
        run.fetch(run.trajectories)

        def run_specs(specs: Sequence[EpisodeSpec]) -> Results:
            return pool.run(specs, progress=lambda done, _: bar.move_to(over + done))

        def move(done: int) -> None:
            nonlocal over
            over = done
            bar.start_at(done)
            run.sync(run.trajectories)

        result = collect(config, run.trajectories, run_specs, move)
        facts.update(trajectories=result.trajectories, made=result.made, failed=result.failed)
        faults.add_tally(result.tally)
        faults.add({"groups": result.groups, "small_groups": result.small_groups, **census.total()})
        if result.first_unscored:
            say(f"  {result.unscored} answers could not be checked; the first: {result.first_unscored}")
            event = {"event": "unscored", "stage": "collect", "message": result.first_unscored}
            run.log({**event, "count": result.unscored})
        if result.first_error:
            say(f"  {result.failed} rollouts failed and are left out; the first: {result.first_error}")
            run.log({"event": "failure", "stage": "collect", "message": result.first_error, "count": result.failed})


def pairs_stage(config: Config, run: RunDir, pool: RolloutPool) -> None:
    """Stage 2: preference pairs by outcome, cost and process quality."""
    from actors.census import Census
    from roro_ray.data.collection import training_queries
    from roro_ray.reward.pairing import pair_shards
    from roro_ray.routing.failures import SteadyRun, make_policy

    if is_done(run, "make_pairs"):
        return
    run.require("collect")
    with (
        run_stage(run, "make_pairs", "Make preference pairs") as facts,
        count_faults(run, "make_pairs", facts) as faults,
        log_replicas(run, "make_pairs", pool),
        Progress("pairs", 1, "shards") as bar,
    ):
        census = Census(pool)
        run.fetch(run.trajectories, run.pairs)

        def run_specs(specs: Sequence[EpisodeSpec]) -> Results:
            return pool.run(specs, progress=lambda done, total: bar.note(f"{done}/{total} interventions"))

        def move(done: int, total: int) -> None:
            bar.total = total
            bar.start_at(done)
            run.sync(run.pairs)

        steady = SteadyRun(run_specs, make_policy(config.faults, grouped=False), "make_pairs")
        found = pair_shards(config, run.trajectories, run.pairs, training_queries(config), steady, move)
        facts.update(pairs=found.pairs, **found.kinds, unmeasured=found.unmeasured)
        faults.add_tally(steady.tally)
        faults.add(census.total())


def reward_stage(config: Config, run: RunDir) -> None:
    """Stage 3: Rubricor and Judge by alternating optimisation; needs Ray with reward.backend=engine only."""
    from jobs.reward_stages import learn_engine_reward, learn_local_reward

    if is_done(run, "learn_reward"):
        return
    run.require("make_pairs")
    settings = config.reward
    updates = settings.rounds * (settings.judge_updates + settings.rubricor_updates)
    with (
        run_stage(run, "learn_reward", "Learn the reward") as facts,
        count_faults(run, "learn_reward", facts) as faults,
        Progress("reward", updates, "updates") as bar,
    ):
        run.fetch(run.trajectories, run.pairs, run.reward)
        over: object = None

        def on_update(metrics: dict[str, float | str]) -> None:
            nonlocal over
            run.log({"stage": "learn_reward", **metrics})
            bar.advance()
            if metrics.get("round") != over:  # the round before was saved
                over = metrics.get("round")
                run.sync(run.reward)

        learn = learn_engine_reward if settings.backend == "engine" else learn_local_reward
        summary = learn(config, run, on_update, faults)
        facts.update(_round_all(summary["pair_accuracy"], ("warm", "trained", "shuffled_rubrics", "fixed_rubric")))


def router_stage(config: Config, run: RunDir, pool: RolloutPool, method: str, name: str | None = None) -> None:
    """Stage 4: train a router by GRPO in one of the ways of `ROUTER_SETTINGS`, under `router/NAME`."""
    from actors.census import Census
    from actors.learner import train_router
    from roro_ray.learning.router_rewards import count_failures
    from roro_ray.learning.router_run import FINISHED, METRICS, load_finished

    name = name or method
    settings = method_config(config, method)
    run.fetch(*(run.router(name) / file for file in (FINISHED, METRICS)))
    if load_finished(run.router(name), settings) is not None:
        say(f"train_router ({name}): already done in {run.place_of(run.router(name))}")
        return
    if settings.router.beta and settings.reward.rubric_source != "warm":
        run.require("learn_reward")
    iterations, title = config.router.iterations, f"Train the router ({name})"
    stage = f"train_router-{name}"
    with (
        run_stage(run, stage, title) as facts,
        count_faults(run, stage, facts) as faults,
        log_replicas(run, stage, pool),
        Progress(name, iterations, "iterations") as bar,
        _open_reward(settings, run) as reward,
    ):
        census = Census(pool, reward)

        def progress(done: int, _: int, metrics: dict[str, float]) -> None:
            run.log({"stage": f"train_router/{name}", **metrics, **census.take()})
            faults.add(count_failures(metrics))
            bar.start_at(done - 1)
            bar.move_to(done)

        result = train_router(settings, name, pool, reward, run.mirror, progress)
        facts.update(iterations=len(result.metrics))
        faults.add({**census.total(), "learner_restarts": result.restarts})


@contextmanager
def _open_reward(config: Config, run: RunDir) -> Iterator[RewardClient | None]:
    from actors.reward_service import RewardClient

    if not config.router.beta:
        with nullcontext():
            yield None
        return
    from jobs.reward_stages import find_reward

    found = find_reward(config, run)
    client = RewardClient.start(config, None if found is None else run.place_of(found))
    try:
        yield client
    finally:
        client.stop()


def is_done(run: RunDir, stage: str) -> bool:
    """Whether nothing is left to do of a stage; says so if that is so."""
    if run.is_done(stage):
        say(f"{stage}: already done in {run.place}")
        return True
    return False


def _round_all(values: Any, names: Sequence[str]) -> dict[str, float]:
    return {name: round(values[name], 3) for name in names if values.get(name) is not None}
