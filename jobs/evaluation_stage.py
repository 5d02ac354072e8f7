"""Stage 5 as the jobs run it: what it reads of the other stages, and the examples that its report explains."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs._cli import run_stage
from jobs._faults import count_faults
from jobs._progress import Progress
from jobs._replicas import log_replicas
from jobs.stages import ROUTER_SETTINGS, is_done
from roro_ray.config import Config
from roro_ray.data.run_dir import RunDir, read_json

if TYPE_CHECKING:
    from actors.rollout import RolloutPool
    from roro_ray.evaluation.sweeps import QuerySets


def evaluate_stage(
    config: Config, run: RunDir, pool: RolloutPool, extra: dict[str, Path] | None = None
) -> dict[str, Any]:
    """Stage 5: every method on the test queries; writes summary, figures and report, and returns the summary.

    Args:
        extra: routers that lie elsewhere than `router/METHOD`, by method.
    """
    from actors.census import Census
    from actors.host import ClusterHost
    from roro_ray.data.run_dir import make_versions
    from roro_ray.evaluation.evaluate import evaluate
    from roro_ray.evaluation.report import save_report
    from roro_ray.evaluation.summary import load_summary, make_summary, save_summary

    if is_done(run, "evaluate"):
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
