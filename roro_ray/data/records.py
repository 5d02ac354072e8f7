"""Turns the project's frozen dataclasses into Arrow records and back, by their type hints.

One derivation in place of a hand-written schema for each noun: a field added to `roro_ray.types` is stored from then
on, and an older file that lacks it is read with the field's default. Floats are stored as float64, so they come back
exactly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pyarrow as pa

_PRIMITIVES: dict[type, pa.DataType] = {
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
    str: pa.string(),
}


def make_schema(noun: type) -> pa.Schema:
    """The Arrow schema of a dataclass; its name is kept in the metadata, so that files cannot be mixed up."""
    struct = _arrow_type(noun)
    return pa.schema(list(struct), metadata={"noun": noun.__name__})


@functools.cache
def make_encoder(noun: Any) -> Callable[[Any], Any]:
    """A function from a value of the type to what Arrow takes."""
    if dataclasses.is_dataclass(noun):
        hints = get_type_hints(noun)
        parts = [(field.name, make_encoder(hints[field.name])) for field in dataclasses.fields(noun)]
        return lambda value: {name: encode(getattr(value, name)) for name, encode in parts}
    if get_origin(noun) is UnionType:
        inner = make_encoder(_optional(noun))
        return lambda value: None if value is None else inner(value)
    if get_origin(noun) is tuple:
        item = make_encoder(get_args(noun)[0])
        return lambda value: [item(entry) for entry in value]
    if isinstance(noun, type) and issubclass(noun, StrEnum):
        return lambda value: value.value
    return lambda value: value


@functools.cache
def make_decoder(noun: Any) -> Callable[[Any], Any]:
    """The inverse of `make_encoder`; a missing field takes its default.

    The function raises KeyError where a field is missing that has no default.
    """
    if dataclasses.is_dataclass(noun):
        return _make_struct_decoder(noun)
    if get_origin(noun) is UnionType:
        inner = make_decoder(_optional(noun))
        return lambda value: None if value is None else inner(value)
    if get_origin(noun) is tuple:
        item = make_decoder(get_args(noun)[0])
        return lambda value: tuple([item(entry) for entry in value])
    if isinstance(noun, type) and issubclass(noun, StrEnum):
        return noun
    return lambda value: value


def _make_struct_decoder(noun: Any) -> Callable[[Any], Any]:
    hints = get_type_hints(noun)
    parts = [(field.name, make_decoder(hints[field.name]), _is_optional(field)) for field in dataclasses.fields(noun)]

    def decode(record: dict[str, Any]) -> Any:
        known = {name: part(record[name]) for name, part, optional in parts if name in record or not optional}
        return noun(**known)

    return decode


def _is_optional(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _arrow_type(hint: Any) -> pa.DataType:
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return pa.struct([_arrow_field(field.name, hints[field.name]) for field in dataclasses.fields(hint)])
    if get_origin(hint) is tuple:
        return pa.list_(_arrow_type(get_args(hint)[0]))
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return pa.string()
    return _PRIMITIVES[hint]


def _arrow_field(name: str, hint: Any) -> pa.Field:
    if get_origin(hint) is UnionType:
        return pa.field(name, _arrow_type(_optional(hint)), nullable=True)
    return pa.field(name, _arrow_type(hint), nullable=False)


def _optional(hint: Any) -> Any:
    """What a value of type `.. | None` is where it is not None."""
    (inner,) = (part for part in get_args(hint) if part is not NoneType)
    return inner
