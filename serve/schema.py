"""The chat completion request: OpenAI's schema, read strictly into plain values.

A request either means exactly one thing that this server does, or is refused with a 400 that names the field. Nothing
is ignored: fields of the official schema that are not supported are refused by name (see `unsupported`), unknown ones
with a suggestion. `user`, `metadata` and `safety_identifier` are taken for the access log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from roro_ray.evaluation.calibration import Target
from serve.body import check_content_type, decode_object, shorten
from serve.continuation import BEGIN, CONTINUE, read_continuation
from serve.fields import Fields, item_fields
from serve.problems import bad_request
from serve.routing_fields import RoutingRequest, parse_routing
from serve.unsupported import UNSUPPORTED, UNSUPPORTED_IN_MESSAGE, UNSUPPORTED_IN_STREAM, refuse_unsupported

__all__ = [
    "ChatRequest",
    "ExplainRequest",
    "GivenStep",
    "Limits",
    "Message",
    "RoutingRequest",
    "Target",
    "parse_chat_request",
    "parse_explain_request",
]

ROLES = ("system", "developer", "user", "assistant")
MAX_SEED = 9_223_372_036_854_776_000  # the official schema's bound: 2**63 as a double prints it
MAX_TEMPERATURE = 2.0
MAX_STOPS = 4
MAX_MODEL_CHARS = 256
MAX_TAG_CHARS = 512  # user, safety_identifier, a metadata value
MAX_METADATA = 16
MAX_METADATA_KEY_CHARS = 64

_SUPPORTED = (
    "model",
    "messages",
    "temperature",
    "top_p",
    "seed",
    "n",
    "stop",
    "max_tokens",
    "max_completion_tokens",
    "stream",
    "stream_options",
    "user",
    "metadata",
    "safety_identifier",
    "routing",
    CONTINUE,
    BEGIN,
)


@dataclass
class Limits:
    """What one request may ask for."""

    max_body_bytes: int = 1_048_576  # bytes of a request's body
    max_messages: int = 256  # messages of a conversation
    max_text_chars: int = 65_536  # characters of a whole conversation, and of the steps given to explain
    max_completion_tokens: int = 1024  # tokens of one choice; the default where a request sets none
    max_choices: int = 8  # n
    max_stop_chars: int = 256  # characters of one stop string
    max_given_steps: int = 64  # steps of an explain request
    default_temperature: float = 0.0  # the routers are trained on greedy steps


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of the conversation; parts of text are joined by line breaks."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked request. `seed` is None where the client gave none; `max_tokens` bounds each choice.

    `continues`: the last message is the beginning of the answer.
    """

    model: str
    messages: tuple[Message, ...]
    temperature: float
    top_p: float
    seed: int | None
    n: int
    stop: tuple[str, ...]
    max_tokens: int
    stream: bool
    include_usage: bool
    routing: RoutingRequest
    user: str | None = None
    safety_identifier: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    continues: bool = False


@dataclass(frozen=True, slots=True)
class GivenStep:
    """A step that an explain request says is written already; None where it does not say how it went."""

    model: str
    text: str
    tokens: int | None = None
    confidence: float | None = None
    confidence_min: float | None = None


@dataclass(frozen=True, slots=True)
class ExplainRequest:
    """A chat request and the steps written so far."""

    chat: ChatRequest
    steps: tuple[GivenStep, ...]


def parse_chat_request(body: bytes | Mapping[str, Any], headers: Mapping[str, str], limits: Limits) -> ChatRequest:
    """Read and check a request of POST /v1/chat/completions.

    Args:
        body: the raw bytes, or an object decoded before (then the content type is not checked).
        headers: all of the request's; names in any case.

    Raises:
        ApiError: 400, 413 or 415; no other exception, whatever the body is.
    """
    return _read_chat(_read_fields(body, headers, limits), headers, limits, ())


def parse_explain_request(
    body: bytes | Mapping[str, Any], headers: Mapping[str, str], limits: Limits
) -> ExplainRequest:
    """Read and check a request of POST /v1/routing/explain: a chat request, and `steps`. It cannot be streamed.

    Raises:
        ApiError: 400, 413 or 415.
    """
    fields = _read_fields(body, headers, limits)
    chat = _read_chat(fields, headers, limits, ("steps",))
    if chat.stream:
        raise bad_request("stream is not supported here: an explanation comes in one piece.", "stream")
    return ExplainRequest(chat, _read_steps(fields, limits))


def _read_fields(body: bytes | Mapping[str, Any], headers: Mapping[str, str], limits: Limits) -> Fields:
    if not isinstance(body, Mapping):
        check_content_type(headers)
    return Fields(decode_object(body, limits.max_body_bytes))


def _read_chat(fields: Fields, headers: Mapping[str, str], limits: Limits, also: tuple[str, ...]) -> ChatRequest:
    fields.refuse_unknown((*_SUPPORTED, *also, *UNSUPPORTED))
    refuse_unsupported(fields, UNSUPPORTED)
    model = fields.text("model", MAX_MODEL_CHARS, required=True, min_chars=1)
    messages = _read_messages(fields, limits)
    stream = fields.boolean("stream")
    temperature = fields.number("temperature", limits.default_temperature, 0.0, MAX_TEMPERATURE)
    top_p = fields.number("top_p", 1.0, 0.0, 1.0, above=True)
    n = fields.integer("n", 1, 1, limits.max_choices)
    assert model is not None and temperature is not None and top_p is not None and n is not None  # have defaults
    return ChatRequest(
        model=model,
        messages=messages,
        temperature=temperature,
        top_p=top_p,
        seed=_read_seed(fields),
        n=n,
        stop=_read_stop(fields, limits),
        max_tokens=_read_max_tokens(fields, limits),
        stream=stream,
        include_usage=_read_include_usage(fields, stream),
        routing=parse_routing(fields, headers),
        user=fields.text("user", MAX_TAG_CHARS),
        safety_identifier=fields.text("safety_identifier", MAX_TAG_CHARS),
        metadata=_read_metadata(fields),
        continues=read_continuation(fields, messages[-1].role),
    )


def _read_messages(fields: Fields, limits: Limits) -> tuple[Message, ...]:
    items = fields.array("messages", limits.max_messages, 1)
    if items is None:
        raise fields.wrong("messages", "an array of messages")
    messages = tuple(_read_message(item_fields(item, f"messages[{index}]")) for index, item in enumerate(items))
    chars = sum(len(message.content) for message in messages)
    if chars > limits.max_text_chars:
        message = f"The conversation has {chars} characters; at most {limits.max_text_chars} are read. Shorten it."
        raise bad_request(message, "messages", "context_length_exceeded")
    return messages


def _read_message(fields: Fields) -> Message:
    fields.refuse_unknown(("role", "content", *UNSUPPORTED_IN_MESSAGE))
    role = fields.get("role")
    if role not in ROLES:
        tools = " Tools are not supported." if role in ("tool", "function") else ""
        error = fields.wrong("role", f"one of {', '.join(ROLES)}")
        raise bad_request(error.message + tools, error.param)
    refuse_unsupported(fields, UNSUPPORTED_IN_MESSAGE)
    content = fields.get("content")
    if isinstance(content, str):
        return Message(str(role), content)
    if not isinstance(content, (list, tuple)) or not content:
        raise fields.wrong("content", "a string or an array of text parts")
    place = fields.param("content")
    parts = [_read_part(item_fields(part, f"{place}[{index}]")) for index, part in enumerate(content)]
    return Message(str(role), "\n".join(parts))


def _read_part(fields: Fields) -> str:
    kind = fields.get("type")
    if kind != "text":
        param = fields.param("type")
        raise bad_request(f"{param} must be 'text', not {shorten(kind)}: only text is read.", param)
    fields.refuse_unknown(("type", "text"))
    if not isinstance(text := fields.get("text"), str):
        raise fields.wrong("text", "a string")
    return text


def _read_seed(fields: Fields) -> int | None:
    """The seed as a signed 64-bit integer; the few beyond are wrapped, so that every one fits a column."""
    seed = fields.integer("seed", None, -MAX_SEED, MAX_SEED)
    return None if seed is None else (seed + 2**63) % 2**64 - 2**63


def _read_stop(fields: Fields, limits: Limits) -> tuple[str, ...]:
    value = fields.get("stop")
    single = isinstance(value, str)
    items = [value] if single else fields.array("stop", MAX_STOPS) or []
    for index, item in enumerate(items):
        param = "stop" if single else f"stop[{index}]"
        if not isinstance(item, str) or not item:
            raise bad_request(f"{param} must be a string of at least one character, not {shorten(item)}.", param)
        if len(item) > limits.max_stop_chars:
            raise bad_request(f"{param} must have at most {limits.max_stop_chars} characters.", param)
    return tuple(items)


def _read_max_tokens(fields: Fields, limits: Limits) -> int:
    new = fields.integer("max_completion_tokens", None, 1, limits.max_completion_tokens)
    old = fields.integer("max_tokens", None, 1, limits.max_completion_tokens)
    if new is not None and old is not None and new != old:
        message = f"max_tokens ({old}) and its successor max_completion_tokens ({new}) disagree. Send one."
        raise bad_request(message, "max_tokens, max_completion_tokens")
    given = new if new is not None else old
    return limits.max_completion_tokens if given is None else given


def _read_include_usage(fields: Fields, stream: bool) -> bool:
    options = fields.object("stream_options")
    if options is None:
        return False
    if not stream:
        raise bad_request("stream_options may only be given with stream: true.", "stream_options")
    options.refuse_unknown(("include_usage", *UNSUPPORTED_IN_STREAM))
    refuse_unsupported(options, UNSUPPORTED_IN_STREAM)
    return options.boolean("include_usage")


def _read_metadata(fields: Fields) -> dict[str, str]:
    metadata = fields.object("metadata")
    if metadata is None:
        return {}
    if len(metadata.values) > MAX_METADATA:
        raise bad_request(f"metadata may have at most {MAX_METADATA} pairs; it has {len(metadata.values)}.", "metadata")
    for key, value in metadata.values.items():
        if len(key) > MAX_METADATA_KEY_CHARS:
            raise bad_request(f"A key of metadata has more than {MAX_METADATA_KEY_CHARS} characters.", "metadata")
        if not isinstance(value, str) or len(value) > MAX_TAG_CHARS:
            param = metadata.param(key)
            raise bad_request(f"{param} must be a string of at most {MAX_TAG_CHARS} characters.", param)
    return dict(metadata.values)


def _read_steps(fields: Fields, limits: Limits) -> tuple[GivenStep, ...]:
    items = fields.array("steps", limits.max_given_steps) or []
    steps = tuple(_read_step(item_fields(item, f"steps[{index}]"), limits) for index, item in enumerate(items))
    chars = sum(len(step.text) for step in steps)
    if chars > limits.max_text_chars:
        raise bad_request(f"The steps have {chars} characters; at most {limits.max_text_chars} are read.", "steps")
    return steps


def _read_step(fields: Fields, limits: Limits) -> GivenStep:
    fields.refuse_unknown(("model", "text", "tokens", "confidence", "confidence_min"))
    model = fields.text("model", MAX_MODEL_CHARS, required=True, min_chars=1)
    text = fields.text("text", limits.max_text_chars, required=True)
    assert model is not None and text is not None  # required
    return GivenStep(
        model,
        text,
        fields.integer("tokens", None, 0, limits.max_completion_tokens),
        fields.number("confidence", None, 0.0, 1.0),
        fields.number("confidence_min", None, 0.0, 1.0),
    )
