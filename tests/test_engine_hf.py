"""Engine `hf`: the same step alone, in any batch and by the library itself; sampling, memo, scoring, failures."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from roro_ray.engines.hf import HfEngine, resolve_model_path
from roro_ray.engines.protocol import ChoiceScores, StepRequest, StepResult
from roro_ray.engines.sampling import draw_uniforms
from roro_ray.errors import EngineError
from roro_ray.world.tasks import SUITES, draw_programs, render_query, render_solution

pytestmark = pytest.mark.timeout(60)

MODELS = ("world:small", "world:cross")
ODD_TEXTS = (
    "",
    "\n\n",
    "\x00\x07",
    "Grüße 你好 🙂 \ud800 end",
    "<eos><pad><eos>",
    "A: A: A: " * 20,
    "no delimiter at all",
    "Answer: ",
)


def make_prefixes(count: int, seed: int = 0) -> list[str]:
    """Texts of the world, each stopped after some steps."""
    rng = random.Random(seed)
    streams = [draw_programs(suite, "test", seed) for suite in SUITES]
    prefixes = []
    for index in range(count):
        program = next(streams[index % len(streams)])
        steps = render_solution(program)
        text = [render_query(program), *steps[: rng.randrange(len(steps))]]
        prefixes.append("".join(part + "\n\n" for part in text))
    return prefixes


def make_requests(count: int, seed: int = 0) -> list[StepRequest]:
    """A mix of lengths, limits, temperatures and odd texts."""
    rng = random.Random(seed)
    texts = [*make_prefixes(count - len(ODD_TEXTS), seed), *ODD_TEXTS]
    return [
        StepRequest(text, rng.choice((1, 3, 20, 48)), rng.choice((0.0, 0.0, 0.7, 1.5)), rng.randrange(1000))
        for text in texts
    ]


def generate(engine: HfEngine, requests: Sequence[StepRequest]) -> list[StepResult]:
    """All at once."""

    async def run() -> list[StepResult]:
        return await asyncio.gather(*(engine.generate_step(request) for request in requests))

    return asyncio.run(run())


def score(engine: HfEngine, questions: Sequence[tuple[str, tuple[str, ...]]]) -> list[ChoiceScores]:
    """All at once."""

    async def run() -> list[ChoiceScores]:
        return await asyncio.gather(*(engine.score_choices(*question) for question in questions))

    return asyncio.run(run())


def assert_same(got: StepResult, expected: StepResult) -> None:
    """Equal but for rounding in the log-probabilities."""
    assert replace(got, log_probs=(), first_entropy=0.0) == replace(expected, log_probs=(), first_entropy=0.0)
    assert got.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
    assert got.first_entropy == pytest.approx(expected.first_entropy, abs=1e-4)


def make_engine(path: str = "world:small", **settings: Any) -> HfEngine:
    """A loaded engine, without a memo unless asked for."""
    engine = HfEngine("tested", path, **{"memo_entries": 0, **settings})
    asyncio.run(engine.ready())
    return engine


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def small() -> HfEngine:
    return make_engine()


@pytest.fixture(scope="module")
def library() -> tuple[Any, Any]:
    directory = resolve_model_path("world:small")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(directory)


# The same step whatever the batch


def test_a_request_gives_the_same_alone_and_in_any_batch(path: str) -> None:
    requests = make_requests(40)
    alone = make_engine(path, cache_mb=0)
    expected = [generate(alone, [request])[0] for request in requests]
    together = make_engine(path)
    for seed in range(3):
        order = random.Random(seed).sample(range(len(requests)), len(requests) - 10 * seed)
        for index, result in zip(order, generate(together, [requests[i] for i in order]), strict=True):
            assert_same(result, expected[index])
    assert together.stats.forward_passes < alone.stats.forward_passes / 4
    assert together.stats.tokens_reused > 0


def test_a_kept_peek_is_continued_as_if_it_had_never_stopped(path: str) -> None:
    engine = make_engine(path)
    requests = [replace(request, max_tokens=24) for request in make_requests(30, seed=1)]
    whole = generate(engine, requests)
    for length in (1, 2, 5):
        kept = [replace(r, kept_ids=w.token_ids[:length]) for r, w in zip(requests, whole, strict=True)]
        for got, expected in zip(generate(engine, kept), whole, strict=True):
            assert_same(got, expected)


def test_a_kept_whole_step_comes_back_whole(small: HfEngine) -> None:
    request = StepRequest(make_prefixes(1)[0], 48)
    (whole,) = generate(small, [request])
    assert whole.finish == "delimiter"
    for limit in (len(whole.token_ids), 48):
        (again,) = generate(small, [replace(request, kept_ids=whole.token_ids, max_tokens=limit)])
        assert_same(again, whole)


def test_greedy_steps_are_those_of_the_library(library: tuple[Any, Any], small: HfEngine) -> None:
    model, tokenizer = library
    prefixes = make_prefixes(10, seed=2)
    for prefix, result in zip(prefixes, generate(small, [StepRequest(p, 48) for p in prefixes]), strict=True):
        ids = tokenizer(prefix, return_tensors="pt").input_ids
        output = model.generate(
            ids,
            max_new_tokens=48,
            do_sample=False,
            stop_strings=["\n\n"],
            tokenizer=tokenizer,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = output.sequences[0, ids.shape[1] :].tolist()
        logs = torch.log_softmax(torch.cat(output.logits).float(), -1)
        assert result.token_ids == tuple(new)
        assert result.log_probs == pytest.approx(logs[range(len(new)), new].tolist(), abs=1e-4)
        assert result.first_entropy == pytest.approx(torch.special.entr(logs[0].exp()).sum().item(), abs=1e-4)
        assert result.prefix_tokens == ids.shape[1]
        assert result.text == tokenizer.decode(new).split("\n\n")[0].removesuffix("<eos>")


def test_steps_end_at_the_delimiter_the_end_or_the_limit(small: HfEngine) -> None:
    query = make_prefixes(1)[0]
    step, cut = generate(small, [StepRequest(query, 48), StepRequest(query, 3)])
    assert (step.finish, cut.finish, len(cut.token_ids)) == ("delimiter", "length", 3)
    assert step.text.startswith(cut.text) and "\n" not in step.text
    program = next(draw_programs("chain", "test", 5))
    solved = render_query(program) + "\n\n" + "".join(part + "\n\n" for part in render_solution(program)[:-1])
    (answer,) = generate(small, [StepRequest(solved, 48)])
    assert answer.finish == "stop" and answer.text.startswith("Answer: ") and "<eos>" not in answer.text


# States of earlier prefixes


def test_reused_states_change_nothing_even_when_the_store_overflows() -> None:
    plain, tight = make_engine(cache_mb=0), make_engine(cache_mb=1)
    requests = make_requests(60, seed=3)
    expected = generate(plain, requests)
    for seed in range(4):
        order = random.Random(seed).sample(range(len(requests)), 40)
        for index, result in zip(order, generate(tight, [requests[i] for i in order]), strict=True):
            assert_same(result, expected[index])
    capacity = (1 << 20) // (2 * 2 * 48 * 4)
    assert tight.stats.tokens_prefilled + tight.stats.tokens_decoded > 2 * capacity  # so it did overflow
    assert tight.stats.tokens_reused > 0


def test_the_next_step_computes_only_what_was_written_since() -> None:
    engine = make_engine()
    prefix = make_prefixes(1)[0]
    (step,) = generate(engine, [StepRequest(prefix, 48)])
    before = engine.stats
    generate(engine, [StepRequest(f"{prefix}{step.text}\n\n", 48)])
    assert engine.stats.tokens_prefilled - before.tokens_prefilled == 1  # the delimiter
    assert engine.stats.tokens_reused - before.tokens_reused == step.prefix_tokens + len(step.token_ids) - 1


# Sampling


def test_a_seed_fixes_the_draw_and_another_seed_changes_it(small: HfEngine) -> None:
    prefixes = make_prefixes(20, seed=4)
    first, again, other = (
        generate(small, [StepRequest(p, 20, temperature=2.0, seed=seed) for p in prefixes]) for seed in (7, 7, 8)
    )
    for one, two in zip(first, again, strict=True):
        assert_same(one, two)
    assert [r.token_ids for r in first] != [r.token_ids for r in other]


def test_sampling_follows_the_distribution_at_its_temperature(library: tuple[Any, Any], small: HfEngine) -> None:
    model, tokenizer = library
    prefix, count, temperature = "Start with ", 6000, 1.3
    logits = model(**tokenizer(prefix, return_tensors="pt")).logits[0, -1].double()
    expected = torch.softmax(logits / temperature, -1)
    results = generate(small, [StepRequest(prefix, 1, temperature, seed) for seed in range(count)])
    counts = Counter(result.token_ids[0] for result in results)
    for token, probability in enumerate(expected.tolist()):
        deviation = math.sqrt(probability * (1 - probability) / count)
        assert abs(counts[token] / count - probability) < 5 * deviation + 1e-3
    # Log-probabilities are told at temperature 1, whatever the draw's own.
    logs = torch.log_softmax(logits, -1)
    assert results[0].log_probs[0] == pytest.approx(logs[results[0].token_ids[0]].item(), abs=1e-4)


def test_random_numbers_are_uniform_and_unrelated() -> None:
    keys, counters = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(100, dtype=np.uint64), indexing="ij")
    numbers = draw_uniforms(keys.ravel(), counters.ravel()).reshape(300, 100)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert np.histogram(numbers, 10, (0, 1))[0] == pytest.approx([3000] * 10, abs=300)
    for one, two in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.03


# Memo


def test_the_memo_answers_what_decoding_would() -> None:
    plain, remembering = make_engine(), make_engine(memo_entries=1000)
    requests = [r for r in make_requests(40, seed=5) if r.temperature == 0]
    for limit in (48, 5, 1, 20, 48):
        limited = [replace(request, max_tokens=limit) for request in requests]
        for got, expected in zip(generate(remembering, limited), generate(plain, limited), strict=True):
            assert_same(got, expected)
    assert remembering.stats.memo_hits >= 4 * len(requests)
    firsts = [result.token_ids[:1] for result in generate(plain, requests)]
    kept = [replace(r, max_tokens=48, kept_ids=first) for r, first in zip(requests, firsts, strict=True)]
    before = remembering.stats.forward_passes
    for got, expected in zip(generate(remembering, kept), generate(plain, kept), strict=True):
        assert_same(got, expected)
    assert remembering.stats.forward_passes == before


def test_the_memo_leaves_sampled_steps_and_foreign_peeks_alone() -> None:
    engine = make_engine(memo_entries=1000)
    prefix = make_prefixes(1)[0]
    (greedy,) = generate(engine, [StepRequest(prefix, 48)])
    sampled = [StepRequest(prefix, 48, temperature=3.0, seed=seed) for seed in range(5)]
    assert any(result.token_ids != greedy.token_ids for result in generate(engine, sampled))
    foreign = greedy.token_ids[0] + 1
    (forced,) = generate(engine, [StepRequest(prefix, 48, kept_ids=(foreign,))])
    assert forced.token_ids[0] == foreign
    assert_same(generate(engine, [StepRequest(prefix, 48)])[0], greedy)
    assert engine.stats.memo_hits == 1


def test_the_memo_is_bounded() -> None:
    engine = make_engine(memo_entries=5)
    generate(engine, [StepRequest(prefix, 48) for prefix in make_prefixes(12)])
    assert len(engine._memo) == 5


def test_scores_are_remembered_and_bounded() -> None:
    engine = make_engine(memo_entries=3)
    questions = [(prefix, ("Answer: 50", "Answer: 05")) for prefix in make_prefixes(5)]
    first = score(engine, questions)
    assert score(engine, questions[2:]) == first[2:]
    assert engine.stats.memo_hits == 3
    prefix, choices = questions[-1]
    assert score(engine, [(prefix, choices[:1])])[0].tokens == first[-1].tokens[:1]
    assert engine.stats.memo_hits == 3, "the same prefix with other choices is another request"
    assert len(engine._scores._scores) == 3


def test_requests_in_flight_are_computed_once() -> None:
    engine = make_engine()
    prefix = make_prefixes(1)[0]
    results = generate(engine, [StepRequest(prefix, 48)] * 9)
    assert len(set(results)) == 1
    assert engine.stats.merged == 8
    assert engine.stats.tokens_decoded == len(results[0].token_ids)


# Scoring


def test_choices_are_scored_as_the_library_scores_them(library: tuple[Any, Any], small: HfEngine) -> None:
    model, tokenizer = library
    choices = ("yes", "no", "A: 12 + 03 = 15", "A: 12 + 03 = 16", "", "xyz 🙂")
    questions = [(prefix, choices) for prefix in make_prefixes(12, seed=6)]
    for (prefix, _), result in zip(questions, score(small, questions), strict=True):
        start = len(tokenizer(prefix).input_ids)
        assert result.prefix_tokens == start
        for choice, total, tokens, least in zip(
            choices, result.log_probs, result.tokens, result.min_log_probs, strict=True
        ):
            ids = tokenizer(prefix + choice).input_ids
            logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
            each = [logs[i - 1, ids[i]].item() for i in range(start, len(ids))]
            assert tokens == len(each)
            assert total == pytest.approx(sum(each), abs=1e-3)
            assert least == pytest.approx(min(each, default=0.0), abs=1e-3)


def test_scoring_and_writing_go_together(path: str) -> None:
    engine, prefixes = make_engine(path), make_prefixes(6, seed=7)

    async def run() -> list[Any]:
        steps = [engine.generate_step(StepRequest(prefix, 48)) for prefix in prefixes]
        return await asyncio.gather(*steps, *(engine.score_choices(prefix, ("A: ", "no")) for prefix in prefixes))

    mixed = asyncio.run(run())
    for got, expected in zip(mixed, generate(make_engine(path), [StepRequest(p, 48) for p in prefixes]), strict=False):
        assert_same(got, expected)
    for got, prefix in zip(mixed[len(prefixes) :], prefixes, strict=True):
        (expected,) = score(engine, [(prefix, ("A: ", "no"))])
        assert got.log_probs == pytest.approx(expected.log_probs, abs=1e-4)


def test_a_step_scores_what_writing_it_reported(path: str) -> None:
    engine, prefixes = make_engine(path), make_prefixes(5, seed=8)
    steps = generate(engine, [StepRequest(prefix, 48) for prefix in prefixes])
    scores = score(engine, [(p, (f"{s.text}\n\n",)) for p, s in zip(prefixes, steps, strict=True)])
    for step, found in zip(steps, scores, strict=True):
        if step.finish == "delimiter":
            assert found.log_probs[0] == pytest.approx(sum(step.log_probs), abs=1e-3)
            assert found.tokens == (len(step.token_ids),)


# What goes wrong


def test_too_long_a_prefix_fails_alone_and_says_so(small: HfEngine) -> None:
    async def run() -> list[Any]:
        requests = [StepRequest("A: " * 1000, 48), StepRequest(make_prefixes(1)[0], 48)]
        steps = [small.generate_step(request) for request in requests]
        scores = [small.score_choices("A: " * 1024, ("yes",)), small.score_choices("A: " * 1023, ("yes",))]
        return await asyncio.gather(*steps, *scores, return_exceptions=True)

    long, fine, long_score, fine_score = asyncio.run(run())
    assert isinstance(long, EngineError) and "1048 tokens" in str(long) and "1024" in str(long)
    assert fine.finish == "delimiter"
    assert isinstance(long_score, EngineError) and isinstance(fine_score, ChoiceScores)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (StepRequest("A: ", 0), "max_tokens=0"),
        (StepRequest("A: ", 1, kept_ids=(1, 2)), "2 kept ids"),
        (StepRequest("A: ", 9, kept_ids=(10**6,)), "same engine"),
    ],
)
def test_a_malformed_request_is_refused(small: HfEngine, request_: StepRequest, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        generate(small, [request_])


def test_a_forward_pass_that_raises_fails_its_batch_only() -> None:
    engine = make_engine(batch_size=4)
    healthy, marked = engine._decoder._forward, engine._text.encode(["reverse"])[0]

    def forward(ids: Any, *rest: Any) -> torch.Tensor:
        if any(list(row)[-len(marked) :] == marked for row in torch.as_tensor(ids).tolist()):
            raise RuntimeError("out of memory, say")
        return healthy(ids, *rest)

    engine._decoder._forward = forward  # type: ignore[method-assign]

    async def run() -> list[Any]:
        texts = [*make_prefixes(3), "Start with 10. A: reverse", *make_prefixes(4, seed=1)]
        return await asyncio.gather(
            *(engine.generate_step(StepRequest(text, 48)) for text in texts), return_exceptions=True
        )

    results = asyncio.run(run())
    assert all(isinstance(result, EngineError) and "out of memory, say" in str(result) for result in results[:4])
    assert all(isinstance(result, StepResult) for result in results[4:])
    again = [StepRequest(make_prefixes(1)[0], 48)]
    assert_same(generate(engine, again)[0], generate(make_engine(), again)[0])


async def test_a_cancelled_request_frees_its_row_at_once() -> None:
    engine = HfEngine("tested", "world:small", memo_entries=0)
    await engine.ready()
    healthy, passes, hold = engine._decoder._forward, threading.Semaphore(0), threading.Event()
    widths: list[int] = []

    def forward(ids: Any, *rest: Any) -> torch.Tensor:
        widths.append(len(ids))
        if len(widths) == 3:
            passes.release()
            assert hold.wait(10)
        return healthy(ids, *rest)

    engine._decoder._forward = forward  # type: ignore[method-assign]
    tasks = [asyncio.create_task(engine.generate_step(StepRequest(prefix, 48))) for prefix in make_prefixes(4)]
    await asyncio.to_thread(passes.acquire)
    for task in tasks[:3]:
        task.cancel()
    await asyncio.sleep(0)
    hold.set()
    result = await tasks[3]
    assert result.finish == "delimiter"
    assert widths[:4] == [4, 4, 4, 1]


def test_long_steps_make_way_for_waiting_ones_and_lose_nothing() -> None:
    engine = make_engine(batch_size=32)
    endless = [StepRequest("qz " * (5 + n), 48, temperature=4.0, seed=n) for n in range(3)]
    ordinary = [StepRequest(prefix, 48) for prefix in make_prefixes(90, seed=9)]
    back: list[int] = []
    put_back = engine._batcher.put_back
    engine._batcher.put_back = lambda jobs: (back.append(len(jobs)), put_back(jobs))[1]  # type: ignore[method-assign]
    results = generate(engine, [*endless, *ordinary])
    assert back, "no batch made way"
    alone = make_engine()
    for request, result in zip(endless, results, strict=False):
        assert_same(result, generate(alone, [request])[0])


def test_one_engine_serves_one_event_loop_after_another() -> None:
    engine = HfEngine("tested", "world:small")  # not loaded: the first request loads it
    prefixes = make_prefixes(6, seed=10)
    results = [generate(engine, [StepRequest(prefix, 48) for prefix in prefixes[:n]]) for n in (2, 4, 6)]
    assert results[0] == results[1][:2] == results[2][:2]


def test_facts_are_those_of_the_model(small: HfEngine, library: tuple[Any, Any]) -> None:
    first, again = asyncio.run(small.ready()), asyncio.run(small.ready())
    assert first is again
    assert first.parameters == sum(p.numel() for p in library[0].parameters())
    assert first.flops_per_token == 2 * first.parameters
    assert first.fingerprint != asyncio.run(make_engine("world:cross").ready()).fingerprint
