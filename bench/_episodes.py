"""Episodes of a fixed number of steps of a fixed number of tokens, whose writers are set beforehand."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench._turns import Counts
from roro_ray.config import EpisodeConfig
from roro_ray.routing.episode import EpisodeSpec
from roro_ray.routing.observation import Observation
from roro_ray.routing.policies import choose_model
from roro_ray.routing.runner import Runner
from roro_ray.types import Decision, Peek, Query, Trajectory
from roro_ray.world.tasks import make_queries


@dataclass(frozen=True, slots=True)
class Shape:
    """`episodes` at a time, each of `steps` steps of `step_tokens` tokens behind a prompt of about `prompt_tokens`."""

    episodes: int
    steps: int
    step_tokens: int
    prompt_tokens: int

    @property
    def tokens(self) -> int:
        """Written in one episode."""
        return self.steps * self.step_tokens

    def make_config(self) -> EpisodeConfig:
        """A step ends at its last token and nowhere else; nothing but the number of steps ends an episode."""
        return EpisodeConfig(
            max_steps=self.steps,
            max_step_tokens=self.step_tokens,
            min_step_tokens=self.step_tokens,
            max_tokens=self.tokens + 1,
            max_repeats=1,
            timeout_s=3600.0,
        )


def make_scripts(shape: Shape, pattern: str, share: float = 0.5) -> list[tuple[int, ...]]:
    """Who writes each step of each episode.

    `alternate`: the models take turns, one half of the episodes beginning with each. `random`: a share of each
    episode's steps, drawn at random, is the large model's. `same`: one model writes all, the models taking turns by
    episode.
    """
    scripts = []
    for index in range(shape.episodes):
        if pattern == "random":
            large = round(share * shape.steps)
            script = [1] * large + [0] * (shape.steps - large)
            random.Random(index).shuffle(script)
        else:
            script = [(index + step * (pattern == "alternate")) % 2 for step in range(shape.steps)]
        scripts.append(tuple(script))
    return scripts


def count_written(shape: Shape, scripts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Tokens that each model writes."""
    steps = sum(len(script) for script in scripts)
    large = sum(sum(script) for script in scripts)
    return (steps - large) * shape.step_tokens, large * shape.step_tokens


def make_texts(shape: Shape, turn: str, tokenizer: Any) -> list[str]:
    """Prompts that begin with a number of their own, so that no cache knows them, and go on the same in every turn."""
    body = " ".join(query.text for query in make_queries("long", "test", 200))
    ids = tokenizer(body, add_special_tokens=False)["input_ids"]
    # Digits are tokens of their own in every family of today: as many in each turn.
    return [
        f"{turn}{index:03d} " + str(tokenizer.decode(ids[index : index + max(shape.prompt_tokens - 10, 1)]))
        for index in range(shape.episodes)
    ]


@dataclass(frozen=True)
class ScriptedRouter:
    """Asks a router for its opinion of every step, and then does what the script of the query says."""

    router: Any
    scripts: Mapping[str, tuple[int, ...]]
    peek: Peek = Peek.NONE
    version: int = -1

    async def decide(self, observation: Observation) -> Decision:
        await self.router.decide(observation)
        return choose_model(self.scripts[observation.query.id][len(observation.steps)], observation.pool_size)


async def run_episodes(
    pool: Any, shape: Shape, texts: Sequence[str], scripts: Sequence[tuple[int, ...]], router: Any = None
) -> Counts:
    """Roll out all episodes at once, along their scripts; with a router that is asked at every step.

    Raises:
        RuntimeError: an episode failed.
    """
    queries = [Query(f"bench/{index}", "bench", "test", text, "0") for index, text in enumerate(texts)]
    consulted = None
    if router is not None:
        consulted = ScriptedRouter(router, {query.id: script for query, script in zip(queries, scripts, strict=True)})
    specs = [
        EpisodeSpec(query.id, query, "router" if consulted else f"script:{','.join(map(str, script))}")
        for query, script in zip(queries, scripts, strict=True)
    ]
    before = count_read(pool)
    results = await Runner(pool, consulted, shape.make_config(), len(specs)).run(specs)  # type: ignore[arg-type]
    written = [0] * pool.size
    for result in results:
        if not isinstance(result, Trajectory):
            raise RuntimeError(f"episode {result.spec_id} failed: {result.error}")
        for step in result.steps:
            written[step.model] += step.tokens
    return Counts(tuple(written), tuple(b - a for a, b in zip(before, count_read(pool), strict=True)))


def count_read(pool: Any) -> tuple[int, ...]:
    """Tokens of prompts that each model has computed so far (0 where an engine does not count them)."""
    return tuple(getattr(getattr(engine, "stats", None), "tokens_prefilled", 0) for engine in pool.engines)
