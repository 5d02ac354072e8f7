"""The warm start of real size: rubrics for many pairs by a strong LLM, and the examples that both adapters learn from.

Pairs are drawn by seed from the folds that are learned from, written about some at a time, and kept one line each, so
that a run that was killed pays for none twice. The Rubricor learns to write the kept rubrics from the query alone, the
Judge the writer's verdicts on each criterion of them, one token each. Trajectories are read when an example is made.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from roro_ray.config import RewardConfig, WarmStartConfig
from roro_ray.engines.formats import PromptFormat
from roro_ray.errors import ConfigError
from roro_ray.learning.sft import SftBatch, make_sft_batch
from roro_ray.reward.contrastive import WriterContext, format_written, make_key, make_writing_prompt, write_for_pair
from roro_ray.reward.engine_batches import Codec
from roro_ray.reward.pair_records import PairRecord, RecordCache
from roro_ray.reward.pair_store import StoredPairs
from roro_ray.reward.prompts import JudgePrompt, is_chat, make_rubric_prompt
from roro_ray.reward.rubric import make_criterion
from roro_ray.types import PairKind, PreferencePair

_UNSURE = 0.1  # verdicts within this of 0.5 teach nothing
_MIXED = 8  # batches of examples that are mixed before one is drawn

Example = tuple[list[int], list[bool]]  # token ids, and which of them are learned


def draw_pairs(
    items: Sequence[StoredPairs], folds: int, warm: WarmStartConfig, seed: int
) -> list[tuple[StoredPairs, PreferencePair]]:
    """The pairs to write about: of each query not held out `pairs_per_query`, kinds in turn, `max_pairs` in all."""
    chosen: list[tuple[StoredPairs, PreferencePair]] = []
    for item in items:
        if item.fold >= folds - 1:
            continue
        rng = random.Random(f"warm/{seed}/{item.query.id}")
        kinds = [kind for kind in PairKind if any(pair.kind == kind for pair in item.pairs)]
        by_kind = [[pair for pair in item.pairs if pair.kind == kind] for kind in kinds]
        for pairs in by_kind:
            rng.shuffle(pairs)
        in_turn = [pair for row in itertools.zip_longest(*by_kind) for pair in row if pair is not None]
        chosen += [(item, pair) for pair in in_turn[: warm.pairs_per_query]]
    if len(chosen) > warm.max_pairs:
        kept = sorted(random.Random(f"warm/{seed}").sample(range(len(chosen)), warm.max_pairs))
        chosen = [chosen[index] for index in kept]
    return chosen


async def write_rubrics(
    context: WriterContext,
    pairs: Sequence[tuple[StoredPairs, PreferencePair]],
    cache: RecordCache,
    on_record: Callable[[PairRecord, bool], None] = lambda record, cached: None,
) -> list[PairRecord]:
    """One record a pair, in order; at most `warm.concurrency` pairs are in memory and in flight.

    Args:
        on_record: told of each record, and whether it was there before.
    """
    gate = asyncio.Semaphore(context.warm.concurrency)

    async def write_one(stored: StoredPairs, pair: PreferencePair) -> PairRecord:
        async with gate:
            item = await asyncio.to_thread(stored.load, [pair])
            prompt = make_writing_prompt(context, item)
            key = make_key(context, prompt)
            known = cache.find(key)
            record = known if known is not None else await write_for_pair(context, item, prompt, key)
            if known is None:
                cache.add(record)
        on_record(record, known is not None)
        return record

    return list(await asyncio.gather(*(write_one(stored, pair) for stored, pair in pairs)))


@dataclass(frozen=True, slots=True)
class WarmExamples:
    """What both adapters learn from: the kept records, with where their pairs lie.

    `judge_prompt` makes what the Judge reads, within `max_tokens` a sequence; longer examples are left out.
    """

    kept: Sequence[tuple[PairRecord, StoredPairs, PreferencePair]]
    codec: Codec
    form: PromptFormat
    judge_prompt: JudgePrompt
    reward: RewardConfig
    max_tokens: int

    def count(self, name: str) -> int:
        """Examples of an adapter in one pass, at most."""
        if name == "rubricor":
            return len(self.kept)
        return sum(len(_sure_verdicts(record)) for record, _, _ in self.kept)

    def draw_batches(self, name: str, batch: int, seed: int) -> Iterator[SftBatch]:
        """Batches of an adapter's examples, pass after pass, without end, in an order of the seed.

        Raises:
            ConfigError: there is no example that fits.
        """
        rng = random.Random(f"warm/{name}/{seed}")
        pending: list[Example] = []
        for number in itertools.count():
            order = list(self.kept)
            rng.shuffle(order)
            found = 0
            for record, stored, pair in order:
                made = [self._rubric(record, stored)] if name == "rubricor" else self._verdicts(record, stored, pair)
                fitting = [example for example in made if len(example[0]) <= self.max_tokens]
                found += len(fitting)
                pending += fitting
                while len(pending) >= batch * _MIXED:
                    yield self._batch(pending, batch, rng)
            if not found and not number:
                raise ConfigError(
                    f"no example for the {name}: {len(self.kept)} rubrics were kept, and none makes a sequence of at "
                    f"most {self.max_tokens} tokens: raise lora.token_budget, warm.max_pairs or warm.attempts, or "
                    "lower warm.margin"
                )
            while len(pending) >= batch or (pending and found <= batch):
                yield self._batch(pending, batch, rng)

    def _batch(self, pending: list[Example], batch: int, rng: random.Random) -> SftBatch:
        rng.shuffle(pending)
        chosen = [pending.pop() for _ in range(min(batch, len(pending)))]
        pad = self.codec.tokenizer.pad_token_id or 0
        return make_sft_batch([ids for ids, _ in chosen], [learned for _, learned in chosen], pad)

    def _rubric(self, record: PairRecord, stored: StoredPairs) -> Example:
        bounds = (self.reward.min_criteria, self.reward.max_criteria)
        prompt = self.codec.encode(make_rubric_prompt(stored.query, self.form, *bounds))
        text = format_written(record.criteria, is_chat(self.form))
        rubric = self.codec.tokenizer.encode(text, add_special_tokens=False)
        ids = [*prompt, *rubric, self.codec.tokenizer.eos_token_id]
        return ids, [False] * len(prompt) + [True] * (len(rubric) + 1)

    def _verdicts(self, record: PairRecord, stored: StoredPairs, pair: PreferencePair) -> list[Example]:
        item = stored.load([pair])
        questions = [self.judge_prompt.make_question(make_criterion(*criterion)) for criterion in record.criteria]
        longest = max(map(self.judge_prompt.count, questions))
        _, better, worse = item.pairs[0]
        heads = {
            index: self.judge_prompt.make_head(item.query, item.trajectories[index], longest)
            for index in (better, worse)
        }
        examples = []
        for preferred, k, verdict in _sure_verdicts(record):
            prompt = self.codec.encode(self.judge_prompt.join(heads[better if preferred else worse], questions[k]))
            word = self.codec.verdict_ids["yes" if verdict else "no"]
            examples.append(([*prompt, *word], [False] * len(prompt) + [True] * len(word)))
        return examples


def _sure_verdicts(record: PairRecord) -> list[tuple[bool, int, bool]]:
    """(on the preferred trajectory?, criterion, yes?) of the verdicts of which the writer was sure."""
    return [
        (preferred, k, yes > 0.5)
        for preferred, values in ((True, record.yes_preferred), (False, record.yes_rejected))
        for k, yes in enumerate(values)
        if abs(yes - 0.5) > _UNSURE
    ]


def count_sft_updates(examples: int, warm: WarmStartConfig, most: int) -> int:
    """Updates of one adapter: `warm.epochs` passes over its examples, at most `most` (`lora.sft_updates`)."""
    return min(most, math.ceil(examples * warm.epochs / warm.batch))
