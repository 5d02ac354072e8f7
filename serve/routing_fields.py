"""The routing controls of a request, from the body's `routing` object and from X-Roro headers, merged.

Headers serve clients that cannot add fields to a body. Whatever is said twice must agree; a header of ours that
nobody reads is an error, so that a mistyped control is not lost in silence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from roro_ray.errors import did_you_mean
from roro_ray.evaluation.calibration import Target
from serve.body import lower_headers, shorten
from serve.fields import Fields
from serve.problems import bad_request

MAX_LARGE_STEPS = 1_000_000
MAX_NAME_CHARS = 256


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """What a client asks of the routing; None where it leaves the choice to the server.

    `cost_weight` >= 0 is the price of a large step; `target` names a calibrated operating point instead;
    `max_large_steps` caps the steps of dearer models; `force` names the model that writes all; `trace` asks for
    every step's decision.
    """

    cost_weight: float | None = None
    target: Target | None = None
    max_large_steps: int | None = None
    force: str | None = None
    trace: bool = False


_NAMES = ("cost_weight", "target", "max_large_steps", "force", "trace")
_HEADERS = {f"x-roro-{name.replace('_', '-')}": name for name in _NAMES}
_CONTRADICTIONS = (("cost_weight", "target"), ("force", "cost_weight"), ("force", "target"))


def parse_routing(body: Fields, headers: Mapping[str, str]) -> RoutingRequest:
    """Read the controls of the whole request.

    Raises:
        ApiError: 400; `param` is the field or the header, or both where they disagree.
    """
    found: dict[str, tuple[Any, str]] = {}  # control -> value, where it was said
    if (fields := body.object("routing")) is not None:
        fields.refuse_unknown(_NAMES)
        for name in _NAMES:
            if fields.get(name) is not None:
                found[name] = _READERS[name](fields, name), fields.param(name)
    for name, (value, shown) in _read_headers(headers).items():
        if name in found and found[name][0] != value:
            places = f"{found[name][1]}, {shown}"
            raise bad_request(f"The body's {found[name][1]} and the header {shown} disagree. Send one.", places)
        found.setdefault(name, (value, shown))
    for one, other in _CONTRADICTIONS:
        if one in found and other in found:
            places = f"{found[one][1]}, {found[other][1]}"
            message = f"{found[one][1]} and {found[other][1]} contradict each other. Send one of them."
            raise bad_request(message, places)
    return RoutingRequest(**{name: value for name, (value, _) in found.items()})


def _read_target(fields: Fields, name: str) -> Target:
    target = fields.object(name)
    if target is None:
        raise fields.wrong(name, "an object")
    names = ("large_share", "accuracy_within")
    target.refuse_unknown(names)
    share = target.number("large_share", None, 0.0, 1.0)
    within = target.number("accuracy_within", None, 0.0, 1.0)
    if (share is None) == (within is None):
        param = fields.param(name)
        raise bad_request(f"{param} must have exactly one of large_share and accuracy_within.", param)
    return Target(share, within)


_READERS: dict[str, Callable[[Fields, str], Any]] = {
    "cost_weight": lambda fields, name: fields.number(name, None, 0.0),
    "target": _read_target,
    "max_large_steps": lambda fields, name: fields.integer(name, None, 0, MAX_LARGE_STEPS),
    "force": lambda fields, name: fields.text(name, MAX_NAME_CHARS, min_chars=1),
    "trace": lambda fields, name: fields.boolean(name),
}


def _read_headers(headers: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    read: dict[str, tuple[Any, str]] = {}
    for header, text in lower_headers(headers).items():
        if not header.startswith("x-roro-"):
            continue
        shown = "-".join(part.capitalize() for part in header[:64].split("-"))
        if header not in _HEADERS:
            hint = did_you_mean(header[:64], _HEADERS)
            raise bad_request(f"Unknown header {shorten(shown)}{hint}.", shown, "unknown_parameter")
        name = _HEADERS[header]
        values = {shown: _header_value(name, text.strip(), shown)}
        read[name] = _READERS[name](Fields(values), shown), shown
    return read


def _header_value(name: str, text: str, shown: str) -> Any:
    """A header's text as the JSON value that the body would have held."""
    if name == "force":
        return text
    if name == "target":
        pairs = [part.partition("=") for part in text.split(",")]
        if not all(equals for _, equals, _ in pairs):
            raise bad_request(f"{shown} must be like large_share=0.3, not {shorten(text)}.", shown)
        return {key.strip()[:64]: _read_json(number.strip()) for key, _, number in pairs}
    return _read_json(text.lower() if name == "trace" else text)


def _read_json(text: str) -> Any:
    """A JSON number or boolean; any other text stays text, which the readers refuse and show."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, (bool, int, float)) and math.isfinite(value) else text
