"""Streamed steps: the same step as asked for whole, told without half characters, and given up without a trace."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from roro_ray.engines.hf import HfEngine
from roro_ray.engines.protocol import StepDelta, StepRequest, StepResult, stream_step
from roro_ray.engines.rows import Row
from roro_ray.engines.sampling import draw_tokens, draw_uniforms, keep_nucleus
from roro_ray.engines.streaming import StepStream, hand_over
from roro_ray.engines.text import StepText
from roro_ray.errors import EngineError, EngineUnavailableError
from tests.fakes import ScriptedEngine
from tests.test_batching import wait_until
from tests.test_engine_hf import MODELS, assert_same, generate, make_engine, make_prefixes, make_requests

pytestmark = pytest.mark.timeout(60)


async def read(engine: Any, request: StepRequest) -> tuple[list[StepDelta], StepResult]:
    """The deltas and the result of one step; the result is the last item."""
    items = [item async for item in stream_step(engine, request)]
    assert isinstance(items[-1], StepResult)
    assert all(isinstance(item, StepDelta) for item in items[:-1])
    return items[:-1], items[-1]  # type: ignore[return-value]


def read_all(engine: Any, requests: Sequence[StepRequest]) -> list[tuple[list[StepDelta], StepResult]]:
    """All at once."""

    async def run() -> list[tuple[list[StepDelta], StepResult]]:
        return await asyncio.gather(*(read(engine, request) for request in requests))

    return asyncio.run(run())


def check_deltas(deltas: Sequence[StepDelta], result: StepResult, engine: HfEngine, kept: tuple[int, ...] = ()) -> None:
    """Kept ids and deltas are the beginning of the result, in tokens and in text."""
    ids = kept + tuple(token for delta in deltas for token in delta.token_ids)
    assert all(delta.token_ids for delta in deltas)
    assert result.token_ids[: len(ids)] == ids
    known = engine._text.render(kept).rstrip("\ufffd") if kept else ""
    told = "".join(delta.text for delta in deltas)
    if told:
        assert result.text.startswith(known + told)


def slow_down(engine: HfEngine) -> None:
    """Let every forward pass take long enough for a reader to see each token."""
    forward, pause = engine._decoder._forward, threading.Event()

    def slow(*arguments: Any) -> torch.Tensor:
        pause.wait(0.004)
        return forward(*arguments)

    engine._decoder._forward = slow  # type: ignore[method-assign]


class Gate:
    """Holds the decode thread before the pass of a given number until it is opened; notes each pass's rows."""

    def __init__(self, engine: HfEngine, at: int) -> None:
        self.widths: list[int] = []
        self.reached, self.open = threading.Event(), threading.Event()
        forward = engine._decoder._forward

        def held(ids: Any, *rest: Any) -> torch.Tensor:
            self.widths.append(len(ids))
            if len(self.widths) == at:
                self.reached.set()
                assert self.open.wait(20)
            return forward(ids, *rest)

        engine._decoder._forward = held  # type: ignore[method-assign]


# The same step


@pytest.mark.parametrize("path", MODELS)
def test_streamed_steps_are_those_asked_for_whole(path: str) -> None:
    engine, requests = make_engine(path), make_requests(64, seed=1)
    expected = [generate(engine, [request])[0] for request in requests]
    deltas_seen = 0
    for (deltas, result), request, whole in zip(read_all(engine, requests), requests, expected, strict=True):
        assert_same(result, whole)
        assert len(result.token_ids) <= request.max_tokens
        check_deltas(deltas, result, engine)
        deltas_seen += len(deltas)
    assert deltas_seen > len(requests)
    assert engine.active == 0


def test_alone_a_streamed_step_has_the_same_bits() -> None:
    for request in make_requests(16, seed=2):
        whole, streaming = make_engine(), make_engine()
        assert read_all(streaming, [request])[0][1] == generate(whole, [request])[0]


def test_a_slow_model_is_told_token_by_token() -> None:
    engine = make_engine()
    slow_down(engine)
    request = StepRequest(make_prefixes(1)[0], 48)
    ((deltas, result),) = read_all(engine, [request])
    assert max(len(delta.token_ids) for delta in deltas) <= 3
    assert len(deltas) >= len(result.token_ids) // 2
    told = "".join(delta.text for delta in deltas)
    assert told and result.text.startswith(told) and len(told) >= len(result.text) - 4


@pytest.mark.parametrize("path", MODELS)
def test_kept_ids_are_continued_and_not_told_again(path: str) -> None:
    engine = make_engine(path)
    slow_down(engine)
    requests = [replace(r, max_tokens=24) for r in make_requests(20, seed=3)]
    whole = generate(engine, requests)
    for length in (1, 4):
        kept = [replace(r, kept_ids=w.token_ids[:length]) for r, w in zip(requests, whole, strict=True)]
        for (deltas, result), request, expected in zip(read_all(engine, kept), kept, whole, strict=True):
            assert_same(result, expected)
            check_deltas(deltas, result, engine, request.kept_ids)


def test_the_limit_cuts_a_streamed_step() -> None:
    engine, prefix = make_engine(), make_prefixes(1)[0]
    for limit in (1, 2, 5):
        ((deltas, result),) = read_all(engine, [StepRequest(prefix, limit)])
        assert (result.finish, len(result.token_ids)) == ("length", limit)
        check_deltas(deltas, result, engine)


# Who reads what


def test_streamed_and_plain_requests_share_batches_and_are_not_mixed_up() -> None:
    engine, requests = make_engine(), make_requests(64, seed=4)
    alone = make_engine()
    expected = [generate(alone, [request])[0] for request in requests]
    before = engine.stats.forward_passes

    async def run() -> list[Any]:
        asked = [read(engine, r) if i % 2 else engine.generate_step(r) for i, r in enumerate(requests)]
        return await asyncio.gather(*asked)

    for index, (got, whole) in enumerate(zip(asyncio.run(run()), expected, strict=True)):
        deltas, result = got if index % 2 else ([], got)
        assert_same(result, whole)
        check_deltas(deltas, result, engine)
    assert engine.stats.forward_passes - before < 48 * 4  # in one batch, or a few


def test_equal_streamed_requests_each_get_the_whole_step() -> None:
    engine = make_engine()
    slow_down(engine)
    request = StepRequest(make_prefixes(1)[0], 48, 0.7, 5)

    async def run() -> list[Any]:
        return await asyncio.gather(*(read(engine, request) for _ in range(4)), engine.generate_step(request))

    *streamed, whole = asyncio.run(run())
    for deltas, result in streamed:
        assert_same(result, whole)
        assert "".join(delta.text for delta in deltas).startswith(whole.text[:1])
    assert engine.stats.merged == 0


def test_a_known_step_comes_from_the_memo_and_a_streamed_one_goes_there() -> None:
    engine = make_engine(memo_entries=100)
    request = StepRequest(make_prefixes(1)[0], 48)
    ((_, first),) = read_all(engine, [request])
    passes = engine.stats.forward_passes
    ((deltas, again),) = read_all(engine, [request])
    assert (deltas, again) == ([], first)
    ((_, cut),) = read_all(engine, [replace(request, max_tokens=3)])
    assert cut.token_ids == first.token_ids[:3]
    assert generate(engine, [request]) == [first]
    assert (engine.stats.forward_passes, engine.stats.memo_hits) == (passes, 3)


def test_steps_that_made_way_go_on_being_told() -> None:
    engine = make_engine(batch_size=32)
    endless = [StepRequest("qz " * (5 + n), 48, temperature=4.0, seed=n) for n in range(3)]
    ordinary = [StepRequest(prefix, 48) for prefix in make_prefixes(90, seed=9)]
    back: list[int] = []
    put_back = engine._batcher.put_back
    engine._batcher.put_back = lambda jobs: (back.append(len(jobs)), put_back(jobs))[1]  # type: ignore[method-assign]
    results = read_all(engine, [*endless, *ordinary])
    assert any(back), "no batch made way"
    alone = make_engine()
    for request, (deltas, result) in zip([*endless, *ordinary], results, strict=True):
        assert_same(result, generate(alone, [request])[0])
        check_deltas(deltas, result, engine)
    assert engine.active == 0


async def test_a_reader_that_lags_gets_one_delta_for_all_that_came(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = HfEngine("tested", "world:small", memo_entries=0)
    await engine.ready()
    late = Gate(engine, at=9)
    early = Gate(engine, at=1)
    loop, calls = asyncio.get_running_loop(), Counter[str]()
    healthy = loop.call_soon_threadsafe

    def count(callback: Any, *arguments: Any, **settings: Any) -> Any:
        calls[callback.__name__] += 1
        return healthy(callback, *arguments, **settings)

    async with aclosing(engine.stream_step(StepRequest(make_prefixes(1)[0], 48))) as stream:  # type: ignore[type-var]
        following = asyncio.ensure_future(anext(stream))
        await wait_until(early.reached.is_set)
        monkeypatch.setattr(loop, "call_soon_threadsafe", count)
        early.open.set()
        assert late.reached.wait(10)  # this loop does nothing meanwhile
        woken = calls["_wake_all"]
        delta = await following
        late.open.set()
        rest = [item async for item in stream]
    assert isinstance(delta, StepDelta) and len(delta.token_ids) == 8
    assert woken == 1, f"a lagging reader was called {woken} times"
    assert isinstance(rest[-1], StepResult)
    check_deltas([delta, *rest[:-1]], rest[-1], engine)


async def test_the_end_of_a_step_comes_with_its_result_only() -> None:
    text, encode = make_text("byte_level")
    stream, row = StepStream(text, ()), Row([65, *encode("ab\n\n")], 1, 99, finish="delimiter")
    hand_over([(stream, row)])
    await asyncio.sleep(0)
    answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(stream.next_delta(answer), 0.05)


# Giving up


@pytest.mark.parametrize("way", ["aclose", "cancel", "forget"])
async def test_a_step_given_up_frees_its_row_with_the_next_pass(way: str) -> None:
    engine = HfEngine("tested", "world:small", memo_entries=0)
    await engine.ready()
    gate = Gate(engine, at=4)
    prefixes = make_prefixes(4)
    streams: list[Any] = [engine.stream_step(StepRequest(prefix, 48)) for prefix in prefixes[:3]]
    plain = asyncio.create_task(engine.generate_step(StepRequest(prefixes[3], 48)))
    firsts = [asyncio.ensure_future(anext(stream)) for stream in streams]
    await asyncio.gather(*firsts)
    await asyncio.to_thread(gate.reached.wait, 10)
    assert engine.active == 4
    if way == "aclose":
        for stream in streams:
            await stream.aclose()
    elif way == "cancel":
        # What came meanwhile is read first, so that each is waiting for more when it is cancelled.
        tasks = [asyncio.create_task(drain(stream)) for stream in streams]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() for task in tasks)
    else:
        del streams, firsts
        gc.collect()
        await asyncio.sleep(0.01)
    gate.open.set()
    assert (await plain).finish == "delimiter"
    assert gate.widths[4] == 1, f"rows by pass: {gate.widths}"
    await wait_until(lambda: engine.active == 0)
    assert (await engine.generate_step(StepRequest(prefixes[0], 48))).finish == "delimiter"


async def drain(stream: AsyncIterator[Any]) -> None:
    async for _ in stream:
        pass


async def test_a_step_given_up_before_its_turn_is_never_computed() -> None:
    engine = HfEngine("tested", "world:small", memo_entries=0)
    await engine.ready()
    gate = Gate(engine, at=1)
    first = asyncio.create_task(engine.generate_step(StepRequest(make_prefixes(1)[0], 48)))
    await asyncio.to_thread(gate.reached.wait, 10)
    waiting = asyncio.create_task(drain(engine.stream_step(StepRequest(make_prefixes(2)[1], 48))))
    await asyncio.sleep(0.01)
    assert engine.active == 2
    waiting.cancel()
    gate.open.set()
    result = await first
    await wait_until(lambda: engine.active == 0)
    assert set(gate.widths) == {1} and engine.stats.tokens_decoded == len(result.token_ids)


async def test_rows_of_a_later_chunk_are_given_up_too() -> None:
    engine = HfEngine("tested", "world:small", memo_entries=0)
    await engine.ready()
    engine._decoder._most_tokens = 1  # a chunk for each row
    gate = Gate(engine, at=3)
    texts = ["A: plus 1", "A: plus 1; B: double", "A: plus 1; B: double; C: reverse"]
    tasks = [asyncio.create_task(drain(engine.stream_step(StepRequest(t, 48, 2.0, seed=7)))) for t in texts]
    await asyncio.to_thread(gate.reached.wait, 10)
    for task in tasks:
        task.cancel()
    await asyncio.sleep(0)
    gate.open.set()
    await wait_until(lambda: engine.active == 0)
    assert len(gate.widths) <= 3 + len(texts)


async def test_an_error_in_the_batch_reaches_the_reader_amid_the_step() -> None:
    engine = HfEngine("tested", "world:small", memo_entries=0)
    await engine.ready()
    healthy, passes = engine._decoder._forward, Counter[str]()

    def forward(*arguments: Any) -> torch.Tensor:
        passes["all"] += 1
        if passes["all"] == 6:
            raise RuntimeError("out of memory, say")
        return healthy(*arguments)

    engine._decoder._forward = forward  # type: ignore[method-assign]
    seen: list[object] = []
    with pytest.raises(EngineError, match="out of memory, say"):
        async for item in engine.stream_step(StepRequest(make_prefixes(1)[0], 48)):
            seen.append(item)
    assert not any(isinstance(item, StepResult) for item in seen)
    assert engine.active == 0
    assert (await read(engine, StepRequest(make_prefixes(1)[0], 48)))[1].finish == "delimiter"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (StepRequest("A: ", 0), "max_tokens=0"),
        (StepRequest("A: ", 9, kept_ids=(10**6,)), "same engine"),
        (StepRequest("A: ", 9, 1.0, top_p=0.0), "top_p=0.0"),
        (StepRequest("A: ", 9, 1.0, top_p=1.01), "top_p=1.01"),
        (StepRequest("A: ", 9, 1.0, top_p=float("nan")), "top_p=nan"),
    ],
)
async def test_a_malformed_request_is_refused_streamed_or_not(request_: StepRequest, message: str) -> None:
    engine = HfEngine("tested", "world:small")
    with pytest.raises(EngineError, match=message):
        await read(engine, request_)
    with pytest.raises(EngineError, match=message):
        await engine.generate_step(request_)
    assert engine.active == 0


# Text that is certain


def make_text(kind: str) -> tuple[StepText, Callable[[str], list[int]]]:
    """A tokenizer that cuts characters beyond ASCII into bytes, and how it does so."""
    if kind == "byte_level":  # as GPT-2 and Qwen
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<end>"])}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    else:  # as Llama 2
        pieces = [*(f"<0x{value:02X}>" for value in range(256)), *map(chr, range(128)), "<end>"]
        backend = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    return StepText(tokenizer, [tokenizer.eos_token_id], len(tokenizer)), tokenizer.encode


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("kept", [0, 1, 3, 5, 9])
async def test_neither_half_characters_nor_half_delimiters_are_told(kind: str, kept: int) -> None:
    text, encode = make_text(kind)
    written = "Grüße\n你好\n🙂!"
    ids = encode(written + "\n")
    assert len(ids) > len(written) + 6 and text.render(ids) == written + "\n"
    row = Row([65, *ids[:kept]], 1, 99)
    stream = StepStream(text, tuple(ids[:kept]))
    answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    told = text.render(ids[:kept]).rstrip("\ufffd") if kept else ""
    for token in ids[kept:]:
        row.ids.append(token)
        hand_over([(stream, row)])
        delta = await asyncio.wait_for(stream.next_delta(answer), 5)
        assert delta is not None and delta.token_ids == (token,)
        told += delta.text
        assert written.startswith(told)
        assert not delta.text.endswith("\n")
    assert told == written
    answer.set_result(None)
    assert await stream.next_delta(answer) is None


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_certain_text_is_what_no_token_can_change(kind: str) -> None:
    text, encode = make_text(kind)
    for written, certain in [
        ("ab", "ab"),
        ("ab\n", "ab"),
        ("ab\nc", "ab\nc"),
        ("ab\n\nc", "ab"),
        ("a\n", "a"),
        ("\n", ""),
        ("", ""),
    ]:
        assert text.certain(encode(written)) == certain
    half = encode("ü")[:1]
    assert text.certain([*encode("a"), *half]) == text.certain([*encode("a\n"), *half]) == "a"
    # A character of byte tokens may be undone by an invalid byte behind it.
    ids = encode("aü")
    assert text.render([*ids, *half]).startswith(text.certain(ids))
    assert text.certain(encode("aüb")) == "aüb"


# The nucleus

LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-9, {1}), (0.39, {1}), (0.41, {1, 3}), (0.64, {1, 3}), (0.66, {1, 3, 4}), (0.94, {0, 1, 3, 4}), (0.99, None)],
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, kept: set[int] | None) -> None:
    probabilities = LOGITS.exp()
    found = keep_nucleus(probabilities, torch.tensor([top_p], dtype=torch.float64))
    expected = [p if kept is None or i in kept else 0.0 for i, p in enumerate(probabilities[0].tolist())]
    assert found[0].tolist() == expected


def test_of_equal_tokens_the_first_ones_are_kept() -> None:
    found = keep_nucleus(torch.full((1, 1024), 2.0**-10, dtype=torch.float64), torch.tensor([0.3]).double())
    assert found[0].nonzero().squeeze(-1).tolist() == list(range(308))  # 307 x 2^-10 is below 0.3


def test_a_sum_that_just_reaches_top_p_is_enough() -> None:
    probabilities = torch.tensor([[0.25, 0.5, 0.25]] * 3, dtype=torch.float64)
    found = keep_nucleus(probabilities, torch.tensor([0.5, 0.75, 0.7500001], dtype=torch.float64))
    assert (found > 0).tolist() == [[False, True, False], [True, True, False], [True, True, True]]


def test_draws_follow_the_hand_computed_nucleus() -> None:
    count = 20_000
    logits = LOGITS.repeat(count, 1)
    counters = list(range(count))
    tokens = draw_tokens(logits, [1.0] * count, [77] * count, counters, [0.7] * count).tolist()
    found = Counter(tokens)
    # 0.4 + 0.25 + 0.2 = 0.85 is the first sum to reach 0.7.
    assert set(found) == {1, 3, 4}
    for token, share in ((1, 0.4 / 0.85), (3, 0.25 / 0.85), (4, 0.2 / 0.85)):
        assert found[token] / count == pytest.approx(share, abs=5 * (share * (1 - share) / count) ** 0.5)
    # And each draw is the inverse of that distribution, in the order of the vocabulary, at the row's own number.
    uniforms = draw_uniforms(np.full(count, 77, dtype=np.uint64), np.arange(count, dtype=np.uint64))
    edges = np.cumsum([0.4, 0.25, 0.2]) / 0.85
    assert tokens == [(1, 3, 4)[i] for i in np.searchsorted(edges, uniforms, side="right")]


def test_temperature_comes_before_the_nucleus() -> None:
    # At temperature 1/2 the probabilities are squared: 0.16 of 0.275 is 0.582, so that 0.58 needs one token only.
    tokens = draw_tokens(LOGITS.repeat(500, 1), [0.5] * 500, [3] * 500, list(range(500)), [0.58] * 500)
    assert set(tokens.tolist()) == {1}
    tokens = draw_tokens(LOGITS.repeat(500, 1), [0.5] * 500, [3] * 500, list(range(500)), [0.59] * 500)
    assert set(tokens.tolist()) == {1, 3}


def test_a_row_draws_the_same_beside_rows_with_another_nucleus() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 300, generator=generator) * 3
    temperatures, keys, counters = [(0.0, 0.7, 1.3)[i % 3] for i in range(40)], list(range(40)), [5] * 40
    top_ps = [(1.0, 0.5, 0.9, 1e-6)[i % 4] for i in range(40)]
    together = draw_tokens(logits, temperatures, keys, counters, top_ps).tolist()
    alone = [draw_tokens(logits[i : i + 1], [temperatures[i]], [keys[i]], [5], [top_ps[i]]).item() for i in range(40)]
    assert together == alone
    whole = draw_tokens(logits, temperatures, keys, counters, [1.0] * 40).tolist()
    assert [t for t, p in zip(together, top_ps, strict=True) if p == 1] == whole[::4]
    greedy = logits.argmax(-1).tolist()
    assert [t for t, p in zip(together, top_ps, strict=True) if p == 1e-6] == greedy[3::4]


def test_an_engine_narrows_its_draws() -> None:
    engine, prefixes = make_engine(), make_prefixes(12, seed=11)
    greedy = generate(engine, [StepRequest(prefix, 24) for prefix in prefixes])
    sampled = generate(engine, [StepRequest(p, 24, 3.0, seed=1) for p in prefixes])
    narrow = [StepRequest(p, 24, 3.0, seed=1, top_p=1e-6) for p in prefixes]
    for (deltas, result), expected in zip(read_all(engine, narrow), greedy, strict=True):
        assert_same(result, expected)
        check_deltas(deltas, result, engine)
    assert sum(a.token_ids != b.token_ids for a, b in zip(sampled, greedy, strict=True)) > 6


# Engines that do not stream, and the scripted one


class Whole:
    """An engine that writes whole steps only."""

    name = "whole"

    async def generate_step(self, request: StepRequest) -> StepResult:
        return StepResult("text", (1,), (0.0,), "delimiter", 1, 0.0)


async def test_an_engine_that_does_not_stream_gives_its_result_alone() -> None:
    deltas, result = await read(Whole(), StepRequest("Q", 9))
    assert (deltas, result.text) == ([], "text")


@pytest.mark.parametrize("limit", [3, 99])
async def test_the_scripted_engine_streams_what_it_writes(limit: int) -> None:
    engine = ScriptedEngine(write=lambda prefix: "A: one\ntwo" if "Q" in prefix else "Answer: 1")
    for prefix in ("Q\n\n", "x\n\n"):
        request = StepRequest(prefix, limit)
        whole = await engine.generate_step(request)
        for kept in (0, 1, 2):
            deltas, result = await read(engine, replace(request, kept_ids=whole.token_ids[:kept]))
            assert result == whole
            assert tuple(t for delta in deltas for t in delta.token_ids) == whole.token_ids[kept:]
            assert "".join(delta.text for delta in deltas) == whole.text[kept:]
    assert engine.active == 0


async def test_the_scripted_engine_dies_amid_a_step_and_can_be_given_up() -> None:
    engine = ScriptedEngine(delay_s=0.2, dies=lambda prefix: 3 if "bad" in prefix else None)
    seen: list[Any] = []
    with pytest.raises(EngineUnavailableError):
        async for item in stream_step(engine, StepRequest("bad\n\n", 99)):
            seen.append(item)
    assert [len(item.token_ids) for item in seen] == [1, 1, 1]
    with pytest.raises(EngineUnavailableError):
        await engine.generate_step(StepRequest("bad\n\n", 99))
    task = asyncio.create_task(drain(stream_step(engine, StepRequest("good\n\n", 99))))
    await wait_until(lambda: engine.active == 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert engine.active == 0


def test_an_unavailable_engine_is_an_engine_error_that_pickles() -> None:
    error = pickle.loads(pickle.dumps(EngineUnavailableError("gone")))
    assert isinstance(error, EngineError) and isinstance(error, EngineUnavailableError) and str(error) == "gone"
