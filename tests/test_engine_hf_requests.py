"""Engine `hf`: what else a request may say: other delimiters, stops, least tokens; streamed, remembered, in chats."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import FAMILIES
from transformers import AutoTokenizer

from roro_ray.engines.hf import HfEngine
from roro_ray.engines.loading import load_model
from roro_ray.engines.protocol import PrefixIds, Prices, StepDelta, StepRequest, StepResult
from roro_ray.engines.rows import Row
from roro_ray.engines.streaming import StepStream, hand_over
from roro_ray.engines.text import StepText
from roro_ray.errors import ConfigError, EngineError

pytestmark = pytest.mark.timeout(60)
ModelMaker = Callable[..., Path]
QUERIES = ("How many clips?", "Let $x$ be 5.\n\nFind $2x$.", "Grüße 你好 🙂", "1 + 1", "Okay, so", "")
ENDINGS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("\n\n", (), 0),
    ("\n\n", (), 1),
    ("\n\n", (), 4),
    ("\n\n", (), 25),
    ("\n\n", ("</think>",), 0),
    ("\n\n", ("</think>",), 12),
    ("", ("</think>",), 0),
    ("", (), 0),
    ("", (".\n\n", "e", "</think>"), 0),
    ("\n", ("the", "e w", "<｜User｜>"), 3),  # noqa: RUF001
    (" ", ("🙂", ""), 2),
)


def generate(engine: HfEngine, requests: Sequence[StepRequest]) -> list[StepResult]:
    async def run() -> list[StepResult]:
        return await asyncio.gather(*(engine.generate_step(request) for request in requests))

    return asyncio.run(run())


def make_engine(path: Path | str, **settings: Any) -> HfEngine:
    engine = HfEngine("tested", str(path), **{"memo_entries": 0, "model_format": "chat", **settings})
    asyncio.run(engine.ready())
    return engine


def make_requests(engine: HfEngine, ending: tuple[str, tuple[str, ...], int]) -> list[StepRequest]:
    rule = dict(zip(("delimiter", "stops", "min_tokens"), ending, strict=True))
    opened = [asyncio.run(engine.ready()).format.open(query) for query in QUERIES]
    draws = itertools.product(opened, ((0.0, 0), (1.0, 1), (1.0, 2), (1.3, 3)))
    return [StepRequest(text, 60, temperature, seed, **rule) for text, (temperature, seed) in draws]


def find_end(tokenizer: Any, ids: Sequence[int], ends: set[int], request: StepRequest) -> tuple[str, str, int]:
    """The rule, said slowly: (finish, text, tokens) of a step that begins with these tokens."""
    for count in range(1, len(ids) + 1):
        before, text = tokenizer.decode(ids[: count - 1]), tokenizer.decode(ids[:count])
        if ids[count - 1] in ends:
            return "stop", before, count
        marks = [(stop, "marker") for stop in request.stops if stop]
        if request.delimiter and count >= request.min_tokens:
            marks.append((request.delimiter, "delimiter"))
        found = [
            (at, finish)
            for mark, finish in marks
            for at in range(len(text))
            if text.startswith(mark, at) and at + len(mark) > len(before.rstrip("\ufffd"))
        ]
        if found:
            at, finish = min(found)
            return finish, text[:at], count
    return "length", tokenizer.decode(ids), len(ids)


@pytest.mark.parametrize("family", ["qwen3", "deepseek_qwen", "llama"])
def test_steps_end_by_the_rule_that_the_request_gives(family: str, tiny_model: ModelMaker) -> None:
    engine = make_engine(tiny_model(family))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(family))
    ends = set(load_model(str(tiny_model(family)), "cpu", "float32").eos_ids)
    never = [replace(request, max_tokens=60) for request in make_requests(engine, ("", (), 0))]
    unended = [list(result.token_ids) for result in generate(engine, never)]
    seen = set()
    for ending in ENDINGS:
        requests = make_requests(engine, ending)
        for request, ids, result in zip(requests, unended, generate(engine, requests), strict=True):
            finish, text, count = find_end(tokenizer, ids, ends, request)
            assert (result.finish, result.text, len(result.token_ids)) == (finish, text, count)
            assert result.token_ids == tuple(ids[:count]) and len(result.log_probs) == count
            seen.add(finish)
    assert seen == {"delimiter", "stop", "marker", "length"}


def test_a_blank_line_before_the_least_number_of_tokens_belongs_to_the_step(tiny_model: ModelMaker) -> None:
    engine = make_engine(tiny_model())
    first, merged = (generate(engine, make_requests(engine, ("\n\n", (), least))) for least in (0, 20))
    pairs = [(one, two) for one, two in zip(first, merged, strict=True) if one.finish == "delimiter"]
    assert len(pairs) > 5
    for one, two in pairs:
        assert two.token_ids[: len(one.token_ids)] == one.token_ids
        assert len(one.token_ids) >= 20 or two.text.startswith(f"{one.text}\n\n")


@pytest.mark.parametrize("family", ["qwen3", "deepseek_qwen"])
@pytest.mark.parametrize("ending", ENDINGS)
async def test_no_part_of_a_mark_that_may_be_forming_is_told(
    family: str, ending: tuple[str, tuple[str, ...], int], tiny_model: ModelMaker
) -> None:
    engine = HfEngine("tested", str(tiny_model(family)), memo_entries=0, model_format="chat")
    facts = await engine.ready()

    async def follow(request: StepRequest) -> None:
        told, tokens = "", 0
        async for part in engine.stream_step(request):
            if isinstance(part, StepDelta):
                told, tokens = told + part.text, tokens + len(part.token_ids)
                # A blank line that came too early to end the step is told but for its last newline.
                marks = [*request.stops, "" if request.min_tokens else request.delimiter]
                assert not any(told.endswith(mark[:cut]) for mark in marks for cut in range(1, len(mark)))
                assert not told.endswith("\ufffd")
            else:
                whole = await engine.generate_step(request)
                assert (part.text, part.token_ids, part.finish) == (whole.text, whole.token_ids, whole.finish)
                assert part.text.startswith(told) and tokens <= len(part.token_ids)

    rule = dict(zip(("delimiter", "stops", "min_tokens"), ending, strict=True))
    draws = [(0.0, 0), (1.0, 1), (1.0, 2)]
    await asyncio.gather(
        *(follow(StepRequest(facts.format.open(q), 40, t, seed, **rule)) for q in QUERIES[:3] for t, seed in draws)
    )


async def test_a_reader_need_not_wait_for_the_end_of_a_long_step(tiny_model: ModelMaker) -> None:
    engine = HfEngine("tested", str(tiny_model(tied=True)), memo_entries=0)
    await engine.ready()
    request = StepRequest("Okay, so", 600, delimiter="")
    whole = await engine.generate_step(request)
    expected = await engine.generate_step(replace(request, max_tokens=10, temperature=1.0))
    assert len(whole.token_ids) == 600
    long, order = engine.stream_step(request), []

    async def read(stream: Any, name: str) -> StepResult:
        async for part in stream:
            order.append((name, type(part)))
        return part  # type: ignore[no-any-return]

    await anext(long)
    later = engine.stream_step(replace(request, max_tokens=10, temperature=1.0))
    results = await asyncio.gather(read(long, "long"), read(later, "later"))
    assert order.index(("later", StepResult)) < order.index(("long", StepResult))
    assert [result.token_ids for result in results] == [whole.token_ids, expected.token_ids]
    prefix = len(AutoTokenizer.from_pretrained(tiny_model()).encode(request.prefix))
    # Rows that go on in another batch compute their last token's state there, and no other one again.
    assert engine.stats.tokens_prefilled < 3 * prefix + 100


@pytest.mark.parametrize("family", [*FAMILIES, "world:small", "world:cross"])
async def test_a_long_text_is_told_as_if_it_were_rendered_whole(family: str, tiny_model: ModelMaker) -> None:
    loaded = load_model(family if ":" in family else str(tiny_model(family)), "cpu", "float32")
    text = StepText(loaded.tokenizer, loaded.eos_ids, loaded.vocabulary)
    draw = random.Random(0)
    usable = [token for token in range(len(loaded.tokenizer)) if token not in loaded.eos_ids]
    answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    for ending in (text.make_ending("", ()), text.make_ending("", ("</thinks>", "\n\n\n"))):
        stream, row, told = StepStream(text, (), ending), Row([0], 1, 999), ""
        for _ in range(300):
            row.ids += [draw.choice(usable) for _ in range(draw.choice((1, 1, 1, 5)))]
            if text.end(row.ids[1:], 9999, ending) is not None:
                break
            hand_over([(stream, row)])
            delta = await stream.next_delta(answer)
            assert delta is not None
            told += delta.text
            assert told == text.certain(row.ids[1:], ending)
        assert len(told) > 200


def test_the_same_alone_and_among_requests_that_end_otherwise(tiny_model: ModelMaker) -> None:
    alone, together = make_engine(tiny_model(), cache_mb=0), make_engine(tiny_model())
    requests = [request for ending in ENDINGS for request in make_requests(alone, ending)]
    random.Random(0).shuffle(requests)
    requests = requests[:60]
    expected = [generate(alone, [request])[0] for request in requests]
    for got, want in zip(generate(together, requests), expected, strict=True):
        assert (got.text, got.token_ids, got.finish) == (want.text, want.token_ids, want.finish)
        assert got.log_probs == pytest.approx(want.log_probs, abs=1e-4)


def test_the_memo_tells_requests_apart_by_how_they_end(tiny_model: ModelMaker) -> None:
    plain, remembering = make_engine(tiny_model()), make_engine(tiny_model(), memo_entries=1000)
    requests = [request for ending in ENDINGS for request in make_requests(plain, ending) if not request.temperature]
    limited = [replace(request, max_tokens=limit) for limit in (60, 7, 60, 1) for request in requests]
    for start in range(0, len(limited), 11):
        some = limited[start : start + 11]
        for got, want in zip(generate(remembering, some), generate(plain, some), strict=True):
            assert (got.text, got.token_ids, got.finish) == (want.text, want.token_ids, want.finish)
    assert remembering.stats.memo_hits > len(limited) // 2


def test_an_ordinary_request_is_remembered_as_before(tiny_model: ModelMaker) -> None:
    engine = make_engine(tiny_model(), memo_entries=10)
    (first,) = generate(engine, [StepRequest("1 + 1", 20)])
    assert generate(engine, [StepRequest("1 + 1", 20, stops=("",))]) == [first]  # an empty stop ends nothing


def test_fields_that_the_engine_does_not_use_keep_no_requests_apart(tiny_model: ModelMaker) -> None:
    engine = make_engine(tiny_model())
    plain = StepRequest("1 + 1 = ", 12)
    others = [replace(plain, known=PrefixIds((1, 2), 3)), replace(plain, schema='{"type": "object"}')]
    assert len(set(generate(engine, [plain, *others]))) == 1
    assert engine.stats.merged == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_prompt_begins_once_and_a_plain_one_as_the_tokenizer_begins(family: str, tiny_model: ModelMaker) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(family))
    chat, plain = make_engine(tiny_model(family)), make_engine(tiny_model(family), model_format="plain")
    prompt = asyncio.run(chat.ready()).format.open("How many?")
    whole = tokenizer.apply_chat_template([{"role": "user", "content": "How many?"}], add_generation_prompt=True)
    opening = 2 if family.startswith("qwen3") else 0  # "<think>\n", which the template leaves to the model
    assert generate(chat, [StepRequest(prompt, 1)])[0].prefix_tokens == len(whole["input_ids"]) + opening
    adds = 1 if tokenizer.bos_token else 0
    bare = len(tokenizer.encode("How many?", add_special_tokens=False))
    assert generate(plain, [StepRequest("How many?", 1)])[0].prefix_tokens == bare + adds

    async def score(engine: HfEngine) -> tuple[int, tuple[int, ...]]:
        scores = await engine.score_choices("How many?", ("yes", " no"))
        return scores.prefix_tokens, scores.tokens

    tokens = tuple(len(tokenizer.encode(f"How many?{c}", add_special_tokens=False)) - bare for c in ("yes", " no"))
    assert asyncio.run(score(chat)) == (bare, tokens)
    assert asyncio.run(score(plain)) == (bare + adds, tokens)


def test_facts_tell_format_prices_and_active_parameters(tiny_model: ModelMaker) -> None:
    prices = Prices(1e-6, 1e-7, 2e-6)
    facts = asyncio.run(make_engine(tiny_model("qwen3_moe"), prices=prices).ready())
    assert facts.prices == prices and facts.max_context == 4096 and facts.tokenizer == ""
    assert facts.format.thinks and facts.format.before == "<|im_start|>user\n"
    expert = 3 * 64 * 64
    assert facts.parameters - facts.flops_per_token / 2 == 2 * 2 * expert  # two layers, two of four experts each
    off = asyncio.run(make_engine(tiny_model("qwen3_moe"), thinking="off").ready())
    assert not off.format.thinks
    world = asyncio.run(HfEngine("tested", "world:small").ready())
    assert world.flops_per_token == 2.0 * world.parameters and world.format.open("q") == "q\n\n"
    with pytest.raises(ConfigError, match="no chat template"):
        make_engine("world:small")


def test_a_context_shorter_than_the_positions_is_kept_to(tiny_model: ModelMaker) -> None:
    engine = make_engine(tiny_model(), max_context=30)
    assert asyncio.run(engine.ready()).max_context == 30
    assert generate(engine, [StepRequest("1 + 1", 26)])[0].prefix_tokens == 4
    with pytest.raises(EngineError, match="more than the model's 30 positions"):
        generate(engine, [StepRequest("1 + 1", 27)])
    with pytest.raises(ConfigError, match="more than its 4096 positions"):
        make_engine(tiny_model(), max_context=5000)


@pytest.mark.parametrize(("family", "dtype"), [("qwen3", "bfloat16"), ("qwen3_moe", "bfloat16"), ("llama", "float16")])
def test_half_precision_decodes(family: str, dtype: str, tiny_model: ModelMaker) -> None:
    engine = make_engine(tiny_model(family), dtype=dtype)
    results = generate(engine, make_requests(engine, ("\n\n", ("</think>",), 2)))
    assert {result.finish for result in results} >= {"delimiter"}
    assert all(len(result.log_probs) == len(result.token_ids) for result in results)
