"""The HTTP service's outside: every error in the envelope, keys, headers, health, access log and metrics."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from serve.api import ApiOptions
from serve.auth import ApiKey, hash_key
from serve.schema import Limits
from serve.service import ServiceOptions
from tests.fakes import ScriptedEngine
from tests.serving import (
    CHAT,
    EXPLAIN,
    ScriptedRouters,
    ask,
    check_error,
    make_engines,
    make_served,
    read_events,
    running,
    wait_until,
)

pytestmark = pytest.mark.timeout(60)
KEYS = (ApiKey(hash_key("roro-one"), "one"), ApiKey(hash_key("roro-two"), "two"))
ORIGIN = "https://page.example"


class BrokenEngine(ScriptedEngine):
    """Fails in a way that nobody foresaw, with something that no client may see."""

    async def generate_step(self, request: Any) -> Any:
        raise ZeroDivisionError("secret detail")

    def stream_step(self, request: Any) -> Any:
        raise ZeroDivisionError("secret detail")


@pytest.mark.parametrize("path", [CHAT, EXPLAIN])
async def test_bodies_that_are_no_request(path: str) -> None:
    api = ApiOptions(limits=Limits(max_body_bytes=2000))
    json_type = {"content-type": "application/json"}
    async with running(make_served(api=api)) as client:
        for content, headers, status, param in (
            (b"", json_type, 400, None),
            (b"{", json_type, 400, None),
            (b"[]", json_type, 400, None),
            (b"\xff{}", json_type, 400, None),
            (b'{"model": NaN}', json_type, 400, None),
            (b"[" * 1500, json_type, 400, None),
            (b"{}", json_type, 400, "model"),
            (json.dumps(ask(model="")).encode(), json_type, 400, "model"),
            (json.dumps(ask() | {"messages": []}).encode(), json_type, 400, "messages"),
            (json.dumps(ask(" \n ")).encode(), json_type, 400, "messages"),
            (json.dumps(ask(temperature=3)).encode(), json_type, 400, "temperature"),
            (json.dumps(ask(tools=[{}])).encode(), json_type, 400, "tools"),
            (json.dumps(ask(max_token=1)).encode(), json_type, 400, "max_token"),
            (json.dumps(ask("x" * 3000)).encode(), json_type, 413, None),
            (json.dumps(ask()).encode(), {}, 415, "Content-Type"),
            (json.dumps(ask()).encode(), {"content-type": "text/plain"}, 415, "Content-Type"),
            (json.dumps(ask()).encode(), {**json_type, "content-encoding": "gzip"}, 415, "Content-Encoding"),
        ):
            check_error(await client.post(path, content=content, headers=headers), status, param)


async def test_unknown_addresses_and_methods() -> None:
    async with running(make_served()) as client:
        for path in ("/nope", "/v1", "/v1/chat", "/v1/models/", "/healthz/", f"{CHAT}/", "/docs", "/v1/completions"):
            check_error(await client.get(path), 404, code="unknown_url")
        for method, path in (("GET", CHAT), ("PUT", CHAT), ("DELETE", "/v1/models"), ("POST", "/healthz")):
            response = await client.request(method, path)
            check_error(response, 405, code="method_not_allowed")
            assert response.headers["allow"] in ("POST", "GET")
        assert (await client.head("/healthz")).status_code == 405


async def test_an_error_that_nobody_foresaw_while_it_loads_does_not_end_loading(caplog: Any) -> None:
    served = make_served()
    ready, failures = served.service.backend.ready, [ZeroDivisionError("once")]

    async def fail_at_first() -> Any:
        if failures:
            raise failures.pop(0)
        return await ready()

    served.service.backend.ready = fail_at_first  # type: ignore[method-assign]
    async with running(served) as client:
        assert (await client.get("/healthz")).status_code == 200
    assert "once" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_while_loading(stream: bool) -> None:
    class Loading(ScriptedEngine):
        async def ready(self) -> Any:
            await asyncio.Event().wait()

    engines = [Loading("small"), Loading("large")]
    async with running(make_served(engines), loaded=False) as client:
        for method, path in (("POST", CHAT), ("POST", EXPLAIN), ("GET", "/v1/models"), ("GET", "/v1/routing/info")):
            body = ask(stream=stream) if path == CHAT else ask()
            response = await client.request(method, path, json=body if method == "POST" else None)
            check_error(response, 503, code="loading")
            assert int(response.headers["retry-after"]) >= 1
        health = await client.get("/healthz")
        assert health.status_code == 503 and health.json()["status"] == "loading"
        assert (await client.get("/openapi.json")).status_code == 200, "the document needs no model"


async def test_past_the_deadline() -> None:
    engines = make_engines(hangs=lambda prefix: "B: note" in prefix)
    served = make_served(engines, options=ServiceOptions(timeout_s=0.15, max_concurrent=1))
    async with running(served) as client:
        check_error(await client.post(CHAT, json=ask()), 504, code="deadline_exceeded")
        streamed = await client.post(CHAT, json=ask(stream=True))
        events = read_events(streamed.text)
        assert streamed.status_code == 200 and "[DONE]" not in events
        error = json.loads(events[-1])["error"]
        assert (error["type"], error["code"]) == ("timeout", "deadline_exceeded")
        queued = await asyncio.gather(*(client.post(CHAT, json=ask()) for _ in range(2)))
        assert [response.status_code for response in queued] == [504, 504], "waiting counts too"
        await wait_until(lambda: served.active == 0)
        assert served.service.admission.used == 0
    assert served.metrics.total("roro_errors", error="deadline_exceeded") == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unforeseen_failure_tells_its_id_and_nothing_else(stream: bool, tmp_path: Path) -> None:
    served = make_served([BrokenEngine("small"), BrokenEngine("large")], log_path=tmp_path / "log")
    async with running(served) as client:
        response = await client.post(CHAT, json=ask(stream=stream))
    assert "secret" not in response.text and "ZeroDivision" not in response.text
    request_id = response.headers["x-request-id"]
    if stream:
        assert json.loads(read_events(response.text)[-1])["error"]["code"] == "internal_error"
    else:
        assert request_id in check_error(response, 500, code="internal_error")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert served.metrics.total("roro_requests", code="500") == 1
    assert request_id in response.text
    line = served.log()[-1]
    assert (line["status"], line["error"], line["request_id"]) == (response.status_code, "internal_error", request_id)


async def test_a_failure_outside_every_handler_is_counted_and_enveloped(monkeypatch: pytest.MonkeyPatch) -> None:
    served = make_served()
    monkeypatch.setattr(served.service, "weight_range", lambda: 1 / 0)
    async with running(served) as client:
        response = await client.get("/v1/routing/info")
    check_error(response, 500, code="internal_error")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert len(response.headers.get_list("x-request-id")) == 1
    assert served.metrics.total("roro_requests", code="500") == 1 == served.metrics.total("roro_requests")


async def test_keys_close_the_api_and_nothing_else(tmp_path: Path) -> None:
    served = make_served(api=ApiOptions(keys=KEYS), log_path=tmp_path / "log")
    async with running(served) as client:
        for headers in (
            {},
            {"authorization": "Bearer roro-three"},
            {"authorization": "Basic roro-one"},
            {"authorization": "roro-one"},
            {"authorization": "Bearer "},
            {"authorization": f"Bearer {KEYS[0].digest}"},
        ):
            for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("POST", EXPLAIN), ("GET", "/v1/nope")):
                response = await client.request(method, path, headers=headers)
                check_error(response, 401, code="invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
        for name in ("one", "two"):
            response = await client.get("/v1/models", headers={"authorization": f"Bearer roro-{name}"})
            assert response.status_code == 200
            assert served.log()[-1]["key"] == name
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/")).status_code == 200
        info = await client.get("/v1/routing/info", headers={"authorization": "Bearer roro-one"})
        assert info.json()["needs_key"] is True
    assert "roro-one" not in (tmp_path / "log").read_text()
    assert not any(engine.requests[2:] for engine in served.engines), "health alone asked the models"


async def test_no_other_sites_page_may_ask_unless_told() -> None:
    preflight = {"origin": ORIGIN, "access-control-request-method": "POST"}
    async with running(make_served()) as client:
        for response in (
            await client.options(CHAT, headers=preflight),
            await client.get("/v1/models", headers={"origin": ORIGIN}),
        ):
            assert not [name for name in response.headers if name.startswith("access-control")]
    served = make_served(api=ApiOptions(cors_origins=[ORIGIN], keys=KEYS))
    async with running(served) as client:
        allowed = await client.options(CHAT, headers=preflight)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == ORIGIN
        key = {"authorization": "Bearer roro-one"}
        answered = await client.get("/v1/models", headers={"origin": ORIGIN, **key})
        assert answered.headers["access-control-allow-origin"] == ORIGIN
        assert "x-request-id" in answered.headers["access-control-expose-headers"]
        refused = await client.get("/v1/models", headers={"origin": ORIGIN})
        check_error(refused, 401)
        assert refused.headers["access-control-allow-origin"] == ORIGIN, "the page can read why"
        other = await client.get("/v1/models", headers={"origin": "https://evil.example", **key})
        assert "access-control-allow-origin" not in other.headers


async def test_headers_of_every_response() -> None:
    async with running(make_served()) as client:
        own = {"x-request-id": "mine-1.2:3"}
        for response in (
            await client.get("/", headers=own),
            await client.get("/healthz", headers=own),
            await client.post(CHAT, json=ask(), headers=own),
            await client.post(CHAT, json=ask(stream=True), headers=own),
            await client.get("/nope", headers=own),
            await client.post(CHAT, content=b"", headers=own),
        ):
            assert response.headers.get_list("x-request-id") == ["mine-1.2:3"]
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["cache-control"] == "no-store"
            assert response.headers["referrer-policy"] == "no-referrer"
            assert "default-src 'none'" in response.headers["content-security-policy"]
        ids = set()
        for bad in (None, "", "a b", "x" * 129, "\u00e9", '"'):
            headers = {} if bad is None else {b"x-request-id": bad.encode("latin-1")}
            ids.add((await client.get("/nope", headers=headers)).headers["x-request-id"])
        assert len(ids) == 6 and all(each.startswith("req-") for each in ids)


async def test_a_page_that_is_switched_off() -> None:
    async with running(make_served(api=ApiOptions(playground=False))) as client:
        check_error(await client.get("/"), 404)


async def test_health_checks_at_once_are_one_check() -> None:
    served = make_served([ScriptedEngine("small", delay_s=0.05), ScriptedEngine("large")])
    async with running(served) as client:
        answers = await asyncio.gather(*(client.get("/healthz") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert [len(engine.requests) for engine in served.engines] == [1, 1]


async def test_health_asks_every_model_and_the_router() -> None:
    served = make_served()
    async with running(served) as client:
        fine = await client.get("/healthz")
        assert fine.status_code == 200 and fine.json()["status"] == "ok"
        assert set(fine.json()["models"]) == {"small", "large"} and fine.json()["router"]["version"] == 7
        assert [len(engine.requests) for engine in served.engines] == [1, 1]
        served.routers.gone = 0
        lost = await client.get("/healthz")
        assert lost.status_code == 503 and lost.json()["router"]["ok"] is False
    for broken in (BrokenEngine("large"), ScriptedEngine("large", fails=lambda prefix: True)):
        async with running(make_served([ScriptedEngine("small"), broken])) as client:
            response = await client.get("/healthz")
        found = response.json()
        assert response.status_code == 503 and found["status"] == "unavailable"
        assert found["models"]["small"]["ok"] and not found["models"]["large"]["ok"] and found["router"]["ok"]
        assert "secret" not in response.text


async def test_each_outcome_has_its_line_and_its_counts(tmp_path: Path) -> None:
    engines = make_engines(dies=lambda prefix: 3 if "die" in prefix else None)
    served = make_served(engines, log_path=tmp_path / "log")
    async with running(served) as client:
        answered = (await client.post(CHAT, json=ask(user="u-1"))).json()
        streamed = await client.post(CHAT, json=ask(stream=True, safety_identifier="u-1"))
        await client.post(CHAT, json=ask(model="nope"))
        await client.post(CHAT, json=ask("private words", seed="x"))
        await client.post(CHAT, json=ask("die", stream=True))
        await client.get("/v1/models/auto")
        await client.get("/v1/%C3%A9%0A")
        await client.post(EXPLAIN, json=ask())
    lines = served.log()
    expected = [
        (CHAT, "auto", 200, None, False),
        (CHAT, "auto", 200, None, True),
        (CHAT, "nope", 404, "model_not_found", False),
        (CHAT, "", 400, None, False),
        (CHAT, "auto", 200, "unavailable", True),
        ("/v1/models/{id}", "", 200, None, False),
        ("/v1/\u00e9\n", "", 404, "unknown_url", False),
        (EXPLAIN, "auto", 200, None, False),
    ]
    keys = ("endpoint", "model", "status", "error", "stream")
    assert [tuple(line[key] for key in keys) for line in lines] == expected
    first, second = lines[:2]
    for line in (first, second):
        assert (line["router_version"], line["steps"], line["ends"]) == (7, {"small": 2, "large": 2}, ["answer"])
        assert line["tokens_in"] == answered["usage"]["prompt_tokens"]
        assert line["tokens_out"] == answered["usage"]["completion_tokens"]
        assert line["flops"] == pytest.approx(answered["routing"]["flops"])
        assert line["flops_saved"] == pytest.approx(answered["routing"]["flops_saved"])
        assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["duration_ms"]
    assert first["user"] == second["user"] != "u-1" and first["request_id"] in answered["id"]
    assert streamed.headers["x-request-id"] == second["request_id"] != first["request_id"]
    assert "private" not in (tmp_path / "log").read_text() and "Say q" not in (tmp_path / "log").read_text()
    metrics, chat = served.metrics, {"endpoint": CHAT}
    assert metrics.total("roro_requests", **chat, code="200") == 3 and metrics.total("roro_requests") == 8
    assert metrics.total("roro_requests", **chat, code="404", model="other") == 1
    assert metrics.total("roro_errors", **chat) == 3 and metrics.total("roro_errors", error="unknown_url") == 1
    assert metrics.total("roro_errors", error="http_400") == metrics.total("roro_errors", error="model_not_found") == 1
    assert metrics.total("roro_steps", model="small") == metrics.total("roro_steps", model="large") == 4
    assert metrics.total("roro_tokens_out") == 2 * answered["usage"]["completion_tokens"]
    assert metrics.total("roro_tokens_in") == 2 * answered["usage"]["prompt_tokens"]
    assert metrics.total("roro_flops") == pytest.approx(2 * answered["routing"]["flops"])
    saved = metrics.total("roro_flops_saved") - metrics.total("roro_flops_overspent")
    assert saved == pytest.approx(2 * answered["routing"]["flops_saved"])
    assert metrics.total("roro_time_to_first_token_ms_count") == 3, "a stream that failed had begun"
    assert metrics.total("roro_queue_wait_ms_count") == 3 and metrics.total("roro_router_decision_ms_count") == 9
    assert metrics.snapshot()["roro_router_version"] == 7


async def test_a_hanging_router_ends_at_the_deadline() -> None:
    routers = ScriptedRouters()
    routers.hangs = True
    served = make_served(routers=routers, options=ServiceOptions(timeout_s=0.1))
    async with running(served) as client:
        check_error(await client.post(CHAT, json=ask()), 504, code="deadline_exceeded")
