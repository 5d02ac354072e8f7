"""The engine for remote endpoints, against a scripted one: continuation, stops, tokens, retries, rates, key."""

from __future__ import annotations

import asyncio
import logging
import math
import pickle
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from api_server import LOG_PROB, Failure, Host, ScriptedApi, split_tokens
from serving import listening

from roro_ray.config import ModelConfig, PoolConfig
from roro_ray.engines.api_client import ApiClient, is_loopback
from roro_ray.engines.api_limits import ApiLimits, TokenBucket, read_limits
from roro_ray.engines.api_prompts import make_chat_format, split_chat
from roro_ray.engines.api_replies import Reply, make_handles, measure_entropy, spell
from roro_ray.engines.openai_api import OpenAIEngine
from roro_ray.engines.pool import make_engine
from roro_ray.engines.protocol import StepDelta, StepRequest, StepResult
from roro_ray.errors import ConfigError, EngineError, EngineUnavailableError

T = TypeVar("T")
QUESTION = "Add 1 and 2, then double."
STEPS = ("First, 1 + 2 = 3.", "Then 3 * 2 = 6.", "Answer: 6")
ANSWER = "\n\n".join(STEPS)
KEY = "sk-very-secret-0123456789"
# How the endpoint continues -> what the engine calls it.
MODES = {
    "completions": "",
    "continue_final_message": "continue_final_message",
    "prefix": "prefix",
    "trailing": "trailing",
}


HOST = Host()


@pytest.fixture(scope="module", autouse=True)
def host() -> Iterator[None]:
    with listening(HOST) as HOST.url:
        yield


def make_api(mode: str = "completions", **options: Any) -> ScriptedApi:
    completions = mode == "completions"
    return ScriptedApi({QUESTION: ANSWER}, completions=completions, chat="" if completions else mode, **options)


@contextmanager
def engine_for(api: ScriptedApi, **settings: Any) -> Iterator[OpenAIEngine]:
    """An engine of a scripted endpoint; waits between attempts are not slept."""
    url = f"{HOST.add(api)}/v1"
    model = ModelConfig(**{"name": "far", "path": "scripted", "engine": "openai", "url": url, **settings})
    engine = OpenAIEngine.from_config(model, PoolConfig())

    async def skip(seconds: float) -> None:
        await asyncio.sleep(0)

    engine.client._sleep = skip
    yield engine


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def ask(api: ScriptedApi, question: Callable[[OpenAIEngine], Coroutine[Any, Any, T]], **settings: Any) -> T:
    """What comes of asking a ready engine; the endpoint's requests are those after `ready`."""

    async def work(engine: OpenAIEngine) -> T:
        await engine.ready()
        api.requests.clear()
        return await question(engine)

    with engine_for(api, **settings) as engine:
        return run(work(engine))


async def write(engine: OpenAIEngine, request: StepRequest, live: bool = False) -> tuple[StepResult, list[StepDelta]]:
    if not live:
        return await engine.generate_step(request), []
    *deltas, result = [part async for part in engine.stream_step(request)]
    assert isinstance(result, StepResult)
    return result, [delta for delta in deltas if isinstance(delta, StepDelta)]


async def write_all(engine: OpenAIEngine, live: bool = False, **options: Any) -> list[StepResult]:
    """Steps until the end of the answer."""
    facts = await engine.ready()
    prefix, results = facts.format.open(QUESTION), []
    while not results or (results[-1].finish == "delimiter" and results[-1].text):
        request = StepRequest(prefix, 40, **options)
        result, deltas = await write(engine, request, live)
        check_stream(request, result, deltas)
        results.append(result)
        prefix += result.text + "\n\n"
    return results


def check_stream(request: StepRequest, result: StepResult, deltas: list[StepDelta]) -> None:
    told = "".join(delta.text for delta in deltas)
    ids = tuple(token for delta in deltas for token in delta.token_ids)
    assert (spell(request.kept_ids) + told) == result.text[: len(spell(request.kept_ids) + told)]
    assert (*request.kept_ids, *ids) == result.token_ids[: len(request.kept_ids) + len(ids)]


# Continuation


@pytest.mark.parametrize("live", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("mode", MODES)
def test_steps_follow_one_another_to_the_end(mode: str, live: bool) -> None:
    api = make_api(mode)
    results = ask(api, lambda engine: write_all(engine, live))
    assert [result.text for result in results] == list(STEPS)
    assert [result.finish for result in results] == ["delimiter", "delimiter", "stop"]
    # Every token billed has an id, the delimiter and the end included.
    assert [len(result.token_ids) for result in results] == [len(split_tokens(step)) + 1 for step in STEPS]
    assert all(spell(result.token_ids).rstrip("\n") == result.text for result in results)
    assert all(result.log_probs == (LOG_PROB,) * len(result.token_ids) for result in results)
    assert all(result.cached_tokens == 2 and result.prefix_tokens > 3 for result in results)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.125))
    assert results[0].first_entropy == pytest.approx(entropy)


@pytest.mark.parametrize("mode", MODES)
def test_ready_finds_the_way_out_once_and_tells_it(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    api = make_api(mode)
    with engine_for(api, price_in=2.0, price_cached=0.5, price_out=10.0) as engine, caplog.at_level(logging.INFO):

        async def twice() -> tuple[Any, Any]:
            return await asyncio.gather(engine.ready(), engine.ready())

        facts, again = run(twice())
        asked = len(api.requests)
        assert run(engine.ready()) is facts is again and len(api.requests) == asked
    assert asked <= 12 and all(body["max_tokens"] <= 8 for _, body in api.requests)
    assert engine.traits is not None and engine.traits.style == MODES[mode]
    assert facts.device == "remote" and facts.tokenizer == "" and facts.parameters == 0 and facts.max_context == 4096
    assert (facts.prices.read, facts.prices.cached, facts.prices.written) == pytest.approx((2e-6, 5e-7, 1e-5))
    assert mode in facts.model and mode in caplog.text


def test_completions_come_before_chat_and_either_can_be_asked_for() -> None:
    both = replace(make_api("prefix"), completions=True)
    for mode, style in (("auto", ""), ("completions", ""), ("chat", "prefix")):
        with engine_for(both, api_mode=mode) as engine:
            run(engine.ready())
            assert engine.traits is not None and engine.traits.style == style


@pytest.mark.parametrize("chat", ["restarts", ""])
def test_an_endpoint_that_cannot_continue_is_refused(chat: str) -> None:
    api = ScriptedApi({QUESTION: ANSWER}, completions=False, chat=chat)
    with engine_for(api) as engine, pytest.raises(EngineError, match=r"continues no answer|refused with 404"):
        run(engine.ready())


def test_an_endpoint_that_restarts_says_what_it_wrote() -> None:
    api = ScriptedApi({QUESTION: ANSWER}, completions=False, chat="restarts")
    with (
        engine_for(api, api_mode="chat") as engine,
        pytest.raises(EngineError, match="went on with 'The quick") as found,
    ):
        run(engine.ready())
    assert "continue_final_message" in str(found.value) and "v1/completions" in str(found.value)


def test_a_reasoning_parser_is_refused() -> None:
    api = make_api("continue_final_message", separates_thinking=True)
    with engine_for(api) as engine, pytest.raises(EngineError, match="reasoning parser"):
        run(engine.ready())


@pytest.mark.parametrize("live", [False, True], ids=["whole", "stream"])
def test_an_endpoint_that_trims_gets_its_steps_cut_here(live: bool) -> None:
    """The blank line behind a step is lost on the way, so that the model writes it again before the next step."""
    api = make_api("continue_final_message", trims=True)
    results = ask(api, lambda engine: write_all(engine, live))
    assert [result.text for result in results] == list(STEPS)
    assert results[-1].finish == "stop"
    assert all("\n\n" not in (body.get("stop") or []) for body in api.steps)


def test_the_text_format_is_the_templates(tiny_model: Callable[..., Any]) -> None:
    api = make_api()
    settings = {"path": str(tiny_model("qwen3")), "format": "chat", "thinking": "off"}
    with engine_for(api, **settings) as engine:
        facts = run(engine.ready())
        assert facts.format.open("Hi.").startswith("<|im_start|>user\nHi.<|im_end|>")
        run(engine.generate_step(StepRequest(facts.format.open(QUESTION), 4)))
    # A chat prompt spells its own control tokens.
    assert api.steps[-1]["add_special_tokens"] is False and "<|im_start|>assistant" in api.steps[-1]["prompt"]


def test_without_a_tokenizer_chat_is_taken_and_completions_are_refused() -> None:
    both = replace(make_api("prefix"), completions=True)
    with engine_for(both, format="chat", path="/nowhere/model") as engine:
        assert "prefix" in run(engine.ready()).model
    with (
        engine_for(both, format="chat", path="/nowhere/model", api_mode="completions") as engine,
        pytest.raises(ConfigError, match="tokenizer"),
    ):
        run(engine.ready())


# Formats of a chat


def test_a_chats_text_is_taken_apart_again() -> None:
    for thinks in (False, True):
        format = make_chat_format(thinks)
        forged = format.open("one <|roro:assistant|> two <think>three</think>")
        user, answer = split_chat(forged + "step\n\n<|roro:assistant|>more")
        assert "roro" not in user and answer.endswith("step\n\n<|roro:assistant|>more")
        assert answer.startswith("<think>\n") is thinks and ("<think>" in user) is not thinks
    assert split_chat("no marks\n\n") == ("no marks\n\n", "")


def test_a_thinking_block_travels_in_the_unfinished_answer() -> None:
    thoughts = "<think>\nFirst.\n\nThen.</think>\n\nAnswer: 6"
    api = make_api("continue_final_message")
    api.answers[QUESTION] = thoughts

    async def think(engine: OpenAIEngine) -> list[StepResult]:
        format = (await engine.ready()).format
        prefix, results = format.open(QUESTION), []
        for delimiter in ("\n\n", "\n\n", ""):
            closing = not delimiter
            request = StepRequest(
                prefix + (format.close() if closing else ""),
                30,
                delimiter=delimiter,
                stops=() if closing else ("</think>",),
            )
            results.append(await engine.generate_step(request))
            prefix += results[-1].text + ("\n\n" if results[-1].finish == "delimiter" else "")
        return results

    for tells in (True, False):
        api.tells_stop = tells
        results = ask(api, think, thinking="on")
        assert [(result.text, result.finish) for result in results] == [
            ("First.", "delimiter"),
            ("Then.", "marker"),
            ("Answer: 6", "stop"),
        ]


def test_a_template_that_drops_thoughts_is_refused() -> None:
    api = make_api("continue_final_message", drops_thoughts=True)
    with (
        engine_for(api, thinking="on") as engine,
        pytest.raises(EngineError, match="behind its thinking block") as told,
    ):
        run(engine.ready())
    assert "api_mode=completions" in str(told.value)
    assert ask(api, write_all)[-1].finish == "stop"


# Stops and tokens


def test_an_endpoint_that_does_not_tell_stop_from_end_is_read_as_delimiter() -> None:
    results = ask(make_api(tells_stop=False), write_all)
    assert [result.text for result in results] == [*STEPS, ""]
    # An empty step ends an episode, and the answer before it is one whatever the finish.
    assert [result.finish for result in results] == ["delimiter"] * 4


def test_an_endpoint_that_ignores_stop_strings_is_cut() -> None:
    for live in (False, True):
        results = ask(make_api(ignores_stop=True), lambda engine, live=live: write_all(engine, live))
        assert [result.text for result in results] == list(STEPS)


@pytest.mark.parametrize("live", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("least, first", [(0, STEPS[0]), (3, STEPS[0]), (14, "\n\n".join(STEPS[:2]))])
def test_small_paragraphs_are_merged(least: int, first: str, live: bool) -> None:
    async def one(engine: OpenAIEngine) -> StepResult:
        prefix = (await engine.ready()).format.open(QUESTION)
        return (await write(engine, StepRequest(prefix, 60, min_tokens=least), live))[0]

    api = make_api()
    result = ask(api, one)
    assert (result.text, result.finish) == (first, "delimiter")
    assert len(result.token_ids) == len(split_tokens(first)) + 1 == len(result.log_probs)
    assert len(api.requests) == first.count("\n\n") + 1


@pytest.mark.parametrize("live", [False, True], ids=["whole", "stream"])
def test_a_peek_is_continued(live: bool) -> None:
    async def peek(engine: OpenAIEngine) -> tuple[StepResult, StepResult, StepResult]:
        prefix = (await engine.ready()).format.open(QUESTION)
        whole = await engine.generate_step(StepRequest(prefix, 40))
        first = await engine.generate_step(StepRequest(prefix, 1))
        request = StepRequest(prefix, 40, kept_ids=first.token_ids)
        rest, deltas = await write(engine, request, live)
        check_stream(request, rest, deltas)
        return whole, first, rest

    whole, first, rest = ask(make_api(), peek)
    assert (first.text, first.finish, len(first.token_ids)) == ("First", "length", 1)
    assert rest.token_ids[:1] == first.token_ids and spell(first.token_ids) == "First"
    assert (rest.text, rest.finish, len(rest.token_ids)) == (whole.text, "delimiter", len(whole.token_ids))
    assert rest.log_probs == whole.log_probs and rest.first_entropy == first.first_entropy


def test_the_token_limit_holds_for_the_whole_step() -> None:
    async def cut(engine: OpenAIEngine) -> list[StepResult]:
        prefix = (await engine.ready()).format.open(QUESTION)
        first = await engine.generate_step(StepRequest(prefix, 2))
        more = await engine.generate_step(StepRequest(prefix, 5, kept_ids=first.token_ids))
        full = await engine.generate_step(StepRequest(prefix, 2, kept_ids=first.token_ids))
        with pytest.raises(EngineError, match="max_tokens=1 with 2 kept ids"):
            await engine.generate_step(StepRequest(prefix, 1, kept_ids=first.token_ids))
        return [first, more, full]

    first, more, full = ask(make_api(), cut)
    assert [len(result.token_ids) for result in (first, more, full)] == [2, 5, 2]
    assert {result.finish for result in (first, more, full)} == {"length"}
    assert more.text.startswith(first.text) and full.text == first.text


def test_handles_spell_their_text_and_no_other_numbers_do() -> None:
    for text, tokens, pieces in (
        ("", 0, ()),
        ("", 1, ("",)),
        ("ab c", 2, ("ab", " c")),
        ("ab c", 4, ("ab", " c", "\n\n")),
        ("ab c", 3, ()),
        ("né\U0001f600\ud800", 2, ("n",)),
        ("abc", 1, ("a", "b")),
        ("ab", 2, ("a", "\ufffd")),
    ):
        handles = make_handles(text, tokens, pieces)
        assert spell(handles) == text and len(handles) == max(tokens, 1 if text else 0)
    assert spell(pickle.loads(pickle.dumps(make_handles("over", 1)))) == "over"
    for wrong in (-5, 7, 513, 2**65):
        with pytest.raises(EngineError, match="spells no text"):
            spell((wrong,))


# What endpoints lack


@pytest.mark.parametrize("most, alternatives", [(5, 5), (-1, -1), (-2, 20)])
def test_log_probabilities_are_optional(most: int, alternatives: int) -> None:
    for mode in ("completions", "prefix"):
        with engine_for(make_api(mode, top_logprobs=most)) as engine:
            results = run(write_all(engine))
            assert engine.traits is not None and engine.traits.top_logprobs == alternatives
        assert [result.text for result in results] == list(STEPS)
        assert math.isnan(results[0].first_entropy) is (most < 0)
        assert (results[0].log_probs == ()) is (most < 0)
        assert [len(result.token_ids) for result in results] == [len(split_tokens(step)) + 1 for step in STEPS]


def test_entropy_counts_what_was_not_told_as_one_lump() -> None:
    assert math.isnan(measure_entropy(None))
    reply = Reply()
    reply.add({"choices": [{"text": "a", "logprobs": {"tokens": ["a"], "token_logprobs": [-0.1]}}]})
    assert math.isnan(measure_entropy(reply.scores[0]))


def test_refused_fields_are_left_out_and_only_those() -> None:
    refuses = ("seed", "add_special_tokens", "stream_options", "response_format")
    api = make_api(refuses=refuses)
    schema = '{"type": "object"}'

    async def both(engine: OpenAIEngine) -> None:
        assert len(await write_all(engine, True, schema=schema)) == 3
        asked = len(api.requests)
        assert len(await write_all(engine, True, schema=schema)) == 3
        assert len(api.requests) == asked + 3, "what is refused once is not asked again"

    ask(api, both)
    assert all(not set(refuses) & set(body) and "logprobs" in body for body in api.steps[-3:])


def test_the_limits_successor_is_used_where_it_is_asked_for() -> None:
    api = make_api("trailing", refuses=("max_tokens",), refusal="Unsupported: {}. Use 'max_completion_tokens' instead.")
    results = ask(api, write_all)
    assert [result.text for result in results] == list(STEPS)
    assert all(body["max_completion_tokens"] == 40 and "seed" in body for body in api.steps)


def test_a_schema_goes_along_where_it_is_taken() -> None:
    api = make_api()
    ask(api, lambda engine: write_all(engine, schema='{"type": "object"}'))
    assert api.steps[0]["response_format"]["json_schema"]["schema"] == {"type": "object"}


def test_sampling_and_adapter_reach_the_endpoint() -> None:
    api = make_api()
    request = StepRequest(f"{QUESTION}\n\n", 4, temperature=0.7, seed=2**62 + 3, top_p=0.9, adapter="judge")
    ask(api, lambda engine: engine.generate_step(request))
    body = api.steps[0]
    assert (body["temperature"], body["top_p"], body["model"]) == (0.7, 0.9, "judge")
    assert 0 <= body["seed"] < 2**31


# Scores


def test_choices_are_scored_by_an_echo() -> None:
    api = make_api()
    scores = ask(api, lambda engine: engine.score_choices("Is it so? ", ("yes", "not at all", "")))
    assert scores.tokens == (1, 3, 0)
    assert scores.log_probs == pytest.approx((LOG_PROB, 3 * LOG_PROB, 0.0))
    assert scores.min_log_probs == pytest.approx((LOG_PROB, LOG_PROB, 0.0)) and scores.prefix_tokens > 0


@pytest.mark.parametrize("mode", ["completions", "prefix"])
def test_without_echo_one_word_is_scored_by_the_next_token(mode: str) -> None:
    api = make_api(mode, refuses=("echo",))
    api.answers["Is it so?"] = "yes"

    async def score(engine: OpenAIEngine) -> None:
        prefix = (await engine.ready()).format.open("Is it so?")
        for _ in range(2):
            scores = await engine.score_choices(prefix, (" yes", "no"))
            assert scores.tokens == (1, 1)
            assert scores.log_probs == pytest.approx((LOG_PROB, math.log(0.125)))
        with pytest.raises(EngineError, match="one-word choices only"):
            await engine.score_choices(prefix, ("yes", "not at all"))
        with pytest.raises(EngineError, match="none of the choices"):
            await engine.score_choices(prefix, ("maybe", "no"))

    ask(api, score)


def test_without_log_probabilities_nothing_is_scored() -> None:
    for most in (-1, -2):
        with pytest.raises(EngineError, match=r"log-probabilities|alternatives"):
            ask(make_api("prefix", top_logprobs=most), lambda engine: engine.score_choices("So? ", ("yes", "no")))


# Failures


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@contextmanager
def client_for(api: ScriptedApi, **limits: Any) -> Iterator[tuple[ApiClient, FakeTime]]:
    """A client whose random waits are always the longest possible."""
    time = FakeTime()
    url, made = f"{HOST.add(api)}/v1", ApiLimits(**limits)
    yield ApiClient("far", url, "", made, time.clock, time.sleep, lambda low, high: high), time


BODY = {"model": "m", "prompt": QUESTION, "max_tokens": 3}


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503, 529])
@pytest.mark.parametrize("live", [False, True], ids=["whole", "stream"])
def test_what_may_pass_is_tried_again_with_growing_waits(status: int, live: bool) -> None:
    api = make_api(failures=[Failure(status)] * 4)
    with client_for(api, backoff_s=1.0, backoff_most_s=5.0) as (client, time):

        async def send() -> None:
            if not live:
                assert (await client.ask("/completions", BODY))["choices"]
                return
            assert [chunk async for chunk in client.stream("/completions", BODY)]

        run(send())
    assert time.slept == [1.0, 2.0, 4.0, 5.0]


def test_waits_are_drawn_over_the_whole_interval() -> None:
    api = make_api(failures=[Failure(503)] * 3)
    asked: list[tuple[float, float]] = []
    with client_for(api, backoff_s=1.0) as (client, time):
        client._draw = lambda low, high: asked.append((low, high)) or 0.0  # type: ignore[func-returns-value]
        run(client.ask("/completions", BODY))
    assert asked == [(0.0, 1.0), (0.0, 2.0), (0.0, 4.0)] and time.slept == [0.0] * 3


@pytest.mark.parametrize(
    "headers, waits",
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after-ms": "1500", "retry-after": "2"}, 1.5),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, 0.0),
        ({"retry-after": "-3"}, 0.0),
    ],
)
def test_retry_after_is_honoured(headers: dict[str, str], waits: float) -> None:
    api = make_api(failures=[Failure(429, headers=headers)])
    with client_for(api, backoff_s=0.5) as (client, time):
        run(client.ask("/completions", BODY))
    assert time.slept == [pytest.approx(waits + 0.5)]


def test_attempts_and_deadline_bound_the_patience() -> None:
    with client_for(make_api(failures=[Failure(503, "overloaded")] * 9), attempts=3) as (client, time):
        with pytest.raises(EngineUnavailableError, match=r"overloaded.*attempts"):
            run(client.ask("/completions", BODY))
        assert len(time.slept) == 2
    late = Failure(429, headers={"retry-after": "3600"})
    with client_for(make_api(failures=[late] * 9), deadline_s=60) as (client, time):
        with pytest.raises(EngineUnavailableError, match="deadline_s"):
            run(client.ask("/completions", BODY))
        assert time.slept == []


def test_an_endpoint_that_is_down_is_unavailable() -> None:
    with listening(make_api().app) as url:
        pass
    model = ModelConfig("far", "m", engine="openai", url=f"{url}/v1", engine_args={"attempts": 2, "backoff_s": 0.0})
    with pytest.raises(EngineUnavailableError, match="does not answer"):
        run(OpenAIEngine(model).ready())


@pytest.mark.parametrize(
    "failure, told",
    [
        (Failure(401, "bad key"), "bad key.*environment variable"),
        (Failure(403, "not for you"), "not for you.*may not use"),
        (Failure(404, "no model m"), "no model m.*api_model"),
        (Failure(400, "context too long"), "context too long"),
        (Failure(422, "what?"), "what"),
        (Failure(413, "too large"), "too large"),
        (Failure(429, "pay first", code="insufficient_quota"), "pay first"),
        (Failure(200, body="<html>hello</html>"), "JSON object.*v1"),
    ],
    ids=lambda value: str(value.status) + (value.code or "") if isinstance(value, Failure) else "",
)
def test_what_cannot_pass_is_an_error_at_once(failure: Failure, told: str) -> None:
    api = make_api(failures=[failure])
    with client_for(api) as (client, time):
        with pytest.raises(EngineError, match=told) as found:
            run(client.ask("/completions", BODY))
        assert not isinstance(found.value, EngineUnavailableError) and time.slept == [] and len(api.requests) == 1
    again = pickle.loads(pickle.dumps(found.value))
    assert str(again) == str(found.value) and type(again) is type(found.value)


def test_a_content_filter_is_an_error() -> None:
    reply = Reply()
    reply.add({"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]})
    from roro_ray.engines.api_replies import read_finish

    with pytest.raises(EngineError, match="content_filter"):
        read_finish(reply, "\n\n", ())


def test_a_broken_stream_is_unavailable() -> None:
    async def broken(engine: OpenAIEngine) -> None:
        with pytest.raises(EngineUnavailableError, match=r"broke.*model is gone"):
            await write(engine, StepRequest(f"{QUESTION}\n\n", 20), live=True)

    ask(make_api(breaks=3), broken)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_leaving_a_stream_ends_the_request() -> None:
    api = make_api(pause_s=0.02)

    async def leave(engine: OpenAIEngine) -> None:
        stream = engine.stream_step(StepRequest(f"{QUESTION}\n\n", 20))
        async for part in stream:
            assert isinstance(part, StepDelta)
            break
        await stream.aclose()
        for _ in range(200):
            if api.left:
                return
            await asyncio.sleep(0.02)

    ask(api, leave)
    assert api.left == 1


def test_cancelled_requests_give_their_slots_back() -> None:
    api = make_api(pause_s=0.2)

    async def cancel(engine: OpenAIEngine) -> str:
        request = StepRequest(f"{QUESTION}\n\n", 20)
        tasks = [asyncio.ensure_future(engine.generate_step(request)) for _ in range(4)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return (await asyncio.wait_for(engine.generate_step(request), 10)).text

    assert ask(api, cancel, engine_args={"concurrency": 2}) == STEPS[0]
    assert api.most_active <= 4  # two cancelled at the client may still run at the server


# Rates


def test_concurrency_is_bounded() -> None:
    api = make_api(pause_s=0.02)

    async def many(engine: OpenAIEngine) -> None:
        await asyncio.gather(*(engine.generate_step(StepRequest(f"{QUESTION}\n\n", 5, seed=i)) for i in range(12)))

    ask(api, many, engine_args={"concurrency": 3})
    assert api.most_active == 3 and len(api.requests) == 12


def test_a_minutes_worth_goes_at_once_and_the_rest_in_turn() -> None:
    time = FakeTime()
    bucket = TokenBucket(120, time.clock)  # two a second
    assert [bucket.take(40) for _ in range(5)] == pytest.approx([0.0, 0.0, 0.0, 20.0, 40.0])
    time.now += 40
    assert bucket.take(2) == pytest.approx(1.0)
    bucket.give_back(2)
    assert bucket.take(0) == 0.0
    time.now += 3600
    assert bucket.take(121) == pytest.approx(0.5), "what was not used in an hour is no more than a minute's worth"
    assert TokenBucket(0, time.clock).take(10**9) == 0.0


def test_requests_and_tokens_per_minute_hold_requests_back() -> None:
    with client_for(make_api(), requests_per_minute=2) as (client, time):

        async def four() -> None:
            for _ in range(4):
                await client.ask("/completions", BODY)

        run(four())
    assert time.slept == pytest.approx([30.0, 30.0])
    with client_for(make_api(), tokens_per_minute=600) as (client, time):
        run(client.ask("/completions", BODY, tokens=600))  # an estimate: what is billed comes back to the bucket
        run(client.ask("/completions", BODY, tokens=500))
        assert time.slept == []
        run(client.ask("/completions", BODY, tokens=1200))
    assert len(time.slept) == 1 and 55 < time.slept[0] < 65


def test_limits_are_read_strictly() -> None:
    assert read_limits({"attempts": 2, "requests_per_minute": 30}, "m") == ApiLimits(30.0, attempts=2)
    for given, told in (
        ({"atempts": 2}, "unknown engine_args.atempts of model 'm'.*did you mean 'attempts'"),
        ({"attempts": 0}, "attempts.*at least 1"),
        ({"deadline_s": 0}, "deadline_s.*more than 0"),
        ({"backoff_s": -1}, "backoff_s.*0 or more"),
        ({"concurrency": "many"}, "expected a number"),
        ({"concurrency": True}, "expected a number"),
    ):
        with pytest.raises(ConfigError, match=told):
            read_limits(given, "m")


def test_the_pool_makes_this_engine() -> None:
    model = ModelConfig("far", "m", engine="openai", url="http://localhost/v1")
    assert isinstance(make_engine(model, PoolConfig()), OpenAIEngine)


def test_settings_that_cannot_work_are_refused() -> None:
    for settings, told in (
        ({"url": ""}, "url of 'far'.*expected the address"),
        ({"url": "host/v1"}, "https://"),
        ({"url": "http://localhost/v1", "api_mode": "chats"}, "api_mode.*did you mean 'chat'"),
    ):
        with pytest.raises(ConfigError, match=told):
            OpenAIEngine(ModelConfig("far", "m", engine="openai", **settings))


def test_parameters_make_flops() -> None:
    settings = {"engine_args": {"parameters": 30e9, "active_parameters": 3e9}}
    with engine_for(make_api(), **settings) as engine:
        facts = run(engine.ready())
    assert facts.parameters == 30_000_000_000 and facts.flops_per_token == 6e9


# The key


def test_the_key_is_sent_and_nowhere_else(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("FAR_KEY", KEY)
    api = make_api(key=KEY, failures=[Failure(503, f"retry, {KEY}")])
    with caplog.at_level(logging.DEBUG), engine_for(api, api_key_env="FAR_KEY") as engine:
        facts = run(engine.ready())
        run(engine.generate_step(StepRequest(f"{QUESTION}\n\n", 5)))
        told = [repr(engine), repr(vars(engine)), repr(vars(engine.client)), repr(facts), caplog.text]
        engine.client._sleep = asyncio.sleep
        copied = pickle.dumps(engine)
        again = pickle.loads(copied)
        assert run(again.generate_step(StepRequest(f"{QUESTION}\n\n", 5))).token_ids
        api.key = "another"
        with pytest.raises(EngineError, match="Incorrect API key") as refused:
            run(engine.generate_step(StepRequest(f"{QUESTION}\n\n", 5)))
    error = refused.value
    told += [str(error), repr(error), repr(error.__cause__), repr(error.__context__)]
    assert KEY.encode() not in copied + pickle.dumps(error) and not any(KEY in text for text in told)
    assert "[key]" in str(error) and error.__cause__ is None and error.__context__ is None


def test_a_missing_key_is_told_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAR_KEY", raising=False)
    for env in ("FAR_KEY", ""):
        engine = OpenAIEngine(ModelConfig("far", "m", engine="openai", url="https://api.test/v1", api_key_env=env))
        with pytest.raises(ConfigError, match=f"environment variable {env or '.api_key_env is empty'}.*api.test"):
            run(engine.ready())


def test_loopback_needs_no_key() -> None:
    urls = (
        "http://localhost:1/v1",
        "http://127.0.0.1/v1",
        "http://[::1]:8/v1",
        "https://api.test",
        "http://10.0.0.1/v1",
    )
    assert [is_loopback(url) for url in urls] == [True, True, True, False, False]
