"""The HTTP service in this process: what an answer says, whole and streamed, and what it asks of the models."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from roro_ray.config import EpisodeConfig, RouterConfig
from roro_ray.routing.router import make_router
from roro_ray.routing.router_policy import RouterPolicy
from serve.backend import LoadedRouters, RouterFacts
from serve.service import ServiceOptions
from tests.fakes import ScriptedEngine, write_notes
from tests.serving import (
    CHAT,
    EXPLAIN,
    ROUTER_FLOPS,
    ScriptedRouters,
    ask,
    check_error,
    events_of,
    join_content,
    make_engines,
    make_served,
    read_events,
    read_stream,
    running,
)

pytestmark = pytest.mark.timeout(60)
WHOLE = "A: note 0\n\nB: note 1\n\nC: note 2\n\nAnswer: 42"
MODELS = ["small", "large", "small", "large"]  # by `every_other`


async def test_an_answer_is_an_openai_completion_with_true_sums() -> None:
    served = make_served()
    async with running(served) as client:
        response = await client.post(CHAT, json=ask(routing={"trace": True}))
        assert response.status_code == 200, response.text
        found = response.json()
        model = (await client.get("/v1/models/auto")).json()
    assert found["id"].startswith("chatcmpl-req-") and found["object"] == "chat.completion"
    assert found["model"] == "router-v7" and model["id"] == "auto" and isinstance(found["created"], int)
    message = {"role": "assistant", "content": WHOLE, "refusal": None}
    assert found["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    routing, trace = found["routing"], found["routing"].pop("trace")
    assert [step["model"] for step in trace] == MODELS and [step["index"] for step in trace] == [0, 1, 2, 3]
    assert routing["steps"] == {"small": 2, "large": 2} and routing["large_share"] == 0.5
    assert (routing["router"], routing["router_version"], routing["ends"]) == ("router-v7", 7, ["answer"])
    assert not routing["degraded"] and "\n\n".join(step["text"] for step in trace) == WHOLE
    # By hand: each model reads the query and, where it was away, what the other one wrote; a delimiter is a token, and
    # the step's own last token is read when it goes on. Texts of 9 characters, the query of 6 and its delimiter.
    written = [10, 10, 10, 11]
    assert [step["tokens"] for step in trace] == written
    assert found["usage"]["completion_tokens"] == sum(written)
    requests = [request for engine in served.engines for request in engine.requests]
    assert len(requests) == 4 and found["usage"]["total_tokens"] == sum(found["usage"].values()) / 2
    small, large = 7 + 10, 7 + 10 + 10  # prefilled by each
    assert found["usage"]["prompt_tokens"] == small + large
    router = sum([7, 10, 10, 10]) * ROUTER_FLOPS  # every text once
    flops = 20.0 * (small + 20) + 200.0 * (large + 21) + router
    assert routing["flops"] == pytest.approx(sum(step["flops"] for step in trace)) == pytest.approx(flops)
    assert routing["flops_large_only"] == 200.0 * (7 + sum(written))
    assert routing["flops_saved"] == pytest.approx(routing["flops_large_only"] - routing["flops"])
    assert trace[1]["probabilities"] == pytest.approx({"small": 0.1, "large": 0.9}), "no tilt in the middle"
    assert trace[1]["probability"] == trace[1]["probabilities"]["large"]
    assert trace[0]["confidence"] == pytest.approx(0.9) and trace[0]["milliseconds"] >= 0


@pytest.mark.parametrize("n", [1, 3])
async def test_a_stream_says_what_the_whole_answer_says(n: int) -> None:
    body = ask(seed=5, n=n, temperature=0.7, routing={"trace": True})
    async with running(make_served()) as client:
        whole = (await client.post(CHAT, json=body)).json()
        response = await client.post(
            CHAT, json=body | {"stream": True, "stream_options": {"include_usage": True}}
        )
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = read_stream(response.text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1
    for choice in range(n):
        mine = [each for chunk in chunks for each in chunk["choices"] if each["index"] == choice]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert [each["finish_reason"] for each in mine].count(None) == len(mine) - 1
        assert mine[-1]["finish_reason"] == whole["choices"][choice]["finish_reason"]
        assert join_content(chunks, choice) == whole["choices"][choice]["message"]["content"] == WHOLE
    last = chunks[-1]
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    trace = whole["routing"].pop("trace")
    assert last["routing"] == {"event": "summary", **whole["routing"]}
    ends = sorted(events_of(chunks, "step_end"), key=lambda step: (step["choice"], step["index"]))
    told = [{key: value for key, value in step.items() if key != "milliseconds"} for step in ends]
    assert told == [{key: value for key, value in step.items() if key != "milliseconds"} for step in trace]
    starts = sorted(events_of(chunks, "step_start"), key=lambda step: (step["choice"], step["index"]))
    assert starts == [{key: step[key] for key in starts[0]} for step in trace]


async def test_the_trace_of_a_stream_frames_each_steps_text() -> None:
    async with running(make_served()) as client:
        response = await client.post(CHAT, json=ask(stream=True, routing={"trace": True}))
    texts: list[str] = []
    for chunk in read_stream(response.text):
        event = chunk.get("routing", {}).get("event")
        if event == "step_start":
            texts.append("")
        elif event == "step_end":
            assert texts[-1].removeprefix("\n\n") == chunk["routing"]["text"]
        elif texts and chunk["choices"] and "content" in chunk["choices"][0]["delta"]:
            texts[-1] += chunk["choices"][0]["delta"]["content"]
    assert "".join(texts) == WHOLE and len(texts) == 4 and "usage" not in chunk


async def test_a_plain_stream_holds_nothing_but_openais_chunks() -> None:
    async with running(make_served()) as client:
        chunks = read_stream((await client.post(CHAT, json=ask(stream=True))).text)
    assert all("routing" not in chunk and "usage" not in chunk for chunk in chunks)
    assert join_content(chunks) == WHOLE and chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_the_whole_conversation_is_read() -> None:
    served = make_served()
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ]
    async with running(served) as client:
        await client.post(CHAT, json={"model": "small", "messages": turns})
    prefix = served.engines[0].requests[0].prefix
    assert prefix == "Be brief.\n\none\ntwo\n\nthree\n\nfour\n\n"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("note 1", "A: note 0\n\nB: "),  # amid a step
        ("0\n\nB", "A: note "),  # across the border of two
        ("\n\n", "A: note 0"),
        (["42", "Answer"], "A: note 0\n\nB: note 1\n\nC: note 2\n\n"),  # the one that comes first
        ("42", "A: note 0\n\nB: note 1\n\nC: note 2\n\nAnswer: "),
        ("43", WHOLE),
        ("42 and more", WHOLE),  # begins like the end: held back, then told
        ("A", ""),
    ],
)
async def test_stop_strings(stop: Any, expected: str) -> None:
    served = make_served()
    async with running(served) as client:
        whole = (await client.post(CHAT, json=ask(stop=stop))).json()
        chunks = read_stream((await client.post(CHAT, json=ask(stop=stop, stream=True))).text)
    assert whole["choices"][0]["message"]["content"] == expected == join_content(chunks)
    assert whole["choices"][0]["finish_reason"] == "stop"
    requests = sum(len(engine.requests) for engine in served.engines)
    needed = min(4, expected.count("\n\n") + 1)
    assert requests <= 2 * (needed + 1), "steps after the stop string are not asked for"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_a_limit_of_tokens_cuts_the_answer_and_says_so(field: str) -> None:
    async with running(make_served()) as client:
        found = (await client.post(CHAT, json=ask(**{field: 14}))).json()
        chunks = read_stream((await client.post(CHAT, json=ask(stream=True, **{field: 14}))).text)
        enough = (await client.post(CHAT, json=ask(**{field: 41}))).json()
    assert found["choices"][0]["message"]["content"] == "A: note 0\n\nB: n" == join_content(chunks)
    assert found["choices"][0]["finish_reason"] == "length" == chunks[-1]["choices"][0]["finish_reason"]
    assert found["usage"]["completion_tokens"] == 14 and found["routing"]["ends"] == ["token_limit"]
    assert enough["choices"][0]["finish_reason"] == "stop"


async def test_the_limit_of_steps_is_a_length_too() -> None:
    endless: list[ScriptedEngine] = list(make_engines(write=write_notes(steps=20)))
    options = ServiceOptions(episode=EpisodeConfig(max_steps=5))
    async with running(make_served(endless, options=options)) as client:
        found = (await client.post(CHAT, json=ask())).json()
    assert found["choices"][0]["finish_reason"] == "length" and found["routing"]["ends"] == ["step_limit"]
    assert sum(found["routing"]["steps"].values()) == 5


async def test_sampling_reaches_the_models_and_a_seed_repeats_it() -> None:
    served = make_served()

    async def draws(body: dict[str, Any]) -> list[tuple[float, float, int]]:
        start = [len(engine.requests) for engine in served.engines]
        assert (await client.post(CHAT, json=body)).status_code == 200
        return [
            (request.temperature, request.top_p, request.seed)
            for engine, first in zip(served.engines, start, strict=True)
            for request in engine.requests[first:]
        ]

    async with running(served) as client:
        one = await draws(ask(seed=1, temperature=0.8, top_p=0.9))
        again = await draws(ask(seed=1, temperature=0.8, top_p=0.9, user="else"))
        other = await draws(ask(seed=2, temperature=0.8, top_p=0.9))
        none = [await draws(ask(temperature=0.8)) for _ in range(2)]
        choices = await draws(ask(seed=1, temperature=0.8, n=2))
        default = await draws(ask())
    assert {(temperature, top_p) for temperature, top_p, _ in one} == {(0.8, 0.9)}
    assert one == again and len({seed for _, _, seed in one}) == 4
    assert not {seed for _, _, seed in one} & {seed for _, _, seed in other}
    assert none[0] != none[1] and len({seed for _, _, seed in choices}) == 8
    assert {(temperature, top_p) for temperature, top_p, _ in default} == {(0.0, 1.0)}


async def test_choices_cost_what_they_cost_together() -> None:
    async with running(make_served()) as client:
        one = (await client.post(CHAT, json=ask())).json()
        three = (await client.post(CHAT, json=ask(n=3))).json()
    assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
    assert three["usage"] == {name: 3 * count for name, count in one["usage"].items()}
    assert three["routing"]["flops"] == pytest.approx(3 * one["routing"]["flops"])
    assert three["routing"]["ends"] == ["answer"] * 3 and three["routing"]["steps"] == {"small": 6, "large": 6}


@pytest.mark.parametrize("told", [0, 5, 9, 10])
@pytest.mark.parametrize("who", [0, 1])
async def test_a_model_that_dies_amid_a_step_loses_and_doubles_no_text(who: int, told: int) -> None:
    def dies(prefix: str) -> int | None:
        return told if prefix.count("\n\n") == 1 + who else None  # its first step

    def write_on(prefix: str) -> str:
        """A step, or the rest of one that another model began."""
        done, _, begun = prefix.rpartition("\n\n")
        return write_notes()(done + "\n\n").removeprefix(begun)

    engines = [ScriptedEngine("small", write_on), ScriptedEngine("large", write_on, parameters=100)]
    engines[who].dies = dies
    served = make_served(engines)
    async with running(served) as client:
        chunks = read_stream((await client.post(CHAT, json=ask(stream=True, routing={"trace": True}))).text)
        whole = (await client.post(CHAT, json=ask(routing={"trace": True}))).json()
    assert join_content(chunks) == WHOLE == whole["choices"][0]["message"]["content"]
    ends = events_of(chunks, "step_end")
    assert [step["degraded"] for step in ends] == [index == who for index in range(4)]
    assert ends[who]["model"] == ["large", "small"][who] and chunks[-1]["routing"]["degraded"]
    assert whole["routing"]["degraded"] and whole["routing"]["trace"][who]["degraded"]
    assert served.metrics.total("roro_degraded_requests") == 2 == served.metrics.total("roro_degraded_steps")
    assert served.active == 0


@pytest.mark.parametrize("kind", ["gone", "dropped"])
async def test_without_a_router_the_large_model_goes_on(kind: str) -> None:
    routers = ScriptedRouters(lambda reading: 0.1)
    setattr(routers, kind, 2)
    async with running(make_served(routers=routers)) as client:
        found = (await client.post(CHAT, json=ask(routing={"trace": True}))).json()
        chunks = read_stream((await client.post(CHAT, json=ask(stream=True))).text)
    trace = found["routing"]["trace"]
    assert [step["model"] for step in trace] == ["small", "small", "large", "large"]
    assert [step["degraded"] for step in trace] == [False, False, True, True] and found["routing"]["degraded"]
    assert join_content(chunks) == WHOLE == found["choices"][0]["message"]["content"]


async def test_without_any_model_the_error_says_so_and_a_stream_ends_with_it() -> None:
    engines = make_engines(dies=lambda prefix: 4 if "B: note 1" in prefix else None)
    served = make_served(engines)
    async with running(served) as client:
        whole = await client.post(CHAT, json=ask())
        response = await client.post(CHAT, json=ask(stream=True))
    check_error(whole, 503, code="unavailable")
    assert int(whole.headers["retry-after"]) >= 1
    events = read_events(response.text)
    assert response.status_code == 200 and "[DONE]" not in events
    assert '"code":"unavailable"' in events[-1] and "Traceback" not in response.text
    assert served.active == 0 and served.service.admission.used == 0
    assert served.metrics.total("roro_errors", error="unavailable") == 2


def make_trained() -> tuple[LoadedRouters, RouterPolicy]:
    """An untrained network whose opinions differ from step to step."""
    import torch

    torch.manual_seed(3)
    policy = RouterPolicy(make_router(RouterConfig(prior=0.5), 2), 4)
    routers = LoadedRouters()
    routers.add(policy, RouterFacts(4, policy.peek))
    return routers, policy


@pytest.mark.parametrize("weight", [0, 5e-324, 0.01, 0.2, 0.23, 3.0, 1e300])
async def test_explaining_the_steps_of_a_trace_gives_its_decisions(weight: float) -> None:
    routers, _ = make_trained()
    keys = ("model", "text", "tokens", "confidence", "confidence_min")
    async with running(make_served(routers=routers)) as client:
        answer = (await client.post(CHAT, json=ask(routing={"trace": True, "cost_weight": weight}))).json()
        trace = answer["routing"]["trace"]
        steps = [{key: step[key] for key in keys} for step in trace[:-1]]
        found = (await client.post(EXPLAIN, json=ask(steps=steps, routing={"cost_weight": weight}))).json()
    assert [each["model"] for each in found["decisions"]] == [step["model"] for step in trace]
    for each, step in zip(found["decisions"], trace, strict=True):
        assert each["probabilities"] == pytest.approx(step["probabilities"], abs=1e-6)
        assert math.isclose(sum(each["probabilities"].values()), 1.0)
    if 0.1 < weight < 1:
        assert len({each["probabilities"]["large"] for each in found["decisions"]}) > 1, "the network reads the steps"


async def test_many_answers_at_once_stay_apart() -> None:
    def write(prefix: str) -> str:
        query = prefix.partition("\n\n")[0]
        return write_notes(answer=query)(prefix)

    async with running(make_served(make_engines(write=write, delay_s=0.001))) as client:
        bodies = [ask(f"q{index}", stream=index % 2 == 0) for index in range(40)]
        responses = await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies))
    for index, response in enumerate(responses):
        streamed = index % 2 == 0
        text = (
            join_content(read_stream(response.text))
            if streamed
            else response.json()["choices"][0]["message"]["content"]
        )
        assert text.endswith(f"Answer: q{index}"), text
