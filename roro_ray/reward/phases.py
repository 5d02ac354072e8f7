"""The two phases of a round of alternating optimisation: the Judge learns with the Rubricor frozen, then the reverse.

Judge phase: for a pair and its rubric the Judge's verdicts on both trajectories are sampled; +1 when the
preferred one scores higher, -1 otherwise and on a format error (a verdict that is neither yes nor no).
Rubricor phase: rubrics are sampled for a query, the frozen Judge scores all its trajectories under each, and
the reward is how well that orders all pairs of the query, less fines for format and faithfulness. Both learn
by GRPO with advantages that are centred and not scaled.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from roro_ray.config import RewardConfig
from roro_ray.learning.grpo import LossInputs, make_advantages, make_loss
from roro_ray.learning.sequences import Completion
from roro_ray.learning.updates import UpdateSettings, update_model
from roro_ray.reward.credit import RubricValue, balance_pairs, make_credit_batch, value_rubrics
from roro_ray.reward.judge import Judge, make_judge_batch
from roro_ray.reward.judge_text import make_question, serialise
from roro_ray.reward.preference import QueryPairs, draw_items
from roro_ray.reward.rubric import ReadRubric
from roro_ray.reward.rubricor import MAX_RUBRIC_TOKENS, Rubricor
from roro_ray.types import Rubric
from roro_ray.world.train import make_optimizers

OnUpdate = Callable[[dict[str, float | str]], None]


def run_rubricor_phase(
    rubricor: Rubricor, judge: Judge, items: Sequence[QueryPairs], config: RewardConfig, seed: int, on_update: OnUpdate
) -> None:
    """`config.rubricor_updates` GRPO updates of the Rubricor; the Judge is frozen."""
    rng = random.Random(f"rubricor/{seed}")
    optimizers = make_optimizers(rubricor.model.named_parameters(), config.learning_rate)
    settings = UpdateSettings(MAX_RUBRIC_TOKENS, entropy_weight=config.entropy)
    weights = balance_pairs(judge, items, config, seed)
    for update in range(config.rubricor_updates):
        drawn = draw_items(items, config.queries_per_update, rng)
        n = config.rubrics_per_query
        completions = rubricor.sample([item.query for item in drawn], n, seed * 100_003 + update)
        owners = [item for item in drawn for _ in range(n)]
        reads = [_read(rubricor, c, item) for c, item in zip(completions, owners, strict=True)]
        values = value_rubrics(judge, owners, reads, weights, config)
        groups = torch.arange(len(drawn)).repeat_interleave(n)
        batch = make_credit_batch(rubricor, completions, values, groups)
        metrics = update_model(rubricor.model, optimizers, batch, settings)
        rubricor.version += 1
        on_update({"phase": "rubricor", "update": update, **_describe(reads, values), **metrics})


def _read(rubricor: Rubricor, completion: Completion, item: QueryPairs) -> ReadRubric:
    if completion.finish != "stop":
        return ReadRubric(
            None, error=f"rubric of query {item.query.id!r} did not end within {MAX_RUBRIC_TOKENS} tokens"
        )
    return rubricor.read(completion.text, item.query)


def _describe(reads: Sequence[ReadRubric], values: Sequence[RubricValue]) -> dict[str, float]:
    rubrics = [read.rubric for read in reads if read.rubric is not None]
    criteria = [criterion for rubric in rubrics for criterion in rubric.criteria]
    named = [criterion for criterion in criteria if criterion.label is not None]
    return {
        "reward": sum(value.reward for value in values) / len(values),
        "format_errors": 1 - len(rubrics) / len(reads),
        "dropped": sum(len(read.dropped) for read in reads) / len(reads),
        "criteria": len(criteria) / max(len(rubrics), 1),
        "large_criteria": sum(c.model == "large" for c in named) / max(len(named), 1),
    }


@dataclass(frozen=True, slots=True)
class _JudgedPair:
    """A pair under a rubric, and where its questions lie among those of the batch: K of each trajectory."""

    rubric: Rubric
    preferred: slice
    rejected: slice


def run_judge_phase(
    judge: Judge, rubricor: Rubricor, items: Sequence[QueryPairs], config: RewardConfig, seed: int, on_update: OnUpdate
) -> None:
    """`config.judge_updates` GRPO updates of the Judge; the Rubricor is frozen and its rubrics are sampled once."""
    rng = random.Random(f"judge/{seed}")
    generator = torch.Generator().manual_seed(seed)
    completions = rubricor.sample([item.query for item in items], 1, seed * 100_003)
    reads = [_read(rubricor, c, item).rubric for c, item in zip(completions, items, strict=True)]
    usable = {item.query.id: rubric for item, rubric in zip(items, reads, strict=True) if rubric is not None}
    judged = [item for item in items if item.query.id in usable]
    optimizers = make_optimizers(judge.model.named_parameters(), config.judge_lr)
    for update in range(config.judge_updates if judged else 0):
        drawn = draw_items(judged, config.queries_per_update, rng)
        metrics = _update_judge(judge, drawn, usable, config, optimizers, rng, generator)
        judge.version += 1
        on_update({"phase": "judge", "update": update, **metrics})


def _draw_pair(item: QueryPairs, config: RewardConfig, rng: random.Random) -> tuple[int, int]:
    """A kind by its weight, then one of its pairs."""
    kinds = list(dict.fromkeys(kind for kind, _, _ in item.pairs))
    weights = [config.kind_weights.get(kind, 0.0) + 1e-9 for kind in kinds]
    kind = rng.choices(kinds, weights)[0]
    _, preferred, rejected = rng.choice([pair for pair in item.pairs if pair[0] == kind])
    return preferred, rejected


def _update_judge(
    judge: Judge,
    drawn: Sequence[QueryPairs],
    rubrics: dict[str, Rubric],
    config: RewardConfig,
    optimizers: list[torch.optim.Optimizer],
    rng: random.Random,
    generator: torch.Generator,
) -> dict[str, float]:
    rows, pairs, start = [], [], 0
    for item in drawn:
        rubric = rubrics[item.query.id]
        questions = [judge.encode(make_question(criterion, judge.special)) for criterion in rubric.criteria]
        for index in _draw_pair(item, config, rng):
            head = judge.encode(serialise(item.query, item.trajectories[index], judge.special))
            rows.append((head, questions))
        count = len(questions)
        pairs.append(_JudgedPair(rubric, slice(start, start + count), slice(start + count, start + 2 * count)))
        start += 2 * count
    judge.model.train()
    log_probs_Q2 = judge.verdict_log_probs(make_judge_batch(rows, judge.tokenizer.pad_token_id or 0))
    inputs, metrics = _sample_verdicts(log_probs_Q2, pairs, config.verdicts_per_pair, generator)
    output = make_loss(inputs)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(judge.model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return {**metrics, **output.metrics}


def _sample_verdicts(
    log_probs_Q2: torch.Tensor, pairs: Sequence[_JudgedPair], n: int, generator: torch.Generator
) -> tuple[LossInputs, dict[str, float]]:
    """n draws of all verdicts of each pair as GRPO rows: tokens are verdicts, the group is the pair."""
    other_Q = (1 - log_probs_Q2.exp().sum(1)).clamp(min=1e-6).log()
    log_probs_Q3 = torch.cat([log_probs_Q2, other_Q[:, None]], 1)
    width = max(pair.rejected.stop - pair.preferred.start for pair in pairs)
    chosen_rows, masks, rewards, groups = [], [], [], []
    for group, pair in enumerate(pairs):
        own_K3 = log_probs_Q3[pair.preferred.start : pair.rejected.stop]
        draws_KN = torch.multinomial(own_K3.detach().exp(), n, replacement=True, generator=generator)
        chosen_NK = own_K3.gather(1, draws_KN).T
        rewards.extend(reward_verdicts(pair.rubric, draws_KN.T))
        groups.extend([group] * n)
        chosen_rows.append(torch.nn.functional.pad(chosen_NK, (0, width - chosen_NK.shape[1])))
        masks.append((torch.arange(width) < chosen_NK.shape[1]).expand(n, width))
    log_probs_BT, mask_BT = torch.cat(chosen_rows), torch.cat(masks)
    rewards_B, groups_B = torch.tensor(rewards), torch.tensor(groups)
    advantages_B, kept_B = make_advantages(rewards_B, groups_B)
    inputs = LossInputs(log_probs_BT, log_probs_BT.detach(), advantages_B, mask_BT & kept_B[:, None])
    metrics = {"reward": float(rewards_B.mean()), "format_errors": float(other_Q.detach().exp().mean())}
    return inputs, metrics


def reward_verdicts(rubric: Rubric, draws_NK: torch.Tensor) -> list[float]:
    """+1 for each draw in which the preferred trajectory scores higher, -1 otherwise and on a format error.

    `draws_NK` holds 0 (yes), 1 (no) or 2 (neither): the preferred trajectory's criteria, then the rejected one's.
    Judging is pointwise, so that the order in which the two are shown cannot matter.
    """
    weights_K = torch.tensor([criterion.weight for criterion in rubric.criteria])
    signs_NK = 1.0 - 2.0 * draws_NK
    preferred_NK, rejected_NK = signs_NK.chunk(2, dim=1)
    difference_N = (preferred_NK - rejected_NK) @ weights_K
    broken_N = (draws_NK == 2).any(1)
    return torch.where(broken_N, -1.0, torch.where(difference_N > 0, 1.0, -1.0)).tolist()
