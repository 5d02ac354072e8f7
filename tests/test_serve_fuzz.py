"""The HTTP layer against what nobody would write by hand: cases made from its own OpenAPI document, and raw bytes.

Schemathesis makes requests that the document allows and requests that it forbids; whatever comes, no answer may be a
5xx, every error is in the envelope, and every response is one that the document promises, each event of a stream
included. Models are scripted, so that thousands of cases pass in a minute. `FUZZ_CASES` sets their number (`make fuzz`:
10,000, drawn anew each time).
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi import checks

from serve.api import ApiOptions
from serve.schema import Limits
from tests.serving import CHAT, EXPLAIN, ScriptedRouters, ask, make_calibration, make_served, read_stream, running

DEFAULT_CASES = 2000
CASES = int(os.environ.get("FUZZ_CASES", DEFAULT_CASES))
POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
MODEL = "/v1/models/{id}"
# Of all cases: forbidden ones are dear to make, names of models cheap.
SHARES = {
    (CHAT, POSITIVE): 0.32,
    (CHAT, NEGATIVE): 0.12,
    (EXPLAIN, POSITIVE): 0.24,
    (EXPLAIN, NEGATIVE): 0.08,
    (MODEL, POSITIVE): 0.24,
}
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
# What JSON Schema cannot say, so that the document allows it and the server refuses it, by the error's `param`.
UNSAYABLE = (
    "messages",
    "continue_final_message",
    "add_generation_prompt",
    "max_tokens, max_completion_tokens",
    "routing",
    "X-Roro-",
    "steps",
    "model",
)
RAW = max(CASES // 5, 200)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(max(300, CASES // 4))]


class Client:
    """Sends requests to the service in this process."""

    def __init__(self, loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient) -> None:
        self.loop = loop
        self.client = client

    def send(self, method: str, url: str, **options: Any) -> httpx.Response:
        return self.loop.run_until_complete(self.client.request(method, url, **options))

    def run(self, case: Case) -> httpx.Response:
        """Send a case as Schemathesis would."""
        sent = case.as_transport_kwargs(base_url="http://roro.test")
        body = {"content": sent["data"]} if "data" in sent else {"json": sent["json"]} if "json" in sent else {}
        return self.send(sent["method"], sent["url"], headers=sent["headers"], params=sent.get("params"), **body)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    loop = asyncio.new_event_loop()
    routers = ScriptedRouters(calibration=make_calibration())
    manager = running(make_served(routers=routers, api=ApiOptions(limits=Limits(max_body_bytes=100_000))))
    yield Client(loop, loop.run_until_complete(manager.__aenter__()))
    loop.run_until_complete(manager.__aexit__(None, None, None))
    loop.close()


@pytest.fixture(scope="module")
def document(client: Client) -> schemathesis.BaseSchema:
    """The app's own OpenAPI document."""
    return schemathesis.openapi.from_dict(client.send("GET", "/openapi.json").json())


def set_up(cases: int) -> settings:
    return settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=CASES == DEFAULT_CASES,  # the same cases on every run in CI
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # shrinking would take longer than all cases; the failing one is shown as it is
    )


def count_cases(kind: tuple[str, Any]) -> int:
    """Cases of one operation and mode."""
    return math.ceil(CASES * SHARES[kind])


def test_the_number_of_cases() -> None:
    assert sum(map(count_cases, SHARES)) >= CASES and DEFAULT_CASES >= 2000


@pytest.mark.parametrize(("path", "mode"), SHARES, ids=[f"{path}-{mode.value}" for path, mode in SHARES])
def test_cases_from_the_document(client: Client, document: schemathesis.BaseSchema, path: str, mode: Any) -> None:
    operation = document[path]["GET" if path == MODEL else "POST"]
    wanted = count_cases((path, mode))
    statuses: list[int] = []

    @set_up(wanted)
    @given(operation.as_strategy(mode))
    def check(case: Case) -> None:
        response = client.run(case)
        statuses.append(response.status_code)
        check_response(response)
        case.validate_response(response, checks=CHECKS)
        if mode == POSITIVE and path != MODEL and response.status_code != 200:
            param = response.json()["error"]["param"] or ""
            assert response.status_code == 400 and param.startswith(UNSAYABLE), response.text
        if mode == NEGATIVE:
            case.validate_response(response, checks=[checks.negative_data_rejection])

    check()
    assert len(statuses) == wanted
    answered = sum(status == 200 for status in statuses) / len(statuses)
    # Many allowed conversations hold nothing but white space, and headers contradict bodies; enough are answered.
    assert answered > 0.1 if mode == POSITIVE and path != MODEL else answered < 1, f"{answered:.0%} answered"


def check_response(response: httpx.Response) -> None:
    """What holds for every response, whatever was sent."""
    assert response.status_code < 500, response.text
    assert response.headers["x-request-id"]
    if response.status_code >= 400:
        body = response.json()
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
        assert body["error"]["message"] and len(response.content) < 4000, "an error repeats no long input"
        assert "Traceback" not in response.text
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert read_stream(response.text)
    else:
        assert isinstance(response.json(), dict)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/routing/info", "/healthz"])
def test_what_takes_no_input_answers_as_documented(client: Client, document: Any, path: str) -> None:
    @set_up(1)
    @given(document[path]["GET"].as_strategy())
    def check(case: Case) -> None:
        response = client.run(case)
        assert response.status_code == 200
        case.validate_response(response, checks=CHECKS)

    check()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
_NAMES = [*ask(), "routing", "stream", "n", "stop", "seed", "temperature", "steps", "stream_options", "metadata"]
_OPENINGS = st.sampled_from([b"[", b'{"a":', b'{"messages":['])
_BODIES = st.one_of(
    st.binary(max_size=300),
    st.builds(lambda value: json.dumps(value).encode(), _JSON),
    # A request with some fields replaced by anything.
    st.builds(
        lambda fields: json.dumps(ask() | fields).encode(),
        st.dictionaries(st.sampled_from(_NAMES), _JSON, max_size=3),
    ),
    # A request with bytes replaced, added or cut off.
    st.builds(
        lambda at, new, cut: (body := json.dumps(ask(stream=True)).encode())[:at] + new + body[at + cut :],
        st.integers(0, 90),
        st.binary(max_size=6),
        st.integers(0, 90),
    ),
    st.builds(lambda opening, depth: opening * depth, _OPENINGS, st.integers(1, 5000)),
    st.builds(lambda digits: b'{"n": ' + b"9" * digits + b"}", st.integers(1, 9000)),
    st.just(b" " * 100_001),
)
_HEADER_VALUE = st.binary(max_size=40).map(lambda value: bytes(byte for byte in value if byte not in b"\r\n\0"))
_HEADERS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                b"x-roro-cost-weight",
                b"x-roro-target",
                b"x-roro-trace",
                b"x-roro-force",
                b"x-roro-max-large-steps",
                b"x-roro-nothing",
                b"content-encoding",
                b"content-length",
                b"content-type",
                b"authorization",
                b"x-request-id",
                b"cookie",
                b"expect",
                b"origin",
            ]
        ),
        _HEADER_VALUE | st.sampled_from([b"1", b"0.5", b"true", b"small", b"large_share=0.5", b"1e999", b"-0"]),
    ),
    max_size=4,
)
_TYPES = st.sampled_from([b"application/json"] * 4 + [b"text/plain", b"", b"application/json; charset=utf-16", b"\xff"])


def test_raw_bytes_and_odd_headers(client: Client) -> None:
    seen: set[int] = set()

    @set_up(RAW)
    @given(st.sampled_from([CHAT, EXPLAIN]), _BODIES, _TYPES, _HEADERS)
    def check(path: str, body: bytes, kind: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        response = client.send("POST", path, content=body, headers=[(b"content-type", kind), *headers])
        check_response(response)
        seen.add(response.status_code)

    check()
    assert {200, 400, 413, 415} <= seen <= {200, 400, 404, 413, 415}


def test_any_path_and_method(client: Client) -> None:
    methods = st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FOO"])
    parts = st.sampled_from(["v1", "models", "chat", "completions", "routing", "..", "%2e%2e", "", "%00", "%ff"])
    seen: set[int] = set()

    @set_up(RAW // 2)
    @given(methods, st.lists(parts | st.text("abc%/?#:@", max_size=6), max_size=5), st.text("a=&%0", max_size=10))
    def check(method: str, path: list[str], query: str) -> None:
        try:
            url = httpx.URL("http://roro.test/" + "/".join(path), params=query)
        except httpx.InvalidURL:
            return
        response = client.send(method, str(url))
        seen.add(response.status_code)
        if response.headers.get("content-type", "").startswith("text/html"):
            assert response.status_code == 200, "the playground"
        else:
            check_response(response)

    check()
    assert {404, 405} <= seen
