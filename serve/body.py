"""From the bytes of a request to a JSON object that holds no surprises.

Python's JSON reader takes more than JSON (NaN, Infinity, duplicate keys, numbers that overflow to infinity) and a
hostile body can make it fail in many ways; here each of them is a 400, 413 or 415 that says what is wrong. Lone
surrogates and NUL are refused wherever they stand: no tokenizer, log or Parquet file takes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Mapping
from typing import Any, NoReturn

from serve.problems import ApiError, bad_request, too_large, unsupported_media

MAX_DEPTH = 32  # levels of nesting; the schema needs fewer than ten
MAX_VALUES = 20_000  # values in one body; checking a megabyte of `[]` would hold up every other request for a second
_TYPE_NAMES = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}


async def read_body(chunks: AsyncIterator[bytes], headers: Mapping[str, str], max_bytes: int) -> bytes:
    """Read a body (`request.stream()`), and stop where it grows beyond `max_bytes`.

    Raises:
        ApiError: 413, before anything is read where Content-Length already says so.
    """
    length = lower_headers(headers).get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > max_bytes):
        raise too_large(max_bytes)
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > max_bytes:
            raise too_large(max_bytes)
    return bytes(body)


def lower_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers by lower-case name.

    Raises:
        ApiError: 400 where one is given twice with different values.
    """
    lowered: dict[str, str] = {}
    for name, value in headers.items():
        key = name.lower()
        # Only our own headers and those read here: proxies repeat others (Via, X-Forwarded-For) rightly.
        if key in lowered and lowered[key] != value and key.startswith(("x-roro-", "content-")):
            raise bad_request(f"The header {name} is given twice with different values. Send it once.", name)
        lowered[key] = value
    return lowered


def check_content_type(headers: Mapping[str, str]) -> None:
    """Refuse what is not said to be JSON in UTF-8.

    A missing type is refused too: a browser sends such a request to any server, this machine's included, without
    asking (CORS), and a page from elsewhere must not be able to make this one work.

    Raises:
        ApiError: 415.
    """
    lowered = lower_headers(headers)
    kind, _, parameters = lowered.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/json":
        got = repr(kind.strip()[:64]) if kind.strip() else "nothing"
        raise unsupported_media(f"Send the header 'Content-Type: application/json' (got {got}).", "Content-Type")
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset" and value.strip().strip('"').lower() not in {"utf-8", "utf8"}:
            raise unsupported_media(f"JSON must be UTF-8, not {value.strip()[:64]!r}.", "Content-Type")
    if (coding := lowered.get("content-encoding", "identity").strip().lower()) not in {"", "identity"}:
        raise unsupported_media(f"Send the body as it is, not encoded as {coding[:64]!r}.", "Content-Encoding")


def decode_object(body: bytes | Mapping[str, Any], max_bytes: int) -> dict[str, Any]:
    """The JSON object of a body (or one decoded before), checked throughout.

    Raises:
        ApiError: 413 for too many bytes; 400 for anything that is not one clean JSON object.
    """
    decoded: Any = body
    if isinstance(body, (bytes, bytearray, memoryview)):
        if len(body) > max_bytes:
            raise too_large(max_bytes)
        decoded = _decode_bytes(bytes(body))
    if not isinstance(decoded, Mapping):
        raise bad_request(f"The body must be a JSON object, not {name_type(decoded)}.", code="invalid_json")
    _check_tree(decoded)
    return dict(decoded)


def name_type(value: Any) -> str:
    """What JSON calls the type of a value."""
    if value is None:
        return "null"
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def _decode_bytes(body: bytes) -> Any:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"The body is not valid UTF-8: byte {error.start} cannot be read."
        raise bad_request(message, code="invalid_json") from None
    if not text.strip(" \t\r\n"):
        raise bad_request("The body is empty. Send a JSON object.", code="invalid_json")
    try:
        return json.loads(
            text, object_pairs_hook=_make_object, parse_constant=_refuse_constant, parse_float=_parse_float
        )
    except ApiError:
        raise
    except json.JSONDecodeError as error:
        message = f"The body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        raise bad_request(message, code="invalid_json") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # Python refuses to read integers of thousands of digits
        raise bad_request("The body holds a number with too many digits.", code="invalid_json") from None


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    decoded: dict[str, Any] = {}
    for key, value in pairs:
        if key in decoded:
            # Readers differ in which of the two they take; a request must mean one thing.
            message = f"The key {shorten(key)} is given twice in one object. Give it once."
            raise bad_request(message, key[:64] if _is_clean(key) else None, "invalid_json")
        decoded[key] = value
    return decoded


def _refuse_constant(name: str) -> NoReturn:
    raise bad_request(f"{name} is not a JSON value. Send a finite number.", code="invalid_json")


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise bad_request(f"The number {text[:32]} is too large.", code="invalid_json")
    return value


def _check_tree(root: Any) -> None:
    """Every string storable, every number finite, at most MAX_DEPTH levels and MAX_VALUES values; no recursion."""
    waiting: list[tuple[Any, str, int]] = [(root, "", 0)]
    seen = 0
    while waiting:
        value, path, depth = waiting.pop()
        seen += len(value) if isinstance(value, (Mapping, list, tuple)) else 0
        if seen > MAX_VALUES:
            raise bad_request(f"The body holds more than {MAX_VALUES} values.", code="invalid_json")
        if depth > MAX_DEPTH:
            raise _too_deep()
        if isinstance(value, str):
            if not _is_clean(value):
                raise bad_request("Text must not hold NUL or lone surrogates.", path or None, "invalid_text")
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                if not isinstance(key, str) or not _is_clean(key):
                    raise bad_request("A key holds NUL or a lone surrogate.", path or None, "invalid_text")
                waiting.append((inner, f"{path}.{key[:64]}" if path else key[:64], depth + 1))
        elif isinstance(value, (list, tuple)):
            waiting.extend((inner, f"{path}[{index}]", depth + 1) for index, inner in enumerate(value))
        elif isinstance(value, float) and not math.isfinite(value):
            raise bad_request("Numbers must be finite.", path or None, "invalid_json")


def _is_clean(text: str) -> bool:
    if "\0" in text:
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _too_deep() -> ApiError:
    return bad_request(f"The body is nested deeper than {MAX_DEPTH} levels.", code="invalid_json")


def shorten(value: Any, limit: int = 64) -> str:
    """A value as an error may show it: at most `limit` characters, and printable."""
    if isinstance(value, (dict, list)):
        return name_type(value)
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int) and abs(value) >= 10**limit:  # Python refuses to print very long integers
        return "a very large integer"
    if isinstance(value, str):
        value = value[: limit + 1]
    shown = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
