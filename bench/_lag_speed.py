"""Wall time of router training at several lags: one pool of workers and one Judge, the lags taking turns."""

from __future__ import annotations

import asyncio
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from roro_ray.config import Config, RewardConfig
from roro_ray.engines.protocol import ChoiceScores, Engine, EngineFacts, StepRequest, StepResult
from roro_ray.learning.router_run import make_train_queries
from roro_ray.learning.router_training import RouterTrainer
from roro_ray.routing.episode import EpisodeSpec
from roro_ray.routing.router import make_router
from roro_ray.types import Query, Verdict

# Seconds a token of a 7.6B and a 32.8B model in bf16 that decode one text on one H100: 2 bytes a parameter at 60% of
# 3.35 TB/s (the figures that `jobs.costs` reckons with).
PACE_S = (0.0076, 0.0326)


class PacedEngine:
    """A tiny model's steps after the time that a large model would take for as many tokens; sleeping costs no CPU."""

    def __init__(self, engine: Engine, seconds_per_token: float) -> None:
        self.name = engine.name
        self._engine = engine
        self._pace_s = seconds_per_token

    async def ready(self) -> EngineFacts:
        """Load the model."""
        return await self._engine.ready()

    async def generate_step(self, request: StepRequest) -> StepResult:
        """The model's step, later."""
        result = await self._engine.generate_step(request)
        await asyncio.sleep(self._pace_s * (len(result.token_ids) - len(request.kept_ids)))
        return result

    async def score_choices(self, prefix: str, choices: tuple[str, ...], adapter: str = "") -> ChoiceScores:
        """The model's scores, at once: no policy of this bench asks for them."""
        return await self._engine.score_choices(prefix, choices, adapter)


def make_paced_runner(pace_s: Sequence[float], config: Config, engines: Sequence[Engine]) -> Any:
    """As `actors.rollout.make_runner`, with paced engines."""
    from actors.rollout import make_runner
    from roro_ray.engines.pool import make_pool

    own = engines or make_pool(config.pool).engines
    return make_runner(config, [PacedEngine(engine, pace) for engine, pace in zip(own, pace_s, strict=True)])


@dataclass(frozen=True, slots=True)
class Site:
    """Where an arm runs: what `RolloutPool` and `RewardClient` offer, and nothing more."""

    run: Callable[..., Any]
    publish: Callable[..., Any]
    score: Callable[..., Any]


class _FreshReward:
    """A reward model that reads every trajectory anew: the lags train on much the same ones, one after the other."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def score(self, *given: Any) -> Any:
        self._model.judge._memo.clear()
        return self._model.score(*given)


def load_fresh(directory: str | None, config: RewardConfig) -> Any:
    """As `actors.reward_service.load_model`, for measuring."""
    from actors.reward_service import load_model

    return _FreshReward(load_model(directory, config))


@contextmanager
def open_site(config: Config, pace_s: Sequence[float], queries: Sequence[Query]) -> Iterator[Site]:
    """Rollout workers and the reward service on a Ray of their own, rubrics written."""
    from actors.cluster import open_cluster
    from actors.reward_service import RewardClient
    from actors.rollout import RolloutPool, make_runner

    with open_cluster(config.ray):
        pool = RolloutPool.start(config, partial(make_paced_runner, tuple(pace_s)) if pace_s else make_runner)
        try:
            reward = RewardClient.start(config, load=load_fresh)
            reward.write_rubrics(queries)
            yield Site(pool.run, pool.publish, reward.score)
            reward.stop()
        finally:
            pool.stop()


def make_local_site(config: Config, pace_s: Sequence[float], score_s: float, learn_s: float) -> Site:
    """Every role on a machine of its own, played in this process: rollouts, Judge and learner take time and little CPU.

    Args:
        score_s: seconds that a batch's verdicts (all alike) take.
        learn_s: seconds that an update takes beside what it computes here.
    """
    from roro_ray.engines.pool import EnginePool, make_pool
    from roro_ray.routing.router_policy import RouterPolicy
    from roro_ray.routing.runner import Runner

    engines = [PacedEngine(engine, pace) for engine, pace in zip(make_pool(config.pool).engines, pace_s, strict=True)]
    pool = EnginePool(engines)
    asyncio.run(pool.ready())
    runner = Runner(pool, RouterPolicy(make_router(config.router, pool.size), -1), config.episode)
    states: dict[tuple[str, int], dict[str, torch.Tensor]] = {}

    def run(specs: Sequence[EpisodeSpec], version: int, name: str) -> Any:
        own = runner.copy()
        own.load_router(states[name, version], version)
        return asyncio.run(own.run(specs))

    def publish(state: dict[str, torch.Tensor], version: int, name: str, keep: int) -> None:
        time.sleep(learn_s if version else 0.0)
        states[name, version] = {key: tensor.detach().clone() for key, tensor in state.items()}

    def score(queries: Sequence[Query], groups: Sequence[Sequence[Any]]) -> list[tuple[Verdict, ...]]:
        time.sleep(score_s)
        return [tuple(Verdict(0.0) for _ in group) for group in groups]

    return Site(run, publish, score)


def simulate_lags(
    config: Config, lags: Sequence[int], rounds: int, pace_s: Sequence[float], score_s: float, learn_s: float
) -> dict[int, dict[str, Any]]:
    """As `compare_lags`, with every role on a machine of its own (`make_local_site`)."""
    queries = make_train_queries(config)
    site = make_local_site(config, pace_s, score_s, learn_s)
    time_arm(site, config, queries, max(lags), "warm")
    return _take_turns(site, config, queries, lags, rounds)


def time_arm(site: Site, config: Config, queries: Sequence[Query], max_lag: int, name: str) -> dict[str, float]:
    """Wall seconds an iteration of one training, filling the pipeline and emptying it included, and where they went.

    Args:
        name: of this training's weights, used for no other.
    """
    config = copy.deepcopy(config)
    config.router.max_lag = max_lag
    torch.manual_seed(config.seed)
    network = make_router(config.router, len(config.pool.models))
    trainer = RouterTrainer(
        config,
        network,
        queries,
        lambda specs, version: site.run(specs, version, name),
        site.score,
        lambda state, version: site.publish(state, version, name, max_lag + 2),
    )
    iterations = config.router.iterations
    started = time.perf_counter()
    trainer.begin()
    rows = [trainer.step() for _ in range(iterations)]
    wall_s = time.perf_counter() - started
    trainer.close()
    assert all(row["failed"] == row["stale"] == row["unscored"] == 0 for row in rows), "rollouts or scores failed"
    assert max(row["lag"] for row in rows) <= max_lag, "the lag is not bounded"
    means = {key: statistics.fmean(row[f"seconds_{key}"] for row in rows) for key in ("rollout", "score", "learn")}
    means["learn"] += statistics.fmean(row["seconds_publish"] for row in rows)
    waited = sum(row["seconds_waited"] for row in rows) / iterations
    work = means["rollout"] + means["score"]
    return {"seconds": wall_s / iterations, **means, "waited": waited, "overlap": max(1 - waited / work, 0.0)}


def compare_lags(
    config: Config, lags: Sequence[int], rounds: int, pace_s: Sequence[float] = ()
) -> dict[int, dict[str, Any]]:
    """Every lag's median figures, and its speed against lag 0 in the same round (median, least, most).

    With paced engines the shipped models' steps are remembered, and a first training that is not counted fills the
    memory; without, every step is computed every time.
    """
    config = copy.deepcopy(config)
    config.router.max_lag = max(lags)  # the workers hold as many versions as the largest needs
    for model in config.pool.models:
        assert model.engine == "hf", "the embedded world's models"
    config.pool.memo_entries = config.pool.memo_entries if pace_s else 0
    queries = make_train_queries(config)
    with open_site(config, pace_s, queries) as site:
        time_arm(site, config, queries, max(lags), "warm")
        return _take_turns(site, config, queries, lags, rounds)


def _take_turns(
    site: Site, config: Config, queries: Sequence[Query], lags: Sequence[int], rounds: int
) -> dict[int, dict[str, Any]]:
    rows: dict[int, list[dict[str, float]]] = {lag: [] for lag in lags}
    for round_number in range(rounds):
        for lag in lags if round_number % 2 == 0 else reversed(lags):
            rows[lag].append(time_arm(site, config, queries, lag, f"lag {lag} round {round_number}"))
    return {lag: _summarise(lag, config.router.iterations, found, rows[lags[0]]) for lag, found in rows.items()}


def model_seconds(lag: int, iterations: int, rollout_s: float, score_s: float, learn_s: float) -> float:
    """Seconds an iteration where the stages take so long whatever runs beside them, filling and emptying included.

    A batch starts when the version it acts with is there; Judge and learner do one batch after the other.
    """
    ready_s = [0.0]  # of every version
    judged_s = 0.0
    for iteration in range(iterations):
        rolled_s = ready_s[max(iteration - lag, 0)] + rollout_s
        judged_s = max(rolled_s, judged_s) + score_s
        ready_s.append(max(judged_s, ready_s[-1]) + learn_s)
    return ready_s[-1] / iterations


def _summarise(
    lag: int, iterations: int, found: Sequence[dict[str, float]], first: Sequence[dict[str, float]]
) -> dict[str, Any]:
    ratios = [base["seconds"] / row["seconds"] for base, row in zip(first, found, strict=True)]
    summary: dict[str, Any] = {key: round(statistics.median(row[key] for row in found), 2) for key in found[0]}
    stages = [statistics.median(row[key] for row in first) for key in ("rollout", "score", "learn")]
    summary["model"] = round(model_seconds(lag, iterations, *stages), 2)
    summary["speed"] = round(statistics.median(ratios), 2)
    summary["speed_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
    return summary
