"""The two halves of a warm start with a strong LLM: it writes; then both adapters learn what was kept.

They are apart because they need the GPU one after the other. Each half may be killed and goes on: the first by its
cache, the second by the learner's checkpoints.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from roro_ray.config import Config, ModelConfig
from roro_ray.engines.formats import make_format
from roro_ray.engines.loading import load_tokenizer
from roro_ray.engines.protocol import Engine
from roro_ray.errors import ConfigError, EngineError, did_you_mean
from roro_ray.learning.adapter_files import AdapterVersion
from roro_ray.learning.lm_run import AdapterLearner
from roro_ray.reward.contrastive import WriterContext
from roro_ray.reward.engine_batches import Codec
from roro_ray.reward.engine_reward import JUDGE, RUBRICOR, make_token_counter, resolve_reward
from roro_ray.reward.pair_records import PairRecord, RecordCache
from roro_ray.reward.pair_store import StoredPairs
from roro_ray.reward.prompts import JudgePrompt, is_chat
from roro_ray.reward.warm_rubrics import WarmExamples, count_sft_updates, draw_pairs, write_rubrics

_MAX_FAILED_SHARE = 0.2  # above it the writer is broken, and what is left would hide it
OnUpdate = Callable[[dict[str, float | str]], None]


def find_writer(config: Config) -> ModelConfig:
    """The settings of the strong LLM: a model of the pool, or one of its own.

    Raises:
        ConfigError: the pool has no model of that name.
    """
    if not config.warm.writer:
        return config.warm.engine
    names = [model.name for model in config.pool.models]
    if config.warm.writer not in names:
        raise ConfigError(
            f"warm.writer={config.warm.writer!r}: the pool has {', '.join(names)}"
            f"{did_you_mean(config.warm.writer, names)}; leave it empty to use warm.engine"
        )
    return config.pool.models[names.index(config.warm.writer)]


async def write_warm_rubrics(
    config: Config,
    engine: Engine,
    items: Sequence[StoredPairs],
    cache: RecordCache,
    on_record: Callable[[PairRecord, bool], None] = lambda record, cached: None,
) -> list[PairRecord]:
    """First half: the records of all drawn pairs, those that are in the cache among them.

    Raises:
        EngineError: too many pairs failed; the others are in the cache, and the next run tries only these again.
    """
    facts = await engine.ready()
    model = find_writer(config)
    count = await asyncio.to_thread(make_token_counter, model.path)
    context = WriterContext(engine, facts, config.warm, config.reward, config.seed, count)
    pairs = draw_pairs(items, config.pairs.folds, config.warm, config.seed)
    records = await write_rubrics(context, pairs, cache, on_record)
    failed = [record for record in records if record.status == "failed"]
    if len(failed) > _MAX_FAILED_SHARE * len(records):
        raise EngineError(
            f"warm_start: {len(failed)} of {len(records)} pairs failed; the first: {failed[0].error}. Mend the cause "
            "and run again: what was written is kept."
        )
    return records


def make_examples(config: Config, items: Sequence[StoredPairs], records: Sequence[PairRecord]) -> WarmExamples:
    """What the kept records teach, in the format of the adapters' base.

    Raises:
        ConfigError: the base's tokenizer is missing or unfit.
        EngineError: it does not load.
    """
    reward = resolve_reward(config)
    tokenizer = load_tokenizer(reward.engine.path, reward.engine.revision)
    form = make_format(tokenizer, reward.engine.format, reward.engine.thinking)
    by_id = {item.query.id: item for item in items}
    kept = []
    for record in records:
        if record.status == "kept":
            stored = by_id[record.query_id]
            ends = (record.preferred, record.rejected)
            kept.append((record, stored, next(p for p in stored.pairs if (p.preferred, p.rejected) == ends)))
    prompt = JudgePrompt(form, reward.judge_tokens, lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
    return WarmExamples(kept, Codec(tokenizer, is_chat(form)), form, prompt, reward, config.lora.token_budget)


def check_examples(examples: WarmExamples) -> None:
    """Raise ConfigError where there is nothing to learn from."""
    if not examples.kept:
        raise ConfigError(
            "warm_start: no rubric was kept, so there is nothing to learn from. See the counts above: unparsed rubrics "
            "ask for a stronger writer (warm.writer, warm.engine), inconsistent ones for warm.attempts or a lower "
            "warm.margin."
        )


def learn_examples(
    config: Config, examples: WarmExamples, learner: AdapterLearner, on_update: OnUpdate = lambda metrics: None
) -> list[AdapterVersion]:
    """Second half: SFT of both adapters, or what is left of it; returns the versions that engines can serve.

    Raises:
        ConfigError: nothing was kept, or the adapters have learned more than a warm start already.
    """
    warm, published = config.warm, []
    check_examples(examples)
    for name in (RUBRICOR, JUDGE):
        updates = count_sft_updates(examples.count(name), warm, config.lora.sft_updates)
        done = learner.versions[name]
        if done > updates:
            raise ConfigError(
                f"the {name} has learned in {done} updates already, more than the {updates} of this warm start, which "
                "comes before learn_reward. Remove the run's adapters and reward directories to begin anew."
            )
        batches = itertools.islice(examples.draw_batches(name, warm.batch, config.seed), done, None)
        # Some at a time, so that progress is seen; the schedule is that of all.
        for start in range(done, updates, config.lora.checkpoint_every):
            part = itertools.islice(batches, min(config.lora.checkpoint_every, updates - start))
            for number, metrics in enumerate(learner.sft(name, part, updates, start), start):
                on_update({"phase": f"sft_{name}", "update": number, **metrics})
        published.append(learner.publish(name))
    return published


def check_backend(config: Config) -> None:
    """Raise ConfigError unless the reward is made of adapters."""
    if config.reward.backend != "engine":
        raise ConfigError(
            "warm_start teaches LoRA adapters, and reward.backend=local has none (its warm start is shipped): set "
            "reward.backend=engine and lora.base, or go on with python -m jobs.learn_reward."
        )


def cache_of(directory: Path) -> RecordCache:
    """The records of a run's warm start."""
    return RecordCache(directory / "rubrics.jsonl")

