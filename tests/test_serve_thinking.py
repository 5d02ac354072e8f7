"""Models with a thinking block behind the HTTP service: thoughts are told apart from the answer."""

from __future__ import annotations

import pytest

from roro_ray.config import EpisodeConfig
from roro_ray.engines.pool import EnginePool
from serve.service import ServiceOptions, limit_tokens
from tests.fakes import CharacterEngine, make_fake_pool
from tests.serving import CHAT, Served, ask, events_of, join_content, make_served, read_stream, running
from tests.test_thinking import CHAT as FORMAT
from tests.test_thinking import FINAL, think

pytestmark = pytest.mark.timeout(60)
THOUGHTS = "Thought 0.\n\nThought 1.\n\nSo that is it.\n"


def make_thinking() -> Served:
    engines = [
        CharacterEngine("small", think(2), format=FORMAT),
        CharacterEngine("large", think(2), format=FORMAT, parameters=100),
    ]
    options = ServiceOptions(episode=EpisodeConfig(max_step_tokens=200, max_tokens=4000))
    return make_served(engines, options=options)


async def test_a_whole_answer_keeps_thoughts_and_content_apart() -> None:
    async with running(make_thinking()) as client:
        body = (await client.post(CHAT, json=ask(routing={"trace": True}))).json()
    message = body["choices"][0]["message"]
    assert message["content"] == FINAL and message["reasoning_content"] == THOUGHTS
    assert body["choices"][0]["finish_reason"] == "stop"
    trace = body["routing"]["trace"]
    assert [step["text"] for step in trace] == ["Thought 0.", "Thought 1.", "So that is it.\n", FINAL]
    assert trace[-1]["model"] == "large"
    # The final answer is paid for, and is no routed step.
    assert sum(body["routing"]["steps"].values()) == 3
    assert body["routing"]["flops"] == pytest.approx(sum(step["flops"] for step in trace))
    written = len(THOUGHTS) + len("</think>") + len(FINAL) + 1
    assert body["usage"]["completion_tokens"] == written


async def test_a_stream_tells_thoughts_first_and_then_the_answer() -> None:
    async with running(make_thinking()) as client:
        response = await client.post(CHAT, json=ask(stream=True, routing={"trace": True}))
    chunks = read_stream(response.text)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    thoughts = "".join(delta.get("reasoning_content", "") for delta in deltas)
    assert (thoughts, join_content(chunks)) == (THOUGHTS, FINAL)
    kinds = ["reasoning_content" in delta for delta in deltas if delta.get("content") or "reasoning_content" in delta]
    assert kinds == sorted(kinds, reverse=True)
    assert len(events_of(chunks, "step_end")) == 4


async def test_a_stop_string_in_a_thought_ends_nothing_and_one_in_the_answer_cuts_it() -> None:
    async with running(make_thinking()) as client:
        message = (await client.post(CHAT, json=ask(stop="Thought 1"))).json()["choices"][0]["message"]
        cut = (await client.post(CHAT, json=ask(stop="boxed"))).json()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == (FINAL, THOUGHTS)
    assert cut["content"] == FINAL.partition("boxed")[0]


async def test_a_client_who_asks_for_little_gets_an_answer_and_the_right_reason() -> None:
    async with running(make_thinking()) as client:
        body = (await client.post(CHAT, json=ask(max_tokens=40))).json()
    assert body["choices"][0]["message"]["content"] == FINAL[:10]
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] <= 40


def test_the_limit_is_divided_between_thoughts_and_answer() -> None:
    thinking: EnginePool = make_fake_pool(*(CharacterEngine(name, think(1), format=FORMAT) for name in ("a", "b")))
    episode = EpisodeConfig(max_tokens=1000, max_answer_tokens=50)
    for most in (2, 3, 40, 100, 10_000):
        limited = limit_tokens(episode, most, thinking)
        assert limited.max_tokens + limited.max_answer_tokens <= max(most, 2)
        assert limited.max_tokens <= 1000 and limited.max_answer_tokens <= 50
    assert limit_tokens(episode, 70, make_fake_pool()).max_tokens == 70
