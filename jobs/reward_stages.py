"""The stages of the reward: the warm start with a strong LLM, and learning, in memory or as adapters behind an engine.

Engine and learner are actors on one Ray; trajectories stay on disk until they are read. Interrupted, both go on: the
warm start by its cache of written rubrics, learning by its rounds, both by the learner's checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs._cli import run_stage
from jobs._cluster import open_ray
from jobs._progress import Progress
from jobs._terminal import say
from roro_ray.config import Config
from roro_ray.data.run_dir import RunDir, write_json

if TYPE_CHECKING:
    from jobs._faults import FaultLog
    from roro_ray.reward.pair_records import PairRecord
    from roro_ray.reward.pair_store import StoredPairs

OnUpdate = Callable[[dict[str, float | str]], None]
WARM, ADAPTERS = "warm", "adapters"
_COUNTS = ("pairs", "written", "parsed", "faithful", "consistent", "tokens_in", "tokens_out", "usd")


def warm_stage(config: Config, run: RunDir) -> None:
    """Between stages 2 and 3: rubrics by a strong LLM, and SFT of both adapters on what is consistent."""
    from roro_ray.reward.engine_reward import save_engine_reward
    from roro_ray.reward.pair_records import count_records
    from roro_ray.reward.warm_run import check_backend, check_examples, learn_examples, make_examples

    check_backend(config)
    if run.is_done("warm_start"):
        say(f"warm_start: already done in {run.place}")
        return
    run.require("make_pairs")
    run.fetch(run.trajectories, run.pairs, WARM)
    from actors.lm_learner import LmLearner

    items = _index_items(config, run)
    with run_stage(run, "warm_start", "Warm start with a strong LLM") as facts, open_ray(config.ray):
        records = _write(config, run, items)
        counts = count_records(records)
        write_json(run.path / WARM / "counts.json", counts)
        say("  " + ", ".join(f"{name} {counts[name]:g}" for name in _COUNTS))
        examples = make_examples(config, items, records)
        check_examples(examples)
        bar = Progress("sft", 2 * config.lora.sft_updates, "updates")

        def on_update(metrics: dict[str, float | str]) -> None:
            run.log({"stage": "warm_start", **metrics})
            bar.advance()

        with bar, LmLearner.start(config, run.mirror.part(ADAPTERS)) as learner:
            published = learn_examples(config, examples, learner, on_update)
        save_engine_reward(published, config.lora.base, run.path / WARM / "model")
        facts.update({name: counts[name] for name in _COUNTS}, **{a.name: a.version for a in published})


def _write(config: Config, run: RunDir, items: Sequence[StoredPairs]) -> list[PairRecord]:
    from actors.reward_engine import open_model
    from roro_ray.reward.engine_reward import LoopThread
    from roro_ray.reward.warm_rubrics import draw_pairs
    from roro_ray.reward.warm_run import cache_of, find_writer, write_warm_rubrics

    pairs = len(draw_pairs(items, config.pairs.folds, config.warm, config.seed))
    with Progress("rubrics", pairs, "pairs") as bar, open_model(config, find_writer(config)) as engine:

        def on_record(record: PairRecord, cached: bool) -> None:
            bar.advance()
            if not cached:
                told = {"status": record.status, "kind": record.kind, "attempts": record.attempts, "usd": record.usd}
                tokens = {"tokens_in": record.tokens_in, "tokens_out": record.tokens_out}
                run.log({"stage": "warm_start", "phase": "write", **told, **tokens, "error": record.error})

        loop = LoopThread("warm start")
        try:
            cache = cache_of(run.path / WARM)
            return loop.run(write_warm_rubrics(config, engine, items, cache, on_record))
        finally:
            loop.close()


def find_reward(config: Config, run: RunDir) -> Path | None:
    """Where the reward model lies that scores rollouts; None is the shipped warm start, or adapters' bare base."""
    if config.reward.rubric_source != "warm":
        return run.reward / "model"
    taught = run.path / WARM / "model"
    return taught if config.reward.backend == "engine" and run.is_done("warm_start") else None


def learn_local_reward(config: Config, run: RunDir, on_update: OnUpdate, faults: FaultLog) -> dict[str, Any]:
    """Stage 3 with `reward.backend=local`: both models in this process; returns the summary of result.json."""
    from roro_ray.data.collection import training_queries
    from roro_ray.data.store import load_pairs, load_trajectories
    from roro_ray.reward.alternate import alternate
    from roro_ray.reward.model import make_reward, save_reward
    from roro_ray.reward.preference import group_pairs

    items = group_pairs(training_queries(config), load_trajectories(run.trajectories), load_pairs(run.pairs))
    warm = make_reward(config.reward)
    trained, result = alternate(warm, items, config.pairs.folds, config.seed, run.reward / "rounds", on_update)
    summary = result.as_summary()
    write_json(run.reward / "result.json", summary)
    save_reward(trained, run.reward / "model")
    return summary


def learn_engine_reward(config: Config, run: RunDir, on_update: OnUpdate, faults: FaultLog) -> dict[str, Any]:
    """Stage 3 with `reward.backend=engine`: alternation through an engine; returns the summary of result.json."""
    from actors.census import Census
    from actors.lm_learner import LmLearner
    from actors.reward_engine import make_deliver, open_model
    from roro_ray.engines.loading import load_tokenizer
    from roro_ray.reward.engine_alternate import alternate_engine
    from roro_ray.reward.engine_batches import make_codec
    from roro_ray.reward.engine_reward import open_engine_reward, resolve_reward, save_engine_reward

    items, settings = _index_items(config, run), resolve_reward(config)
    tokenizer = load_tokenizer(settings.engine.path, settings.engine.revision)
    with (
        open_ray(config.ray),
        open_model(config, settings.engine) as engine,
        LmLearner.start(config, run.mirror.part(ADAPTERS)) as learner,
    ):
        deliver = make_deliver(config.lora.transport, run.mirror.part(ADAPTERS))
        reward = open_engine_reward(settings, engine=engine, deliver=deliver)
        census = Census(engine=engine)
        try:
            trained, result = alternate_engine(
                reward,
                learner,
                make_codec(tokenizer, reward),
                items,
                config.pairs.folds,
                config.seed,
                run.reward / "rounds",
                on_update,
            )
        finally:
            reward.close()
            faults.add({**census.total(), "learner_restarts": learner.restarts})
    summary = result.as_summary()
    write_json(run.reward / "result.json", summary)
    save_engine_reward([trained.rubricor, trained.judge], config.lora.base, run.reward / "model")
    return summary


def _index_items(config: Config, run: RunDir) -> list[StoredPairs]:
    from roro_ray.data.collection import training_queries
    from roro_ray.reward.pair_store import index_pairs

    return index_pairs(training_queries(config), run.trajectories, run.pairs)
