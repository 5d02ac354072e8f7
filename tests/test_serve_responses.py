"""Responses against the official client's own types, stop strings against a naive reference, errors over HTTP."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import pickle
from typing import Any

import jsonschema
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from roro_ray.errors import DeadlineError, EngineError, QueueFullError
from serve import problems
from serve.openapi import drop_framework_errors
from serve.openapi_responses import (
    ERRORS,
    chat_responses,
    chunk_schema,
    completion_schema,
    error_responses,
    error_schema,
    explain_schema,
    health_schema,
    info_schema,
    models_schema,
)
from serve.problems import ApiError, install_handlers, model_not_found, to_api_error, too_many
from serve.responses import (
    ChoiceResult,
    ChunkMaker,
    Head,
    RoutingSummary,
    StepStart,
    StepTrace,
    TokenUsage,
    finish_reason,
    join_steps,
    make_completion,
    sse,
    sse_error,
)
from serve.stop_filter import StopFilter, cut_at_stop

HEAD = Head("chatcmpl-1", 1_700_000_000, "auto", "fp")
STEP = StepTrace(
    choice=0,
    index=1,
    model="large",
    probability=0.75,
    probabilities={"small": 0.25, "large": 0.75},
    router_version=30,
    text="B = 7",
    tokens=5,
    discarded=2,
    confidence=0.9,
    confidence_min=math.nan,
    flops=1e8,
    milliseconds=4.5,
    capped=True,
)
SUMMARY = RoutingSummary(
    router="router-v30",
    router_version=30,
    cost_weight=0.2,
    steps={"small": 3, "large": 1},
    large_share=0.25,
    flops=4e8,
    flops_large_only=1e9,
    degraded=False,
    ends=("answer", "token_limit"),
    trace=(STEP,),
)
USAGE = TokenUsage(20, 12)


def is_valid(schema: dict[str, Any], value: Any) -> bool:
    jsonschema.Draft202012Validator(schema).validate(value)
    return True


def test_a_completion_is_one_to_the_official_client() -> None:
    made = make_completion(HEAD, [ChoiceResult(0, "6", "answer"), ChoiceResult(1, "x", "token_limit")], USAGE, SUMMARY)
    made = json.loads(json.dumps(made, allow_nan=False))
    assert is_valid(completion_schema(), made)
    parsed = ChatCompletion.model_validate(made, strict=True)
    assert [choice.message.content for choice in parsed.choices] == ["6", "x"]
    assert [choice.finish_reason for choice in parsed.choices] == ["stop", "length"]
    assert parsed.usage is not None and parsed.usage.total_tokens == 32
    assert parsed.model_extra is not None
    routing = parsed.model_extra["routing"]
    assert routing["flops_saved"] == 6e8
    assert routing["trace"][0]["confidence_min"] is None
    assert routing["trace"][0]["probabilities"] == {"small": 0.25, "large": 0.75}


def test_no_trace_where_none_was_asked_for() -> None:
    made = make_completion(HEAD, [ChoiceResult(0, "6", "stop")], USAGE, dataclasses.replace(SUMMARY, trace=None))
    assert "trace" not in made["routing"]
    assert is_valid(completion_schema(), made)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("answer", "stop"),
        ("stop", "stop"),
        ("stop_string", "stop"),
        ("empty", "stop"),
        ("repeated", "stop"),
        ("step_limit", "length"),
        ("token_limit", "length"),
    ],
)
def test_finish_reasons(end: str, reason: str) -> None:
    assert finish_reason(end) == reason


def test_chunks_are_chunks_to_the_official_client() -> None:
    maker = ChunkMaker(HEAD, include_usage=True)
    start = StepStart(0, 1, "large", 0.75, {"small": 0.25, "large": 0.75}, 30)
    made = [
        maker.start(0),
        maker.step_start(start),
        maker.text(0, "6"),
        maker.step_end(STEP),
        maker.finish(0, "answer"),
        maker.summary(USAGE, SUMMARY),
    ]
    assert all(is_valid(chunk_schema(), chunk) for chunk in made)
    chunks = [ChatCompletionChunk.model_validate(json.loads(sse(chunk)[6:]), strict=True) for chunk in made]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all("usage" in chunk for chunk in made)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "6"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, None, None, "stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens == 20
    events = [chunk["routing"]["event"] for chunk in made if "routing" in chunk]
    assert events == ["step_start", "step_end", "summary"]


def test_usage_is_absent_where_it_was_not_asked_for() -> None:
    maker = ChunkMaker(HEAD)
    assert "usage" not in maker.text(0, "a")
    assert "usage" not in maker.summary(None, SUMMARY)


def test_an_event_is_one_line_whatever_its_text() -> None:
    text = "a\n\nb\r\n\u2028\u0085 \N{GRINNING FACE} \ud800"
    event = sse({"text": text})
    assert event.startswith(b"data: ") and event.endswith(b"\n\n")
    assert len(event.decode().splitlines()) == 2
    assert json.loads(event[6:]) == {"text": text}


def test_errors_amid_a_stream_have_the_envelope() -> None:
    event = json.loads(sse_error(ApiError(503, "gone", "server_error"))[6:])
    assert event == {"error": {"message": "gone", "type": "server_error", "param": None, "code": None}}


def test_steps_are_joined_by_their_delimiter() -> None:
    assert join_steps(["a", "b"]) == "a\n\nb"


# ---- stop strings


def naive_cut(text: str, stops: list[str]) -> str:
    """Read character by character; end where the text read so far ends with a stop string, the longest of them."""
    for end in range(len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))]
    return text


TEXTS = st.text(alphabet="ab\n", max_size=24)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4)


@given(TEXTS, STOPS, st.lists(st.integers(0, 24), max_size=8))
@settings(max_examples=1000, deadline=None)
def test_stop_strings_cut_as_the_naive_reference_however_the_text_comes(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    stop_filter = StopFilter(stops)
    wanted = naive_cut(text, stops)
    told = ""
    for begin, end in itertools.pairwise(places):
        told += stop_filter.feed(text[begin:end])
        assert wanted.startswith(told)  # nothing is ever taken back
        if not stop_filter.stopped:
            held = end - len(told)
            assert held < max(map(len, stops), default=1)
    told += stop_filter.flush()
    assert told == wanted
    assert stop_filter.stopped == (wanted != text or any(text.endswith(s) for s in stops))
    assert cut_at_stop(text, stops)[0] == wanted


def test_text_that_cannot_become_a_stop_string_is_told_at_once() -> None:
    stop_filter = StopFilter(["END", "\n\nQ"])
    assert [stop_filter.feed(piece) for piece in ("abc", "E", "N", "x", "\n", "\nA", "..EN", "D!")] == [
        *("abc", "", "", "ENx", "", "\n\nA", "..", ""),
    ]
    assert stop_filter.found == "END"
    assert stop_filter.feed("more") == stop_filter.flush() == ""


def test_an_empty_stop_string_is_our_fault() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopFilter(["a", ""])


# ---- errors


def test_errors_pickle_with_all_they_hold() -> None:
    error = pickle.loads(pickle.dumps(too_many(2.3)))
    assert (error.status, error.type, error.headers) == (429, "rate_limit_error", {"Retry-After": "3"})
    assert str(error) == error.message


def test_an_unknown_model_comes_with_the_known_ones() -> None:
    error = model_not_found("smal", ("auto", "small"))
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")
    assert "did you mean 'small'" in error.message and "auto, small" in error.message


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ApiError(413, "x"), 413),
        (QueueFullError("full"), 429),
        (DeadlineError("late"), 504),
        (TimeoutError("late"), 504),
        (EngineError("/secret/path died"), 503),
        (KeyError("/secret/path"), 500),
    ],
)
def test_exceptions_are_told_without_their_words(error: Exception, status: int) -> None:
    told = to_api_error(error, "req-1")
    assert told.status == status
    assert "secret" not in told.message
    assert status != 500 or "req-1" in told.message


class Body(BaseModel):
    n: int


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    install_handlers(app)

    @app.get("/full")
    async def full() -> None:
        raise too_many(0.2)

    @app.get("/broken")
    async def broken(request: Request) -> None:
        request.state.request_id = "req-7"
        raise KeyError("the secret key")

    @app.get("/dead")
    async def dead() -> None:
        raise EngineError("secret")

    @app.post("/typed")
    async def typed(body: Body, count: int) -> None:
        pass

    return TestClient(app, raise_server_exceptions=False)


def check(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status
    assert response.headers["x-request-id"]
    assert is_valid(error_schema(), response.json())
    return response.json()["error"]  # type: ignore[no-any-return]


def test_every_error_of_an_app_leaves_in_the_envelope(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    full = client.get("/full")
    assert check(full, 429)["type"] == "rate_limit_error" and full.headers["Retry-After"] == "1"
    assert check(client.get("/nowhere"), 404)["type"] == "not_found_error"
    wrong = client.post("/full")
    assert check(wrong, 405)["code"] == "method_not_allowed" and wrong.headers["Allow"] == "GET"
    assert check(client.post("/typed?count=1", json={"n": "x"}), 400)["param"] == "n"
    assert check(client.post("/typed?count=x", json={"n": 1}), 400)["param"] == "count"
    assert check(client.post("/typed?count=1", content=b"{"), 400)
    assert "secret" not in check(client.get("/dead"), 503)["message"]
    with caplog.at_level(logging.ERROR):
        response = client.get("/broken")
    error = check(response, 500)
    assert "secret" not in response.text and "Traceback" not in response.text
    assert "req-7" in error["message"] and response.headers["x-request-id"] == "req-7"
    assert "the secret key" in caplog.text and "req-7" in caplog.text


def test_the_official_client_reads_our_errors() -> None:
    import openai

    app = FastAPI()
    install_handlers(app)

    @app.post("/v1/chat/completions")
    async def refuse() -> None:
        raise problems.bad_request("no", "messages[0].role", "c")

    with TestClient(app) as test_client:
        http = openai.DefaultHttpxClient(transport=test_client._transport)
        client = openai.OpenAI(api_key="k", base_url="http://t/v1", http_client=http)
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="auto", messages=[{"role": "user", "content": "hi"}])
    assert (caught.value.param, caught.value.code) == ("messages[0].role", "c")


def test_the_documents_pieces_are_schemas_and_promise_no_422() -> None:
    for schema in (completion_schema, chunk_schema, explain_schema, health_schema, info_schema, models_schema):
        jsonschema.Draft202012Validator.check_schema(schema())
    app = FastAPI()

    @app.get("/v1/models/{name}", responses=error_responses(404))
    async def model(name: str) -> None: ...

    @app.post("/v1/chat/completions", responses=chat_responses())
    async def chat() -> None: ...

    document = drop_framework_errors(app.openapi())
    assert set(document["paths"]["/v1/models/{name}"]["get"]["responses"]) == {"200", "404"}
    answers = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(answers) == {"200", *map(str, ERRORS)}
    assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "Retry-After" in answers["429"]["headers"]
    assert "ValidationError" not in json.dumps(document)
