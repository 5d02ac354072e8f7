"""The benchmarks of real models count right and compare right; no time is asserted."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedEngine

from bench import engines, switching, trajectories
from bench._episodes import Shape, count_written, make_scripts, make_texts, run_episodes
from bench._pool import make_endless, make_tiny_pair
from bench._specreason import Work, solve, total
from bench._turns import Counts, Turn, check_counts, compare, subtract, take_turns
from roro_ray.engines.loading import load_tokenizer
from roro_ray.engines.pool import EnginePool
from roro_ray.engines.protocol import StepRequest, StepResult
from roro_ray.types import Decision

SHAPE = Shape(episodes=6, steps=4, step_tokens=5, prompt_tokens=30)
WORLD = "world:small"


class EndlessEngine(ScriptedEngine):
    """Writes letters up to the token limit, and counts what it reads of each prompt."""

    def __init__(self, name: str):
        super().__init__(name, write=lambda prefix: "x" * 10_000)


class CountingRouter:
    def __init__(self) -> None:
        self.asked = 0

    async def decide(self, observation: Any) -> Decision:
        self.asked += 1
        return Decision(1, 0.0, (0.0, 1.0))


@pytest.fixture
async def pool() -> EnginePool:
    pool = EnginePool([EndlessEngine("small"), EndlessEngine("large")])
    await pool.ready()
    return pool


async def test_all_arms_of_switching_write_the_same(pool: EnginePool) -> None:
    tokenizer, router = load_tokenizer(WORLD), CountingRouter()
    arms = switching.make_arms(pool, SHAPE, tokenizer, router)
    arms |= await switching.make_variants(pool, SHAPE, tokenizer, None)
    turns = await take_turns(arms, rounds=2)
    written = count_written(SHAPE, make_scripts(SHAPE, "alternate"))
    assert written == (60, 60)
    check_counts(turns, written, [name for name in arms if name != "prefill"])
    assert {turn.counts.written for turn in turns["prefill"]} == {(0, 0)}
    assert router.asked == 3 * 6 * 4  # three rounds with the one that warms up, six episodes, four steps
    found = switching.summarise(turns, "wall_s")
    assert {"routed / bound", "routed / whole", "text / switching", "random / switching"} <= set(found)


async def test_no_prompt_of_one_turn_is_known_from_another(pool: EnginePool) -> None:
    arms = switching.make_arms(pool, SHAPE, load_tokenizer(WORLD), None)
    await take_turns({name: arms[name] for name in ("whole", "prefill", "whole again")}, rounds=2)
    prompts = [request.prefix[:20] for engine in pool.engines for request in engine.requests]
    assert len(prompts) == len(set(prompts)) == 3 * (6 + 12 + 6)


def test_the_bound_reads_what_a_model_did_not_write() -> None:
    tokenizer = load_tokenizer(WORLD)
    scripts = make_scripts(SHAPE, "alternate")
    read = [0, 0]
    for model, request in switching.make_readings(SHAPE, "000000", tokenizer, scripts):
        assert request.known is not None and request.max_tokens == 1
        read[model] += len(request.known.ids)
    texts = make_texts(SHAPE, "000000", tokenizer)
    prompts = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    assert sum(read) == 6 * 4 * 5 + prompts  # the other model's reading of each prompt is part of `whole`
    assert read[0] == pytest.approx(read[1], abs=6)


def test_prompts_are_as_long_in_every_turn() -> None:
    tokenizer = load_tokenizer(WORLD)
    lengths = [
        [len(tokenizer(text)["input_ids"]) for text in make_texts(SHAPE, turn, tokenizer)]
        for turn in ("000001", "017004")
    ]
    assert lengths[0] == lengths[1]


@pytest.mark.parametrize("pattern", ["alternate", "random", "same"])
def test_scripts_give_each_model_one_half(pattern: str) -> None:
    scripts = make_scripts(SHAPE, pattern)
    assert count_written(SHAPE, scripts) == (60, 60)
    changes = [sum(a != b for a, b in itertools.pairwise(script)) for script in scripts]
    assert {"alternate": set(changes) == {3}, "random": max(changes) > 0, "same": set(changes) == {0}}[pattern]


async def test_an_episode_that_ends_early_is_no_measurement() -> None:
    pool = EnginePool([EndlessEngine("small"), ScriptedEngine("large", write=lambda prefix: "ok")])
    await pool.ready()
    texts = make_texts(SHAPE, "0", load_tokenizer(WORLD))
    counts = await run_episodes(pool, SHAPE, texts, [(0, 1, 0, 1)] * 6)
    with pytest.raises(ValueError, match=r"'routed' wrote .* expected \(60, 60\)"):
        check_counts({"routed": [Turn(1, 1, counts)]}, (60, 60), ["routed"])


async def test_a_failed_episode_fails_the_benchmark() -> None:
    pool = EnginePool([ScriptedEngine("small", fails=lambda prefix: True), EndlessEngine("large")])
    await pool.ready()
    with pytest.raises(RuntimeError, match="told to fail"):
        await run_episodes(pool, SHAPE, make_texts(SHAPE, "0", load_tokenizer(WORLD)), [(0, 1, 0, 1)] * 6)


async def test_turns_are_interleaved_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []

    def make(name: str) -> Callable[[str], Any]:
        async def arm(turn: str) -> Counts:
            order.append(name + turn)
            return Counts((1,))

        return arm

    turns = await take_turns({"a": make("a"), "b": make("b")}, rounds=2)
    assert [len(runs) for runs in turns.values()] == [2, 2] and len(order) == len(set(order)) == 6
    assert [name[0] for name in order] == ["b", "a", "a", "b", "b", "a"]


def test_ratios_are_taken_round_by_round() -> None:
    def runs(*seconds: float) -> list[Turn]:
        return [Turn(value, 2 * value, Counts((1,))) for value in seconds]

    routed, whole, prefill = runs(3, 8, 10), runs(1, 2, 4), runs(1, 2, 1)
    bound = compare(routed, whole, prefill)
    assert (bound.median, bound.low, bound.high) == (2.0, 1.5, 2.0)
    assert compare(routed, whole, by="cpu_s").median == 3.0
    assert subtract(routed, prefill, whole).median == 2.25


class ScriptedCompleter:
    def __init__(self) -> None:
        self.calls: list[tuple[int, str, int, bool]] = []

    async def complete(self, model: int, text: str, tokens: int, scores: bool = False) -> tuple[str, int]:
        self.calls.append((model, text, tokens, scores))
        return f"{'SL'[model]}{len(self.calls)}", tokens


async def test_the_loop_drafts_scores_and_writes_again() -> None:
    completer = ScriptedCompleter()
    work = await solve(completer, "Query", (0, 1), 5)
    assert work == Work(kept=(5, 5), rejected=5, scores=2)
    kinds = [(model, tokens, scores) for model, _, tokens, scores in completer.calls]
    assert kinds == [(0, 5, False), (1, 1, True), (0, 5, False), (1, 1, True), (1, 5, False)]
    texts = [text for _, text, _, _ in completer.calls]
    assert texts[0] == "Query\n\n" and texts[1].startswith("Query\n\nS1\n\nEvaluate the last")
    assert texts[4] == "Query\n\nS1\n\n", "the rejected draft is gone"


def test_a_loop_that_wrote_less_is_refused() -> None:
    scripts = [(0, 1, 0, 1)] * 6
    whole = total([Work((10, 10), 10, 4)] * 6)
    trajectories.check_work(whole, SHAPE, scripts)
    with pytest.raises(ValueError, match="not comparable"):
        trajectories.check_work(dataclasses.replace(whole, scores=23), SHAPE, scripts)


def test_rates_count_the_queries_of_each_arm() -> None:
    counts = Counts((1, 1))
    turns = {"routed": [Turn(2.0, 2.0, counts)], "loop": [Turn(1.0, 4.0, counts)]}
    found = trajectories.summarise(turns, {"routed": 64, "loop": 4})
    assert found["trajectories_per_s"]["routed"]["median"] == 32 and found["wall_s"]["loop"]["median"] == 8
    assert found["cpu_s"]["loop"]["median"] == 32


async def test_engines_that_write_other_steps_are_not_compared() -> None:
    def make(letter: str) -> ScriptedEngine:
        return ScriptedEngine(letter, write=lambda prefix: letter)

    same = await engines.compare_engines({"hf": make("a"), "vllm": make("a")}, 4, 40, 2)
    assert same["different"] == 0 and same["steps"] == 3 * 40
    assert same["vllm over hf"]["wall_s"]["median"] > 0
    with pytest.raises(ValueError, match="120 of 120 steps differ"):
        await engines.compare_engines({"hf": make("a"), "vllm": make("b")}, 4, 40, 2)


async def test_no_request_of_an_engine_comes_twice() -> None:
    engine = ScriptedEngine()
    for batch in (1, 8):
        await engines.compare_engines({"hf": engine, "vllm": ScriptedEngine()}, batch, 30, 2)
    prefixes = [request.prefix for request in engine.requests]
    assert len(set(prefixes)) > 0.9 * len(prefixes) == 0.9 * 180


def test_an_engine_twice_as_fast_has_half_the_time() -> None:
    turns = {"hf": [Turn(2.0, 3.0, Counts((100,)))], "vllm": [Turn(1.0, 1.0, Counts((100,)))]}
    found = engines.summarise(turns, 0, 10)
    assert found["tokens_per_s"] == {"hf": 50, "vllm": 100}
    assert found["vllm over hf"]["wall_s"]["median"] == 2 and found["vllm over hf"]["cpu_s"]["median"] == 3


def test_an_endless_copy_names_no_end_and_shares_the_weights(tmp_path: Path) -> None:
    small, _ = make_tiny_pair(tmp_path / "models")
    (small / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "top_p": 0.9}))
    copy = make_endless(small, tmp_path / "copy")
    assert json.loads((copy / "generation_config.json").read_text()) == {"eos_token_id": None, "top_p": 0.9}
    assert load_tokenizer(str(copy)).eos_token_id is None
    assert (copy / "model.safetensors").is_symlink()
    assert json.loads((small / "tokenizer_config.json").read_text())["eos_token"] is not None


async def test_text_is_handed_over_without_ids() -> None:
    asked: list[StepRequest] = []

    class Taker(ScriptedEngine):
        async def generate_step(self, request: StepRequest) -> StepResult:
            asked.append(request)
            return dataclasses.replace(await super().generate_step(request), encoded_ids=(1, 2), exact=True)

    engine = switching.TextOnly(Taker())
    result = await engine.generate_step(StepRequest("Q\n\n", 5))
    assert asked[0].known is None and result.encoded_ids == () and not result.exact
    assert (await engine.ready()).tokenizer == ""
