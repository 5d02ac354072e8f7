"""Typed reading of JSON objects: each reader returns a checked value or raises a 400 that names the field.

`null` counts as not given, as it does for the OpenAI clients. A boolean is never a number; 3.0 is the integer 3, as
in JSON Schema.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from roro_ray.errors import did_you_mean
from serve.body import name_type, shorten
from serve.problems import ApiError, bad_request


class Fields:
    """An object of the request and where it stands (`path`, empty for the body itself)."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self.values = values
        self.path = path

    def param(self, name: str) -> str:
        """The path of a field, as `param` of an error."""
        return f"{self.path}.{name}" if self.path else name

    def get(self, name: str) -> Any:
        """The raw value, None where it is missing or null."""
        return self.values.get(name)

    def wrong(self, name: str, expected: str) -> ApiError:
        """The 400 for a value that is not what it should be."""
        param = self.param(name)
        if name not in self.values:
            return bad_request(f"{param} is missing. Give {expected}.", param)
        return bad_request(f"{param} must be {expected}, not {shorten(self.values[name])}.", param)

    def number(
        self, name: str, default: float | None, low: float, high: float = math.inf, above: bool = False
    ) -> float | None:
        """A finite number from `low` (above it with `above`) to `high`."""
        value = self.get(name)
        if value is None:
            return default
        start = f"above {low:g}" if above else f"from {low:g}"
        expected = f"a number {start}" + (f" to {high:g}" if high < math.inf else " on")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(name, expected)
        # Compared before conversion: an integer may be too large for a float.
        if not low <= value <= high or (above and value <= low) or value != value or abs(value) > 1e300:
            raise self.wrong(name, expected)
        return float(value)

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """A whole number from `low` to `high`."""
        value = self.get(name)
        if value is None:
            return default
        expected = f"an integer from {low} to {high}"
        if isinstance(value, float) and math.isfinite(value) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, expected)
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, max_chars: int, required: bool = False, min_chars: int = 0) -> str | None:
        """A string of `min_chars` to `max_chars` characters."""
        value = self.get(name)
        if value is None and not required:
            return None
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        if not min_chars <= len(value) <= max_chars:
            param = self.param(name)
            expected = f"{min_chars} to {max_chars} characters long"
            raise bad_request(f"{param} must be {expected}; it has {len(value)}.", param)
        return value

    def object(self, name: str) -> Fields | None:
        """An object, as fields of its own."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return Fields(value, self.param(name))

    def array(self, name: str, max_items: int, min_items: int = 0) -> list[Any] | None:
        """An array of at least `min_items` and at most `max_items` values."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)):
            raise self.wrong(name, "an array")
        if not min_items <= len(value) <= max_items:
            param = self.param(name)
            expected = f"{min_items} to {max_items} items" if min_items else f"at most {max_items} items"
            raise bad_request(f"{param} must have {expected}; it has {len(value)}.", param)
        return list(value)

    def refuse_unknown(self, known: Iterable[str]) -> None:
        """Refuse keys that nobody reads, with a suggestion."""
        names = tuple(known)
        for key in self.values:
            if key not in names:
                name = key[:64]
                param = self.param(name)
                hint = did_you_mean(name, names)
                raise bad_request(f"Unknown field {shorten(param, 128)}{hint}.", param, "unknown_parameter")


def item_fields(value: Any, path: str) -> Fields:
    """Fields of one item of an array, `path` being its place (`messages[0]`)."""
    if not isinstance(value, Mapping):
        raise bad_request(f"{path} must be an object, not {name_type(value)}.", path)
    return Fields(value, path)
