"""What one iteration of router training rolls out: a pure function of (queries, settings, seed, iteration).

No generator's state is carried from one iteration to the next, so that a run that was stopped goes on exactly as
if it had not been, and so that several learner ranks agree on the plan without talking.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from roro_ray.config import RouterConfig
from roro_ray.errors import ConfigError
from roro_ray.routing.draws import mix_seed
from roro_ray.routing.episode import EpisodeSpec
from roro_ray.types import Query


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One group to roll out: G episodes of one query at one cost weight."""

    id: int
    query: Query
    cost_weight: float
    specs: tuple[EpisodeSpec, ...]


def make_plan(queries: Sequence[Query], config: RouterConfig, seed: int, iteration: int) -> list[GroupPlan]:
    """The groups of one iteration: `config.queries` different queries, each with a log-uniform cost weight.

    Raises:
        ConfigError: fewer queries than an iteration draws.
    """
    if len(queries) < config.queries:
        raise ConfigError(
            f"router.queries is {config.queries}, but there are only {len(queries)} queries to train on: "
            "raise data.router_queries or lower router.queries."
        )
    draw = random.Random(mix_seed(seed, "router plan", iteration))
    chosen = draw.sample(range(len(queries)), config.queries)
    return [_make_group(queries[index], config, seed, iteration, group, draw) for group, index in enumerate(chosen)]


def _make_group(
    query: Query, config: RouterConfig, seed: int, iteration: int, group: int, draw: random.Random
) -> GroupPlan:
    low, high = math.log(config.cost_weight_low), math.log(config.cost_weight_high)
    cost_weight = math.exp(draw.uniform(low, high))
    specs = tuple(
        EpisodeSpec(
            id=f"router-{seed}-{iteration}-{group}-{rollout}",
            query=query,
            strategy="router",
            seed=mix_seed(seed, "router rollout", iteration, group, rollout),
            cost_weight=cost_weight,
        )
        for rollout in range(config.group_size)
    )
    return GroupPlan(group, query, cost_weight, specs)
