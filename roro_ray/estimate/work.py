"""Tokens: how many each model reads and writes in an episode, and in each stage of a run.

One episode of T tokens and a prompt of P, in which model m writes the share p_m of the steps, costs m

    written   p_m T        (plus the drafts that a threshold rule throws away: the cheapest model's)
    read      P + (1 - p_m) T, what it did not write itself, once: engines keep their caches (`routing.cost`)
    sent      p_m T / s x (P + T / 2): the prefixes of its steps of s tokens; an API bills them at every step

and whoever writes the final answer behind a thinking block has read everything. The router reads P + T once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from roro_ray.config import Config, EstimateConfig

ROUTER, RUBRICOR, JUDGE, WRITER = "router encoder", "Rubricor", "Judge", "rubric writer"
_MADE_BY_DRAFT = ("threshold", "confidence", "draft_verify")
_CRITERIA = 5


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens of one model: read for the first time, sent (with repetitions), written, and learned from."""

    read: float = 0.0
    sent: float = 0.0
    written: float = 0.0
    trained: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.read + other.read, self.sent + other.sent, self.written + other.written, self.trained + other.trained
        )

    def times(self, count: float) -> Work:
        """The same work, several times."""
        return Work(self.read * count, self.sent * count, self.written * count, self.trained * count)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: its name, its episodes, and the work of each model by name."""

    name: str
    episodes: float
    work: Mapping[str, Work] = field(default_factory=dict)


Load = dict[str, Work]


def plan_stages(config: Config) -> list[Stage]:
    """The stages that generate or train, in order.

    `evaluate` counts the methods of `evaluation.evaluate` for one trained router, without the hindsight oracle, whose
    search depends on what the models write.
    """
    stages = [_plan_collect(config), _plan_pairs(config)]
    if config.reward.rubric_source != "warm":
        stages += [_plan_warm_start(config)] if config.reward.backend == "engine" else []
        stages.append(_plan_reward(config))
    return [*stages, _plan_router(config), *_plan_tests(config)]


def strategy_shares(strategy: str, models: int, large_share: float) -> tuple[float, ...]:
    """The share of steps that each model writes under a strategy, cheap to dear."""
    name, _, value = strategy.partition(":")
    if name in ("fixed", "script"):
        script = [int(part) for part in value.split(",")]
        return tuple(1.0 if model == script[-1] else 0.0 for model in range(models))
    if name in ("blocks", "periodic"):
        dear = 0.5 if name == "blocks" else 1 / int(value)
        return (1 - dear, *(0.0,) * (models - 2), dear)
    dear = float(value) if name == "random" else large_share
    spread = name.startswith(("random", "router"))
    return (1 - dear, *((dear / (models - 1),) * (models - 1) if spread else (*(0.0,) * (models - 2), dear)))


def episode_load(config: Config, strategy: str, tokens: float | None = None) -> Load:
    """The work of one episode of `tokens` (estimate.tokens), by model."""
    assumed, names = config.estimate, [model.name for model in config.pool.models]
    length = _mean_tokens(config) if tokens is None else tokens
    shares = strategy_shares(strategy, len(names), assumed.large_share)
    drafted = (1 - shares[0]) * length if strategy.partition(":")[0] in _MADE_BY_DRAFT else 0.0
    load: Load = {}
    for index, (name, share) in enumerate(zip(names, shares, strict=True)):
        written = share * length + (drafted if index == 0 else 0.0)
        if written:
            sent = written / _step_tokens(config) * (assumed.prompt_tokens + length / 2)
            load[name] = Work(assumed.prompt_tokens + (1 - share) * length, sent, written)
    if any(model.format == "chat" and model.thinking != "off" for model in config.pool.models):
        _add_answer(config, load, shares, length)
    if strategy.startswith("router") and config.router.encoder:
        load[ROUTER] = Work(read=assumed.prompt_tokens + length)
    return load


def _add_answer(config: Config, load: Load, shares: Sequence[float], length: float) -> None:
    """The final answer behind the thinking block, by the model that `episode.answer_by` names."""
    names, assumed = [model.name for model in config.pool.models], config.estimate
    last = max(range(len(names)), key=lambda index: shares[index])
    writer = names[{"large": -1, "small": 0}.get(config.episode.answer_by, last)]
    whole = assumed.prompt_tokens + length
    load[writer] = load.get(writer, Work(read=whole)) + Work(sent=whole, written=float(assumed.answer_tokens))


def _mean_tokens(config: Config) -> float:
    return float(min(config.estimate.tokens, config.episode.max_tokens))


def _step_tokens(config: Config) -> float:
    return float(min(max(config.estimate.step_tokens, config.episode.min_step_tokens), config.episode.max_step_tokens))


def count_steps(config: Config) -> float:
    """Steps of a mean trajectory."""
    return min(_mean_tokens(config) / _step_tokens(config), float(config.episode.max_steps))


def _sum(parts: Sequence[tuple[Load, float]]) -> Load:
    total: Load = {}
    for load, count in parts:
        for name, work in load.items():
            total[name] = total.get(name, Work()) + work.times(count)
    return total


def _plan_collect(config: Config) -> Stage:
    each = len(config.data.train_suites or config.data.suites) * config.data.train_queries * config.collect.rollouts
    parts = [(episode_load(config, strategy), each) for strategy in config.collect.strategies]
    return Stage("collect", sum(count for _, count in parts), _sum(parts))


def _plan_pairs(config: Config) -> Stage:
    """Per step of a measured trajectory: that step by the cheapest and by the dearest model, the rest by the dearest.

    What is left to write is half a trajectory on average. Prefixes are those of one trajectory, so each model reads
    them once.
    """
    if config.pairs.process_source == "confidence":
        return Stage("make_pairs", 0)
    repeats = config.pairs.continuations if config.episode.temperature > 0 else 1
    measured, steps = _plan_collect(config).episodes * config.estimate.process_share, count_steps(config)
    length, prompt = _mean_tokens(config), config.estimate.prompt_tokens
    sent = steps * repeats * (prompt + length / 2)
    small = Work(prompt + length, sent, length * repeats)
    rest = steps * repeats * 2 * (length / 2)
    large = Work(prompt + length + small.written, rest / _step_tokens(config) * (prompt + 0.75 * length), rest)
    names = [model.name for model in config.pool.models]
    work = {names[0]: small.times(measured), names[-1]: large.times(measured)}
    return Stage("make_pairs", measured * steps * repeats * 2, work)


def _reward_load(assumed: EstimateConfig, trajectories: float, rubrics: float, length: float) -> Load:
    """Rubrics written from the query alone, and trajectories read under a rubric, one verdict per criterion."""
    prompt = assumed.prompt_tokens
    read = prompt + length + assumed.rubric_tokens
    return {
        RUBRICOR: Work(rubrics * prompt, rubrics * prompt, rubrics * assumed.rubric_tokens),
        JUDGE: Work(trajectories * read, trajectories * read * _CRITERIA, trajectories * float(_CRITERIA)),
    }


def _plan_warm_start(config: Config) -> Stage:
    """A strong model writes a rubric from both trajectories of a pair, then judges each by it; the adapters learn."""
    warm, assumed, length = config.warm, config.estimate, _mean_tokens(config)
    queries = len(config.data.train_suites or config.data.suites) * config.data.train_queries
    pairs = float(min(warm.max_pairs, queries * warm.pairs_per_query))
    both = pairs * (assumed.prompt_tokens + 2 * length)
    judged = _reward_load(assumed, 2.0 * pairs, 0.0, length)[JUDGE]
    writer = judged + Work(both, both, pairs * assumed.rubric_tokens)
    examples = min(config.lora.sft_updates, math.ceil(warm.epochs * pairs / warm.batch)) * warm.batch
    rubric = Work(trained=examples * float(assumed.prompt_tokens + assumed.rubric_tokens))
    verdict = Work(trained=examples * (assumed.prompt_tokens + length + assumed.rubric_tokens))
    return Stage("warm_start", pairs, {warm.writer or WRITER: writer, RUBRICOR: rubric, JUDGE: verdict})


def _plan_reward(config: Config) -> Stage:
    reward, assumed, length = config.reward, config.estimate, _mean_tokens(config)
    queries = reward.queries_per_update
    rubrics = queries * reward.rubrics_per_query
    rubricor = _reward_load(assumed, 2.0 * rubrics, rubrics, length)
    rubricor[RUBRICOR] += Work(trained=rubrics * (assumed.prompt_tokens + assumed.rubric_tokens))
    judge = _reward_load(assumed, 2.0 * queries, queries, length)
    judge[JUDGE] += Work(trained=2.0 * queries * (assumed.prompt_tokens + length + assumed.rubric_tokens))
    parts = [(rubricor, reward.rounds * reward.rubricor_updates), (judge, reward.rounds * reward.judge_updates)]
    return Stage("learn_reward", sum(count for _, count in parts), _sum(parts))


def _plan_router(config: Config) -> Stage:
    router, assumed = config.router, config.estimate
    episodes = router.iterations * router.queries * router.group_size
    length = _mean_tokens(config)
    load = episode_load(config, "router")
    if router.encoder:
        load[ROUTER] += Work(trained=router.epochs * (assumed.prompt_tokens + length))
    parts = [(load, float(episodes))]
    if router.beta:
        drawn = router.iterations * router.queries
        parts.append((_reward_load(assumed, episodes, drawn, length), 1.0))
    return Stage("train_router", episodes, _sum(parts))


def _plan_tests(config: Config) -> list[Stage]:
    suites, data, settings = len(config.data.suites), config.data, config.evaluate
    validation, test = suites * data.validation_queries, suites * data.test_queries
    both = validation + test
    dearest = len(config.pool.models) - 1
    parts: list[tuple[Load, float]] = [(episode_load(config, f"fixed:{model}"), both) for model in (0, dearest)]
    parts += [(episode_load(config, f"random:{share}"), both) for share in settings.random_shares]
    for rule in ("confidence:0", "draft_verify:0", "glimpse:0"):
        parts.append((episode_load(config, rule), settings.thresholds * both + validation))
    parts.append((episode_load(config, "router_greedy"), len(settings.cost_weights) * both))
    snapshots = -(-config.router.iterations // settings.every)
    parts.append((episode_load(config, "router_greedy"), snapshots * len(settings.curve_cost_weights) * validation))
    evaluate = Stage("evaluate", sum(count for _, count in parts), _sum(parts))
    queries = suites * config.calibrate.queries
    measured: list[tuple[Load, float]] = [(episode_load(config, f"fixed:{model}"), queries) for model in (0, dearest)]
    measured.append((episode_load(config, "router_priced"), queries * len(config.calibrate.cost_weights)))
    return [evaluate, Stage("calibrate", sum(count for _, count in measured), _sum(measured))]
