"""The two phases of a round of alternating optimisation where Rubricor and Judge are adapters behind an engine.

The engine samples rubrics and reads verdicts, the learner updates adapters, and every `reward.publish_every` updates
the engine gets the new version: in between the ratio of GRPO corrects for the few updates that it is behind. The
rewards are those of `reward.phases`. What differs: a rubric's credit is that of the whole rubric (its criteria are of
any wording, and cannot be turned round one by one), and the Judge's verdicts are drawn from yes and no alone, as
they are read: with centred advantages, what the two have of the whole distribution gets no gradient on average.

Every update draws from its own seed, so that a learner that comes back in the middle of a phase goes on as it was.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from roro_ray.config import RewardConfig
from roro_ray.learning.lm_run import AdapterLearner
from roro_ray.learning.updates import UpdateSettings
from roro_ray.reward.credit import FORMAT_FINE, MISSING_FINE, UNFAITHFUL_FINE
from roro_ray.reward.engine_batches import Asked, Codec, make_rubric_batch, make_verdict_batch
from roro_ray.reward.engine_judge import EngineJudge
from roro_ray.reward.engine_reward import JUDGE, RUBRICOR, EngineReward
from roro_ray.reward.engine_rubricor import RubricSample
from roro_ray.reward.freeform import is_free
from roro_ray.reward.generic import count_criteria
from roro_ray.reward.pair_store import StoredPairs
from roro_ray.reward.preference import QueryPairs, draw_items, reward_scores, weigh_pairs
from roro_ray.reward.rubric import ReadRubric
from roro_ray.types import Criterion, PreferencePair, Rubric

Metrics = dict[str, float | str]
OnUpdate = Callable[[Metrics], None]
_LOADED = 4  # queries whose trajectories are held at once


@dataclass(frozen=True, slots=True)
class PhaseContext:
    """What both phases work with; `on_update` hears the metrics of every update."""

    reward: EngineReward
    learner: AdapterLearner
    codec: Codec
    seed: int
    on_update: OnUpdate

    @property
    def config(self) -> RewardConfig:
        """The reward's settings."""
        return self.reward.config

    def publish(self, name: str) -> None:
        """Have the engine go on with the adapter as the learner has it."""
        self.reward.take_over(self.learner.publish(name))

    def publish_if_due(self, name: str, update: int, updates: int) -> None:
        """The same after every `reward.publish_every` updates, and after the last."""
        if (update + 1) % self.config.publish_every == 0 or update + 1 == updates:
            self.publish(name)


def run_rubricor_phase(context: PhaseContext, items: Sequence[StoredPairs], start: int = 0) -> None:
    """GRPO updates `start` to `reward.rubricor_updates` of the Rubricor; the Judge is frozen."""
    config, reward = context.config, context.reward
    settings = UpdateSettings(config.rubric_tokens, entropy_weight=config.entropy)
    for update in range(start, config.rubricor_updates):
        rng = random.Random(f"rubricor/{context.seed}/{update}")
        drawn = draw_items(items, config.queries_per_update, rng)
        n = config.rubrics_per_query
        seed = context.seed * 100_003 + update
        samples = reward.loop.run(reward.rubricor.sample([item.query for item in drawn], n, seed))
        reads = [reward.rubricor.read(sample) for sample in samples]
        groups = [list(range(first, first + n)) for first in range(0, len(samples), n)]
        rewards = reward.loop.run(_value_groups(reward, drawn, groups, samples, reads))
        owners_B = torch.arange(len(drawn)).repeat_interleave(n)
        batch = make_rubric_batch(context.codec, samples, torch.tensor(rewards), owners_B)
        metrics = context.learner.grpo(RUBRICOR, batch, settings)
        context.publish_if_due(RUBRICOR, update, config.rubricor_updates)
        context.on_update({"phase": RUBRICOR, "update": update, **_describe(samples, reads, rewards), **metrics})


async def _value_groups(
    reward: EngineReward,
    drawn: Sequence[StoredPairs],
    groups: Sequence[Sequence[int]],
    samples: Sequence[RubricSample],
    reads: Sequence[ReadRubric],
) -> list[float]:
    """The reward of each rubric; NaN (an error value) where the engine failed on it or on its verdicts."""
    rewards = [math.nan] * len(samples)
    gate = asyncio.Semaphore(_LOADED)

    async def value_one(stored: StoredPairs, group: Sequence[int]) -> None:
        async with gate:
            item = await asyncio.to_thread(stored.load)
            values = await value_rubrics(reward.judge, item, [reads[index] for index in group], reward.config)
        for index, value in zip(group, values, strict=True):
            rewards[index] = value if samples[index].result is not None else math.nan

    await asyncio.gather(*(value_one(stored, group) for stored, group in zip(drawn, groups, strict=True)))
    return rewards


async def value_rubrics(
    judge: EngineJudge, item: QueryPairs, reads: Sequence[ReadRubric], config: RewardConfig
) -> list[float]:
    """How well each rubric lets the Judge order all pairs of the query, less the fines; see `credit.value_rubrics`.

    A trajectory that could not be judged makes its rubric's reward NaN.
    """
    criteria = list({c.text: c for read in reads if read.rubric for c in read.rubric.criteria}.values())
    asked = (read_signs(judge, item, index, criteria) for index in range(len(item.trajectories)))
    columns = await asyncio.gather(*asked) if criteria else []
    table = {c.text: [column[k] for column in columns] for k, c in enumerate(criteria)}
    weights_P = weigh_pairs(item, config.kind_weights)
    values = []
    for read in reads:
        if read.rubric is None:
            values.append(-FORMAT_FINE)
            continue
        signs_KN = torch.tensor([table[c.text] for c in read.rubric.criteria])
        weights_K = torch.tensor([c.weight for c in read.rubric.criteria])
        scores_1N = (weights_K @ signs_KN / weights_K.sum())[None]
        complete = 0 if is_free(item.query) else count_criteria(item.query, config.max_criteria)
        missing = max(complete - len(read.written), 0)
        fines = UNFAITHFUL_FINE * len(read.dropped) + MISSING_FINE * missing
        values.append(float(reward_scores(item, weights_P, scores_1N, config.score_scale)[0]) - fines)
    return values


async def read_signs(judge: EngineJudge, item: QueryPairs, index: int, criteria: Sequence[Criterion]) -> list[float]:
    """P(yes) - P(no) of each criterion on one trajectory of a query; NaN where it could not be judged."""
    rubric = Rubric(item.query.id, tuple(criteria), "")
    verdict = await judge.score(item.query, item.trajectories[index], rubric)
    return [2 * yes - 1 for yes in verdict.yes] if verdict.error is None else [math.nan] * len(criteria)


def _describe(samples: Sequence[RubricSample], reads: Sequence[ReadRubric], rewards: Sequence[float]) -> Metrics:
    valid = [reward for reward in rewards if math.isfinite(reward)]
    rubrics = [read.rubric for read in reads if read.rubric is not None]
    criteria = [criterion for rubric in rubrics for criterion in rubric.criteria]
    named = [criterion for criterion in criteria if criterion.model is not None]
    return {
        "reward": sum(valid) / max(len(valid), 1),
        "errors": 1 - len(valid) / len(rewards),
        "format_errors": sum(r.rubric is None and s.result is not None for r, s in zip(reads, samples, strict=True))
        / len(reads),
        "dropped": sum(len(read.dropped) for read in reads) / len(reads),
        "criteria": len(criteria) / max(len(rubrics), 1),
        "large_criteria": sum(c.model == "large" for c in named) / max(len(named), 1),
    }


def run_judge_phase(context: PhaseContext, items: Sequence[StoredPairs], start: int = 0) -> None:
    """GRPO updates `start` to `reward.judge_updates` of the Judge; the Rubricor, and each query's rubric, is fixed."""
    config, reward = context.config, context.reward
    settings = UpdateSettings(max_length=1)
    rubrics: dict[str, Rubric | None] = {}
    for update in range(start, config.judge_updates):
        rng = random.Random(f"judge/{context.seed}/{update}")
        drawn = draw_items(items, config.queries_per_update, rng)
        new = [item.query for item in drawn if item.query.id not in rubrics]
        for sample in reward.loop.run(reward.rubricor.sample(new, 1, context.seed * 100_003)):
            rubrics[sample.query.id] = reward.rubricor.read(sample).rubric
        work = [(item, rubrics[item.query.id], _draw_pair(item, config, rng)) for item in drawn]
        asked = reward.loop.run(_ask_pairs(reward.judge, [(i, r, p) for i, r, p in work if r is not None]))
        batch, metrics = make_verdict_batch(context.codec, asked, config, rng)
        metrics |= {"unjudged": 1 - len(asked) / len(work)}
        learned = context.learner.grpo(JUDGE, batch, settings)
        context.publish_if_due(JUDGE, update, config.judge_updates)
        context.on_update({"phase": JUDGE, "update": update, **metrics, **learned})


def _draw_pair(item: StoredPairs, config: RewardConfig, rng: random.Random) -> PreferencePair:
    """A kind by its weight, then one of its pairs."""
    kinds = list(dict.fromkeys(pair.kind for pair in item.pairs))
    kind = rng.choices(kinds, [config.kind_weights.get(kind, 0.0) + 1e-9 for kind in kinds])[0]
    return rng.choice([pair for pair in item.pairs if pair.kind == kind])


async def _ask_pairs(
    judge: EngineJudge, work: Sequence[tuple[StoredPairs, Rubric, PreferencePair]]
) -> list[tuple[Rubric, list[Asked]]]:
    """The questions of each pair, those about the preferred trajectory first; what could not be judged is left out."""
    gate = asyncio.Semaphore(_LOADED)

    async def ask_one(stored: StoredPairs, rubric: Rubric, pair: PreferencePair) -> tuple[Rubric, list[Asked]] | None:
        async with gate:
            item = await asyncio.to_thread(stored.load, [pair])
            _, better, worse = item.pairs[0]
            asked: list[Asked] = []
            for index in (better, worse):
                trajectory = item.trajectories[index]
                verdict = await judge.score(item.query, trajectory, rubric)
                if verdict.error is not None:
                    return None
                readings = await judge.read(item.query, trajectory, rubric.criteria)  # all remembered by now
                questions = [judge.prompt.make_question(criterion) for criterion in rubric.criteria]
                head = judge.make_head(item.query, trajectory, questions)
                prompts = (judge.prompt.join(head, question) for question in questions)
                asked += [Asked(prompt, reading) for prompt, reading in zip(prompts, readings, strict=True)]
            return rubric, asked

    results = await asyncio.gather(*(ask_one(*each) for each in work))
    return [result for result in results if result is not None]
