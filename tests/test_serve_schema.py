"""The chat request: what is taken, what is refused, and that nothing but an ApiError ever comes out."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roro_ray.evaluation.calibration import Target
from serve.body import read_body
from serve.openapi import chat_request_schema, explain_request_schema, make_operation
from serve.problems import ApiError
from serve.schema import (
    ChatRequest,
    GivenStep,
    Limits,
    Message,
    RoutingRequest,
    parse_chat_request,
    parse_explain_request,
)
from serve.unsupported import UNSUPPORTED

JSON_TYPE = {"Content-Type": "application/json"}
LIMITS = Limits(max_body_bytes=4096, max_messages=4, max_text_chars=100, max_completion_tokens=64, max_choices=3)
HELLO = [{"role": "user", "content": "hi"}]


def parse(headers: dict[str, str] | None = None, **fields: Any) -> ChatRequest:
    body = {"model": "auto", "messages": HELLO, **fields}
    return parse_chat_request(json.dumps(body).encode(), {**JSON_TYPE, **(headers or {})}, LIMITS)


def refuse(headers: dict[str, str] | None = None, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(headers, **fields)
    assert caught.value.status == 400
    return caught.value


def refuse_raw(body: bytes, headers: dict[str, str] | None = None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_chat_request(body, JSON_TYPE if headers is None else headers, LIMITS)
    return caught.value


def test_a_bare_request_gets_the_defaults() -> None:
    request = parse()
    assert request == ChatRequest(
        model="auto",
        messages=(Message("user", "hi"),),
        temperature=0.0,
        top_p=1.0,
        seed=None,
        n=1,
        stop=(),
        max_tokens=64,
        stream=False,
        include_usage=False,
        routing=RoutingRequest(),
    )


def test_every_supported_field_is_read() -> None:
    request = parse(
        temperature=0.5,
        top_p=0.9,
        seed=-7,
        n=3,
        stop=["a", "bc"],
        max_completion_tokens=9,
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
        user="u",
        safety_identifier="s",
        metadata={"k": "v"},
        routing={"cost_weight": 0.25, "max_large_steps": 2, "trace": True},
    )
    assert (request.temperature, request.top_p, request.seed, request.n) == (0.5, 0.9, -7, 3)
    assert (request.stop, request.max_tokens) == (("a", "bc"), 9)
    assert request.stream and request.include_usage
    assert (request.user, request.safety_identifier, request.metadata) == ("u", "s", {"k": "v"})
    assert request.routing == RoutingRequest(cost_weight=0.25, max_large_steps=2, trace=True)


def test_null_is_not_given() -> None:
    names = ["temperature", "top_p", "seed", "n", "stop", "max_tokens", "stream", "stream_options", "user"]
    names += ["metadata", "routing", *UNSUPPORTED]
    assert parse(**dict.fromkeys(names)) == parse()


def test_the_default_temperature_is_the_servers() -> None:
    body = {"model": "auto", "messages": HELLO}
    assert parse_chat_request(body, {}, Limits(default_temperature=0.7)).temperature == 0.7


def test_text_parts_are_joined_by_line_breaks() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert parse(messages=[{"role": "user", "content": parts}]).messages == (Message("user", "one\ntwo"),)


def test_an_answer_can_be_handed_back_as_the_client_dumps_it() -> None:
    from openai.types.chat import ChatCompletionMessage

    answer = ChatCompletionMessage(role="assistant", content="6").model_dump()
    messages = [*HELLO, answer, {"role": "user", "content": "and now?"}]
    assert parse(messages=messages).messages[1] == Message("assistant", "6")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"model": ""}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": HELLO * 5}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [*HELLO, {"role": "tool", "content": "hi"}]}, "messages[1].role"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": "hi", "name": "Ann"}]}, "messages[0].name"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "hi", "contents": 1}]}, "messages[0].contents"),
        ({"messages": [{"role": "user", "content": "x" * 60}] * 2}, "messages"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": False}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 4}, "n"),
        ({"n": 10**400}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 65}, "max_tokens"),
        ({"max_completion_tokens": 65}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens, max_completion_tokens"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"user": 7}, "user"),
        ({"user": "x" * 513}, "user"),
        ({"metadata": []}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {str(i): "v" for i in range(17)}}, "metadata"),
        ({"routing": []}, "routing"),
        ({"routing": {"cost": 1}}, "routing.cost"),
        ({"routing": {"cost_weight": -1}}, "routing.cost_weight"),
        ({"routing": {"cost_weight": "1"}}, "routing.cost_weight"),
        ({"routing": {"cost_weight": 10**400}}, "routing.cost_weight"),
        ({"routing": {"target": 0.3}}, "routing.target"),
        ({"routing": {"target": {}}}, "routing.target"),
        ({"routing": {"target": {"large_share": 0.1, "accuracy_within": 0.1}}}, "routing.target"),
        ({"routing": {"target": {"large_share": 1.1}}}, "routing.target.large_share"),
        ({"routing": {"target": {"share": 1}}}, "routing.target.share"),
        ({"routing": {"max_large_steps": -1}}, "routing.max_large_steps"),
        ({"routing": {"force": ""}}, "routing.force"),
        ({"routing": {"trace": "true"}}, "routing.trace"),
        ({"temprature": 1}, "temprature"),
        ({"steps": []}, "steps"),
    ],
)
def test_a_wrong_field_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    assert refuse(**fields).param == param


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal", "nonsense", None, 3])
def test_parts_other_than_text_are_refused(kind: Any) -> None:
    parts = [{"type": "text", "text": "look"}, {"type": kind, "image_url": {"url": "https://example.org/a.png"}}]
    assert refuse(messages=[{"role": "user", "content": parts}]).param == "messages[0].content[1].type"


def test_an_unknown_field_comes_with_a_suggestion() -> None:
    assert "did you mean 'temperature'" in refuse(temprature=1).message
    assert "did you mean 'cost_weight'" in refuse(routing={"cost_wieght": 1}).message


ASKING: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "frequency_penalty": 0.5,
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "logit_bias": {"50256": -100},
    "logprobs": True,
    "modalities": ["text", "audio"],
    "moderation": {"model": "omni"},
    "parallel_tool_calls": "yes",
    "prediction": {"type": "content", "content": "x"},
    "presence_penalty": -0.5,
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "response_format": {"type": "json_object"},
    "service_tier": "flex",
    "store": True,
    "tool_choice": "auto",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "top_logprobs": 2,
    "verbosity": "high",
    "web_search_options": {},
}


@pytest.mark.parametrize("name", sorted(ASKING))
def test_an_unsupported_field_is_refused_by_name_unless_it_asks_for_nothing(name: str) -> None:
    error = refuse(**{name: ASKING[name]})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    for neutral in UNSUPPORTED[name].neutral:
        assert parse(**{name: neutral}) == parse()


def test_every_field_of_the_official_schema_is_read_or_refused_by_name() -> None:
    from openai.types.chat import completion_create_params as official

    names = set(official.CompletionCreateParamsStreaming.__annotations__)
    names |= set(official.CompletionCreateParamsBase.__annotations__)
    assert len(names) > 30
    known = set(chat_request_schema(LIMITS)["properties"])
    assert names <= known
    assert set(ASKING) == set(UNSUPPORTED) <= names


def test_false_is_not_zero_and_zero_not_false() -> None:
    assert refuse(frequency_penalty=False).param == "frequency_penalty"
    assert refuse(logprobs=0).param == "logprobs"


def test_whole_floats_are_integers_and_equal_limits_agree() -> None:
    request = parse(n=2.0, max_tokens=5, max_completion_tokens=5)
    assert (request.n, request.max_tokens) == (2, 5)


def test_seeds_are_signed_64_bit_integers() -> None:
    assert [parse(seed=seed).seed for seed in (2**63 - 1, -(2**63), 2**63)] == [2**63 - 1, -(2**63), -(2**63)]


def test_headers_control_the_routing() -> None:
    headers = {
        "X-Roro-Target": "large_share=0.3",
        "x-roro-max-large-steps": "2",
        "X-RORO-TRACE": "True",
    }
    assert parse(headers).routing == RoutingRequest(target=Target(large_share=0.3), max_large_steps=2, trace=True)
    assert parse({"X-Roro-Force": "small"}).routing == RoutingRequest(force="small")
    assert parse({"X-Roro-Cost-Weight": "0.5"}, routing={"cost_weight": 0.5}).routing.cost_weight == 0.5


@pytest.mark.parametrize(
    ("headers", "routing", "param"),
    [
        ({"X-Roro-Cost-Weight": "0.5"}, {"cost_weight": 0.4}, "routing.cost_weight, X-Roro-Cost-Weight"),
        ({"X-Roro-Trace": "false"}, {"trace": True}, "routing.trace, X-Roro-Trace"),
        ({"X-Roro-Target": "large_share=0.5"}, {"cost_weight": 0.4}, "routing.cost_weight, X-Roro-Target"),
        ({}, {"cost_weight": 0.4, "target": {"large_share": 0.1}}, "routing.cost_weight, routing.target"),
        ({"X-Roro-Force": "small"}, {"cost_weight": 0.4}, "X-Roro-Force, routing.cost_weight"),
        ({"X-Roro-Cost-Weight": "dear"}, {}, "X-Roro-Cost-Weight"),
        ({"X-Roro-Cost-Weight": "NaN"}, {}, "X-Roro-Cost-Weight"),
        ({"X-Roro-Cost-Weight": "1e999"}, {}, "X-Roro-Cost-Weight"),
        ({"X-Roro-Cost-Weight": ""}, {}, "X-Roro-Cost-Weight"),
        ({"X-Roro-Cost-Weight": "9" * 5000}, {}, "X-Roro-Cost-Weight"),
        ({"X-Roro-Cost-Weight": "true"}, {}, "X-Roro-Cost-Weight"),
        ({"X-Roro-Target": "0.3"}, {}, "X-Roro-Target"),
        ({"X-Roro-Target": "large_share=much"}, {}, "X-Roro-Target.large_share"),
        ({"X-Roro-Target": "large_share=0.1,accuracy_within=0.1"}, {}, "X-Roro-Target"),
        ({"X-Roro-Trace": "yes"}, {}, "X-Roro-Trace"),
        ({"X-Roro-Max-Large-Steps": "1.5"}, {}, "X-Roro-Max-Large-Steps"),
        ({"X-Roro-Forced": "small"}, {}, "X-Roro-Forced"),
    ],
)
def test_contradicting_or_wrong_headers_are_refused(
    headers: dict[str, str], routing: dict[str, Any], param: str
) -> None:
    assert refuse(headers, routing=routing).param == param


def test_a_header_sent_twice_must_agree_with_itself() -> None:
    from starlette.datastructures import Headers

    def read(*values: str) -> ChatRequest:
        raw = [(b"content-type", b"application/json")]
        raw += [(b"x-roro-cost-weight", value.encode()) for value in values]
        return parse_chat_request(json.dumps({"model": "auto", "messages": HELLO}).encode(), Headers(raw=raw), LIMITS)

    assert read("1", "1").routing.cost_weight == 1
    with pytest.raises(ApiError, match="twice"):
        read("1", "2")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"{", "not valid JSON"),
        (b"[]", "an array"),
        (b"null", "null"),
        (b"3", "a number"),
        (b'"text"', "a string"),
        (b'{"n": NaN}', "NaN"),
        (b'{"n": -Infinity}', "-Infinity"),
        (b'{"n": 1e999}', "too large"),
        (b'{"n": ' + b"9" * 4000 + b"}", "integer"),
        (b'{"n": 1, "n": 2}', "twice"),
        (b'{"routing": {"trace": true, "trace": true}}', "twice"),
        (b'{"n": ' + b"[" * 1500 + b"]" * 1500 + b"}", "nested"),
        (b'{"n": ' + b"[" * 40 + b"]" * 40 + b"}", "nested"),
        (b'{"model": "\xff"}', "UTF-8"),
        (b'{"model": "\xed\xa0\x80"}', "UTF-8"),
        (b'\xef\xbb\xbf{"model": "auto"}', "BOM"),
        (b'{"model": "\\ud800"}', "surrogates"),
        (b'{"model": "a\\u0000b"}', "NUL"),
        (b'{"a\\u0000": 1}', "NUL"),
        (b'{"model": "a\nb"}', "not valid JSON"),
        (b'{"model": 1} {}', "not valid JSON"),
    ],
)
def test_what_is_not_clean_json_is_a_400(body: bytes, words: str) -> None:
    if words == "integer":
        body = body[:-1] + b', "model": "auto", "messages": [{"role": "user", "content": "hi"}]}'
        with pytest.raises(ApiError) as caught:
            parse_chat_request(body, JSON_TYPE, Limits())
        error = caught.value
    else:
        error = refuse_raw(body)
    assert error.status == 400
    assert words in error.message


def test_a_body_of_very_many_values_is_refused_before_it_is_read_through() -> None:
    for inner in (b"[" + b"[]," * 20_001 + b"[]]", b"{" + b",".join(b'"%d":1' % i for i in range(20_001)) + b"}"):
        with pytest.raises(ApiError, match="values"):
            parse_chat_request(b'{"messages": ' + inner + b"}", JSON_TYPE, Limits())


def test_integers_that_python_refuses_to_read_are_a_400() -> None:
    with pytest.raises(ApiError, match="too many digits"):
        parse_chat_request(b'{"n": ' + b"9" * 5000 + b"}", JSON_TYPE, Limits())


def test_integers_too_long_to_print_are_refused_too() -> None:
    for name in ("n", "temperature", "stop", "logprobs"):
        with pytest.raises(ApiError, match=name):
            parse_chat_request({"model": "auto", "messages": HELLO, name: 10**5000}, {}, LIMITS)


def test_errors_show_only_a_little_of_what_was_sent() -> None:
    assert len(refuse(temperature="x" * 3000).message) < 300
    assert len(refuse(**{"y" * 3000: 1}).message) < 300


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_what_is_not_said_to_be_json_is_a_415(headers: dict[str, str]) -> None:
    error = refuse_raw(b"{}", headers)
    assert error.status == 415
    assert error.param in ("Content-Type", "Content-Encoding")


def test_json_may_say_that_it_is_utf8() -> None:
    body = json.dumps({"model": "auto", "messages": HELLO}).encode()
    assert parse_chat_request(body, {"content-type": 'Application/JSON; charset="UTF-8"'}, LIMITS).model == "auto"


def test_a_large_body_is_a_413() -> None:
    assert refuse_raw(b" " * 4097).status == 413


async def test_a_body_is_read_only_up_to_its_limit() -> None:
    taken = 0

    async def chunks() -> Any:
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield b"12345"

    assert await read_body(chunks(), {}, 500) == b"12345" * 100
    taken = 0
    with pytest.raises(ApiError) as caught:
        await read_body(chunks(), {}, 12)
    assert (caught.value.status, taken) == (413, 3)
    taken = 0
    for length in ("13", "9" * 5000):
        with pytest.raises(ApiError):
            await read_body(chunks(), {"Content-Length": length}, 12)
    assert taken == 0


def explain(**fields: Any) -> Any:
    return parse_explain_request({"model": "auto", "messages": HELLO, **fields}, {}, LIMITS)


def test_explain_takes_the_steps_written_so_far() -> None:
    steps = [{"model": "small", "text": "a", "tokens": 3, "confidence": 0.9}, {"model": "large", "text": ""}]
    request = explain(steps=steps, routing={"cost_weight": 0.2})
    assert request.steps == (GivenStep("small", "a", 3, 0.9), GivenStep("large", ""))
    assert request.chat.routing.cost_weight == 0.2
    assert explain().steps == ()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "stream"),
        ({"steps": {}}, "steps"),
        ({"steps": [3]}, "steps[0]"),
        ({"steps": [{"model": "small"}]}, "steps[0].text"),
        ({"steps": [{"text": "a"}]}, "steps[0].model"),
        ({"steps": [{"model": "small", "text": "a", "tokens": -1}]}, "steps[0].tokens"),
        ({"steps": [{"model": "small", "text": "a", "confidence": 1.5}]}, "steps[0].confidence"),
        ({"steps": [{"model": "small", "text": "a", "sure": 1}]}, "steps[0].sure"),
        ({"steps": [{"model": "small", "text": "x" * 60}] * 2}, "steps"),
    ],
)
def test_wrong_steps_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        explain(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


# ---- hostile bodies

KEYS = [*chat_request_schema(LIMITS)["properties"], "role", "content", "type", "text", "cost_weight", "target", "x"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["user", "text", "auto", "\ud800", "a\0", 10**4000])
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=6)
    ),
    max_leaves=20,
)


def outcome(read: Any, body: Any, headers: dict[str, str]) -> Any:
    try:
        return read(body, headers, LIMITS)
    except ApiError as error:
        assert error.status in (400, 413, 415)
        assert error.message
        error.message.encode()
        (error.param or "").encode()
        return None


@given(TREES, st.dictionaries(st.sampled_from(["x-roro-trace", "x-roro-target", "x-roro-zzz", "a"]), st.text()))
@settings(max_examples=300, deadline=None)
def test_no_tree_of_values_raises_anything_else(tree: Any, headers: dict[str, str]) -> None:
    outcome(parse_chat_request, tree if isinstance(tree, dict) else {"messages": tree}, headers)
    fields = tree if isinstance(tree, dict) else {"routing": tree}
    outcome(parse_explain_request, {"model": "auto", "messages": HELLO, **fields}, headers)


@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,\\u0d8eE+-.19 \ntruefalsn', max_size=80).map(str.encode))
@settings(max_examples=300, deadline=None)
def test_no_bytes_raise_anything_else(body: bytes) -> None:
    outcome(parse_chat_request, body, JSON_TYPE)


# ---- the published schema tells the truth

MAYBE = {
    "model": ["auto", "", None, 3],
    "messages": [
        HELLO,
        [],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        [{"role": "user", "content": [{"type": "file"}]}],
        [{"role": "tool", "content": "a"}],
        [{"role": "assistant", "content": "a", "tool_calls": [], "refusal": None}],
        [{"role": "user", "content": "a", "name": "b"}],
        [{"role": "user", "content": None}],
        HELLO * 5,
    ],
    "temperature": [0, 1.5, 2.0, 2.1, -1, True, None, "a"],
    "top_p": [1, 0.1, 0, 1.1, None],
    "seed": [0, -1, 2**63, 2**64, 2.5, 2.0, None],
    "n": [1, 3, 4, 0, 1.0, None, True],
    "stop": ["a", "", [], ["a"], [""], ["a"] * 5, None, 1, "x" * 257],
    "max_tokens": [1, 64, 65, 0, None],
    "max_completion_tokens": [2, 63, 65, None],
    "stream": [True, False, None, 1],
    "stream_options": [{}, {"include_usage": True}, None, {"x": 1}, {"include_obfuscation": True}, []],
    "user": ["a", None, 1, "x" * 513, "a\0"],
    "metadata": [{}, {"a": "b"}, {"a": 1}, None, {"k" * 65: "v"}, []],
    "routing": [
        {},
        None,
        {"cost_weight": 0.5},
        {"cost_weight": -1},
        {"cost_weight": 0.5, "target": {"large_share": 0.1}},
        {"cost_weight": 0.5, "target": None},
        {"target": {"large_share": 0.1}},
        {"target": {"large_share": 0.1, "accuracy_within": None}},
        {"target": {"large_share": 0.1, "accuracy_within": 0.1}},
        {"target": {}},
        {"target": {"large_share": None}},
        {"force": "small"},
        {"force": "small", "cost_weight": 1},
        {"force": "small", "max_large_steps": 1, "trace": True},
        {"trace": 1},
    ],
    "frequency_penalty": [0, 0.0, 1, None, False],
    "logprobs": [False, True, None, 0],
    "continue_final_message": [False, None, 1],
    "add_generation_prompt": [True, None, "a"],
    "tools": [[], [1], None],
    "response_format": [{"type": "text"}, {"type": "json_object"}, None],
    "parallel_tool_calls": [True, False, None, 1],
    "zzz": [1],
}
ALSO = {
    "steps": [[], None, [{"model": "a", "text": "b"}], [{"model": "a"}], [{"model": "a", "text": "b", "tokens": 1}]]
}


def bodies(table: dict[str, list[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    options = {name: st.sampled_from(values) for name, values in table.items() if name not in ("model", "messages")}
    usual = {"model": st.just("auto"), "messages": st.just(HELLO)}
    unusual = {name: st.sampled_from(table[name]) for name in ("model", "messages")}
    few = st.lists(st.sampled_from(sorted(options)), max_size=3, unique=True)

    def build(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
        chosen = {name: options[name] for name in names}
        return st.fixed_dictionaries({**usual, **chosen}) | st.fixed_dictionaries({**unusual, **chosen})

    return few.flatmap(build)


@given(bodies(MAYBE))
@settings(max_examples=1000, deadline=None)
def test_the_schema_accepts_what_the_parser_accepts(body: dict[str, Any]) -> None:
    valid = jsonschema.Draft202012Validator(chat_request_schema(LIMITS)).is_valid(body)
    assert valid == (outcome(parse_chat_request, body, {}) is not None)


@given(bodies(MAYBE | ALSO))
@settings(max_examples=300, deadline=None)
def test_the_schema_of_explain_accepts_what_its_parser_accepts(body: dict[str, Any]) -> None:
    valid = jsonschema.Draft202012Validator(explain_request_schema(LIMITS)).is_valid(body)
    assert valid == (outcome(parse_explain_request, body, {}) is not None)


def test_the_schemas_are_schemas() -> None:
    for schema in (chat_request_schema(LIMITS, ["auto", "small"]), explain_request_schema(LIMITS)):
        jsonschema.Draft202012Validator.check_schema(schema)
        json.dumps(make_operation(schema, ["auto"]), allow_nan=False)
    named = jsonschema.Draft202012Validator(chat_request_schema(LIMITS, ["auto", "small"]))
    assert named.is_valid({"model": "small", "messages": HELLO})
    assert not named.is_valid({"model": "huge", "messages": HELLO})
