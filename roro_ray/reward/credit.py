"""What a sampled rubric is worth, what each of its lines adds, and the token-wise advantages made of both."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from roro_ray.config import RewardConfig
from roro_ray.learning.grpo import make_advantages
from roro_ray.learning.sequences import Completion, TokenBatch, make_token_batch
from roro_ray.reward.freeform import find_steps
from roro_ray.reward.generic import count_criteria, draw_random_criteria
from roro_ray.reward.judge import Judge
from roro_ray.reward.judge_text import make_question
from roro_ray.reward.preference import QueryPairs, find_dearer, reward_scores, weigh_pairs
from roro_ray.reward.rubric import (
    MODELS,
    WEIGHTS,
    WRITTEN_BY,
    ReadRubric,
    make_criterion,
    make_overall_criterion,
)
from roro_ray.reward.rubricor import Rubricor
from roro_ray.types import Criterion

FORMAT_FINE = 0.5  # below every reward of a rubric that parses
UNFAITHFUL_FINE = 0.1  # for each criterion dropped
MISSING_FINE = 0.1  # for each step left unnamed while there is room: else rubrics shrink to the minimum
# What the advantage of a token is made of: the rubric's reward, the gain of its line, the choice that it makes.
WHOLE_CREDIT, GAIN_CREDIT, CHOICE_CREDIT = 1.0, 1.0, 4.0
_PROBED_QUERIES, _PROBES = 64, 6  # random rubrics per query from which the two directions are balanced
_MOST_TILT = 10.0


def balance_pairs(
    judge: Judge, items: Sequence[QueryPairs], config: RewardConfig, seed: int
) -> dict[str, torch.Tensor]:
    """The weight of each pair, by query id, with the two directions of cost balanced.

    Pairs whose preferred trajectory is the dearer one teach `large`, the others `small`. Hard steps are fewer
    but matter more than easy ones, so that on average one of the two pays, and the Rubricor would learn that
    bias first and lose the entropy that it needs to find the steps. So the cheaper-preferred pairs are multiplied
    by the factor at which, in random rubrics, a line gains on average as much by `large` as by `small`: what is
    left to gain is to say which step.
    """
    rng = random.Random(f"balance/{seed}")
    probes = [
        (item, draw_random_criteria(item.query, rng, config.max_criteria))
        for item in rng.choices(items, [item.draw_weight for item in items], k=_PROBED_QUERIES)
        for _ in range(_PROBES)
    ]
    tables = read_verdicts(judge, [(item, [*criteria, *map(turn_round, criteria)]) for item, criteria in probes])
    lean = {True: 0.0, False: 0.0}
    for item, criteria in probes:
        weights, mask, table = weigh_pairs(item, config.kind_weights), find_dearer(item) > 0, tables[item.query.id]
        for side in lean:
            writers = gain_lines(item, criteria, table, weights * (mask == side), config.score_scale).writers
            lean[side] += sum(
                x if c.model == "large" else -x for x, c in zip(writers, criteria, strict=True) if c.label
            )
    factor = -lean[True] / lean[False] if lean[False] < 0 < lean[True] else 1.0
    factor = min(max(factor, 1 / _MOST_TILT), _MOST_TILT)
    result = {}
    for item in items:
        weights = weigh_pairs(item, config.kind_weights)
        result[item.query.id] = torch.where(find_dearer(item) > 0, weights, weights * factor) * 2 / (1 + factor)
    return result


@dataclass(frozen=True, slots=True)
class RubricValue:
    """The reward of a rubric, and for each of its lines what its parts add to it, all other lines as they are.

    `gains`: the reward less that without the line (a dropped line: its fine): was it worth to name this step?
    `writers`: the reward with the line's writer less that with either writer, both averaged over the weights.
    `weights`: the reward less that with the line's writer at every weight, averaged.
    """

    reward: float
    gains: tuple[float, ...] = ()
    writers: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()


def value_rubrics(
    judge: Judge,
    items: Sequence[QueryPairs],
    reads: Sequence[ReadRubric],
    weights: Mapping[str, torch.Tensor],
    config: RewardConfig,
) -> list[RubricValue]:
    """How well each rubric orders its query's pairs, less the fines, and what each of its lines adds to that.

    Changing a line needs no new verdicts on the others: the Judge's verdict on a criterion does not depend on them.
    """
    good = [(items[index], read.rubric.criteria) for index, read in enumerate(reads) if read.rubric is not None]
    tables = read_verdicts(judge, [(item, [*criteria, *map(turn_round, criteria)]) for item, criteria in good])
    values = []
    for item, read in zip(items, reads, strict=True):
        if read.rubric is None:
            values.append(RubricValue(-FORMAT_FINE))
        else:
            values.append(_value_one(item, read, tables[item.query.id], weights[item.query.id], config))
    return values


def turn_round(criterion: Criterion) -> Criterion:
    """The same criterion asking for the other writer."""
    if criterion.label is None:
        return make_overall_criterion(MODELS[criterion.model == "small"], criterion.weight)
    mine, other = (WRITTEN_BY.format(model) for model in (criterion.model, MODELS[criterion.model == "small"]))
    return make_criterion(criterion.text.removesuffix(mine) + other, criterion.weight)


def read_verdicts(
    judge: Judge, work: Sequence[tuple[QueryPairs, Sequence[Criterion]]]
) -> dict[str, dict[str, torch.Tensor]]:
    """By query id and criterion text: P(yes) - P(no) for each trajectory, shape (N,)."""
    items = {item.query.id: item for item, _ in work}
    texts: dict[str, dict[str, str]] = {identity: {} for identity in items}
    for item, criteria in work:
        texts[item.query.id].update({c.text: make_question(c, judge.special) for c in criteria})
    asked = [
        (item.query, trajectory, list(texts[identity].values()))
        for identity, item in items.items()
        for trajectory in item.trajectories
    ]
    answers = iter(judge.read(asked))
    tables = {}
    for identity, item in items.items():
        values_NK = torch.tensor([[yes - no for yes, no in next(answers)] for _ in item.trajectories])
        tables[identity] = dict(zip(texts[identity], values_NK.unbind(1), strict=True))
    return tables


def gain_lines(
    item: QueryPairs,
    criteria: Sequence[Criterion],
    table: Mapping[str, torch.Tensor],
    weights_P: torch.Tensor,
    scale: float,
) -> RubricValue:
    """The reward of a rubric without its fines, and what the parts of each line add to it."""
    weights_K1 = torch.tensor([[criterion.weight] for criterion in criteria])
    own_KN = torch.stack([table[criterion.text] for criterion in criteria])
    turned_KN = torch.stack([table[turn_round(criterion).text] for criterion in criteria])
    whole_N, total = (weights_K1 * own_KN).sum(0), weights_K1.sum()
    rest_KN, rest_K1 = whole_N - weights_K1 * own_KN, total - weights_K1
    new_W = torch.tensor(WEIGHTS)
    # scores with each line's verdicts replaced: _M its own writer and the other one, _W every weight
    options_KMWN = torch.stack([own_KN, turned_KN], 1)[:, :, None] * new_W[:, None] + rest_KN[:, None, None]
    options_KMWN = options_KMWN / (rest_K1 + new_W)[:, None, :, None]
    count = len(criteria)
    rows = [whole_N[None] / total, rest_KN / rest_K1.clamp(min=1e-9), options_KMWN.flatten(0, 2)]
    rewards = reward_scores(item, weights_P, torch.cat(rows), scale)
    options_KM = rewards[1 + count :].view(count, 2, -1).mean(2)
    return RubricValue(
        float(rewards[0]),
        tuple((rewards[0] - rewards[1 : 1 + count]).tolist()),
        tuple((options_KM[:, 0] - options_KM.mean(1)).tolist()),
        tuple((rewards[0] - options_KM[:, 0]).tolist()),
    )


def _value_one(
    item: QueryPairs, read: ReadRubric, table: Mapping[str, torch.Tensor], weights_P: torch.Tensor, config: RewardConfig
) -> RubricValue:
    assert read.rubric is not None
    value = gain_lines(item, read.rubric.criteria, table, weights_P, config.score_scale)
    parts = zip(value.gains, value.writers, value.weights, strict=True)
    kept = {criterion.text: part for criterion, part in zip(read.rubric.criteria, parts, strict=True)}
    lines = [kept.get(criterion.text, (-UNFAITHFUL_FINE, -UNFAITHFUL_FINE, 0.0)) for criterion in read.written]
    missing = max(count_criteria(item.query, config.max_criteria) - len(read.written), 0)
    fines = UNFAITHFUL_FINE * len(read.dropped) + MISSING_FINE * missing
    gains, writers, weights = zip(*lines, strict=True)
    # Where there is room for every step, none is to be chosen.
    gains = gains if len(find_steps(item.query)) >= config.max_criteria else (0.0,) * len(lines)
    return RubricValue(value.reward - fines, gains, writers, weights)


def make_credit_batch(
    rubricor: Rubricor, completions: Sequence[Completion], values: Sequence[RubricValue], groups_B: torch.Tensor
) -> TokenBatch:
    """Rows to learn from, with one advantage a token.

    It is the rubric's reward, centred over the query's rubrics (GRPO), plus what its line adds: the gain, centred
    over the lines of the query's rubrics, and, up to the writer, that of the writer, after it that of the weight.
    Both are centred by construction (counterfactual baselines, as in COMA, arXiv 1705.08926): most of the noise of
    a rubric's reward comes from its other lines. Rubrics of queries that tell nothing are left out.
    """
    rewards_B = torch.tensor([value.reward for value in values])
    advantages_B, kept_B = make_advantages(rewards_B, groups_B)
    batch = make_token_batch(completions, advantages_B, groups_B, rubricor.tokenizer.pad_token_id or 0)
    advantages_BT = advantages_B[:, None] * batch.action_mask_BT * WHOLE_CREDIT
    gains: dict[int, list[float]] = {}
    for group, value in zip(groups_B.tolist(), values, strict=True):
        gains.setdefault(group, []).extend(value.gains)
    for row, (completion, value, group) in enumerate(zip(completions, values, groups_B.tolist(), strict=True)):
        mean = sum(gains[group]) / max(len(gains[group]), 1)
        lines = zip(value.gains, value.writers, value.weights, strict=True)
        # (line, writer or weight) -> credit; tokens after the last line (the end) get the rubric's part alone
        table = [[GAIN_CREDIT * (g - mean) + CHOICE_CREDIT * part for part in parts] for g, *parts in lines]
        places = rubricor.find_places(completion.ids)
        credit = [table[line][part] if line < len(table) else 0.0 for line, part in places]
        start = len(completion.prompt_ids)
        advantages_BT[row, start : start + len(credit)] += torch.tensor(credit)
    return replace(batch, advantages_B=advantages_BT).select(kept_B)
