"""The warm start with a strong LLM: what is written, what is kept, its cost, going on after a kill, and examples."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from reward_engines import RewardEngine, make_rubric_json
from stored_pairs import StrongWriter, make_stored
from tiny_models import make_tiny_model

from roro_ray.config import Config, LoraConfig, ModelConfig, RewardConfig, WarmStartConfig
from roro_ray.data.run_dir import read_metrics
from roro_ray.engines.hf import HfEngine
from roro_ray.engines.loading import load_tokenizer
from roro_ray.engines.protocol import Engine, Prices
from roro_ray.errors import ConfigError, DataError, EngineError
from roro_ray.learning.adapter_files import AdapterVersion
from roro_ray.learning.sft import IGNORED, SftBatch
from roro_ray.reward.contrastive import WriterContext, format_written, make_writing_prompt
from roro_ray.reward.pair_records import PairRecord, RecordCache, count_records, load_record
from roro_ray.reward.pair_store import StoredPairs, index_pairs
from roro_ray.reward.rubric import parse_rubric
from roro_ray.reward.warm_rubrics import count_sft_updates, draw_pairs, write_rubrics
from roro_ray.reward.warm_run import (
    cache_of,
    check_backend,
    find_writer,
    learn_examples,
    make_examples,
    write_warm_rubrics,
)
from roro_ray.types import PairKind

pytestmark = pytest.mark.timeout(60)
FOLDS = 4


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[StoredPairs]:
    return make_stored(tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"), thinking=False)


def make_engine(writer: StrongWriter | None = None, **options: object) -> RewardEngine:
    writer = writer or StrongWriter()
    return RewardEngine(writer.write, writer.prefer, **options)  # type: ignore[arg-type]


def write(
    items: list[StoredPairs], engine: Engine, cache: RecordCache, **settings: object
) -> tuple[list[PairRecord], list[bool]]:
    warm = WarmStartConfig(**{"pairs_per_query": 2, **settings})  # type: ignore[arg-type]
    context = WriterContext(engine, asyncio.run(engine.ready()), warm, RewardConfig())
    told: list[bool] = []
    pairs = draw_pairs(items, FOLDS, warm, 0)
    records = asyncio.run(write_rubrics(context, pairs, cache, lambda record, cached: told.append(cached)))
    return records, told


# Pairs on disk.


def test_pairs_are_loaded_with_their_trajectories_and_no_others(items: list[StoredPairs]) -> None:
    item = next(item for item in items if len(item.pairs) > 2)
    whole = item.load()
    assert [(kind, whole.trajectories[a].id, whole.trajectories[b].id) for kind, a, b in whole.pairs] == [
        (pair.kind, pair.preferred, pair.rejected) for pair in item.pairs
    ]
    one = item.load([item.pairs[-1]])
    assert {t.id for t in one.trajectories} == {item.pairs[-1].preferred, item.pairs[-1].rejected}
    assert all(trajectory.query_id == item.query.id for trajectory in whole.trajectories)
    assert item.has_outcome == whole.has_outcome and item.draw_weight == whole.draw_weight
    lost = replace(item.pairs[0], preferred="gone")
    with pytest.raises(DataError, match="lacks trajectory gone"):
        item.load([lost])


def test_an_index_of_pairs_without_trajectories_is_refused(items: list[StoredPairs], tmp_path: Path) -> None:
    other = make_stored(tmp_path / "other", 2, ("list",))
    with pytest.raises(DataError, match="collect again"):
        index_pairs([item.query for item in other], items[0].shard.parent, tmp_path / "other" / "pairs")


def test_drawn_pairs_are_not_held_out_cover_kinds_and_are_the_same_again(items: list[StoredPairs]) -> None:
    warm = WarmStartConfig(pairs_per_query=2)
    drawn = draw_pairs(items, FOLDS, warm, 0)
    assert drawn == draw_pairs(items, FOLDS, warm, 0) and drawn != draw_pairs(items, FOLDS, warm, 1)
    assert all(item.fold < FOLDS - 1 for item, _ in drawn)
    both = [item for item in items if len({pair.kind for pair in item.pairs}) == 2 and item.fold < FOLDS - 1]
    for item in both:
        assert {pair.kind for other, pair in drawn if other is item} == {PairKind.OUTCOME, PairKind.COST}
    assert len(draw_pairs(items, FOLDS, replace(warm, max_pairs=3), 0)) == 3


# Writing and the filter.


def test_the_prompt_tells_the_preference_and_its_kind_and_no_gold_answer(items: list[StoredPairs]) -> None:
    engine = make_engine()
    context = WriterContext(engine, asyncio.run(engine.ready()), WarmStartConfig(), RewardConfig())
    sides = set()
    for stored, pair in draw_pairs(items, FOLDS, WarmStartConfig(), 0):
        item = stored.load([pair])
        prompt = make_writing_prompt(context, item)
        secret = replace(item, query=replace(item.query, answer="never shown"))
        assert make_writing_prompt(context, secret) == prompt
        assert ("found right, the other's wrong" in prompt) == (pair.kind == PairKind.OUTCOME)
        assert ("used the large model clearly less" in prompt) == (pair.kind == PairKind.COST)
        sides.add("A" if "Solution A is preferred" in prompt else "B")
    assert sides == {"A", "B"}, "the preferred solution is not always shown first"


def test_a_good_writer_s_rubrics_are_kept_and_recover_their_pairs(items: list[StoredPairs], tmp_path: Path) -> None:
    engine = make_engine(prices=Prices(1e-6, 1e-7, 2e-6))
    records, _ = write(items, engine, RecordCache(tmp_path / "r.jsonl"))
    counts = count_records(records)
    assert counts["pairs"] == counts["parsed"] == counts["faithful"] == len(records) > 8
    assert counts["consistent"] >= 0.9 * len(records)
    for record in records:
        if record.status == "kept":
            weights = [weight for _, weight in record.criteria]
            margin = sum(
                w * 2 * (p - r) for w, p, r in zip(weights, record.yes_preferred, record.yes_rejected, strict=True)
            )
            assert margin / sum(weights) >= 0.1
    read = sum(len(request.prefix) for request in engine.requests)
    written = sum(len(engine.write(request)) + 1 for request in engine.requests)
    assert counts["tokens_out"] == written and counts["tokens_in"] > read
    expected = sum(
        (r.tokens_in - r.tokens_cached) * 1e-6 + r.tokens_cached * 1e-7 + r.tokens_out * 2e-6 for r in records
    )
    assert counts["usd"] == pytest.approx(expected, abs=1e-5) and counts["usd"] > 0


def test_a_writer_that_asks_for_the_wrong_models_is_filtered_out(items: list[StoredPairs], tmp_path: Path) -> None:
    records, _ = write(items, make_engine(StrongWriter(turned=True)), RecordCache(tmp_path / "r.jsonl"))
    assert {record.status for record in records} == {"inconsistent"}
    assert all(record.attempts == 2 for record in records) and "differ by" in str(records[0].error)


def test_a_judge_that_follows_the_side_is_found_out_by_swapping(items: list[StoredPairs], tmp_path: Path) -> None:
    engine = make_engine(StrongWriter(biased=True))
    records, _ = write(items, engine, RecordCache(tmp_path / "a.jsonl"))
    assert {record.status for record in records} == {"inconsistent"}
    assert {record.error for record in records} == {"with the preferred one as B, not chosen"}
    records, _ = write(items, engine, RecordCache(tmp_path / "b.jsonl"), swap=False)
    assert count_records(records)["consistent"] >= 0.9 * len(records)


def test_the_margin_decides(items: list[StoredPairs], tmp_path: Path) -> None:
    records, _ = write(items, make_engine(), RecordCache(tmp_path / "r.jsonl"), margin=1.95)
    assert count_records(records)["consistent"] == 0


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("no rubric", "unparsed"),
        (make_rubric_json(), "unfaithful"),  # the world's queries want their steps quoted
        ("```json\n[]\n```", "unparsed"),
    ],
)
def test_what_is_no_faithful_rubric_is_counted_as_what_it_is(
    items: list[StoredPairs], tmp_path: Path, text: str, status: str
) -> None:
    records, _ = write(items[:4], RewardEngine(lambda request: text), RecordCache(tmp_path / "r.jsonl"))
    assert {record.status for record in records} == {status}
    counts = count_records(records)
    assert counts["consistent"] == counts["faithful"] == 0
    assert counts["parsed"] == (len(records) if status == "unfaithful" else 0)


def test_verdicts_in_text_serve_endpoints_without_scores(items: list[StoredPairs], tmp_path: Path) -> None:
    strong = StrongWriter()

    def say(request: object) -> str:
        prompt = request.prefix  # type: ignore[attr-defined]
        if "(yes/no)?" in prompt:
            return "yes" if strong.prefer(prompt, ("yes", "no")) > 0.5 else "no"
        if "Solution A or solution B?" in prompt:
            return "A" if strong.prefer(prompt, ("A", "B")) > 0.5 else "B"
        return strong.write(request)  # type: ignore[arg-type]

    engine = RewardEngine(say)  # type: ignore[arg-type]
    records, _ = write(items, engine, RecordCache(tmp_path / "r.jsonl"), verdicts="text")
    assert not engine.scored and count_records(records)["consistent"] >= 0.9 * len(records)


# Cache.


def test_nothing_is_written_twice_and_a_kill_costs_only_what_was_in_flight(
    items: list[StoredPairs], tmp_path: Path
) -> None:
    straight, _ = write(items, make_engine(), RecordCache(tmp_path / "straight.jsonl"))
    file = tmp_path / "r.jsonl"
    engine = make_engine()

    class Killed(BaseException):
        pass

    def fail(prefix: str) -> bool:
        if len(engine.requests) > 5:
            raise Killed
        return False

    engine.fails = fail
    with pytest.raises(Killed):
        write(items, engine, RecordCache(file), concurrency=2)
    kept = len(RecordCache(file))
    assert 2 <= kept < len(straight)
    with file.open("a") as stream:
        stream.write('{"key": "cut o')  # what a kill leaves of a line
    again = make_engine()
    resumed, told = write(items, again, RecordCache(file))
    assert resumed == straight and sum(told) == kept
    third = make_engine()
    assert write(items, third, RecordCache(file))[0] == straight and not third.requests and not third.scored
    assert len({line["key"] for line in read_metrics(file)}) == len(straight)


def test_other_settings_or_another_model_are_other_records(items: list[StoredPairs], tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    first, _ = write(items[:4], make_engine(), RecordCache(file))
    second, told = write(items[:4], make_engine(), RecordCache(file), margin=0.2)
    assert not any(told) and {r.key for r in first}.isdisjoint({r.key for r in second})


def test_failed_pairs_are_tried_again(items: list[StoredPairs], tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    records, _ = write(items[:4], make_engine(fails=lambda prefix: "preferred" in prefix), RecordCache(file))
    assert {record.status for record in records} == {"failed"} and count_records(records)["written"] == 0
    records, told = write(items[:4], make_engine(), RecordCache(file))
    assert not any(told) and "kept" in {record.status for record in records}


def test_no_more_pairs_are_in_flight_than_allowed(items: list[StoredPairs], tmp_path: Path) -> None:
    active, most = 0, 0

    class Slow(RewardEngine):
        async def generate_step(self, request):  # type: ignore[no-untyped-def]
            nonlocal active, most
            active += 1
            most = max(most, active)
            await asyncio.sleep(0.005)
            active -= 1
            return await super().generate_step(request)

    strong = StrongWriter()
    write(items, Slow(strong.write, strong.prefer), RecordCache(tmp_path / "r.jsonl"), concurrency=3)
    assert most == 3


def test_a_record_of_another_version_is_passed_over() -> None:
    record = PairRecord("k", "q", "cost", "a", "b", "kept", criteria=(("t", 2.0),), yes_preferred=(0.5,))
    assert load_record({**record.as_json(), "time": 1.0}) == record
    for wrong in ({}, {"key": 1}, {**record.as_json(), "status": "new"}, {**record.as_json(), "criteria": [[1]]}):
        assert load_record(wrong) is None


# Both halves.


def make_config(base: Path, **warm: object) -> Config:
    return Config(
        lora=LoraConfig(base=str(base), dtype="float32", sft_updates=6, checkpoint_every=2, token_budget=4000),
        reward=RewardConfig(backend="engine", engine=ModelConfig("reward", "", format="chat", adapters=2)),
        warm=WarmStartConfig(batch=4, **warm),  # type: ignore[arg-type]
    )


class FakeLearner:
    """Notes what it is taught."""

    def __init__(self, rubricor: int = 0, judge: int = 0) -> None:
        self.versions = {"rubricor": rubricor, "judge": judge}
        self.calls: list[tuple[str, int | None, int, int]] = []
        self.batches: dict[str, list[SftBatch]] = {"rubricor": [], "judge": []}

    def sft(
        self, name: str, batches: Iterable[SftBatch], updates: int | None = None, start: int = 0
    ) -> list[dict[str, float]]:
        read = list(batches)
        self.batches[name] += read
        self.calls.append((name, updates, start, len(read)))
        self.versions[name] += len(read)
        return [{"loss": 1.0}] * len(read)

    def publish(self, name: str) -> AdapterVersion:
        return AdapterVersion(name, self.versions[name], f"/{name}")


def test_both_adapters_learn_what_was_kept(items: list[StoredPairs], base: Path, tmp_path: Path) -> None:
    config = make_config(base)
    records = asyncio.run(write_warm_rubrics(config, make_engine(), items, cache_of(tmp_path)))
    examples = make_examples(config, items, records)
    learner = FakeLearner()
    seen: list[dict[str, float | str]] = []
    published = learn_examples(config, examples, learner, seen.append)  # type: ignore[arg-type]
    assert [(adapter.name, adapter.version) for adapter in published] == [("rubricor", 6), ("judge", 6)]
    assert [call[:3] for call in learner.calls[:3]] == [("rubricor", 6, 0), ("rubricor", 6, 2), ("rubricor", 6, 4)]
    assert [metrics["update"] for metrics in seen] == [*range(6), *range(6)]
    tokenizer = load_tokenizer(str(base))
    kept = {format_written(record.criteria, chat=True) for record in records if record.status == "kept"}
    for ids_BT, mask_BT, labels_BT in learner.batches["rubricor"]:
        for ids, mask, labels in zip(ids_BT, mask_BT, labels_BT, strict=True):
            text = tokenizer.decode(labels[labels != IGNORED])
            assert text.removesuffix(tokenizer.eos_token) in kept and text.endswith(tokenizer.eos_token)
            prompt = tokenizer.decode(ids[(labels == IGNORED) & mask.bool()])
            assert prompt.endswith("<|im_start|>assistant\n") and "Solution" not in prompt and "[S]" not in prompt
    verdicts = {"yes": 0, "no": 0}
    for ids_BT, _, labels_BT in learner.batches["judge"]:
        for ids, labels in zip(ids_BT, labels_BT, strict=True):
            word = tokenizer.decode(labels[labels != IGNORED])
            prompt = tokenizer.decode(ids[labels == IGNORED])
            verdicts[word] += 1
            asked = prompt.replace(tokenizer.pad_token, "").rpartition("<|im_end|>")[0]
            assert (StrongWriter().prefer(asked, ("yes", "no")) > 0.5) == (word == "yes")
    assert min(verdicts.values()) > 0


def test_a_learner_that_comes_back_goes_on_with_the_batches_that_are_left(
    items: list[StoredPairs], base: Path, tmp_path: Path
) -> None:
    config = make_config(base)
    records = asyncio.run(write_warm_rubrics(config, make_engine(), items, cache_of(tmp_path)))
    examples = make_examples(config, items, records)
    straight, resumed = FakeLearner(), FakeLearner(rubricor=4, judge=6)
    for learner in (straight, resumed):
        learn_examples(config, examples, learner)  # type: ignore[arg-type]
    assert [call[:3] for call in resumed.calls] == [("rubricor", 6, 4)]
    for one, other in zip(straight.batches["rubricor"][4:], resumed.batches["rubricor"], strict=True):
        assert all((a == b).all() for a, b in zip(one, other, strict=True))
    with pytest.raises(ConfigError, match="comes before learn_reward"):
        learn_examples(config, examples, FakeLearner(rubricor=9))  # type: ignore[arg-type]


def test_nothing_kept_and_nothing_that_fits_are_errors_that_say_what_to_do(
    items: list[StoredPairs], base: Path, tmp_path: Path
) -> None:
    config = make_config(base, margin=1.99)
    records = asyncio.run(write_warm_rubrics(config, make_engine(), items, cache_of(tmp_path)))
    with pytest.raises(ConfigError, match=r"warm\.attempts"):
        learn_examples(config, make_examples(config, items, records), FakeLearner())  # type: ignore[arg-type]
    config = make_config(base)
    records = asyncio.run(write_warm_rubrics(config, make_engine(), items, cache_of(tmp_path)))
    examples = replace(make_examples(config, items, records), max_tokens=10)
    with pytest.raises(ConfigError, match=r"lora\.token_budget"):
        learn_examples(config, examples, FakeLearner())  # type: ignore[arg-type]


def test_a_broken_writer_ends_the_warm_start(items: list[StoredPairs], tmp_path: Path) -> None:
    config = make_config(Path("base"))
    with pytest.raises(EngineError, match="pairs failed; the first"):
        asyncio.run(write_warm_rubrics(config, make_engine(fails=lambda prefix: True), items, cache_of(tmp_path)))


def test_the_writer_is_a_model_of_the_pool_or_one_of_its_own() -> None:
    config = make_config(Path("base"))
    assert find_writer(config).name == "large"
    assert find_writer(replace(config, warm=WarmStartConfig(writer=""))) == config.warm.engine
    with pytest.raises(ConfigError, match="did you mean 'large'"):
        find_writer(replace(config, warm=WarmStartConfig(writer="larg")))
    with pytest.raises(ConfigError, match=r"reward\.backend=engine"):
        check_backend(Config())


def test_updates_follow_the_examples_up_to_a_limit() -> None:
    warm = WarmStartConfig(batch=16, epochs=2.0)
    assert [count_sft_updates(n, warm, 200) for n in (0, 1, 80, 10_000)] == [0, 1, 10, 200]


def test_a_pass_yields_every_example_and_short_ones_go_on(items: list[StoredPairs], base: Path, tmp_path: Path) -> None:
    config = make_config(base)
    records = asyncio.run(write_warm_rubrics(config, make_engine(), items, cache_of(tmp_path)))
    examples = make_examples(config, items, records)
    count = examples.count("rubricor")
    seen = set()
    for ids_BT, mask_BT, _ in itertools.islice(examples.draw_batches("rubricor", 1, 0), count):
        seen.add(tuple(ids_BT[0][mask_BT[0].bool()].tolist()))
    assert len(seen) == len({(record.query_id, record.criteria) for record, _, _ in examples.kept})
    few = replace(examples, kept=examples.kept[:2])
    assert [len(batch[0]) for batch in itertools.islice(few.draw_batches("rubricor", 16, 0), 3)] == [2, 2, 2]


def test_a_tiny_real_model_as_writer_breaks_nothing(items: list[StoredPairs], base: Path, tmp_path: Path) -> None:
    engine = HfEngine("writer", str(base), model_format="chat", thinking="off")
    records, _ = write(items[:3], engine, RecordCache(tmp_path / "r.jsonl"), max_tokens=40, pairs_per_query=1)
    assert {record.status for record in records} <= {"unparsed", "unfaithful", "inconsistent", "kept"}
    counts = count_records(records)
    assert counts["tokens_in"] > 100 * len(records) and counts["tokens_out"] > 0


def test_written_rubrics_read_back_in_both_forms() -> None:
    texts = ("a step \u2260 b by the large model", "x by the small model", "y by the small model")
    criteria = tuple(zip(texts, (2.0, 5.0, 1.0), strict=True))
    for chat in (True, False):
        rubric = parse_rubric(format_written(criteria, chat))
        assert [(criterion.text, criterion.weight) for criterion in rubric.criteria] == list(criteria)
