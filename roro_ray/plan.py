"""What a run would do and ask for, derived from its settings alone, for `--dry-run`."""

from __future__ import annotations

import os

from roro_ray.config import Config
from roro_ray.estimate.describe import describe_estimate
from roro_ray.placement import count_replicas, describe_placement, describe_replicas


def describe_plan(config: Config) -> str:
    """The plan as text: models, resources, and for each stage how many queries, trajectories and updates."""
    return "\n".join(
        [
            f"run_dir      {config.run_dir}",
            f"models       {' < '.join(f'{m.name} ({m.path}, {m.engine}, {m.device})' for m in config.pool.models)}",
            *_resource_lines(config),
            *describe_placement(config),
            *_stage_lines(config),
            *describe_estimate(config),
        ]
    )


def count_collected(config: Config) -> int:
    """Trajectories that stage 1 collects."""
    queries = count_train_suites(config) * config.data.train_queries
    return queries * len(config.collect.strategies) * config.collect.rollouts


def count_train_suites(config: Config) -> int:
    """Suites of the training stages."""
    return len(config.data.train_suites or config.data.suites)


def count_episodes(config: Config) -> int:
    """Rollouts of one router training."""
    return config.router.iterations * config.router.queries * config.router.group_size


def count_ppo_episodes(config: Config) -> int:
    """Rollouts of the PPO baseline: as many as one training by GRPO has, unless the settings say otherwise."""
    return config.ppo.episodes or count_episodes(config)


def count_calibrated(config: Config) -> int:
    """Rollouts of one calibration: every cost weight and both models alone on every query."""
    settings = config.calibrate
    return len(config.data.suites) * settings.queries * (len(settings.cost_weights) + 2)


def _resource_lines(config: Config) -> list[str]:
    ray, router = config.ray, config.router
    rollouts = ray.workers * ray.worker_cpus
    learner = router.workers * ray.learner_cpus
    bounds = [count_replicas(config, model.name) for model in config.pool.models]
    engines = sum(least for least, _ in bounds) * ray.engine_cpus if config.pool.placement == "actors" else 0.0
    total = rollouts + learner + engines + ray.reward_cpus
    devices = sorted({model.device for model in config.pool.models})
    placement = "inside each worker" if config.pool.placement == "colocated" else describe_replicas(config)
    return [
        f"resources    {total:g} logical CPUs: {ray.workers} rollout workers x {ray.worker_cpus:g}, {router.workers} "
        f"learner(s) x {ray.learner_cpus:g}, reward service {ray.reward_cpus:g}",
        f"             engines {placement}, on {', '.join(devices)}; object store {ray.object_store_mb} MB where Ray "
        f"is started here; this machine has {os.cpu_count()} cores",
    ]


def _stage_lines(config: Config) -> list[str]:
    data, router = config.data, config.router
    suites, trained = len(data.suites), count_train_suites(config)
    queries = trained * data.train_queries
    per_query = len(config.collect.strategies) * config.collect.rollouts
    batch = router.queries * router.group_size
    shards = trained * -(-data.train_queries // config.collect.shard_queries)
    folds = config.pairs.folds
    return [
        f"collect      {count_collected(config)} trajectories: {queries} queries ({trained} suites x "
        f"{data.train_queries}) x {per_query} ({len(config.collect.strategies)} strategies x "
        f"{config.collect.rollouts}), in {shards} shards of up to {config.collect.shard_queries} queries",
        f"make_pairs   at most {3 * queries * config.pairs.max_per_query} pairs of 3 kinds, {folds} folds of about "
        f"{queries // folds} queries, 1 held out; process quality from {config.pairs.process_source}",
        *_warm_lines(config),
        _reward_line(config),
        f"train_router {count_episodes(config)} episodes a method: {router.iterations} iterations x {router.queries} "
        f"queries x {router.group_size} rollouts = {batch} trajectories an iteration, "
        f"{batch // router.workers} a learner; lag at most {router.max_lag} version(s)",
        f"train_ppo    optional: {count_ppo_episodes(config)} episodes in batches of {config.ppo.decisions} decisions "
        f"on {config.ray.workers} env runner(s) x {config.ppo.envs} episodes side by side",
        f"evaluate     {suites * data.validation_queries} validation and {suites * data.test_queries} test queries; "
        f"{len(config.evaluate.cost_weights)} cost weights, {config.evaluate.thresholds} thresholds a method, "
        f"{config.evaluate.bootstrap} bootstrap resamples",
        f"calibrate    {count_calibrated(config)} episodes: {suites * config.calibrate.queries} held-out queries x "
        f"({len(config.calibrate.cost_weights)} cost weights + 2 models alone)",
    ]


def _warm_lines(config: Config) -> list[str]:
    """Only where the reward is made of adapters: else the warm start is shipped."""
    warm, lora = config.warm, config.lora
    if config.reward.backend != "engine" or config.reward.rubric_source in ("random", "fixed"):
        return []
    writer = warm.writer or f"{warm.engine.name} ({warm.engine.path}, {warm.engine.engine})"
    return [
        f"warm_start   optional: at most {warm.max_pairs} pairs, {warm.pairs_per_query} a query, written about by "
        f"{writer} in up to {warm.attempts} attempts each; then at most {lora.sft_updates} SFT updates of {warm.batch} "
        "examples an adapter"
    ]


def _reward_line(config: Config) -> str:
    reward = config.reward
    if reward.rubric_source == "warm":
        return "learn_reward left out: the warm start's rubrics and Judge are used (reward.rubric_source=warm)"
    return (
        f"learn_reward {reward.rounds} rounds x ({reward.judge_updates} Judge + {reward.rubricor_updates} Rubricor "
        f"updates) of {reward.queries_per_update} queries; {reward.queries_per_update * reward.rubrics_per_query} "
        "rubrics an update"
    )
