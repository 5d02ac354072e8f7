"""The stages as the jobs chain them: read what the stage before left, work, write, record.

A stage that is finished is not done again, and one that was interrupted goes on. The algorithms are in `roro_ray`, the
placement in `actors`; what is here is the order of things and what is shown while they happen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs._cli import run_stage
from jobs._cluster import open_ray
from jobs._faults import count_faults
from jobs._progress import Progress
from jobs._replicas import log_replicas
from jobs._terminal import say
from roro_ray.config import Config
from roro_ray.data.run_dir import RunDir, read_json

if TYPE_CHECKING:
    from actors.reward_service import RewardClient
    from actors.rollout import Results, RolloutPool
    from roro_ray.evaluation.sweeps import QuerySets
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

    if _is_done(run, "collect"):
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

    if _is_done(run, "make_pairs"):
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

    if _is_done(run, "learn_reward"):
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


def evaluate_stage(
    config: Config, run: RunDir, pool: RolloutPool, extra: dict[str, Path] | None = None
) -> dict[str, Any]:
    """Stage 5: every method on the test queries; writes summary, figures and report, and returns the summary.

    Args:
        extra: routers that lie elsewhere than `router/METHOD`, by method.
    """
    import dataclasses

    from actors.census import Census
    from actors.host import ClusterHost
    from roro_ray.data.run_dir import make_versions
    from roro_ray.evaluation.evaluate import evaluate
    from roro_ray.evaluation.report import save_report
    from roro_ray.evaluation.summary import load_summary, make_summary, save_summary

    if _is_done(run, "evaluate"):
        run.fetch(run.evaluation)
        return load_summary(run.evaluation)[0]
    run.require("collect")
    with (
        run_stage(run, "evaluate", "Evaluate") as facts,
        count_faults(run, "evaluate", facts) as faults,
        log_replicas(run, "evaluate", pool),
        Progress("evaluate", 1, "stages") as bar,
    ):
        episodes, census = 0, Census(pool)

        def count(done: int) -> None:
            nonlocal episodes
            episodes += done
            bar.note(f"{episodes} episodes")

        def progress(label: str, done: int, total: int) -> None:
            bar.total = total
            bar.start_at(done, label)

        host = ClusterHost(pool, config.seed, count)
        evaluation = evaluate(_make_inputs(config, run, extra or {}), host, progress)
        judge = read_json(run.reward / "result.json") if run.is_done("learn_reward") else None
        summary = make_summary(
            evaluation, dataclasses.asdict(config), make_versions(), judge, config.evaluate.bootstrap, config.seed
        )
        save_summary(summary, evaluation.examples, run.evaluation)
        save_report(run.evaluation, run.report, run.path / "frontier.png")
        facts.update(episodes=episodes)
        faults.add_tally(evaluation.tally)
        faults.add({"searches": evaluation.searches, "oracle_errors": evaluation.oracle_errors, **census.total()})
    return summary


def make_query_sets(config: Config) -> QuerySets:
    """The validation and the test queries, all suites."""
    from roro_ray.data.sources import make_stage_queries
    from roro_ray.evaluation.sweeps import QuerySets

    validation = make_stage_queries(config, "validation", config.data.validation_queries)
    return QuerySets(tuple(validation), tuple(make_stage_queries(config, "test", config.data.test_queries)))


def _make_inputs(config: Config, run: RunDir, extra: dict[str, Path]) -> Any:
    from roro_ray.data.collection import training_queries
    from roro_ray.data.store import iter_trajectories
    from roro_ray.evaluation.evaluate import Inputs, collect_alone
    from roro_ray.evaluation.learning_curve import Snapshot
    from roro_ray.learning.ppo_run import METHOD as PPO
    from roro_ray.learning.router_run import FINISHED, list_snapshots

    places = {method: run.router(method) for method in (*ROUTER_SETTINGS, PPO)} | extra
    run.fetch(run.trajectories, run.reward / "result.json")
    fetch_routers(run, places.values())
    routers = {method: place for method, place in places.items() if (place / FINISHED).is_file()}
    batch = config.router.queries * config.router.group_size
    snapshots: dict[str, Sequence[Snapshot]] = {
        method: [Snapshot(done * batch, folder) for done, folder in list_snapshots(place).items()]
        for method, place in routers.items()
    }
    alone = collect_alone(training_queries(config), iter_trajectories(run.trajectories, batch_size=64))
    return Inputs(config, make_query_sets(config), routers, snapshots, alone, _make_explain(config, run))


def fetch_routers(run: RunDir, routers: Iterable[Path]) -> None:
    """Bring trained routers of a remote run here, with their snapshots and without their checkpoints."""
    from roro_ray.learning.router_run import FINISHED, METRICS, SNAPSHOTS
    from roro_ray.routing.router_files import ROUTER_FILES

    run.fetch(*(router / name for router in routers for name in (*ROUTER_FILES, FINISHED, METRICS, SNAPSHOTS)))


def _make_explain(config: Config, run: RunDir) -> Any:
    """Writes and judges the rubrics that the report shows beside its examples; None without a learned reward."""
    if not run.is_done("learn_reward"):
        return None

    def explain(queries: Sequence[Any], trajectories: Sequence[Any]) -> list[Any]:
        if config.reward.backend == "engine":
            return _explain_by_service(config, run, queries, trajectories)
        from roro_ray.reward.model import load_reward

        run.fetch(run.reward / "model")
        reward = load_reward(run.reward / "model", config.reward)
        rubrics = reward.write_rubrics(queries, config.seed)
        verdicts = reward.score(queries, [[trajectory] for trajectory in trajectories], rubrics)
        return [(rubric, verdict[0]) for rubric, verdict in zip(rubrics, verdicts, strict=True)]

    return explain


def _explain_by_service(config: Config, run: RunDir, queries: Sequence[Any], trajectories: Sequence[Any]) -> list[Any]:
    """The same where Rubricor and Judge are adapters, whose engine wants a process and a device of its own."""
    from actors.reward_service import RewardClient

    client = RewardClient.start(config, run.place_of(run.reward / "model"))
    try:
        rubrics = client.write_rubrics(queries)
        verdicts = client.score(queries, [[trajectory] for trajectory in trajectories])
    finally:
        client.stop()
    return [(rubric, verdict[0]) for rubric, verdict in zip(rubrics, verdicts, strict=True)]


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


def _is_done(run: RunDir, stage: str) -> bool:
    if run.is_done(stage):
        say(f"{stage}: already done in {run.place}")
        return True
    return False


def _round_all(values: Any, names: Sequence[str]) -> dict[str, float]:
    return {name: round(values[name], 3) for name in names if values.get(name) is not None}
