"""Unmodified clients against the service on loopback: the `openai` package (sync and async) and `curl`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from roro_ray.config import PoolConfig, RouterConfig
from roro_ray.engines.pool import make_pool
from roro_ray.routing.router import make_router
from roro_ray.routing.router_policy import RouterPolicy
from serve.api import ApiOptions
from serve.auth import ApiKey, hash_key
from serve.backend import LoadedRouters, RouterFacts
from serve.service import ServiceOptions
from tests.fakes import ScriptedEngine
from tests.serving import CHAT, Served, ask, join_content, make_engines, make_served, read_stream, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
QUERY = "Start with 36. A: double; B: times 04; C: subtract 38."
FREED_S = 1.0  # slots of a client that has left
MARGIN_S = 0.5  # for a machine that is busy with other things
KEY = "roro-key"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[Served, str]]:
    """The tiny real models behind an untrained router."""
    torch.manual_seed(3)
    policy = RouterPolicy(make_router(RouterConfig(prior=0.5), 2), 4)
    routers = LoadedRouters()
    routers.add(policy, RouterFacts(4, policy.peek))
    served = make_served(make_pool(PoolConfig(memo_entries=0)).engines, routers)
    with serving(served) as url:
        yield served, url


@contextlib.contextmanager
def scripted(*engines: ScriptedEngine, **options: Any) -> Iterator[tuple[Served, str]]:
    served = make_served(engines or make_engines(), **options)
    with serving(served) as url:
        yield served, url


def connect(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(**{"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, **options})


def connect_async(url: str, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(**{"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, **options})


def say(text: str = QUERY, **fields: Any) -> dict[str, Any]:
    return ask(text, **fields)


def wait_freed(served: Served) -> None:
    """Every slot is free within a second of the client's leaving, down to the engines."""
    began = time.monotonic()
    while served.active or served.service.admission.used:
        assert time.monotonic() - began < FREED_S + MARGIN_S, (served.active, served.service.admission.used)
        time.sleep(0.005)


def wait_for(happened: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < 20
        time.sleep(0.005)


# The openai client on real models


def test_a_completion_and_its_stream(real: tuple[Served, str]) -> None:
    client = connect(real[1])
    for options in ({}, {"seed": 11, "temperature": 0.9, "top_p": 0.95, "n": 2}):
        whole = client.chat.completions.create(**say(**options))
        assert whole.object == "chat.completion" and whole.model == "router-v4" and whole._request_id
        assert whole.choices[0].message.role == "assistant" and whole.choices[0].message.content
        chunks = list(
            client.chat.completions.create(**say(**options), stream=True, stream_options={"include_usage": True})
        )
        for choice in range(options.get("n", 1)):
            told = "".join(
                each.delta.content or "" for chunk in chunks for each in chunk.choices if each.index == choice
            )
            assert told == whole.choices[choice].message.content
        assert chunks[-1].usage == whole.usage and whole.usage is not None
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens > 0
        assert chunks[-1].model_extra["routing"]["steps"] == whole.model_extra["routing"]["steps"]
    again = client.chat.completions.create(**say(**options))
    assert [each.message.content for each in again.choices] == [each.message.content for each in whole.choices]


def test_the_large_model_alone_is_right_and_the_trace_says_who_wrote(real: tuple[Served, str]) -> None:
    client = connect(real[1])
    large = client.chat.completions.create(**say(), extra_body={"routing": {"force": "large", "trace": True}})
    assert large.choices[0].message.content.endswith("Answer: 50") and large.choices[0].finish_reason == "stop"
    routing = large.model_extra["routing"]
    assert {step["model"] for step in routing["trace"]} == {"large"}
    assert "\n\n".join(step["text"] for step in routing["trace"]) == large.choices[0].message.content
    assert routing["flops"] == pytest.approx(routing["flops_large_only"], rel=0.05)
    dear = client.chat.completions.create(**say(), extra_headers={"X-Roro-Cost-Weight": "0"})
    assert dear.choices[0].message.content == large.choices[0].message.content
    cheap = client.chat.completions.create(**say(), extra_body={"routing": {"cost_weight": 1e6}})
    assert cheap.model_extra["routing"]["steps"]["large"] == 0
    assert cheap.model_extra["routing"]["flops"] < routing["flops"]


def test_stop_and_length(real: tuple[Served, str]) -> None:
    client = connect(real[1])
    whole = client.chat.completions.create(**say(model="large")).choices[0].message.content
    stopped = client.chat.completions.create(**say(model="large"), stop=["\n\nC"]).choices[0]
    assert stopped.message.content == whole.partition("\n\nC")[0] and stopped.finish_reason == "stop"
    cut = client.chat.completions.create(**say(model="large"), max_completion_tokens=10)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 10
    assert whole.startswith(cut.choices[0].message.content)


def test_models_and_raw_responses(real: tuple[Served, str]) -> None:
    client = connect(real[1])
    assert [model.id for model in client.models.list()] == ["auto", "router-v4", "small", "large"]
    assert client.models.retrieve("small").owned_by == "roro_ray"
    raw = client.chat.completions.with_raw_response.create(**say(), extra_headers={"X-Request-Id": "mine"})
    assert raw.headers["x-request-id"] == "mine" == raw.parse()._request_id
    assert raw.parse().id == "chatcmpl-mine"


async def test_many_streams_of_the_async_client(real: tuple[Served, str]) -> None:
    async with connect_async(real[1]) as client:

        async def read(text: str) -> str:
            stream = await client.chat.completions.create(**say(text), stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        texts = [f"Start with {30 + index}. A: double; B: plus 0{index % 9 + 1}." for index in range(24)]
        together = await asyncio.gather(*map(read, texts))
        whole = [(await client.chat.completions.create(**say(text))).choices[0].message.content for text in texts[::6]]
    assert list(together[::6]) == whole and len(set(together)) > 12
    wait_freed(real[0])


async def test_real_slots_are_free_when_clients_leave(real: tuple[Served, str]) -> None:
    served, url = real
    async with connect_async(url) as client:
        streams = [
            await client.chat.completions.create(**say(temperature=2.0, n=8), stream=True) for _ in range(6)
        ]
        for stream in streams:
            await anext(aiter(stream))
        assert served.service.admission.used > 0
        for stream in streams:
            await stream.close()
        await asyncio.to_thread(wait_freed, served)


# Errors, as the openai client tells them


def test_errors_have_the_clients_own_classes() -> None:
    keys = (ApiKey(hash_key(KEY), "one"),)
    with scripted(api=ApiOptions(keys=keys)) as (_, url):
        client = connect(url, api_key=KEY)
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(**say(temperature=3))
        assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(**say(), extra_body={"routing": {"cost_wait": 1}})
        assert bad.value.param == "routing.cost_wait" and "cost_weight" in str(bad.value)
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(**say(), tools=[{"type": "function", "function": {"name": "f"}}])
        assert bad.value.param == "tools"
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(**say(model="gpt-5"))
        assert unknown.value.code == "model_not_found" and unknown.value.request_id
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-5")
        with pytest.raises(openai.AuthenticationError) as closed:
            connect(url, api_key="roro-other").chat.completions.create(**say())
        assert closed.value.code == "invalid_api_key"
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="auto", input="x")


def test_a_full_server_is_asked_again_when_it_said() -> None:
    gate = threading.Event()
    engines = make_engines(hangs=lambda prefix: False)
    engines[0].write = lambda prefix: "Answer: 1"
    engines[0].hangs = lambda prefix: "wait" in prefix and not gate.is_set()
    options = ServiceOptions(max_concurrent=1, max_queue=0)
    with scripted(*engines, options=options) as (served, url):
        client = connect(url)
        stream = client.chat.completions.create(**say("wait", model="small"), stream=True)
        wait_for(lambda: served.active == 1)
        with pytest.raises(openai.RateLimitError) as full:
            client.chat.completions.create(**say(model="small"))
        retry_after = int(full.value.response.headers["retry-after"])
        assert full.value.code == "rate_limit_exceeded" and retry_after >= 1
        stream.close()
        wait_freed(served)
        # Full again until the first try has been refused.
        holder = client.chat.completions.create(**say("wait", model="small"), stream=True)
        refused = served.metrics.total("roro_requests", code="429")

        def make_room() -> None:
            wait_for(lambda: served.metrics.total("roro_requests", code="429") > refused)
            holder.close()

        helper = threading.Thread(target=make_room)
        helper.start()
        began = time.monotonic()
        answer = connect(url, max_retries=1).chat.completions.create(**say(model="small"))
        helper.join()
        assert answer.choices[0].message.content == "Answer: 1"
        assert time.monotonic() - began >= retry_after, "not before the server said"
        assert served.metrics.total("roro_requests", code="429") == refused + 1


def test_models_that_cannot_be_had() -> None:
    with scripted(*make_engines(dies=lambda prefix: 3)) as (_, url):
        client = connect(url)
        with pytest.raises(openai.InternalServerError) as gone:
            client.chat.completions.create(**say())
        assert gone.value.status_code == 503 and gone.value.code == "unavailable"
        with pytest.raises(openai.APIError) as amid:
            for _ in client.chat.completions.create(**say(), stream=True):
                pass
        assert amid.value.code == "unavailable"


# Clients that leave


@pytest.mark.parametrize("stream", [False, True])
def test_a_clients_timeout_frees_its_slots(stream: bool, tmp_path: Path) -> None:
    with scripted(*make_engines(hangs=lambda prefix: "B: " in prefix), log_path=tmp_path / "log") as (served, url):
        client = connect(url, timeout=0.5)
        with pytest.raises(openai.APITimeoutError):
            made = client.chat.completions.create(**say(n=3), stream=stream)
            for _ in made:  # the stream itself began
                pass
        wait_freed(served)
        wait_for(lambda: any(line["error"] == "client_left" for line in served.log()))


@pytest.mark.parametrize("hangs", [False, True])
def test_closing_a_stream_frees_its_slots(hangs: bool) -> None:
    engines = make_engines(hangs=lambda prefix: hangs and "B: " in prefix, delay_s=0.0 if hangs else 5.0)
    with scripted(*engines) as (served, url):
        client = connect(url)
        streams = [client.chat.completions.create(**say(n=4), stream=True) for _ in range(4)]
        for stream in streams:
            next(iter(stream))
        wait_for(lambda: served.active == 16)
        for stream in streams:
            stream.close()
        wait_freed(served)
        assert served.metrics.total("roro_errors", error="client_left") == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelling_a_task_frees_its_slots(stream: bool) -> None:
    with scripted(*make_engines(hangs=lambda prefix: "B: " in prefix)) as (served, url):
        async with connect_async(url) as client:

            async def read() -> None:
                made = await client.chat.completions.create(**say(n=2), stream=stream)
                async for _ in made:
                    pass

            tasks = [asyncio.create_task(read()) for _ in range(5)]
            await asyncio.to_thread(wait_for, lambda: served.active == 10)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(wait_freed, served)
        wait_for(lambda: served.metrics.total("roro_errors", error="client_left") == 5)


# curl


def curl(url: str, *arguments: str, body: Any = None) -> subprocess.CompletedProcess[str]:
    given = ["-H", "Content-Type: application/json", "-d", json.dumps(body)] if body is not None else []
    command = ["curl", "-sS", "--noproxy", "*", *arguments, *given, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_curl(real: tuple[Served, str]) -> None:
    url = real[1] + CHAT
    whole = json.loads(curl(url, body=say()).stdout)["choices"][0]["message"]["content"]
    streamed = curl(url, "-N", body=say(stream=True))
    assert join_content(read_stream(streamed.stdout)) == whole and streamed.returncode == 0
    traced = curl(url, "-N", "-H", "X-Roro-Trace: true", body=say(stream=True)).stdout
    assert '"event":"step_start"' in traced and '"event":"summary"' in traced
    for body, status in ((say(model="nope"), "404"), (say(n=0), "400"), ([], "400")):
        found = curl(url, "-w", "%{http_code}", body=body).stdout
        assert found.endswith(status) and json.loads(found[:-3])["error"]["message"]
    assert curl(url, "--fail", body=say(n=0)).returncode == 22
    assert curl(url, "-w", "%{http_code}", "-d", "{}").stdout.endswith("415"), "curl's own content type is a form's"
    assert curl(url, "-w", "%{http_code}").stdout.endswith("405")
    large = curl(url, "-w", "%{http_code}", "-H", "Content-Type: application/json", "-d", "@/dev/stdin")
    assert large.stdout.endswith("400"), "an empty body"
    page = curl(real[1] + "/")
    assert page.stdout.startswith("<!") and json.loads(curl(real[1] + "/healthz").stdout)["status"] == "ok"


def test_curl_that_leaves_frees_its_slots() -> None:
    with scripted(*make_engines(hangs=lambda prefix: "B: " in prefix)) as (served, url):
        for stream in (False, True):
            left = curl(url + CHAT, "-N", "--max-time", "1", body=say(stream=stream))
            assert left.returncode == 28 and ("chat.completion.chunk" in left.stdout) == stream
            wait_freed(served)


def test_curl_with_a_body_that_is_too_large(real: tuple[Served, str], tmp_path: Path) -> None:
    file = tmp_path / "large.json"
    file.write_text(json.dumps(say("x" * 2_000_000)))
    found = curl(
        real[1] + CHAT, "-w", "%{http_code}", "-H", "Content-Type: application/json", "--data-binary", f"@{file}"
    )
    assert found.stdout.endswith("413") and json.loads(found.stdout[:-3])["error"]["code"] == "request_too_large"
