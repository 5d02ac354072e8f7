"""From what an engine wrote and read to rows that a learner of adapters takes."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from roro_ray.config import RewardConfig
from roro_ray.errors import ConfigError
from roro_ray.learning.grpo import make_advantages
from roro_ray.learning.sequences import Completion, TokenBatch, make_token_batch
from roro_ray.reward.engine_judge import Reading
from roro_ray.reward.engine_reward import EngineReward
from roro_ray.reward.engine_rubricor import RubricSample
from roro_ray.reward.judge_text import VERDICTS
from roro_ray.reward.phases import reward_verdicts
from roro_ray.reward.prompts import is_chat
from roro_ray.types import Rubric


@dataclass(slots=True)
class Codec:
    """Turns prompts and verdicts into the base's token ids."""

    tokenizer: Any
    chat: bool
    verdict_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for word in VERDICTS:
            self.verdict_ids[word] = tuple(self.tokenizer.encode(word, add_special_tokens=False))

    def encode(self, prompt: str) -> list[int]:
        """As the engine encodes it: a chat prompt spells its own control tokens."""
        ids: list[int] = self.tokenizer.encode(prompt, add_special_tokens=not self.chat)
        return ids


def make_codec(tokenizer: Any, reward: EngineReward) -> Codec:
    """The codec of a reward's base.

    Raises:
        ConfigError: yes or no are not one token each.
    """
    codec = Codec(tokenizer, is_chat(reward.rubricor.form))
    for word, ids in codec.verdict_ids.items():
        if len(ids) != 1:  # an engine tells the probability of a whole word, GRPO needs that of each token
            raise ConfigError(
                f"the base's tokenizer writes the verdict {word!r} in {len(ids)} tokens, expected 1: take another base"
            )
    return codec


def make_empty_batch() -> TokenBatch:
    """No rows: an update from which nothing is learned, but which counts, so that a resumed phase knows where it is."""
    zeros_BT, none_B = torch.zeros(0, 1), torch.zeros(0)
    return TokenBatch(zeros_BT.long(), zeros_BT.long(), zeros_BT.bool(), zeros_BT, none_B, none_B.long())


def make_rubric_batch(
    codec: Codec, samples: Sequence[RubricSample], rewards_B: torch.Tensor, groups_B: torch.Tensor
) -> TokenBatch:
    """Rows to learn from; none where no group tells anything.

    A row is left out whose prompt the engine read in other tokens than ours, or without log-probabilities.
    """
    completions: list[Completion | None] = []
    for index, sample in enumerate(samples):
        result = sample.result
        prompt = [] if result is None else list(result.encoded_ids) or codec.encode(sample.prompt)
        good = result is not None and len(prompt) == result.prefix_tokens
        if result is None or not good or len(result.log_probs) != len(result.token_ids) or not result.token_ids:
            completions.append(None)
            continue
        completions.append(
            Completion(index, tuple(prompt), result.token_ids, result.log_probs, result.text, result.finish)
        )
    usable_B = torch.tensor([completion is not None for completion in completions])
    rewards_B = torch.where(usable_B, rewards_B, torch.full_like(rewards_B, math.nan))
    advantages_B, kept_B = make_advantages(rewards_B, groups_B)
    if not bool(kept_B.any()):
        return make_empty_batch()
    kept = [c for c, keep in zip(completions, kept_B.tolist(), strict=True) if keep and c is not None]
    return make_token_batch(kept, advantages_B[kept_B], groups_B[kept_B], codec.tokenizer.pad_token_id or 0)


@dataclass(frozen=True, slots=True)
class Asked:
    """One question about one trajectory of a pair: the Judge's prompt and its reading."""

    prompt: str
    reading: Reading


def make_verdict_batch(
    codec: Codec, pairs: Sequence[tuple[Rubric, list[Asked]]], config: RewardConfig, rng: random.Random
) -> tuple[TokenBatch, dict[str, float]]:
    """`config.verdicts_per_pair` draws of all verdicts of each pair, as rows of one verdict token each.

    The draws of one question that said the same are one row with the sum of their advantages, so that a trajectory of
    many tokens is read twice at most. Of more rows than `config.judge_rows` a random part is kept.
    """
    n = config.verdicts_per_pair
    rows: list[tuple[Completion, float, int]] = []
    rewards_all: list[float] = []
    for number, (rubric, asked) in enumerate(pairs):
        draws_NK = torch.tensor([[int(rng.random() >= each.reading.yes) for each in asked] for _ in range(n)])
        rewards = reward_verdicts(rubric, draws_NK)
        rewards_all += rewards
        mean = sum(rewards) / n
        advantages_N = torch.tensor([reward - mean for reward in rewards])
        for k, each in enumerate(asked):
            for choice, word in enumerate(VERDICTS):
                advantage = float(advantages_N[draws_NK[:, k] == choice].sum()) / n
                chance = (each.reading.yes, each.reading.no)[choice] * each.reading.mass
                if advantage and chance > 0:
                    ids = tuple(codec.encode(each.prompt))
                    row = Completion(k, ids, codec.verdict_ids[word], (math.log(chance),), word, "stop")
                    rows.append((row, advantage, number))
    masses = [each.reading.mass for _, asked in pairs for each in asked]
    metrics = {
        "reward": sum(rewards_all) / max(len(rewards_all), 1),
        "format_errors": 1 - sum(masses) / max(len(masses), 1),
    }
    if not rows:
        return make_empty_batch(), metrics
    if len(rows) > config.judge_rows:
        rows = rng.sample(rows, config.judge_rows)
    completions, advantages, groups = zip(*rows, strict=True)
    pad = codec.tokenizer.pad_token_id or 0
    return make_token_batch(completions, torch.tensor(advantages), torch.tensor(groups), pad), metrics
